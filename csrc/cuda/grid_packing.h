// How the grid family (cuda/grid.h) packs W_hh: for its kernels and their tests.
#ifndef FASTRNN_CUDA_GRID_PACKING_H_
#define FASTRNN_CUDA_GRID_PACKING_H_

#include <stdint.h>

#include "cells/scalar.h"
#include "cuda/fragments.h"

namespace fastrnn {
namespace cuda {
namespace grid {

constexpr int kBlockUnits = 16;    // hidden units whose weights stand together
constexpr int kPairElements = 32;  // state elements of two k tiles: four lanes of 8

// Packed weights are the A operands of a product (cuda/fragments.h) whose B operand comes from
// memory as it is: a lane loads 8 neighbouring elements of a row, and the pair of k tiles gives the
// 8 that the lane holds of its two B operands the same order. So the element of B that
// b_element(lane, r, half) of tile t names stands at 8 (lane % 4) + 4 t + 2 r + half of the pair's
// 32, and the columns of A follow.
//
//   [units / 16][K / 32][m tile][t][lane][8]
//
// The 8 elements of a lane are rows lane / 4 (first four) and lane / 4 + 8 (last four) of the m
// tile, so that 8 of 16 units can be had without the others.
struct PackedPlace {
  int64_t block;    // of 16 units
  int m_tile, row;  // row of 16 in the m tile
  int64_t k;        // column of the product
};
FASTRNN_HD constexpr PackedPlace packed_place(int64_t index, int m_tiles, int64_t pairs) {
  const int64_t tile = index / kTileElements;  // counts [block][pair][m_tile][t]
  const int i = static_cast<int>(index % kLaneElements);
  const int lane = static_cast<int>(index % kTileElements) / kLaneElements;
  const int t = static_cast<int>(tile % 2);
  const int64_t pair = tile / (2 * m_tiles) % pairs;
  return {tile / (2 * m_tiles) / pairs, static_cast<int>(tile / 2 % m_tiles),
          lane / 4 + 8 * (i / 4), kPairElements * pair + 8 * (lane % 4) + 4 * t + i % 4};
}

// Forward, gates = W_hh h: an m tile is a gate of the 16 units, k is the unit of h. Backward,
// dh = W_hhᵀ dG: the one m tile is the 16 units of dh, and k counts dG as blocks exchange it,
// [units / 16][slot][16].
struct WeightPlace {
  int64_t gate, unit, from;  // W_hh[gate * H + unit][from]
};
FASTRNN_HD constexpr WeightPlace forward_place(const PackedPlace& at) {
  return {at.m_tile, at.block * kBlockUnits + at.row, at.k};
}
FASTRNN_HD constexpr WeightPlace backward_place(const PackedPlace& at, int gates) {
  return {at.k / kBlockUnits % gates,
          at.k / (kBlockUnits * gates) * kBlockUnits + at.k % kBlockUnits,
          at.block * kBlockUnits + at.row};
}

}  // namespace grid
}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_GRID_PACKING_H_
