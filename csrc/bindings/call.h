// What every call of a recurrent network shares, on the CPU and on the device: the names and shapes
// of its parameters, and the steps and rows that its arguments describe.
#ifndef FASTRNN_BINDINGS_CALL_H_
#define FASTRNN_BINDINGS_CALL_H_

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "bindings/arrays.h"
#include "core/dims.h"

namespace fastrnn {

inline CellKind cell_kind(const std::string& name) {
  static const std::map<std::string, CellKind> kinds = {
      {"rnn_tanh", CellKind::kRnnTanh},       {"rnn_relu", CellKind::kRnnRelu},
      {"rnn_sigmoid", CellKind::kRnnSigmoid}, {"lstm", CellKind::kLstm},
      {"gru_after", CellKind::kGruAfter},     {"gru_before", CellKind::kGruBefore}};
  const auto found = kinds.find(name);
  if (found == kinds.end()) value_mismatch("cell", "a cell's name", "'" + name + "'");
  return found->second;
}

inline StackSpec stack_spec(const std::string& cell, int64_t input_size, int64_t hidden_size,
                            int num_layers, int num_directions, bool bias) {
  if (input_size < 1 || hidden_size < 1 || num_layers < 1 || num_layers > INT32_MAX / 2 ||
      num_directions < 1 || num_directions > 2)
    throw py::value_error(
        "input_size, hidden_size, num_layers: expected at least 1, num_directions: expected 1 or "
        "2");
  return {cell_kind(cell), input_size, hidden_size, num_layers, num_directions, bias};
}

// The name that PyTorch gives a parameter, for messages.
inline std::string parameter_name(const char* what, int layer, int direction) {
  return std::string(what) + "_l" + std::to_string(layer) + (direction ? "_reverse" : "");
}

struct ParameterShapes {
  Shape w_ih, w_hh, b;
};

inline ParameterShapes parameter_shapes(const StackSpec& spec, int layer) {
  const py::ssize_t rows = cell_traits(spec.kind).gates * spec.H;
  return {{rows, spec.input_size(layer)}, {rows, spec.H}, {rows}};
}

// Calls f(layer, direction, index of its first array, shapes) and checks the number of arrays.
template <class F>
void for_parameters(const StackSpec& spec, const std::string& name,
                    const std::vector<py::object>& arrays, const F& f) {
  const size_t per = spec.bias ? 4 : 2;
  const size_t expected = per * static_cast<size_t>(spec.count());
  if (arrays.size() != expected)
    value_mismatch(name, std::to_string(expected) + " arrays", std::to_string(arrays.size()));
  for (int l = 0; l < spec.layers; ++l)
    for (int d = 0; d < spec.directions; ++d)
      f(l, d, per * static_cast<size_t>(spec.index(l, d)), parameter_shapes(spec, l));
}

// Steps and rows of a call, from the shape of x and from lengths or offsets. Throws TypeError or
// ValueError for what does not fit.
class Extent {
 public:
  // x: its shape; one_hot: it is integers, which have no axis of features. offsets: of rows that
  // stand one after the other, or None.
  Extent(const StackSpec& spec, const Shape& x, bool one_hot, const py::object& offsets,
         const py::object& lengths, bool batch_first) {
    read_shape(spec, x, one_hot, offsets, batch_first);
    read_lengths(lengths);
  }

  int64_t steps = 0, batch = 0;
  bool batched = false;

  // (B) or null: all rows have all steps.
  const int64_t* lengths() const { return lengths_ ? lengths_->data() : nullptr; }
  // (B) the first steps of rows that stand one after the other, or null.
  const int64_t* starts() const { return offsets_ ? offsets_->data() : nullptr; }

  // Which axes of x, y and dy are time and batch; the batch's is -1 where there is none.
  py::ssize_t time_axis = 0, batch_axis = -1;

  Shape state_shape(const StackSpec& spec) const {
    return batched ? Shape{spec.count(), batch, spec.H} : Shape{spec.count(), spec.H};
  }

 private:
  void read_shape(const StackSpec& spec, const Shape& x, bool one_hot, const py::object& offsets,
                  bool batch_first) {
    const bool ragged = !offsets.is_none();
    const size_t most = (ragged ? 1 : 2) + (one_hot ? 0 : 1);
    batched = ragged || x.size() == most;
    if (x.size() != most && (ragged || x.size() + 1 != most)) {
      const std::string I = std::to_string(spec.I), order = batch_first ? "B, T" : "T, B";
      const std::string expected =
          ragged    ? (one_hot ? "integers of shape (steps of all rows,)"
                               : "shape (steps of all rows, " + I + ")")
          : one_hot ? "integers of shape (" + order + "), or (T,) without a batch"
                    : "shape (" + order + ", " + I + "), or (T, " + I + ") without a batch";
      value_mismatch("x", expected, text(x));
    }
    if (!one_hot && x.back() != spec.I)
      value_mismatch("x", std::to_string(spec.I) + " features in its last axis", text(x));
    if (ragged) {
      read_offsets(offsets, x[0]);
    } else {
      time_axis = batched && batch_first ? 1 : 0;
      batch_axis = batched ? 1 - time_axis : -1;
      steps = x[static_cast<size_t>(time_axis)];
      batch = batched ? x[static_cast<size_t>(batch_axis)] : 1;
    }
    if (batch > INT32_MAX) value_mismatch("x", "a batch below 2**31 rows", std::to_string(batch));
  }

  void read_offsets(const py::object& offsets, int64_t total) {
    const py::array a = as_array("offsets", offsets);
    if (a.ndim() != 1 || a.shape(0) < 1)
      value_mismatch("offsets", "shape (B + 1,)", text(shape_of(a)));
    offsets_ = private_integers("offsets", a, shape_of(a));
    batch = a.shape(0) - 1;
    lengths_ = py::array_t<int64_t>(Shape{batch});
    const int64_t* const o = offsets_->data();
    bool fits = o[0] == 0 && o[batch] == total;
    for (int64_t b = 0; b < batch; ++b) fits = fits && o[b + 1] >= o[b];
    if (!fits)
      value_mismatch("offsets", "values that rise from 0 to " + std::to_string(total),
                     std::string(py::str(a)));
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t n = o[b + 1] - o[b];
      lengths_->mutable_data()[b] = n;
      steps = std::max(steps, n);
    }
  }

  void read_lengths(const py::object& lengths) {
    if (lengths.is_none()) return;
    if (!batched) value_mismatch("lengths", "None, since x has no batch axis", type_name(lengths));
    if (offsets_)
      value_mismatch("lengths", "None, since x tells its rows' lengths", type_name(lengths));
    lengths_ = private_integers("lengths", lengths, {batch});
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t n = lengths_->data()[b];
      if (n < 0 || n > steps)
        value_mismatch("lengths", "values from 0 to " + std::to_string(steps) + " (the steps of x)",
                       std::to_string(n) + " at index " + std::to_string(b));
    }
  }

  std::optional<py::array_t<int64_t>> lengths_, offsets_;
};

// Which axes of x, y and dy are time and batch, and where rows begin that stand one after the
// other.
struct Axes {
  py::ssize_t t = 0, b = -1;
  const int64_t* starts = nullptr;

  Layout layout(const py::array& a, size_t element) const {
    const auto stride = [&](py::ssize_t axis) {
      return a.strides(axis) / static_cast<py::ssize_t>(element);
    };
    if (starts != nullptr) return {stride(0), 0, starts};
    return {stride(t), b < 0 ? 0 : stride(b), nullptr};
  }
};

}  // namespace fastrnn

#endif  // FASTRNN_BINDINGS_CALL_H_
