// The contract between the code that organises work and a backend's kernels: one table of function
// pointers per instruction set. A kernel is sequential and works on the range it is given; threads
// are the caller's business.
#ifndef FASTRNN_CORE_KERNELS_H_
#define FASTRNN_CORE_KERNELS_H_

#include "core/args.h"
#include "core/training_kernels.h"

namespace fastrnn {

template <class T>
struct Kernels {
  int width;  // W
  int rows;   // rows of the microkernel's tile: what a thread's share of a batch is worth dividing
              // by

  // Weights (G*H, K) row-major → panels [S*G][K][W], lanes past H zero. One (superblock, gate) pair
  // a panel.
  void (*pack)(const T* w, int64_t gates, int64_t H, int64_t K, int64_t panel0, int64_t panel1,
               T* out);
  // Panels [P][K][W] → [ceil(K/W)][P*W][W], the packing of the transposed product. Blocks block0 …
  // block1 - 1.
  void (*pack_transposed)(const T* panels, int64_t P, int64_t K, int64_t block0, int64_t block1,
                          T* out);
  // dw (G*H, K) += acc [ceil(K/W)][S*G*W][W]; with `first`, =.
  void (*add_gradient)(const T* acc, int64_t gates, int64_t H, int64_t K, int64_t s0, int64_t s1,
                       bool first, T* dw);
  // The same with acc [S*G][K][W] (one-hot input).
  void (*add_table_gradient)(const T* acc, int64_t gates, int64_t H, int64_t K, int64_t s0,
                             int64_t s1, bool first, T* dw);

  // Chunks chunk0 … chunk1 - 1 of a share. Scratch: forward_scratch() elements, one for all members
  // of a team.
  int64_t (*forward_scratch[kCellKinds])(const ForwardArgs<T>&, int64_t j0, int64_t j1);
  void (*forward[kCellKinds])(const ForwardArgs<T>&, int64_t chunk0, int64_t chunk1, const Share&,
                              T* scratch);
  // The recurrence of one chunk, backwards. Scratch, for a two-phase cell: (j1 - j0) * S * W
  // elements, likewise.
  void (*backward[kCellKinds])(const BackwardArgs<T>&, int64_t chunk, const Share&, T* scratch);
  // What the chunk adds to the gradients of weights and biases, panels p0 … p1 - 1 of S*G. The
  // last chunk, the first that comes, finds nothing there yet but in dbias and a table's dw_ih.
  void (*weight_gradients[kCellKinds])(const BackwardArgs<T>&, int64_t chunk, int64_t p0,
                                       int64_t p1);
  // What the chunk's rows of dx are, or what is added to them (BackwardArgs), rows r0 … r1 - 1 of
  // the chunk. Scratch: tile rows * ceil(I/W) * W elements.
  void (*input_gradients[kCellKinds])(const BackwardArgs<T>&, int64_t chunk, int64_t r0, int64_t r1,
                                      T* scratch);

  // x rows r0 … r1 - 1, features contiguous, → panels [ceil(cols/W)][panel_rows][W], the first of
  // them at row r0.
  void (*gather)(const T* x, int64_t stride_x, int64_t cols, int64_t r0, int64_t r1,
                 int64_t panel_rows, T* out);
  // Rows r0 … r1 - 1 of a linear layer. Scratch: tile rows * (ceil(in/W) + ceil(out/W)) * W
  // elements.
  void (*linear)(const LinearArgs<T>&, int64_t r0, int64_t r1, T* scratch);
  // acc [K_blocks][P*W][W] += dyᵀ x over `rows` rows of panels dy [P][panel_rows][W], x
  // [K_blocks][panel_rows][W]; dbias [P][W] (or null) += the column sums of dy. Panels p0 … p1 - 1.
  void (*outer)(const T* dy, const T* x, int64_t rows, int64_t panel_rows, int64_t P,
                int64_t K_blocks, int64_t p0, int64_t p1, T* acc, T* dbias);
  // out[i] = f(in[i]) with f 0 sigmoid, 1 tanh: for the accuracy tests.
  void (*activation)(int f, const T* in, T* out, int64_t n);

  // What the machine can do at most, for the benchmarks (cpu/limits.h). Multiply-adds that wait for
  // nothing but the arithmetic units; returns the operations done. And a pass over p [n] that only
  // reads, `repeats` times over; returns a sum that keeps the compiler from leaving it out.
  double (*fma_peak)(int64_t iterations);
  double (*read_memory)(const T* p, int64_t n, int64_t repeats);
  // The largest tile on operands in the first-level cache, likewise; scratch: tile_peak_scratch()
  // zeros.
  int64_t (*tile_peak_scratch)();
  double (*tile_peak)(T* scratch, int64_t iterations);
};

struct KernelTable {
  const char* isa;
  Kernels<float> f32;
  Kernels<double> f64;
  TrainingKernels<float> train_f32;
  TrainingKernels<double> train_f64;
};

}  // namespace fastrnn

#endif  // FASTRNN_CORE_KERNELS_H_
