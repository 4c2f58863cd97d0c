// Buffers: alignment, ownership, absurd sizes, reuse, threads, forks. And sizes that do not wrap.
#include "core/memory.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "core/checked.h"

// A sanitizer's allocator is to refuse an absurd size as the system's does, not to end the program.
extern "C" const char* __asan_default_options();
extern "C" const char* __tsan_default_options();
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }
extern "C" const char* __tsan_default_options() { return "allocator_may_return_null=1"; }

namespace {

using fastrnn::Buffer;
using fastrnn::checked_add;
using fastrnn::checked_mul;

// A child forked while another thread is inside AddressSanitizer's allocator inherits that
// allocator's locks, held for ever (GCC 12's does not release them; the C library's does): under it
// the threads have ended before the first fork.
#if defined(__SANITIZE_ADDRESS__)
#define FASTRNN_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FASTRNN_ADDRESS_SANITIZER 1
#endif
#endif
#if defined(FASTRNN_ADDRESS_SANITIZER)
constexpr bool kForkAmongThreads = false;
#else
constexpr bool kForkAmongThreads = true;
#endif

constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr std::size_t kMax = SIZE_MAX;

bool aligned(const Buffer& buffer) {
  return reinterpret_cast<std::uintptr_t>(buffer.data()) % 64 == 0;
}

void test_sizes_and_alignment() {
  for (std::size_t bytes : {std::size_t{0}, std::size_t{1}, std::size_t{63}, std::size_t{64},
                            std::size_t{65}, 2 * kMiB - 1, 2 * kMiB, 5 * kMiB + 7}) {
    Buffer buffer(bytes);
    CHECK_EQ(buffer.size(), bytes);
    CHECK(buffer.data() != nullptr);
    CHECK(aligned(buffer));
    std::memset(buffer.data(), 0xab, bytes);
    CHECK(bytes == 0 || buffer.data()[bytes - 1] == 0xab);
    CHECK_EQ(static_cast<const void*>(buffer.data<float>()), static_cast<void*>(buffer.data()));
  }
}

void test_ownership() {
  Buffer empty;
  CHECK(empty.data() == nullptr);
  CHECK_EQ(empty.size(), std::size_t{0});
  Buffer first(100);
  unsigned char* const data = first.data();
  Buffer second(std::move(first));
  CHECK(second.data() == data && second.size() == 100);
  Buffer third(7);
  third = std::move(second);
  CHECK(third.data() == data && third.size() == 100);
  third = Buffer();
  CHECK(third.data() == nullptr);
}

// std::bad_alloc, and the next allocation works.
void test_absurd_sizes() {
  for (std::size_t bytes : {kMax, kMax - 63, kMax / 2, kMax / 2 - 4096, kMax / 4}) {
    bool refused = false;
    try {
      Buffer buffer(bytes);
    } catch (const std::bad_alloc&) {
      refused = true;
    }
    CHECK(refused);
    CHECK(Buffer(1000).data() != nullptr);
  }
}

void test_kept_blocks() {
  fastrnn::release_cached_memory();
  {
    Buffer buffer(8 * kMiB);
  }
  const std::size_t kept = fastrnn::release_cached_memory();
  if (kept == 0) return;  // AddressSanitizer: nothing is kept
  CHECK_EQ(kept, 8 * kMiB);
  CHECK_EQ(fastrnn::release_cached_memory(), std::size_t{0});

  // A block serves again for its size and somewhat less, not for far less, not for more.
  const unsigned char* data = nullptr;
  {
    Buffer buffer(8 * kMiB);
    data = buffer.data();
  }
  {
    Buffer buffer(7 * kMiB);
    CHECK(buffer.data() == data);
    Buffer other(7 * kMiB);
    CHECK(other.data() != data);
  }
  {
    Buffer small(4 * kMiB);
    Buffer large(9 * kMiB);
    std::memset(large.data(), 1, large.size());
  }

  // Bounded in number and in bytes, small blocks and giants not at all.
  fastrnn::release_cached_memory();
  {
    std::vector<Buffer> many;
    for (int i = 0; i < 40; ++i) many.emplace_back(2 * kMiB);
    many.emplace_back(kMiB);
    many.emplace_back(300 * kMiB);
  }
  CHECK_EQ(fastrnn::release_cached_memory(), 64 * kMiB);
  {
    std::vector<Buffer> large;
    for (int i = 0; i < 4; ++i) large.emplace_back(100 * kMiB);
  }
  CHECK_EQ(fastrnn::release_cached_memory(), 200 * kMiB);
}

void test_threads_and_forks() {
  std::atomic<bool> stop{false};
  std::atomic<int> torn{0};
  std::vector<std::thread> threads;
  for (unsigned char id = 1; id <= 3; ++id) {
    threads.emplace_back([&, id] {
      while (!stop) {
        Buffer buffer(2 * kMiB + id);
        buffer.data()[0] = id;
        buffer.data()[buffer.size() - 1] = id;
        std::this_thread::yield();
        if (buffer.data()[0] != id || buffer.data()[buffer.size() - 1] != id) ++torn;
      }
    });
  }
  const auto end_threads = [&] {
    stop = true;
    for (std::thread& thread : threads) thread.join();
    threads.clear();
  };
  Buffer inherited(3 * kMiB);
  inherited.data()[5] = 42;
  if (!kForkAmongThreads) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    end_threads();
  }
  for (int i = 0; i < 20; ++i) {
    const pid_t pid = fork();
    if (pid == 0) {
      alarm(10);
      bool good = inherited.data()[5] == 42;
      inherited = Buffer();
      for (int k = 0; k < 5; ++k) {
        Buffer buffer(3 * kMiB);
        buffer.data()[5] = 7;
        good = good && buffer.data()[5] == 7;
      }
      _exit(good ? 0 : 1);
    }
    int status = -1;
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK_EQ(status, 0);
  }
  CHECK_EQ(static_cast<int>(inherited.data()[5]), 42);
  end_threads();
  CHECK_EQ(torn.load(), 0);
}

template <class Function>
bool overflows(const Function& function) {
  try {
    function();
  } catch (const std::overflow_error&) {
    return true;
  }
  return false;
}

void test_checked_sizes() {
  CHECK_EQ(checked_mul(3, 5), std::size_t{15});
  CHECK_EQ(checked_mul(3, 5, 7, 11), std::size_t{1155});
  CHECK_EQ(checked_add(3, 5, 7), std::size_t{15});
  CHECK_EQ(checked_mul(kMax, 1), kMax);
  CHECK_EQ(checked_mul(0, kMax, kMax), std::size_t{0});
  CHECK_EQ(checked_add(kMax, 0), kMax);
  const std::size_t half = std::size_t{1} << 32;
  CHECK(overflows([&] { checked_mul(half, half); }));
  CHECK(overflows([&] { checked_mul(1, half, half); }));
  CHECK(overflows([&] { checked_mul(half, half, std::size_t{0}); }));
  CHECK(overflows([&] { checked_add(kMax, 1); }));
  CHECK(overflows([&] { checked_add(1, kMax - 1, 1); }));
}

}  // namespace

int main() {
  test_sizes_and_alignment();
  test_ownership();
  test_absurd_sizes();
  test_kept_blocks();
  test_threads_and_forks();
  test_checked_sizes();
  return check_report();
}
