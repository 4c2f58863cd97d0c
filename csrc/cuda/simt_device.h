// The CUDA meaning of cuda/simt.h, which is the header to include.
#ifndef FASTRNN_CUDA_SIMT_DEVICE_H_
#define FASTRNN_CUDA_SIMT_DEVICE_H_

#include <cuda_runtime.h>
#include <string.h>

#include <type_traits>

#include "cuda/simt.h"

#define FASTRNN_KERNEL __global__
#define FASTRNN_DEVICE __device__
#define FASTRNN_LAUNCH_BOUNDS(threads, blocks_per_sm) __launch_bounds__(threads, blocks_per_sm)

namespace fastrnn {
namespace cuda {

FASTRNN_DEVICE FASTRNN_INLINE unsigned thread_index() { return threadIdx.x; }
FASTRNN_DEVICE FASTRNN_INLINE unsigned block_threads() { return blockDim.x; }
FASTRNN_DEVICE FASTRNN_INLINE Index3 block_index() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
FASTRNN_DEVICE FASTRNN_INLINE Index3 grid_size() { return {gridDim.x, gridDim.y, gridDim.z}; }

FASTRNN_DEVICE FASTRNN_INLINE void sync_threads() { __syncthreads(); }
FASTRNN_DEVICE FASTRNN_INLINE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <class T>
FASTRNN_DEVICE FASTRNN_INLINE T* shared_memory() {
  extern __shared__ __align__(128) unsigned char fastrnn_shared_memory[];
  return reinterpret_cast<T*>(fastrnn_shared_memory);
}

FASTRNN_DEVICE FASTRNN_INLINE int lane() { return static_cast<int>(threadIdx.x & 31u); }

namespace detail {
template <class To, class From>
FASTRNN_DEVICE FASTRNN_INLINE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable<To>::value &&
                    std::is_trivially_copyable<From>::value,
                "a shuffle moves 4 bytes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
}  // namespace detail

template <class T>
FASTRNN_DEVICE FASTRNN_INLINE T shuffle_xor(T v, int mask) {
  return detail::same_bits<T>(__shfl_xor_sync(~0u, detail::same_bits<uint32_t>(v), mask));
}
template <class T>
FASTRNN_DEVICE FASTRNN_INLINE T shuffle_down(T v, int delta) {
  return detail::same_bits<T>(
      __shfl_down_sync(~0u, detail::same_bits<uint32_t>(v), static_cast<unsigned>(delta)));
}

namespace detail {
// In cuda/runtime.cu. `arguments`: pointers to the kernel's arguments, in order.
void launch(Stream stream, const Launch& how, const void* kernel, void** arguments);
int resident_blocks(const void* kernel, int block, size_t shared);
int resident_clusters(const void* kernel, const Launch& how);

template <class... P>
void launch_with(Stream stream, const Launch& how, void (*kernel)(P...), P... values) {
  void* arguments[] = {static_cast<void*>(&values)..., nullptr};
  launch(stream, how, reinterpret_cast<const void*>(kernel), arguments);
}
}  // namespace detail

template <class... P, class... A>
void launch(Stream stream, const Launch& how, void (*kernel)(P...), A... args) {
  static_assert(sizeof...(P) == sizeof...(A), "as many arguments as the kernel has parameters");
  detail::launch_with<P...>(stream, how, kernel, args...);
}

template <class... P>
int resident_blocks(void (*kernel)(P...), int block, size_t shared) {
  return detail::resident_blocks(reinterpret_cast<const void*>(kernel), block, shared);
}
template <class... P>
int resident_clusters(void (*kernel)(P...), const Launch& how) {
  return detail::resident_clusters(reinterpret_cast<const void*>(kernel), how);
}

namespace detail {
constexpr int kForEachThreads = 256;

template <class F>
FASTRNN_KERNEL void FASTRNN_LAUNCH_BOUNDS(kForEachThreads, 1) for_each_kernel(int64_t n, F f) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kForEachThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kForEachThreads + threadIdx.x; i < n;
       i += step) {
    f(i);
  }
}
}  // namespace detail

template <class F>
void for_each(Stream stream, int64_t n, const F& f) {
  if (n <= 0) return;
  constexpr int64_t kMostBlocks = 1 << 20;
  const int64_t blocks = (n - 1) / detail::kForEachThreads + 1;
  Launch how;
  how.grid.x = static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
  how.block = detail::kForEachThreads;
  launch(stream, how, detail::for_each_kernel<F>, n, f);
}

}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_SIMT_DEVICE_H_
