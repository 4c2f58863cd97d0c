// Where the elements of a matrix stand in the registers of a warp that multiplies them, and the
// order in which weights are packed for it.
//
// mma.m16n8k16 multiplies A (16 x 16) with B (16 x 8) and adds to C (16 x 8). Each lane of a warp
// holds 8 elements of A in 4 registers of two 16-bit halves, 4 of B in 2, and 4 of C in 4 registers
// of float; D is laid out like C (PTX ISA, "Matrix Fragments for mma.m16n8k16").
//
// In a recurrence A is the weights, which never change, so that they stay in A's registers for all
// steps; B is the state (or, backward, the gates' gradients) of 8 rows of the batch, k by batch
// row.
//
// Packed weights. A matrix of M x K, both multiples of 16, is packed as A fragments: m tile after m
// tile, in each k tile after k tile, in each lane after lane 16 bytes. A warp loads a tile with one
// 16-byte load per lane, contiguous over the warp.
//
// The forward product, gates = W_hh h: M = 4 * H', K = H', where H' is H padded to what a kernel is
// compiled for. An m tile is 4 units times 4 gates, the gate in the upper digit,
//   row 16 m + 4 g + u  is  gate g of unit 4 m + u,
// so that one exchange between lanes 16 apart (gates_of_cell) leaves all gates of one cell, that is
// of one (unit, batch row), in one lane. Rows of gates that the cell does not have are zero.
//
// The backward product, dh = W_hhᵀ dG: M = H', row j is hidden unit j; K = slots * H', and
//   column slots * u + s  is  slot s of unit u,
// the order in which the cells' slots stand in memory. Every cell's gate g multiplies h into slot g
// (gates_are_slots), and slots beyond have zero columns.
#ifndef FASTRNN_CUDA_FRAGMENTS_H_
#define FASTRNN_CUDA_FRAGMENTS_H_

#include <stdint.h>

#include "cells/scalar.h"
#include "cuda/half.h"
#include "cuda/simt.h"

