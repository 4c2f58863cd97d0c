// What recurrent.cc and frozen.cc share: packed weights of either dtype, and reading a call's
// arguments.
#ifndef FASTRNN_BINDINGS_RECURRENT_H_
#define FASTRNN_BINDINGS_RECURRENT_H_

#include <memory>
#include <utility>
#include <variant>

#include "bindings/arrays.h"
#include "cpu/stack.h"

namespace fastrnn {

// Packed weights of a network, float32 or float64.
struct Packed {
  std::variant<std::shared_ptr<const PackedStack<float>>,
               std::shared_ptr<const PackedStack<double>>>
      stack;

  const StackSpec& spec() const {
    return std::visit([](const auto& s) -> const StackSpec& { return s->spec(); }, stack);
  }
  bool has_cell() const { return cell_traits(spec().kind).has_cell; }
};

// The state arguments or results of a call: h, and c for an LSTM.
template <class T>
struct States {
  std::optional<py::array_t<T>> h, c;

  const T* h_data() const { return h ? h->data() : nullptr; }
  const T* c_data() const { return c ? c->data() : nullptr; }
};

// `value`: None, an array, or for an LSTM a pair of arrays, each of `shape`; None within a pair
// means zeros.
template <class T>
States<T> read_states(const std::string& name, const py::handle& value, bool has_cell,
                      const Shape& shape) {
  States<T> states;
  if (value.is_none()) return states;
  if (!has_cell) {
    states.h = dense<T>(name, value, shape);
    return states;
  }
  if (!(py::isinstance<py::tuple>(value) || py::isinstance<py::list>(value)))
    type_mismatch(name, "a pair (h, c) of arrays", type_name(value));
  const py::sequence pair = py::reinterpret_borrow<py::sequence>(value);
  if (pair.size() != 2)
    value_mismatch(name, "a pair (h, c) of arrays", std::to_string(pair.size()) + " items");
  const py::object h = pair[0], c = pair[1];
  if (!h.is_none()) states.h = dense<T>(name + "[0]", h, shape);
  if (!c.is_none()) states.c = dense<T>(name + "[1]", c, shape);
  return states;
}

template <class T>
py::object state_object(const States<T>& states, bool has_cell) {
  if (has_cell) return py::make_tuple(*states.h, *states.c);
  return *states.h;
}

template <class T>
States<T> empty_states(bool has_cell, const Shape& shape) {
  States<T> states;
  states.h = py::array_t<T>(shape);
  if (has_cell) states.c = py::array_t<T>(shape);
  return states;
}

}  // namespace fastrnn

#endif  // FASTRNN_BINDINGS_RECURRENT_H_
