// The recurrence of one layer on the device, over a chunk of steps: what the three families of
// kernels have in common, cuda/step.h (a launch a step, every cell, every precision),
// cuda/cluster.h (one launch, weights in the registers of a cluster of blocks) and cuda/grid.h (one
// launch, weights spread over the whole chip). What comes before and after it, the products over
// all steps, is in cuda/layer.cc.
//
// Rows. As on the CPU (core/args.h), rows are sorted by length, longest first ("processing order"),
// and steps are in the order in which the recurrence visits them. All steps' rows stand one after
// the other: row j of step k is at first[k] + j, j < active[k] = first[k + 1] - first[k]. A chunk's
// arrays begin at its own first row, so index them with first[k] - first[k0] + j.
//
// Types. S is what is stored, A what is computed with: (float, float), (double, double),
// (Bfloat16, float), (Float16, float). The state h is stored and fed back as S; c is kept as A.
#ifndef FASTRNN_CUDA_RECURRENCE_H_
#define FASTRNN_CUDA_RECURRENCE_H_

#include <stdint.h>

#include <string>

#include "core/dims.h"
#include "cuda/half.h"
#include "cuda/runtime.h"

namespace fastrnn {
namespace cuda {

enum class Precision : int {
  kFloat64,
  kFloat32,   // strict: the CPU's bits in the forward pass
  kTf32,      // float32; products over all steps may round their operands to 10 bits
  kBfloat16,  // weights, inputs, h and what is kept for training in 16 bits, sums and c in float32
  kFloat16,
};

template <class S>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <class S>
using Accumulator = typename AccumulatorOf<S>::Type;

constexpr int kMaxDirections = 2;

// What a family must know to say whether it can run something.
struct RecurrenceShape {
  CellKind kind;
  Precision precision;
  int64_t H, B;    // B: the most rows of a step
  int directions;  // that run side by side
};

// The steps of a chunk. `first` is on the device, `first_host` the same on the host.
struct Steps {
  int64_t k0, k1;             // steps k0 ... k1 - 1
  const int64_t* first;       // (T + 1)
  const int64_t* first_host;  // (T + 1)
};

// One direction, forward. All pointers are device memory; rows are the chunk's.
template <class S>
struct ForwardRecurrence {
  using A = Accumulator<S>;
  const A* gx;           // in [rows][H][G]: b + W_ih x of every gate, in the order of the gates
  const A* bias;         // in [H][slots]: what a slot that no gate of the input goes to starts from
                         // (GRU's q: b_hn); the other slots' entries are not read
  const void* w;         // in: W_hh as the family packs it
  const uint8_t* reset;  // in [rows], or null: not 0 where the state is dropped before the step
  S* h;                  // in/out [B][H], processing order: the state before k0; on return that of
                         // each row after its last step before k1
  A* c;                  // the same for LSTM's c, else null
  S* h_rows;             // out [rows][H]: the state after each step
  S* gates;              // out [rows][H][slots]: what the cell keeps; null: inference
  A* c_rows;             // out [rows][H], LSTM only; null: inference
};

// One direction, backward. `h0`, `c0` are the state before k0, as the forward pass found it.
template <class S>
struct BackwardRecurrence {
  using A = Accumulator<S>;
  const A* dy;           // in [rows][H]: gradient of the outputs; null: zeros
  const void* w;         // in: W_hh as the family packs it for this direction of the product
  const uint8_t* reset;  // in [rows], or null
  const S* h_rows;       // in, as the forward pass wrote them
  const A* c_rows;       //
  const S* h0;           // in [B][H]
  const A* c0;           // in [B][H], LSTM only
  S* gates;              // in: what the cell kept; out: gradients of the slots' pre-activations
  A* dh;                 // in/out [B][H], processing order: in the gradient of the state after each
                         // row's last step before k1, out that of the state before k0
  A* dc;                 // the same for c, LSTM only
};

// A family is a namespace with these functions (cluster::, grid::), each for S = Bfloat16, Float16:
//
//   std::string refuse(const RecurrenceShape&, const DeviceInfo&);  // empty: it can run this; else
//   why not int64_t packed_elements(const RecurrenceShape&, bool backward); // of S void pack(const
//   RecurrenceShape&, const float* w_hh /*(G*H, H)*/, bool backward, S* out, Stream); void
//   forward(const RecurrenceShape&, const Steps&, const ForwardRecurrence<S>* directions, Stream);
//   void backward(const RecurrenceShape&, const Steps&, const BackwardRecurrence<S>* directions,
//   Stream);

}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_RECURRENCE_H_
