// Buffer's allocator. Blocks of 2 MiB and more are asked for in huge pages, and a few are kept when
// freed: mapping a fresh 100 MB tape faults in every page, which costs more than the arithmetic
// that fills it.
#include "core/memory.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

namespace fastrnn {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kLarge = std::size_t{2}
                               << 20;  // a huge page; also the smallest block worth keeping
constexpr int kKeptBlocks = 32;        // a training call has some ten a layer
constexpr std::size_t kKeptBytes = std::size_t{256} << 20;

struct Block {
  void* data = nullptr;
  std::size_t bytes = 0;
};

// A few freed large blocks, ready to be handed out again, oldest first.
class Cache {
 public:
  // The smallest kept block of at least `bytes` and at most a quarter more, or a null one.
  Block take(std::size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    int best = -1;
    for (int i = 0; i < count_; ++i) {
      const bool fits = blocks_[i].bytes >= bytes && blocks_[i].bytes - bytes <= bytes / 4;
      if (fits && (best < 0 || blocks_[i].bytes < blocks_[best].bytes)) best = i;
    }
    return best < 0 ? Block{} : remove(best);
  }

  // Keeps the block, at the expense of the oldest ones, unless it is larger than all that may be
  // kept.
  void give(Block block) {
    if (block.bytes > kKeptBytes) {
      std::free(block.data);
      return;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    while (count_ == kKeptBlocks || total_ + block.bytes > kKeptBytes) std::free(remove(0).data);
    blocks_[count_++] = block;
    total_ += block.bytes;
  }

  // Frees everything; returns how many bytes that was.
  std::size_t clear() {
    std::lock_guard<std::mutex> lock(mutex_);
    const std::size_t bytes = total_;
    while (count_ > 0) std::free(remove(0).data);
    return bytes;
  }

 private:
  Block remove(int index) {
    const Block block = blocks_[index];
    std::copy(blocks_ + index + 1, blocks_ + count_, blocks_ + index);
    --count_;
    total_ -= block.bytes;
    return block;
  }

  std::mutex mutex_;
  Block blocks_[kKeptBlocks];
  int count_ = 0;
  std::size_t total_ = 0;
};

// Never destroyed, since buffers may outlive any static object. A forked child forgets the
// parent's: another thread may have held its mutex, and the blocks' pages are still shared with the
// parent.
std::atomic<Cache*> g_cache{nullptr};

void forget_cache_after_fork() { g_cache.store(nullptr); }

const bool g_fork_safe = pthread_atfork(nullptr, nullptr, forget_cache_after_fork) == 0;

// Null when there is no memory for it or no safety from forks.
Cache* cache() noexcept {
  Cache* current = g_cache.load();
  if (current == nullptr && g_fork_safe) {
    std::unique_ptr<Cache> fresh(new (std::nothrow) Cache);
    if (g_cache.compare_exchange_strong(current, fresh.get())) current = fresh.release();
  }
  return current;
}

// Under AddressSanitizer blocks go straight back, or it could not see their use after free.
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FASTRNN_ADDRESS_SANITIZER
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define FASTRNN_ADDRESS_SANITIZER
#endif
#if defined(FASTRNN_ADDRESS_SANITIZER)
constexpr bool kKeepBlocks = false;
#else
constexpr bool kKeepBlocks = true;
#endif

void* allocate(std::size_t bytes) noexcept {
  void* data = nullptr;
  if (posix_memalign(&data, bytes >= kLarge ? kLarge : kAlignment, bytes) != 0) return nullptr;
#if defined(MADV_HUGEPAGE)
  if (bytes >= kLarge) madvise(data, bytes, MADV_HUGEPAGE);  // advice: failure changes nothing
#endif
  return data;
}

}  // namespace

Buffer::Buffer(std::size_t bytes) : size_(bytes) {
  if (bytes > static_cast<std::size_t>(PTRDIFF_MAX) - kLarge) throw std::bad_alloc();
  const std::size_t unit = bytes >= kLarge ? std::size_t{4096} : kAlignment;
  capacity_ = bytes == 0 ? kAlignment : (bytes + unit - 1) / unit * unit;
  if (kKeepBlocks && capacity_ >= kLarge) {
    if (Cache* kept = cache()) {
      const Block block = kept->take(capacity_);
      if (block.data != nullptr) {
        data_ = block.data;
        capacity_ = block.bytes;
        return;
      }
    }
  }
  data_ = allocate(capacity_);
  if (data_ == nullptr && release_cached_memory() > 0) data_ = allocate(capacity_);
  if (data_ == nullptr) throw std::bad_alloc();
}

Buffer::~Buffer() {
  if (kKeepBlocks && capacity_ >= kLarge) {
    if (Cache* kept = cache()) {
      kept->give({data_, capacity_});
      return;
    }
  }
  std::free(data_);
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      capacity_(std::exchange(other.capacity_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(capacity_, other.capacity_);
  return *this;
}

std::size_t second_level_cache_bytes() noexcept {
  static const std::size_t bytes = [] {
    long found = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return found > 0 ? static_cast<std::size_t>(found) : std::size_t{1} << 20;
  }();
  return bytes;
}

std::size_t release_cached_memory() noexcept {
  Cache* kept = kKeepBlocks ? cache() : nullptr;
  return kept != nullptr ? kept->clear() : 0;
}

}  // namespace fastrnn
