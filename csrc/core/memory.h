// Work memory: aligned, uninitialised, owned by one object, with freed large blocks kept for the
// next call.
#ifndef FASTRNN_CORE_MEMORY_H_
#define FASTRNN_CORE_MEMORY_H_

#include <cstddef>

namespace fastrnn {

// `bytes` bytes of uninitialised memory aligned to 64 bytes; move-only. A default or moved-from
// Buffer holds nothing (null data, size 0); Buffer(0) has a valid pointer. Throws std::bad_alloc
// when there is not that much.
class Buffer {
 public:
  Buffer() noexcept = default;
  explicit Buffer(std::size_t bytes);
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <class T = unsigned char>
  T* data() noexcept {
    return static_cast<T*>(data_);
  }
  template <class T = unsigned char>
  const T* data() const noexcept {
    return static_cast<const T*>(data_);
  }
  std::size_t size() const noexcept { return size_; }  // bytes asked for

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t capacity_ = 0;  // bytes the block really has, at least size_
};

// Of one core's second-level cache; 1 MiB where the system does not say.
std::size_t second_level_cache_bytes() noexcept;

// Gives the kept blocks back to the system; returns how many bytes that was.
std::size_t release_cached_memory() noexcept;

}  // namespace fastrnn

#endif  // FASTRNN_CORE_MEMORY_H_
