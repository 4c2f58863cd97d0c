// All kernels, compiled once per instruction set with that set's flags and namespace
// (cmake/isa.cmake). Nothing here may be inlined into, or shared with, code of another instruction
// set: only plain structs cross the border.
#include "core/kernels.h"

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/limits.h"
#include "cpu/linear.h"
#include "cpu/training.h"

#define FASTRNN_STRING_(x) #x
#define FASTRNN_STRING(x) FASTRNN_STRING_(x)

namespace fastrnn {
namespace FASTRNN_ISA {

const KernelTable& kernel_table();

namespace {

template <class T>
void activation(int f, const T* in, T* out, int64_t n) {
  using V = Vec<T>;
  for (int64_t i = 0; i < n; i += V::N) {
    const int lanes = n - i < V::N ? static_cast<int>(n - i) : V::N;
    const V x = V::load_n(in + i, lanes);
    (f == 0 ? sigmoid(x) : tanh(x)).store_n(out + i, lanes);
  }
}

template <class Cell, class T>
void set_cell(Kernels<T>& k, CellKind kind) {
  const int i = static_cast<int>(kind);
  k.forward_scratch[i] = forward_scratch<Cell, T>;
  k.forward[i] = forward<Cell, T>;
  k.backward[i] = backward<Cell, T>;
  k.weight_gradients[i] = weight_gradients<Cell, T>;
  k.input_gradients[i] = input_gradients<Cell, T>;
}

template <class T>
Kernels<T> kernels() {
  Kernels<T> k = {};
  k.width = kWidth<T>;
  k.rows = kTileRows;
  k.pack = pack<T>;
  k.pack_transposed = pack_transposed<T>;
  k.add_gradient = add_gradient<T>;
  k.add_table_gradient = add_table_gradient<T>;
  set_cell<RnnTanh>(k, CellKind::kRnnTanh);
  set_cell<RnnRelu>(k, CellKind::kRnnRelu);
  set_cell<RnnSigmoid>(k, CellKind::kRnnSigmoid);
  set_cell<Lstm>(k, CellKind::kLstm);
  set_cell<GruAfter>(k, CellKind::kGruAfter);
  set_cell<GruBefore>(k, CellKind::kGruBefore);
  k.gather = gather<T>;
  k.linear = linear<T>;
  k.outer = outer<T>;
  k.activation = activation<T>;
  k.fma_peak = fma_peak<T>;
  k.read_memory = read_memory<T>;
  k.tile_peak_scratch = tile_peak_scratch<T>;
  k.tile_peak = tile_peak<T>;
  return k;
}

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable table = {FASTRNN_STRING(FASTRNN_ISA), kernels<float>(),
                                    kernels<double>(), training_kernels<float>(),
                                    training_kernels<double>()};
  return table;
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
