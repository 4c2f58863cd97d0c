// What a kernel is written in: the few words of CUDA that fastrnn's kernels use, with two meanings.
// nvcc compiles them to the device's instructions; a plain C++ compiler compiles the same kernels
// against an emulator (cuda/emulator.h), which runs every CUDA thread as a coroutine on the host.
// So each kernel, its synchronisation included, is tested on machines that have no GPU.
//
// Blocks are one-dimensional. Shared memory is the block's dynamic shared memory, whose size the
// launch gives.
#ifndef FASTRNN_CUDA_SIMT_H_
#define FASTRNN_CUDA_SIMT_H_

#include <stddef.h>
#include <stdint.h>

#include "cells/scalar.h"
#include "cuda/runtime.h"

namespace fastrnn {
namespace cuda {

struct Index3 {
  unsigned x = 1, y = 1, z = 1;
};

struct Launch {
  Index3 grid;
  int block;                 // threads
  size_t shared = 0;         // bytes of dynamic shared memory
  int cluster = 1;           // blocks of a cluster, along x
  bool cooperative = false;  // all blocks of the grid run at once, or the launch is an Error
};

}  // namespace cuda
}  // namespace fastrnn

#if defined(__CUDACC__)
#include "cuda/simt_device.h"
#else
#include "cuda/emulator.h"
#endif

// Both define, in fastrnn::cuda:
//
//   FASTRNN_KERNEL                        before `void name(...)`: a kernel
//   FASTRNN_DEVICE                        before a function that kernels call
//   FASTRNN_LAUNCH_BOUNDS(threads, blocks_per_sm)   after FASTRNN_KERNEL void
//
//   unsigned thread_index(), block_threads();  Index3 block_index(), grid_size();
//   void sync_threads();                  // all threads of the block
//   void named_barrier(int id, int threads);   // 1 <= id <= 15; `threads` of the block, whole
//   warps template <class T> T* shared_memory();     // the block's dynamic shared memory, 128-byte
//   aligned int lane();  T shuffle_xor(T v, int mask); T shuffle_down(T v, int delta);  // whole
//   warps, 4-byte T
//
//   template <class... P, class... A>
//   void launch(Stream stream, const Launch& how, void (*kernel)(P...), A... args);
//   template <class F> void for_each(Stream stream, int64_t n, const F& f);  // f(i) for i < n, any
//   order int resident_blocks(void (*kernel)(P...), int block, size_t shared);     // blocks an SM
//   can hold at once int resident_clusters(void (*kernel)(P...), const Launch& how);          // of
//   the whole device
//
// The matrix and exchange instructions are in cuda/ptx.h.

#endif  // FASTRNN_CUDA_SIMT_H_
