// Bindings of training on the device: the functions of _core (bindings/training.cc, linear.cc) with
// the same arguments, on Arrays. Work goes on the stream that used the first array last. Integers
// (targets, ids) and masks may be NumPy arrays, too; `threads` is taken and not used.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include "bindings/cuda/arrays.h"
#include "cuda/matmul.h"
#include "cuda/training.h"

namespace fastrnn {

void register_device_training(py::module_& m);

namespace {

using Arrays = std::vector<Array>;

// Calls f with a value of the array's type.
template <class F>
auto for_floats(const std::string& name, const Array& a, const F& f) {
  if (a.dtype() == DType::kFloat32) return f(float{});
  if (a.dtype() == DType::kFloat64) return f(double{});
  type_mismatch(name, "an array of float32 or float64", name_of(a.dtype()));
}

template <class T>
T* output(const std::string& name, const Array& a, const Shape& shape, cuda::Stream stream) {
  return device_output<T>(name, py::cast(a), shape).template data<T>(stream);
}

// `a` as dense memory of T, kept alive in `held`.
template <class T>
const T* input(const std::string& name, const Array& a, const Shape& shape, Arrays& held,
               cuda::Stream stream) {
  held.push_back(dense_input<T>(name, py::cast(a), shape, stream));
  return held.back().data<T>(stream);
}

// n values from the device, once the work before is done.
template <class T>
std::vector<T> read_back(const T* from, int64_t n, cuda::Stream stream) {
  std::vector<T> values(static_cast<size_t>(n));
  const py::gil_scoped_release unlocked;
  if (n > 0) cuda::copy_to_host(values.data(), from, values.size() * sizeof(T), stream);
  return values;
}

void check_matrix(const std::string& name, const Array& a) {
  if (a.ndim() != 2) value_mismatch(name, "2 dimensions", text(a.shape()));
}

// Integers and masks.

// A mask as the kernels and the host read it.
struct Mask {
  std::optional<Array> array;
  std::vector<uint8_t> host;  // the same values; empty without a mask

