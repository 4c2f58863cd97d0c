// Between the caller's arrays and the recurrence's rows (cuda/recurrence.h): gathering inputs and
// gradients into processing order, scattering results back, and the packing of weights and of their
// gradients around the large products.
#ifndef FASTRNN_CUDA_ROWS_H_
#define FASTRNN_CUDA_ROWS_H_

#include <stdint.h>

#include <vector>

#include "cells/scalar.h"
#include "cuda/elementwise.h"
#include "cuda/half.h"
#include "cuda/recurrence.h"
#include "cuda/runtime.h"

namespace fastrnn {
namespace cuda {

// Where step t of row b lies in one of the caller's arrays on the device, in elements: as Layout of
// core/args.h; `starts` is device memory.
struct DeviceLayout {
  int64_t stride_t, stride_b;
  const int64_t* starts;  // (B), or null

  FASTRNN_HD int64_t at(int64_t t, int64_t b) const {
    return starts != nullptr ? (starts[b] + t) * stride_t : t * stride_t + b * stride_b;
  }
};

// One of the caller's arrays (T, B, features): strides of all three axes, in elements.
struct DeviceArrayRef {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  DeviceLayout layout = {};
  int64_t stride_f = 1;
};

// The rows of all steps, in processing order, and how to find the caller's (t, b) of each. One
// value serves both directions.
struct RowMap {
  int64_t T, B, N;        // steps, batch, rows: the sum of the lengths
  const int64_t* first;   // (T + 1) first row of each step; first[T] = N
  const int32_t* step;    // (N) step of each row
  const int32_t* order;   // (B) the caller's row
  const int64_t* length;  // (B) of row j, descending

  struct Place {
    int64_t t, b, j;
  };
  FASTRNN_HD Place place(int64_t row, bool reverse) const {
    const int64_t k = step[row], j = row - first[k];
    return {reverse ? length[j] - 1 - k : k, order[j], j};
  }
  // The row of the caller's step t of row j of the processing order.
  FASTRNN_HD int64_t row(int64_t t, int64_t j, bool reverse) const {
    return first[reverse ? length[j] - 1 - t : t] + j;
  }
};

// A RowMap and the memory it stands in.
class DeviceSchedule {
 public:
  // T steps of B rows; `lengths` (B), host memory, or null for T everywhere.
  DeviceSchedule(int64_t T, int64_t B, const int64_t* lengths, Stream stream);

  const RowMap& map() const { return map_; }
  const std::vector<int64_t>& first() const { return first_; }
  // The caller's row of row j, and its length, in host memory.
  const std::vector<int32_t>& order() const { return order_; }
  const std::vector<int64_t>& lengths() const { return lengths_; }
  Steps steps(int64_t k0, int64_t k1) const { return {k0, k1, map_.first, first_.data()}; }
  int64_t rows(int64_t k0, int64_t k1) const {
    return first_[static_cast<size_t>(k1)] - first_[static_cast<size_t>(k0)];
  }
  size_t bytes() const { return memory_.bytes(); }
  void give_back_on(Stream stream) { memory_.give_back_on(stream); }

