// The dimension legend and the cell kinds: the words that every other file uses.
//
//   T  time steps            B  batch rows           I  input features
//   H  hidden units          G  gates of a cell      L  layers       D  directions (1 or 2)
//   W  panel width: the columns that the microkernel computes at once (two vectors of the ISA)
//   S  superblocks of W hidden units, ceil(H / W)
//
// Blocked layout. Every matrix that a kernel touches, apart from the caller's own arrays, is stored
// as panels of W columns: element (row, col) of an R-row matrix is at [col / W][row][col % W]. A
// row of a panel is one or two cache lines, the distance between rows is the constant W, and the
// same bytes serve as the left operand (a row is broadcast element by element) and as the right
// operand (a row is loaded as vectors) of a product.
#ifndef FASTRNN_CORE_DIMS_H_
#define FASTRNN_CORE_DIMS_H_

#include <stddef.h>
#include <stdint.h>

namespace fastrnn {

enum class CellKind : int { kRnnTanh, kRnnRelu, kRnnSigmoid, kLstm, kGruAfter, kGruBefore };
constexpr int kCellKinds = 6;

// What the code outside the kernels must know of a cell.
struct CellTraits {
  int gates;       // G: rows of weight_ih and weight_hh are G * H
  int slots;       // values a step keeps per hidden unit (gates, and GRU's hidden part of n)
  bool has_cell;   // LSTM's second state c
  bool two_phase;  // GRU with the reset gate before the product: one more pass a step
};

constexpr CellTraits cell_traits(CellKind kind) {
  return kind == CellKind::kLstm        ? CellTraits{4, 4, true, false}
         : kind == CellKind::kGruAfter  ? CellTraits{3, 4, false, false}
         : kind == CellKind::kGruBefore ? CellTraits{3, 3, false, true}
                                        : CellTraits{1, 1, false, false};
}

// The shape of a recurrent network.
struct StackSpec {
  CellKind kind;
  int64_t I, H;
  int layers, directions;
  bool bias;

  int64_t input_size(int layer) const { return layer == 0 ? I : H * directions; }
  int index(int layer, int direction) const { return layer * directions + direction; }
  int count() const { return layers * directions; }
};

}  // namespace fastrnn

#endif  // FASTRNN_CORE_DIMS_H_