  const uint8_t* data(cuda::Stream stream) const {
    return array ? array->data<uint8_t>(stream) : nullptr;
  }
  int64_t count(int64_t n) const {
    return array ? n - std::count(host.begin(), host.end(), uint8_t{0}) : n;
  }
};

Mask read_mask(const py::object& mask, const Shape& shape, cuda::Stream stream) {
  if (mask.is_none()) return {};
  Mask result;
  result.array = dense_input<bool>("mask", mask, shape, stream);
  const py::array host = to_host(*result.array);  // where it came from the host: no wait
  const auto* const flags = static_cast<const uint8_t*>(host.data());
  result.host.assign(flags, flags + host.size());
  return result;
}

void check_range(const std::string& name, const int64_t* ids, int64_t n, int64_t limit,
                 const std::vector<uint8_t>& mask) {
  for (int64_t i = 0; i < n; ++i)
    if ((mask.empty() || mask[static_cast<size_t>(i)] != 0) && (ids[i] < 0 || ids[i] >= limit))
      value_mismatch(name, "integers in [0, " + std::to_string(limit) + ")",
                     std::to_string(ids[i]));
}

// The ids of an Array as dense int64.
Array wide_ids(const std::string& name, const Array& a, int64_t count, cuda::Stream stream) {
  if (a.dtype() != DType::kInt64 && a.dtype() != DType::kInt32)
    type_mismatch(name, "integers", std::string("an array of ") + name_of(a.dtype()));
  if (a.size() != count) check_shape(name, a, {count});
  const Array flat = a.dense(stream).reshape({count});
  return flat.dtype() == DType::kInt64 ? flat : flat.copy(DType::kInt64, stream);
}

std::vector<int64_t> host_values(const Array& ids) {
  const py::array host = to_host(ids);
  const auto* const data = static_cast<const int64_t*>(host.data());
  return std::vector<int64_t>(data, data + ids.size());
}

// Ids on the device, each in [0, limit) where the mask is set: a private copy of a NumPy array's,
// checked on the host; an Array's, unless they are known there, on the device, which the host waits
// for.
Array checked_ids(const std::string& name, const py::object& ids, int64_t count, int64_t limit,
                  const Mask& mask, cuda::Stream stream) {
  if (const std::optional<Array> a = device_array(ids)) {
    const Array wide = wide_ids(name, *a, count, stream);
    if (count == 0) return wide;
    if (!wide.storage()->known.empty()) {
      check_range(name, host_values(wide).data(), count, limit, mask.host);
      return wide;
    }
    const int64_t* const data = wide.data<int64_t>(stream);
    const cuda::Memory bad = cuda::allocate<int32_t>(1, stream);
    cuda::check_ids(stream, count, data, mask.data(stream), limit, bad.data<int32_t>());
    if (read_back(bad.data<int32_t>(), 1, stream)[0] != 0)
      check_range(name, host_values(wide).data(), count, limit, mask.host);
    return wide;
  }
  const py::array_t<int64_t> host = private_integers(name, ids, {count});
  check_range(name, host.data(), count, limit, mask.host);
  return to_device(name, host, stream);
}

// The same on the host.
std::vector<int64_t> host_ids(const std::string& name, const py::object& ids, int64_t count,
                              int64_t limit, cuda::Stream stream) {
  std::vector<int64_t> values;
  if (const std::optional<Array> a = device_array(ids)) {
    values = host_values(wide_ids(name, *a, count, stream));
  } else {
    const py::array_t<int64_t> host = private_integers(name, ids, {count});
    values.assign(host.data(), host.data() + count);
  }
  check_range(name, values.data(), count, limit, {});
  return values;
}

int64_t count_ids(const py::object& ids) {
  if (const std::optional<Array> a = device_array(ids)) return a->size();
  return as_array("x", ids).size();
}

// Optimisers.

void check_counts(const Arrays& weights, const Arrays& others, const std::string& name) {
  if (others.size() != weights.size())
    value_mismatch(name, std::to_string(weights.size()) + " arrays", std::to_string(others.size()));
}

// Every item's pointers are taken and checked before the first is updated: a call does all of it or
// nothing.
void sgd_step(const Arrays& weights, const Arrays& grads, const Arrays& buffers, double scale,
              double limit, double lr, double momentum, double weight_decay, bool nesterov,
              const py::object&) {
  check_counts(weights, grads, "grads");
  if (!buffers.empty()) check_counts(weights, buffers, "buffers");
  if (weights.empty()) return;
  for_floats("weights", weights[0], [&](auto zero) {
    using T = decltype(zero);
    const cuda::Stream stream = grads[0].stream();
    Arrays held;
    std::vector<SgdArgs<T>> items;
    for (size_t k = 0; k < weights.size(); ++k) {
      const Shape shape = weights[k].shape();
      items.push_back({output<T>("weights", weights[k], shape, stream),
                       input<T>("grads", grads[k], shape, held, stream),
                       buffers.empty() ? nullptr : output<T>("buffers", buffers[k], shape, stream),
                       static_cast<T>(scale), static_cast<T>(limit), static_cast<T>(lr),
                       static_cast<T>(momentum), static_cast<T>(weight_decay), nesterov});
    }
    for (size_t k = 0; k < items.size(); ++k) cuda::sgd(stream, weights[k].size(), items[k]);
  });
}

void adam_step(const Arrays& weights, const Arrays& grads, const Arrays& firsts,
               const Arrays& seconds, double scale, double limit, double lr, double beta1,
               double beta2, double eps, double weight_decay, bool decoupled, int64_t step,
               const py::object&) {
  check_counts(weights, grads, "grads");
  check_counts(weights, firsts, "firsts");
  check_counts(weights, seconds, "seconds");
  if (step < 1) value_mismatch("step", "a positive integer", std::to_string(step));
  if (weights.empty()) return;
  for_floats("weights", weights[0], [&](auto zero) {
    using T = decltype(zero);
    // Rounded to T once, after all arithmetic on the options in double.
    const auto t = static_cast<double>(step);
    AdamArgs<T> item = {};
    item.scale = static_cast<T>(scale);
    item.limit = static_cast<T>(limit);
    item.weight_decay = static_cast<T>(decoupled ? 0.0 : weight_decay);
    item.shrink = static_cast<T>(decoupled ? 1.0 - lr * weight_decay : 1.0);
    item.one_minus_beta1 = static_cast<T>(1.0 - beta1);
    item.beta2 = static_cast<T>(beta2);
    item.one_minus_beta2 = static_cast<T>(1.0 - beta2);
    item.step_size = static_cast<T>(lr / (1.0 - std::pow(beta1, t)));
    item.sqrt_correction2 = static_cast<T>(std::sqrt(1.0 - std::pow(beta2, t)));
    item.eps = static_cast<T>(eps);
    const cuda::Stream stream = grads[0].stream();
    Arrays held;
    std::vector<AdamArgs<T>> items;
    for (size_t k = 0; k < weights.size(); ++k) {
      const Shape shape = weights[k].shape();
      item.weight = output<T>("weights", weights[k], shape, stream);
      item.grad = input<T>("grads", grads[k], shape, held, stream);
      item.first = output<T>("firsts", firsts[k], shape, stream);
      item.second = output<T>("seconds", seconds[k], shape, stream);
      items.push_back(item);
    }
    for (size_t k = 0; k < items.size(); ++k) cuda::adam(stream, weights[k].size(), items[k]);
  });
}

// The blocks of all arrays are added in order, on the host: the CPU's sum.
template <class T>
double sum_squares_typed(const Arrays& arrays, cuda::Stream stream) {
  Arrays held;
  int64_t blocks = 0;
  for (const Array& a : arrays) blocks += cuda::sum_blocks(a.size());
  const cuda::Memory sums = cuda::allocate<double>(blocks, stream);
  double* next = sums.data<double>();
  for (const Array& a : arrays) {
    cuda::sum_squares(stream, a.size(), input<T>("arrays", a, a.shape(), held, stream), next);
    next += cuda::sum_blocks(a.size());
  }
  double total = 0;
  for (const double sum : read_back(sums.data<double>(), blocks, stream)) total += sum;
  return total;
}

double sum_squares(const Arrays& arrays, const py::object&) {
  if (arrays.empty()) return 0;
  return for_floats("arrays", arrays[0], [&](auto zero) {
    return sum_squares_typed<decltype(zero)>(arrays, arrays[0].stream());
  });
}

void scale_all(const Arrays& arrays, double factor) {
  for (const Array& a : arrays)
    for_floats("arrays", a, [&](auto zero) {
      using T = decltype(zero);
      T* const x = output<T>("arrays", a, a.shape(), a.stream());
      cuda::scale(a.stream(), a.size(), static_cast<T>(factor), x);
    });
}

void clip_all(const Arrays& arrays, double limit) {
  for (const Array& a : arrays)
    for_floats("arrays", a, [&](auto zero) {
      using T = decltype(zero);
      T* const x = output<T>("arrays", a, a.shape(), a.stream());
      cuda::clip(a.stream(), a.size(), static_cast<T>(limit), x);
    });
}

// Losses and layers.

py::tuple softmax_cross_entropy(const Array& logits, const py::object& targets,
                                const py::object& mask, const py::object&) {
  check_matrix("logits", logits);
  return for_floats("logits", logits, [&](auto zero) -> py::tuple {
    using T = decltype(zero);
    const cuda::Stream stream = logits.stream();
    const int64_t n = logits.shape(0), classes = logits.shape(1);
    Arrays held;
    const T* const z = input<T>("logits", logits, logits.shape(), held, stream);
    const Mask keep = read_mask(mask, {n}, stream);
    const Array ids = checked_ids("targets", targets, n, classes, keep, stream);
    const Array dlogits = Array::empty({n, classes}, logits.dtype(), stream);
    const cuda::Memory losses = cuda::allocate<double>(n, stream);
    const double weight = 1.0 / static_cast<double>(std::max<int64_t>(keep.count(n), 1));
    cuda::cross_entropy(
        stream, n,
        CrossEntropyArgs<T>{z, ids.data<int64_t>(stream), keep.data(stream), losses.data<double>(),
                            dlogits.data<T>(stream), classes, static_cast<T>(weight)});
    double total = 0;  // in the order of the rows, as on the CPU
    for (const double loss : read_back(losses.data<double>(), n, stream)) total += loss;
    return py::make_tuple(total * weight, dlogits);
  });
}

py::tuple mean_squared_error(const Array& pred, const Array& target, const py::object& mask) {
  return for_floats("pred", pred, [&](auto zero) -> py::tuple {
    using T = decltype(zero);
    const cuda::Stream stream = pred.stream();
    const int64_t n = pred.size();
    Arrays held;
    const T* const p = input<T>("pred", pred, pred.shape(), held, stream);
    const T* const t = input<T>("target", target, pred.shape(), held, stream);
    const Mask keep = read_mask(mask, pred.shape(), stream);
    const Array difference = Array::empty(pred.shape(), pred.dtype(), stream);
    T* const d = difference.data<T>(stream);
    cuda::subtract(stream, n, p, t, keep.data(stream), d);
    const auto count = static_cast<double>(std::max<int64_t>(keep.count(n), 1));
    const double total = sum_squares_typed<T>({difference}, stream);
    cuda::scale(stream, n, static_cast<T>(2 / count), d);
    return py::make_tuple(total / count, difference);
  });
}

Array embedding_forward(const Array& weight, const py::object& ids, const py::object&) {
  check_matrix("weight", weight);
  return for_floats("weight", weight, [&](auto zero) {
    using T = decltype(zero);
    const cuda::Stream stream = weight.stream();
    const int64_t count = count_ids(ids), width = weight.shape(1);
    Arrays held;
    const T* const table = input<T>("weight", weight, weight.shape(), held, stream);
    const Array rows = checked_ids("x", ids, count, weight.shape(0), {}, stream);
    const Array y = Array::empty({count, width}, weight.dtype(), stream);
    cuda::embedding_gather(stream, EmbeddingArgs<T>{rows.data<int64_t>(stream), count, width, table,
                                                    y.data<T>(stream)});
    return y;
  });
}

// The rows of each id that occurs, in order: starts of the segments, their ids, the rows.
struct Segments {
  std::vector<int64_t> starts, ids, order;
};

Segments sort_by_id(const std::vector<int64_t>& ids, int64_t limit) {
  std::vector<int64_t> next(static_cast<size_t>(limit) + 1);
  for (const int64_t id : ids) ++next[static_cast<size_t>(id) + 1];
  Segments s;
  for (size_t id = 0; id < static_cast<size_t>(limit); ++id) {
    if (next[id + 1] > 0) {
      s.starts.push_back(next[id]);
      s.ids.push_back(static_cast<int64_t>(id));
    }
    next[id + 1] += next[id];
  }
  s.starts.push_back(static_cast<int64_t>(ids.size()));
  s.order.resize(ids.size());
  for (size_t i = 0; i < ids.size(); ++i)
    s.order[static_cast<size_t>(next[static_cast<size_t>(ids[i])]++)] = static_cast<int64_t>(i);
  return s;
}

void embedding_backward(const py::object& ids, const Array& dy, const Array& dweight,
                        const py::object&) {
  check_matrix("dweight", dweight);
  for_floats("dweight", dweight, [&](auto zero) {
    using T = decltype(zero);
    const cuda::Stream stream = dy.stream();
    const int64_t count = count_ids(ids), width = dweight.shape(1);
    T* const out = output<T>("dweight", dweight, dweight.shape(), stream);
    Arrays held;
    const T* const gradient = input<T>("dy", dy, {count, width}, held, stream);
    const Segments s =
        sort_by_id(host_ids("x", ids, count, dweight.shape(0), stream), dweight.shape(0));
    std::vector<int64_t> all = s.starts;
    all.insert(all.end(), s.ids.begin(), s.ids.end());
    all.insert(all.end(), s.order.begin(), s.order.end());
    const cuda::Memory memory = cuda::allocate<int64_t>(static_cast<int64_t>(all.size()), stream);
    const auto* const starts = memory.data<int64_t>();
    cuda::copy_to_device(memory.data(), all.data(), all.size() * sizeof(int64_t), stream);
    const auto segments = static_cast<int64_t>(s.ids.size());
    cuda::embedding_scatter(
        stream, cuda::Scatter<T>{segments, width, starts + s.starts.size(), starts,
                                 starts + s.starts.size() + s.ids.size(), gradient, out});
  });
}

Array dropout(const Array& x, double p, uint64_t key, const py::object&) {
  if (!(p >= 0 && p < 1)) value_mismatch("p", "a number in [0, 1)", std::to_string(p));
  return for_floats("x", x, [&](auto zero) {
    using T = decltype(zero);
    const cuda::Stream stream = x.stream();
    Arrays held;
    const T* const from = input<T>("x", x, x.shape(), held, stream);
    const Array y = Array::empty(x.shape(), x.dtype(), stream);
    // p * 2^53 is exact, so the rounding up is that of the real number.
    const auto threshold = static_cast<uint64_t>(std::ceil(std::ldexp(p, 53)));
    cuda::dropout(
        stream, x.size(),
        DropoutArgs<T>{from, y.data<T>(stream), key, threshold, static_cast<T>(1.0 / (1.0 - p))});
    return y;
  });
}

void check_weight(const Array& weight) {
  if (weight.ndim() != 2 || weight.size() == 0)
    value_mismatch("weight", "a matrix with no empty axis", text(weight.shape()));
}

void check_rows(const std::string& name, const Array& a, int64_t columns) {
  if (a.ndim() != 2 || a.shape(1) != columns)
    value_mismatch(name, "shape (rows, " + std::to_string(columns) + ")", text(a.shape()));
}

Array linear_forward(const Array& x, const Array& weight, const std::optional<Array>& bias,
                     const py::object&) {
  check_weight(weight);
  return for_floats("weight", weight, [&](auto zero) {
    using T = decltype(zero);
    const cuda::Stream stream = x.stream();
    const int64_t out = weight.shape(0), in = weight.shape(1);
    check_rows("x", x, in);
    Arrays held;
    const T* const w = input<T>("weight", weight, {out, in}, held, stream);
    const T* const rows = input<T>("x", x, x.shape(), held, stream);
    const T* const b = bias ? input<T>("bias", *bias, {out}, held, stream) : nullptr;
    const Array y = Array::empty({x.shape(0), out}, weight.dtype(), stream);
    cuda::matmul(stream, x.shape(0), out, in, cuda::row_major(rows, in),
                 cuda::transposed(cuda::row_major(w, in)),
                 bias ? cuda::Start::kBias : cuda::Start::kZero, b, y.data<T>(stream), out);
    return y;
  });
}

std::optional<Array> linear_backward(const Array& x, const Array& weight, const Array& dy,
                                     const std::optional<Array>& dweight,
                                     const std::optional<Array>& dbias, bool need_dx,
                                     const py::object&) {
  check_weight(weight);
  return for_floats("weight", weight, [&](auto zero) {
    using T = decltype(zero);
    const cuda::Stream stream = dy.stream();
    const int64_t out = weight.shape(0), in = weight.shape(1);
    check_rows("x", x, in);
    const int64_t count = x.shape(0);
    Arrays held;
    const T* const w = input<T>("weight", weight, {out, in}, held, stream);
    const T* const rows = input<T>("x", x, {count, in}, held, stream);
    const T* const gradient = input<T>("dy", dy, {count, out}, held, stream);
    T* const dw = dweight ? output<T>("dweight", *dweight, {out, in}, stream) : nullptr;
    T* const db = dbias ? output<T>("dbias", *dbias, {out}, stream) : nullptr;
    std::optional<Array> dx;
    if (need_dx) {
      dx = Array::empty({count, in}, weight.dtype(), stream);
      cuda::matmul(stream, count, in, out, cuda::row_major(gradient, out), cuda::row_major(w, in),
                   cuda::Start::kZero, static_cast<const T*>(nullptr), dx->data<T>(stream), in);
    }
    if (dw != nullptr) cuda::add_outer_products(stream, count, out, in, gradient, rows, dw);
    if (db != nullptr) cuda::add_column_sums(stream, count, out, gradient, db);
    return dx;
  });
}

// Elementwise.

// `mask`, a NumPy array of bool, is broadcast to the array's shape.
Array where(const py::object& mask, const Array& a) {
  const cuda::Stream stream = a.stream();
  const py::object full =
      py::module_::import("numpy").attr("broadcast_to")(mask, py::tuple(py::cast(a.shape())));
  const Array keep = dense_input<bool>("mask", full, a.shape(), stream);
  const Array to = Array::empty(a.shape(), a.dtype(), stream);
  cuda::where(stream, keep.view(stream), a.view(stream), to.view(stream));
  return to;
}

void add(const Array& to, const Array& from) {
  for_floats("array", to, [&](auto) {
    if (from.dtype() != to.dtype())
      type_mismatch("values", std::string("an array of ") + name_of(to.dtype()),
                    name_of(from.dtype()));
    check_shape("values", from, to.shape());
    if (!to.writable()) value_mismatch("array", "a writable one", "a read-only one");
    const cuda::Stream stream = from.stream();
    cuda::add(stream, from.view(stream), to.view(stream));
  });
}

}  // namespace

void register_device_training(py::module_& m) {
  using py::literals::operator""_a;
  m.def("sgd_step", &sgd_step, "weights"_a, "grads"_a, "buffers"_a, py::kw_only(), "scale"_a,
        "limit"_a, "lr"_a, "momentum"_a, "weight_decay"_a, "nesterov"_a, "threads"_a,
        "One SGD step on lists of arrays, in place; buffers is empty without momentum.");
  m.def("adam_step", &adam_step, "weights"_a, "grads"_a, "firsts"_a, "seconds"_a, py::kw_only(),
        "scale"_a, "limit"_a, "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a,
        "decoupled"_a, "step"_a, "threads"_a,
        "One step of Adam (decoupled: AdamW) on lists of arrays, in place; step counts from 1.");
  m.def("sum_squares", &sum_squares, "arrays"_a, "threads"_a,
        "The sum of all squares, accumulated in float64 in a fixed order.");
  m.def("scale", &scale_all, "arrays"_a, "factor"_a, "Each array times the factor, in place.");
  m.def("clip", &clip_all, "arrays"_a, "limit"_a, "Each array clipped to [-limit, limit].");
  m.def("softmax_cross_entropy", &softmax_cross_entropy, "logits"_a, "targets"_a, "mask"_a,
        "threads"_a,
        "logits (n, V), targets (n) int64, mask (n) bool or None -> mean loss, dlogits (n, V).");
  m.def("mean_squared_error", &mean_squared_error, "pred"_a, "target"_a, "mask"_a,
        "mean((pred - target)^2) over what the mask (of the same shape, or None) has set, and its "
        "gradient.");
  m.def("embedding_forward", &embedding_forward, "weight"_a, "ids"_a, "threads"_a,
        "weight (V, E), ids (n) -> weight[ids] (n, E).");
  m.def("embedding_backward", &embedding_backward, "ids"_a, "dy"_a, "dweight"_a, "threads"_a,
        "dweight (V, E) += the rows dy (n, E), at ids (n), in the order of the rows.");
  m.def("dropout", &dropout, "x"_a, "p"_a, "key"_a, "threads"_a,
        "x with each element zeroed with probability p, or else divided by 1 - p.");
  m.def("linear_forward", &linear_forward, "x"_a, "weight"_a, "bias"_a = py::none(),
        "threads"_a = py::none(),
        "x (rows, in), weight (out, in), bias (out) or None -> (rows, out).");
  m.def("linear_backward", &linear_backward, "x"_a, "weight"_a, "dy"_a, "dweight"_a, "dbias"_a,
        "need_dx"_a = true, "threads"_a = py::none(),
        "Adds dy^T x to dweight and dy's column sums to dbias (each may be None); returns dy "
        "weight, or None.");
  m.def("where", &where, "mask"_a, "array"_a, "The array where the NumPy mask is True, else 0.");
  m.def("add", &add, "array"_a, "values"_a, "array += values, in place.");
}

}  // namespace fastrnn
