// The linear layer: y = x wᵀ + b and its gradients, on rows.
#include "bindings/arrays.h"
#include "cpu/stack.h"

namespace fastrnn {

void register_linear(py::module_& m);

namespace {

// Calls f with a value of the array's floating type.
template <class F>
auto for_dtype(const std::string& name, const py::array& a, const F& f) {
  const py::dtype d = a.dtype();
  if (d.kind() == 'f' && d.itemsize() == 4) return f(float{});
  if (d.kind() == 'f' && d.itemsize() == 8) return f(double{});
  type_mismatch(name, "an array of float32 or float64", dtype_name(a));
}

template <class T>
struct Rows {
  py::array array;
  const T* data;
  int64_t stride;
};

// A 2-D array of `columns` columns, read in place where possible.
template <class T>
Rows<T> rows(const std::string& name, const py::handle& value, int64_t columns) {
  py::array a = rows_of<T>(name, value);
  if (a.ndim() != 2 || a.shape(1) != columns)
    value_mismatch(name, "shape (rows, " + std::to_string(columns) + ")", text(shape_of(a)));
  return {a, static_cast<const T*>(a.data()), a.strides(0) / static_cast<py::ssize_t>(sizeof(T))};
}

void check_matrix(const std::string& name, const py::array& w) {
  if (w.ndim() != 2 || w.shape(0) < 1 || w.shape(1) < 1)
    value_mismatch(name, "a matrix with no empty axis", text(shape_of(w)));
}

py::object forward(const py::object& x, const py::object& weight, const py::object& bias,
                   const py::object& threads) {
  const py::array w = as_array("weight", weight);
  check_matrix("weight", w);
  return for_dtype("weight", w, [&](auto zero) -> py::object {
    using T = decltype(zero);
    const int64_t out = w.shape(0), in = w.shape(1);
    const py::array_t<T> weights = dense<T>("weight", w, {out, in});
    const Rows<T> input = rows<T>("x", x, in);
    std::optional<py::array_t<T>> b;
    if (!bias.is_none()) b = dense<T>("bias", bias, {out});
    const int n = thread_count(threads);
    py::array_t<T> y(Shape{input.array.shape(0), out});
    T* const y_data = y.mutable_data();
    without_lock([&](Interrupt* interrupt) {
      linear_forward(input.data, input.stride, input.array.shape(0), in, out, weights.data(),
                     b ? b->data() : nullptr, y_data, n, interrupt);
    });
    return y;
  });
}

py::object backward(const py::object& x, const py::object& weight, const py::object& dy,
                    const py::object& dweight, const py::object& dbias, bool need_dx,
                    const py::object& threads) {
  const py::array w = as_array("weight", weight);
  check_matrix("weight", w);
  return for_dtype("weight", w, [&](auto zero) -> py::object {
    using T = decltype(zero);
    const int64_t out = w.shape(0), in = w.shape(1);
    const py::array_t<T> weights = dense<T>("weight", w, {out, in});
    const Rows<T> input = rows<T>("x", x, in), gradient = rows<T>("dy", dy, out);
    const int64_t count = input.array.shape(0);
    check_shape("dy", gradient.array, {count, out});
    T* const dw = dweight.is_none() ? nullptr : writable<T>("dweight", dweight, {out, in});
    T* const db = dbias.is_none() ? nullptr : writable<T>("dbias", dbias, {out});
    const int n = thread_count(threads);
    py::object result = py::none();
    T* dx = nullptr;
    if (need_dx) {
      py::array_t<T> a(Shape{count, in});
      dx = a.mutable_data();
      result = a;
    }
    without_lock([&](Interrupt* interrupt) {
      linear_backward(input.data, input.stride, gradient.data, gradient.stride, count, in, out,
                      weights.data(), dx, dw, db, n, interrupt);
    });
    return result;
  });
}

// The column numbers, each of `cols`.
py::array_t<int64_t> read_columns(const py::object& columns, int64_t cols) {
  const py::array a = as_array("columns", columns);
  const py::array_t<int64_t> numbers = private_integers("columns", a, {a.size()});
  for (py::ssize_t i = 0; i < numbers.size(); ++i)
    if (numbers.data()[i] < 0 || numbers.data()[i] >= cols)
      value_mismatch("columns", "column numbers from 0 to " + std::to_string(cols - 1),
                     std::to_string(numbers.data()[i]));
  return numbers;
}

py::object take(const py::object& matrix, const py::object& columns, const py::object& threads) {
  const py::array m = as_array("matrix", matrix);
  check_matrix("matrix", m);
  return for_dtype("matrix", m, [&](auto zero) -> py::object {
    using T = decltype(zero);
    const int64_t rows = m.shape(0), cols = m.shape(1);
    const py::array from = rows_of<T>("matrix", m);
    const py::array_t<int64_t> numbers = read_columns(columns, cols);
    py::array_t<T> to(Shape{rows, numbers.size()});
    const int n = thread_count(threads);
    T* const out = to.mutable_data();
    const int64_t stride = from.strides(0) / static_cast<int64_t>(sizeof(T));
    without_lock([&](Interrupt*) {
      take_columns(static_cast<const T*>(from.data()), stride, rows, numbers.data(), numbers.size(),
                   out, n);
    });
    return to;
  });
}

void add(const py::object& matrix, const py::object& columns, const py::object& part,
         const py::object& threads) {
  const py::array m = as_array("matrix", matrix);
  check_matrix("matrix", m);
  for_dtype("matrix", m, [&](auto zero) -> py::object {
    using T = decltype(zero);
    const int64_t rows = m.shape(0), cols = m.shape(1);
    T* const to = writable<T>("matrix", matrix, {rows, cols});
    const py::array_t<int64_t> numbers = read_columns(columns, cols);
    const py::array_t<T> from = dense<T>("part", part, {rows, numbers.size()});
    const int n = thread_count(threads);
    without_lock([&](Interrupt*) {
      add_columns(from.data(), rows, cols, numbers.data(), numbers.size(), to, n);
    });
    return py::none();
  });
}

}  // namespace

void register_linear(py::module_& m) {
  m.def("linear_forward", &forward, py::arg("x"), py::arg("weight"), py::arg("bias") = py::none(),
        py::arg("threads") = py::none(),
        "x (rows, in), weight (out, in), bias (out) or None -> (rows, out). A row's bits do not "
        "depend on the others.");
  m.def("linear_backward", &backward, py::arg("x"), py::arg("weight"), py::arg("dy"),
        py::arg("dweight"), py::arg("dbias"), py::arg("need_dx") = true,
        py::arg("threads") = py::none(),
        "Adds dy^T x to dweight and dy's column sums to dbias (each may be None); returns dy "
        "weight, or None.");
  m.def("take_columns", &take, py::arg("matrix"), py::arg("columns"),
        py::arg("threads") = py::none(), "matrix[:, columns], on several threads.");
  m.def("add_columns", &add, py::arg("matrix"), py::arg("columns"), py::arg("part"),
        py::arg("threads") = py::none(),
        "matrix[:, columns] += part, in place and on several threads.");
}

}  // namespace fastrnn
