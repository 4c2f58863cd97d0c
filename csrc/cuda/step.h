// F3, the family that runs everything: every cell, every precision, any size, on any device. A
// launch computes one step: each block multiplies a tile of the previous state with the weights of
// all gates of some hidden units and lets the cell finish them. Launches of a group of steps are
// recorded once and replayed.
//
// It is the oracle of the two faster families (cuda/cluster.h, cuda/grid.h). In float32 and float64
// its forward pass gives the CPU's bits: the same chain of fused multiply-adds, the same cell.
#ifndef FASTRNN_CUDA_STEP_H_
#define FASTRNN_CUDA_STEP_H_

#include "cuda/recurrence.h"

namespace fastrnn {
namespace cuda {
namespace step {

// W_hh (G*H, H), row-major, of type A, as the step kernels read it: forward [H][H*G], row k is what
// state element k is multiplied with, columns (unit, gate); backward [H*G][H], row (unit, gate) of
// the product with the gates' gradients. Both have G*H*H elements.
template <class S>
void pack(const RecurrenceShape& shape, const Accumulator<S>* w_hh, bool backward, S* out,
          Stream stream);

template <class S>
void forward(const RecurrenceShape& shape, const Steps& steps,
             const ForwardRecurrence<S>* directions, Stream stream);

// For the GRU with the reset gate before its product, `rh_rows` of each direction takes r * h_prev,
// [rows][H], which the gradient of W_hn needs; else null.
template <class S>
void backward(const RecurrenceShape& shape, const Steps& steps,
              const BackwardRecurrence<S>* directions, S* const* rh_rows, Stream stream);

}  // namespace step
}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_STEP_H_
