// The device as the host sees it: which there are, memory, copies, streams, recorded sequences of
// launches. No CUDA header is needed to use it, and the same declarations are implemented by CUDA
// (cuda/runtime.cu) and by the host emulator (cuda/emulator.cc).
//
// Errors: Error for what the driver reports, std::bad_alloc when the device's memory is exhausted,
// Unavailable when there is no device to be had.
#ifndef FASTRNN_CUDA_RUNTIME_H_
#define FASTRNN_CUDA_RUNTIME_H_

#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

namespace fastrnn {
namespace cuda {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// No driver, a driver that is too old, no device: the message says which.
struct Unavailable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct DeviceInfo {
  std::string name;
  int major, minor;         // compute capability
  int multiprocessors;      // SMs
  size_t shared_per_block;  // bytes of dynamic shared memory that a block can ask for
  int registers_per_multiprocessor;
  size_t memory;
  size_t l2_bytes;
  std::string driver, runtime;  // versions
};

// Throws Unavailable unless device 0 can be used by this process. In the child of a fork after the
// parent has used the device: Unavailable, too, since CUDA does not survive a fork.
void require_device();
DeviceInfo device_info();  // asks the driver no more than once in a process
size_t free_memory();

// A queue of work. Calls below return at once where they can; the order within a stream is that of
// the calls.
struct Stream {
  void* handle = nullptr;  // a cudaStream_t; null is the default stream
};
// The stream of this host thread, made at its first use; where the caller brings none.
Stream own_stream();
// Waits until all work of the stream is done; throws Error if some of it failed.
void synchronize(Stream stream);

// A point in the order of a stream, for others to wait at. It outlives the stream, which its owner
// may destroy: so what one call leaves to another takes an Event along and not a Stream. The host
// never waits. A moved-from or default object: there is nothing to wait for.
class Event {
 public:
  Event() noexcept = default;
  explicit Event(Stream stream);  // after all that is launched on it so far
  ~Event();
  Event(Event&& other) noexcept { *this = std::move(other); }
  Event& operator=(Event&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  // Whether all that is done; from then on there is nothing to wait for.
  bool reached();
  // What is launched on `stream` from now on comes after the event.
  void wait(Stream stream);

 private:
  void* handle_ = nullptr;
};
// What is launched on `waiter` from now on comes after all that is launched on `earlier` so far.
inline void wait_for(Stream waiter, Stream earlier) {
  if (waiter.handle != earlier.handle) Event(earlier).wait(waiter);
}

// A stream of the process on which nothing runs and which is never destroyed. What calls on any
// streams share is given back in its order, and it waits for each of them.
Stream keeper();

// Device memory, uninitialised, aligned to 256 bytes, taken and given back in the order of its
// stream. Memory of a moved-from or default object: null, 0 bytes.
class Memory {
 public:
  Memory() noexcept = default;
  Memory(size_t bytes, Stream stream);  // std::bad_alloc
  ~Memory();
  Memory(Memory&& other) noexcept { *this = std::move(other); }
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(stream_, other.stream_);
    return *this;
  }
  template <class T = void>
  T* data() const noexcept {
    return static_cast<T*>(data_);
  }
  size_t bytes() const noexcept { return bytes_; }
  // From now on it is given back in the order of this stream, which by then waits for all who use
  // it.
  void give_back_on(Stream stream) noexcept { stream_ = stream; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  Stream stream_;
};

// n elements of T.
template <class T>
Memory allocate(int64_t n, Stream stream) {
  if (n < 0 || static_cast<uint64_t>(n) > (uint64_t{1} << 62) / sizeof(T)) throw std::bad_alloc();
  return Memory(static_cast<size_t>(n) * sizeof(T), stream);
}

// Host memory is free on return. The host waits for the stream only where there is more than
// kSmallCopy.
constexpr size_t kSmallCopy = 8192;
void copy_to_device(void* to, const void* from, size_t bytes, Stream stream);
void copy_to_host(void* to, const void* from, size_t bytes, Stream stream);  // waits for it
void copy_on_device(void* to, const void* from, size_t bytes, Stream stream);
void fill_bytes(void* to, int byte, size_t bytes, Stream stream);

// A recorded sequence of launches, to be replayed any number of times, one replay at a time.
class Graph {
 public:
  Graph() noexcept = default;
  // Records what `work` launches on the stream it is given; nothing runs yet.
  static Graph record(const std::function<void(Stream)>& work);
  ~Graph();
  Graph(Graph&& other) noexcept { *this = std::move(other); }
  Graph& operator=(Graph&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  void replay(Stream stream) const;

 private:
  void* handle_ = nullptr;
};

}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_RUNTIME_H_