 private:
  std::vector<int64_t> first_, lengths_;
  std::vector<int32_t> order_;
  Memory memory_;
  RowMap map_ = {};
};

// Inverted dropout on a layer's input, as DropoutMask of core/args.h.
struct Dropout {
  uint64_t key, threshold;  // threshold 0: none
  double scale;
};

// x_rows [rows of r0 ... r1][features] = the caller's x.
template <class S>
void gather_input(Stream stream, const RowMap& map, bool reverse, int64_t r0, int64_t r1,
                  int64_t features, const DeviceArrayRef& x, S* x_rows);

// The same from the layer below: its outputs h_rows[d] [N][H] side by side, dropout applied.
template <class S>
void gather_below(Stream stream, const RowMap& map, bool reverse, int64_t r0, int64_t r1, int64_t H,
                  int directions, const S* const* h_rows, const Dropout& dropout, S* x_rows);

// gx [rows][columns] = bias (columns) + the row ids[layout.at(t, b)] of table
// [vocabulary][columns].
template <class S>
void pick_rows(Stream stream, const RowMap& map, bool reverse, int64_t r0, int64_t r1,
               int64_t columns, const int64_t* ids, const DeviceLayout& layout, const S* table,
               const Accumulator<S>* bias, Accumulator<S>* gx);

// reset_rows [N]: whether the state is dropped before the row's step. mask: the caller's, bytes.
void gather_resets(Stream stream, const RowMap& map, bool reverse, const uint8_t* mask,
                   const DeviceLayout& layout, uint8_t* reset_rows);

// y(t, b, column0 + u) = h_rows[row][u] for rows r0 ... r1 - 1.
template <class S>
void scatter_output(Stream stream, const RowMap& map, bool reverse, int64_t r0, int64_t r1,
                    int64_t H, int64_t column0, const S* h_rows, const DeviceArrayRef& y);
// Zeros in the steps past the rows' lengths of (T, B, features), where these are padded.
void zero_padding(Stream stream, const RowMap& map, int64_t features, const DeviceArrayRef& a);

// state [B][H] in processing order = from [B][H] in the caller's, or zeros where that is null; and
// back.
template <class S>
void load_state(Stream stream, const RowMap& map, int64_t H, const Accumulator<S>* from, S* state);
template <class S>
void store_state(Stream stream, const RowMap& map, int64_t H, const S* state, Accumulator<S>* to);

// dy_rows [N][H] = the caller's dy, columns column0 ... column0 + H - 1.
template <class A>
void gather_gradient(Stream stream, const RowMap& map, bool reverse, int64_t H, int64_t column0,
                     const DeviceArrayRef& dy, A* dy_rows);
// The same from the layer above: the sum over its directions of dx_rows[d] [N][features], at the
// columns of this layer's direction, dropout's mask applied.
template <class A>
void gather_gradient_above(Stream stream, const RowMap& map, bool reverse, int64_t H,
                           int64_t column0, int64_t features, int directions,
                           const A* const* dx_rows, const Dropout& dropout, A* dy_rows);
// dx(t, b, :) = the sum over directions of dx_rows[d] [N][features]; zeros past the lengths.
template <class A>
void scatter_input_gradient(Stream stream, const RowMap& map, int64_t features, int directions,
                            const A* const* dx_rows, const DeviceArrayRef& dx);

// previous [rows][H]: the state before each row's step, of the chunk of steps k0 ... k1 - 1.
template <class S>
void previous_states(Stream stream, const RowMap& map, const Steps& steps, int64_t H,
                     const S* h_rows, const S* h0, const uint8_t* reset, S* previous);

// Where the gates' products go: the slots of a cell (cells/*.h).
constexpr int kMostGates = 4;
struct GateSlots {
  int gates, slots;
  int input[kMostGates], state[kMostGates];
};
GateSlots gate_slots(CellKind kind);

// W_ih (G*H, I) as the input product reads it, [I][H*G], columns (unit, gate); and for its
// transpose [H*slots][I], zeros in the rows of slots that no input gate goes to.
template <class S>
void pack_input(Stream stream, const GateSlots& slots, int64_t H, int64_t I,
                const Accumulator<S>* w_ih, bool backward, S* out);
// gates [H*G]: what the input product starts from; states [H][slots]: what slots without an input
// gate start from. b_ih, b_hh (G*H) may be null.
template <class A>
void pack_bias(Stream stream, const GateSlots& slots, int64_t H, const A* b_ih, const A* b_hh,
               A* gates, A* states);

// Gates gate0 ... gate1 - 1 of dw (G*H, K) += the rows of `sums` [H*slots][K] that belong to the
// gates' slots, slot (G).
template <class A>
void add_gate_rows(Stream stream, const GateSlots& slots, const int* slot, int gate0, int gate1,
                   int64_t H, int64_t K, const A* sums, A* dw);
// dw (G*H, V) += the gradients of rows with token id v, [N][H*slots]. `rows` (N) are the rows
// sorted by id, in their order where ids are equal; those of segment s, rows[begin[s]] ...
// rows[begin[s+1]
// - 1], have the id token[s]. All device memory.
template <class S>
void add_token_gradients(Stream stream, const GateSlots& slots, int64_t H, int64_t V,
                         int64_t segments, const int32_t* rows, const int64_t* begin,
                         const int64_t* token, const S* gradients, Accumulator<S>* dw);

}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_ROWS_H_