namespace fastrnn {
namespace cuda {

constexpr int kLanes = 32;
constexpr int kTileM = 16, kTileN = 8, kTileK = 16;
constexpr int kLaneElements = 8;                       // of a tile of A, in a lane: 16 bytes
constexpr int kTileElements = kLanes * kLaneElements;  // of a tile of A
constexpr int kGateRows = 4;                           // gates of a unit in an m tile
constexpr int kTileUnits = kTileM / kGateRows;         // units of an m tile, forward

struct Place {
  int64_t row, col;
};

// The element of A in `half` (0: low) of register r of 4.
FASTRNN_HD constexpr Place a_element(int lane, int r, int half) {
  return {lane / 4 + 8 * (r % 2), 2 * (lane % 4) + half + 8 * (r / 2)};
}
// The element of B (row: k, col: batch row) in `half` of register r of 2.
FASTRNN_HD constexpr Place b_element(int lane, int r, int half) {
  return {2 * (lane % 4) + half + 8 * r, lane / 4};
}
// The element of C and D in register r of 4.
FASTRNN_HD constexpr Place c_element(int lane, int r) {
  return {lane / 4 + 8 * (r / 2), 2 * (lane % 4) + r % 2};
}

// The element of a matrix with k_tiles tiles in a row that stands at `index` of its packed form,
// and back.
FASTRNN_HD constexpr Place packed_element(int64_t index, int64_t k_tiles) {
  const int64_t tile = index / kTileElements;
  const int lane = static_cast<int>(index % kTileElements) / kLaneElements;
  const int i = static_cast<int>(index % kLaneElements);
  const Place in_tile = a_element(lane, i / 2, i % 2);
  return {tile / k_tiles * kTileM + in_tile.row, tile % k_tiles * kTileK + in_tile.col};
}
FASTRNN_HD constexpr int64_t packed_index(int64_t row, int64_t col, int64_t k_tiles) {
  const int64_t tile = row / kTileM * k_tiles + col / kTileK;
  const int64_t lane = row % 8 * 4 + col % 8 / 2;
  const int64_t i = 4 * (col % kTileK / 8) + 2 * (row % kTileM / 8) + col % 2;
  return tile * kTileElements + lane * kLaneElements + i;
}

// Gate and unit of a row of the forward product.
struct GateRow {
  int64_t gate, unit;
};
FASTRNN_HD constexpr GateRow gate_row(int64_t row) {
  return {row % kTileM / kTileUnits, row / kTileM * kTileUnits + row % kTileUnits};
}

// The cell of an m tile and 8 batch rows that a lane holds after gates_of_cell.
struct Cell4x8 {
  int unit, row;  // unit of the tile's 4, row of the batch's 8
};
FASTRNN_HD constexpr Cell4x8 cell_of_lane(int lane) {
  return {lane / 4 % 4, 2 * (lane % 4) + lane / 16};
}

// What is packed at (row, col) of the forward product's matrix. w: (gates * H, H).
FASTRNN_HD constexpr float forward_weight(const float* w, int64_t H, int gates, int64_t row,
                                          int64_t col) {
  const GateRow at = gate_row(row);
  return at.gate < gates && at.unit < H && col < H ? w[(at.gate * H + at.unit) * H + col] : 0.0f;
}
// The same for the backward product's.
FASTRNN_HD constexpr float backward_weight(const float* w, int64_t H, int gates, int slots,
                                           int64_t row, int64_t col) {
  const int64_t unit = col / slots, gate = col % slots;
  return gate < gates && unit < H && row < H ? w[(gate * H + unit) * H + row] : 0.0f;
}

// Elements of either packed matrix, with H padded to `padded`.
FASTRNN_HD constexpr int64_t forward_elements(int64_t padded) {
  return kGateRows * padded * padded;
}
FASTRNN_HD constexpr int64_t backward_elements(int64_t padded, int slots) {
  return slots * padded * padded;
}

// Element i of the packed matrix from w_hh: what for_each is given. `gates`, `slots`: the cell's.
template <class S>
struct PackForward {
  const float* w;  // in (gates * H, H)
  int64_t H;
  int gates;
  int64_t padded;
  S* out;  // out (forward_elements(padded))
  FASTRNN_DEVICE void operator()(int64_t i) const {
    const Place at = packed_element(i, padded / kTileK);
    out[i] = from_float<S>(forward_weight(w, H, gates, at.row, at.col));
  }
};
template <class S>
struct PackBackward {
  const float* w;  // in (gates * H, H)
  int64_t H;
  int gates, slots;
  int64_t padded;
  S* out;  // out (backward_elements(padded, slots))
  FASTRNN_DEVICE void operator()(int64_t i) const {
    const Place at = packed_element(i, slots * padded / kTileK);
    out[i] = from_float<S>(backward_weight(w, H, gates, slots, at.row, at.col));
  }
};

// The four gates of the lane's cell (cell_of_lane) from its part d of an m tile of the forward
// product. All lanes of the warp call it.
//
// A lane below 16 holds gates 0 and 2 of its unit in two batch rows, the lane 16 above it gates 1
// and 3 of the same unit and rows. The former keeps the even row and gives away the odd one.
FASTRNN_DEVICE FASTRNN_INLINE void gates_of_cell(const float (&d)[4], int lane,
                                                 float (&gates)[kGateRows]) {
  const bool odd = lane >= 16;
  const float first = shuffle_xor(odd ? d[0] : d[1], 16);
  const float second = shuffle_xor(odd ? d[2] : d[3], 16);
  gates[0] = odd ? first : d[0];
  gates[1] = odd ? d[1] : first;
  gates[2] = odd ? second : d[2];
  gates[3] = odd ? d[3] : second;
}

// Both packings assume it of a cell.
template <class Cell>
constexpr bool gates_are_slots() {
  for (int g = 0; g < Cell::kGates; ++g) {
    if (Cell::kStateSlot[g] != g) return false;
  }
  return Cell::kGates <= kGateRows && Cell::kSlots <= kGateRows;
}

}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_FRAGMENTS_H_
