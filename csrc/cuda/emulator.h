// The host's meaning of cuda/simt.h, which is the header to include: a GPU in software, on which
// kernels are tested where there is none.
//
// Every CUDA thread is a coroutine; one of them runs at a time, up to the next word of cuda/simt.h
// or cuda/ptx.h at which it must wait or others might get ahead of it. Plain loads and stores are
// those of the host, so the address sanitizer sees kernels' errors, too: device memory and each
// block's shared memory are allocations of their own of just the size asked for. Fresh memory of
// both kinds is filled with 0xFF, a NaN in every format.
//
// With Options::seed other than 0 the order is random wherever CUDA leaves it open: which thread
// goes on (now and then one warp or block is starved), which block comes first, when what
// store_async sent lands and is counted; and with Options::delay_stores, when a relaxed store is
// seen by others. As CUDA's memory model has it, a barrier makes its threads' stores visible,
// stores of a thread to one address stay in order, and 16 bytes are never torn. Plain stores are
// seen at once.
//
// Streams do their work at once. With Options::defer_streams, or FASTRNN_CUDA_DEFER=1, they do it
// only when the host waits for them or another stream must that the host waits for; with a seed,
// now and then also out of turn. So what another stream has not been waited for is missing, and
// memory that is given back too early is poisoned: its blocks stay until configure(), which looks
// whether somebody has written to them.
//
// What would hang a GPU or is undefined there is an Error here, with the place in the kernel: lanes
// of a warp at different collectives, a thread that is gone at one, a deadlock, threads that poll
// for what never comes, wrong counts at an mbarrier, addresses outside shared memory, stores to a
// block that has returned, a cooperative grid that does not fit.
#ifndef FASTRNN_CUDA_EMULATOR_H_
#define FASTRNN_CUDA_EMULATOR_H_

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <tuple>
#include <type_traits>

#include "cuda/simt.h"

#define FASTRNN_KERNEL
#define FASTRNN_DEVICE
#define FASTRNN_LAUNCH_BOUNDS(threads, blocks_per_sm)

// The last parameters of a word of which an Error may have to say where it stands: the caller's
// line.
#define FASTRNN_SITE_PARAMETERS const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace fastrnn {
namespace cuda {
namespace emulator {

struct Options {
  uint64_t seed = 0;  // 0: threads in turn, everything visible at once
  int multiprocessors = 132;
  size_t shared_per_block = 227 * 1024;
  size_t memory = size_t{8} << 30;
  int major = 9, minor = 0;
  bool delay_stores = false;
  bool defer_streams = false;
};
// For the process, from the next launch on. The same options and launches give the same order.
// Deferred work is done first; an Error if some of it used memory that had been given back.
void configure(const Options& options);
// Its owner destroys the stream: after its work, using it is an Error. With defer_streams only, and
// until configure().
void destroy(Stream stream);
// Bytes of device memory that are allocated now.
size_t live_bytes();

// The rest is what the words are made of.

struct Site {
  const char* file;
  int line;
};

struct BlockView {
  unsigned threads;
  Index3 index, grid;
  unsigned cluster_rank;
  unsigned char* shared;
};
// The thread that runs: null block outside kernels.
struct Running {
  const BlockView* block;
  unsigned thread;
};
extern __thread Running running;  // not thread_local, which would call a function at every use
[[noreturn]] void outside_kernel();
inline const Running& here() {
  if (running.block == nullptr) outside_kernel();
  return running;
}

void sync_threads(Site site);
void named_barrier(int id, int threads, Site site);
void cluster_sync(Site site);
// The value of lane ^ distance, or of lane + distance (where there is none: its own).
uint32_t shuffle_xor(uint32_t value, int distance, Site site);
uint32_t shuffle_down(uint32_t value, int distance, Site site);
void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bfloat16, Site site);
void ldmatrix(uint32_t* r, const void* shared_row, Site site);
void mbarrier_init(uint64_t* mbarrier, int count, Site site);
void mbarrier_expect(uint64_t* mbarrier, uint32_t bytes, Site site);
void mbarrier_wait(uint64_t* mbarrier, unsigned parity, Site site);
uint32_t remote(const void* mine, unsigned rank, Site site);
void store_async(uint32_t to, const uint32_t* words, int count, uint32_t mbarrier, Site site);
void load_relaxed(uint32_t* words, const void* from, Site site);
void store_relaxed(void* to, const uint32_t* words, Site site);

// Runs the work, or records it where the stream is being recorded.
void submit(Stream stream, std::function<void()> work);
// Checks the launch, then submits it; `thread` is called for every thread.
void launch(Stream stream, const Launch& how, std::function<void()> thread);
int resident_blocks(int block, size_t shared);
int resident_clusters(const Launch& how);

// first, first + step, ... modulo n: every i < n once, in random order if the seed is not 0.
struct Order {
  int64_t first, step;
};
Order any_order(int64_t n);

}  // namespace emulator

inline unsigned thread_index() { return emulator::here().thread; }
inline unsigned block_threads() { return emulator::here().block->threads; }
inline Index3 block_index() { return emulator::here().block->index; }
inline Index3 grid_size() { return emulator::here().block->grid; }

inline void sync_threads(FASTRNN_SITE_PARAMETERS) { emulator::sync_threads({file, line}); }
inline void named_barrier(int id, int threads, FASTRNN_SITE_PARAMETERS) {
  emulator::named_barrier(id, threads, {file, line});
}

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulator::here().block->shared);
}

inline int lane() { return static_cast<int>(emulator::here().thread % 32u); }

namespace detail {
template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable<To>::value &&
                    std::is_trivially_copyable<From>::value,
                "a shuffle moves 4 bytes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
}  // namespace detail

template <class T>
T shuffle_xor(T v, int mask, FASTRNN_SITE_PARAMETERS) {
  return detail::same_bits<T>(
      emulator::shuffle_xor(detail::same_bits<uint32_t>(v), mask, {file, line}));
}
template <class T>
T shuffle_down(T v, int delta, FASTRNN_SITE_PARAMETERS) {
  return detail::same_bits<T>(
      emulator::shuffle_down(detail::same_bits<uint32_t>(v), delta, {file, line}));
}

template <class... P, class... A>
void launch(Stream stream, const Launch& how, void (*kernel)(P...), A... args) {
  static_assert(sizeof...(P) == sizeof...(A), "as many arguments as the kernel has parameters");
  static_assert((std::is_trivially_copyable<P>::value && ...), "arguments are copied as bytes");
  const std::tuple<P...> values(args...);
  emulator::launch(stream, how, [kernel, values] { std::apply(kernel, values); });
}

template <class F>
void for_each(Stream stream, int64_t n, const F& f) {
  static_assert(std::is_trivially_copyable<F>::value, "arguments are copied as bytes");
  emulator::submit(stream, [n, f] {
    const emulator::Order order = emulator::any_order(n);
    int64_t i = order.first;
    for (int64_t done = 0; done < n; ++done) {
      f(i);
      i += order.step;
      if (i >= n) i -= n;
    }
  });
}

template <class... P>
int resident_blocks(void (*)(P...), int block, size_t shared) {
  return emulator::resident_blocks(block, shared);
}
template <class... P>
int resident_clusters(void (*)(P...), const Launch& how) {
  return emulator::resident_clusters(how);
}

}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_EMULATOR_H_
