// Bindings of the training kernels: optimiser steps, norms, softmax cross-entropy, embedding,
// dropout.
//
// Arrays are converted and checked by arrays.h; the GIL is released while a kernel runs.
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "bindings/arrays.h"
#include "core/fpenv.h"
#include "core/memory.h"
#include "core/threads.h"
#include "core/training_kernels.h"
#include "dispatch.h"

namespace fastrnn {

void register_training(py::module_& m);

namespace {

template <class T>
const TrainingKernels<T>& kernels();
template <>
const TrainingKernels<float>& kernels<float>() {
  return dispatch().train_f32;
}
template <>
const TrainingKernels<double>& kernels<double>() {
  return dispatch().train_f64;
}

// Elements below which another thread costs more than it saves.
constexpr int64_t kGrain = 16384;

// Calls fn(begin, end) for ranges that cover [0, n), on up to `threads` threads; ranges are
// multiples of `grain`.
template <class Fn>
void split(int64_t n, int64_t grain, int threads, const Fn& fn) {
  struct Context {
    const Fn* fn;
    int64_t n, step;
  };
  const int64_t units = (n + grain - 1) / grain;
  if (units == 0) return;
  const int64_t per_task = (units + threads - 1) / threads;
  Context context{&fn, n, per_task * grain};
  const int tasks = static_cast<int>((units + per_task - 1) / per_task);
  parallel(
      tasks,
      [](void* ctx, int task) {
        const Context& c = *static_cast<Context*>(ctx);
        const int64_t begin = c.step * task;
        (*c.fn)(begin, std::min(c.n, begin + c.step));
      },
      &context);
}

int64_t rows_per_grain(int64_t width) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width));
}

bool is_float32(const py::array& array) {
  return array.dtype().kind() == 'f' && array.itemsize() == 4;
}

void check_matrix(const std::string& name, const py::array& array) {
  if (array.ndim() != 2) value_mismatch(name, "2 dimensions", text(shape_of(array)));
}

// A private copy of `ids`, each in [0, limit) where `mask` (null: everywhere) is set: the kernels
// index memory with them, and nothing that another thread does to the caller's array may change
// them after the check.
Buffer checked_ids(const std::string& name, const py::handle& ids, int64_t count, int64_t limit,
                   const uint8_t* mask) {
  const py::array_t<int64_t> array = integers(name, ids);
  check_shape(name, array, {count});
  const int64_t* from = array.data();
  Buffer copy(static_cast<size_t>(count) * sizeof(int64_t));
  int64_t* to = copy.data<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = from[i];
    if (id >= 0 && id < limit) {
      to[i] = id;
    } else if (mask != nullptr && mask[i] == 0) {
      to[i] = 0;
    } else {
      value_mismatch(name, "integers in [0, " + std::to_string(limit) + ")", std::to_string(id));
    }
  }
  return copy;
}

// Optimisers.

using Arrays = std::vector<py::array>;

void check_counts(const Arrays& weights, const Arrays& others, const std::string& name) {
  if (others.size() != weights.size()) {
    value_mismatch(name, std::to_string(weights.size()) + " arrays", std::to_string(others.size()));
  }
}

// Every item's pointers are taken and checked before the first is updated: a call does all of it or
// nothing.
template <class Args>
void run_step(const std::vector<Args>& items, const std::vector<int64_t>& sizes, int threads,
              void (*kernel)(const Args&, int64_t, int64_t)) {
  const py::gil_scoped_release unlocked;
  const FpEnv environment;
  for (size_t k = 0; k < items.size(); ++k) {
    split(sizes[k], kGrain, threads,
          [&](int64_t begin, int64_t end) { kernel(items[k], begin, end); });
  }
}

template <class T>
void sgd_typed(const Arrays& weights, const Arrays& grads, const Arrays& buffers, SgdArgs<double> o,
               int threads) {
  std::vector<SgdArgs<T>> items;
  std::vector<py::array_t<T>> held;
  std::vector<int64_t> sizes;
  for (size_t k = 0; k < weights.size(); ++k) {
    const Shape shape = shape_of(weights[k]);
    T* weight = writable<T>("weights", weights[k], shape);
    held.push_back(dense<T>("grads", grads[k], shape));
    T* buffer = buffers.empty() ? nullptr : writable<T>("buffers", buffers[k], shape);
    items.push_back({weight, held.back().data(), buffer, static_cast<T>(o.scale),
                     static_cast<T>(o.limit), static_cast<T>(o.lr), static_cast<T>(o.momentum),
                     static_cast<T>(o.weight_decay), o.nesterov});
    sizes.push_back(weights[k].size());
  }
  run_step(items, sizes, threads, kernels<T>().sgd);
}

void sgd_step(const Arrays& weights, const Arrays& grads, const Arrays& buffers, double scale,
              double limit, double lr, double momentum, double weight_decay, bool nesterov,
              const py::object& threads) {
  check_counts(weights, grads, "grads");
  if (!buffers.empty()) check_counts(weights, buffers, "buffers");
  const int count = thread_count(threads);
  if (weights.empty()) return;
  const SgdArgs<double> options{nullptr, nullptr,  nullptr,      scale,   limit,
                                lr,      momentum, weight_decay, nesterov};
  const auto typed = is_float32(weights[0]) ? sgd_typed<float> : sgd_typed<double>;
  typed(weights, grads, buffers, options, count);
}

struct AdamOptions {
  double scale, limit, lr, beta1, beta2, eps, weight_decay;
  bool decoupled;
  int64_t step;  // 1 at the first
};

template <class T>
void adam_typed(const Arrays& weights, const Arrays& grads, const Arrays& firsts,
                const Arrays& seconds, const AdamOptions& o, int threads) {
  // Rounded to T once, after all arithmetic on the options in double.
  const auto t = static_cast<double>(o.step);
  AdamArgs<T> common{};
  common.scale = static_cast<T>(o.scale);
  common.limit = static_cast<T>(o.limit);
  common.weight_decay = static_cast<T>(o.decoupled ? 0.0 : o.weight_decay);
  common.shrink = static_cast<T>(o.decoupled ? 1.0 - o.lr * o.weight_decay : 1.0);
  common.one_minus_beta1 = static_cast<T>(1.0 - o.beta1);
  common.beta2 = static_cast<T>(o.beta2);
  common.one_minus_beta2 = static_cast<T>(1.0 - o.beta2);
  common.step_size = static_cast<T>(o.lr / (1.0 - std::pow(o.beta1, t)));
  common.sqrt_correction2 = static_cast<T>(std::sqrt(1.0 - std::pow(o.beta2, t)));
  common.eps = static_cast<T>(o.eps);
  std::vector<AdamArgs<T>> items;
  std::vector<py::array_t<T>> held;
  std::vector<int64_t> sizes;
  for (size_t k = 0; k < weights.size(); ++k) {
    const Shape shape = shape_of(weights[k]);
    held.push_back(dense<T>("grads", grads[k], shape));
    AdamArgs<T> item = common;
    item.weight = writable<T>("weights", weights[k], shape);
    item.grad = held.back().data();
    item.first = writable<T>("firsts", firsts[k], shape);
    item.second = writable<T>("seconds", seconds[k], shape);
    items.push_back(item);
    sizes.push_back(weights[k].size());
  }
  run_step(items, sizes, threads, kernels<T>().adam);
}

void adam_step(const Arrays& weights, const Arrays& grads, const Arrays& firsts,
               const Arrays& seconds, double scale, double limit, double lr, double beta1,
               double beta2, double eps, double weight_decay, bool decoupled, int64_t step,
               const py::object& threads) {
  check_counts(weights, grads, "grads");
  check_counts(weights, firsts, "firsts");
  check_counts(weights, seconds, "seconds");
  if (step < 1) value_mismatch("step", "a positive integer", std::to_string(step));
  const int count = thread_count(threads);
  if (weights.empty()) return;
  const AdamOptions options{scale, limit, lr, beta1, beta2, eps, weight_decay, decoupled, step};
  const auto typed = is_float32(weights[0]) ? adam_typed<float> : adam_typed<double>;
  typed(weights, grads, firsts, seconds, options, count);
}

// Blocks never span two arrays, so that the sum is the same whether arrays are parts of one buffer
// or not.
template <class T>
double sum_squares_typed(const Arrays& arrays, int threads) {
  struct Block {
    const T* x;
    int64_t count;
  };
  std::vector<Block> blocks;
  std::vector<py::array_t<T>> held;
  for (const py::array& array : arrays) {
    held.push_back(dense<T>("arrays", array, shape_of(array)));
    const T* x = held.back().data();
    const int64_t size = array.size();
    for (int64_t i = 0; i < size; i += kSumBlock) {
      blocks.push_back({x + i, std::min(kSumBlock, size - i)});
    }
  }
  std::vector<double> sums(blocks.size());
  const py::gil_scoped_release unlocked;
  const FpEnv environment;
  split(static_cast<int64_t>(blocks.size()), kGrain / kSumBlock, threads,
        [&](int64_t begin, int64_t end) {
          for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
            sums[i] = kernels<T>().sum_squares(blocks[i].x, blocks[i].count);
          }
        });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

double sum_squares(const Arrays& arrays, const py::object& threads) {
  const int count = thread_count(threads);
  if (arrays.empty()) return 0;
  return is_float32(arrays[0]) ? sum_squares_typed<float>(arrays, count)
                               : sum_squares_typed<double>(arrays, count);
}

// Losses and layers.

template <class T>
py::tuple cross_entropy_typed(const py::array& logits, const py::object& targets,
                              const py::object& mask, int threads) {
  const py::array_t<T> z = dense<T>("logits", logits, shape_of(logits));
  const int64_t n = z.shape(0);
  const int64_t classes = z.shape(1);
  const uint8_t* keep = nullptr;
  int64_t counted = n;
  py::array_t<bool> flags;
  if (!mask.is_none()) {
    if (!py::isinstance<py::array_t<bool>>(mask)) {
      type_mismatch("mask", "an array of bool", type_name(mask));
    }
    flags = py::array_t<bool, py::array::c_style | py::array::forcecast>::ensure(mask);
    check_shape("mask", flags, {n});
    keep = reinterpret_cast<const uint8_t*>(flags.data());
    counted = n - std::count(keep, keep + n, uint8_t{0});
  }
  const Buffer ids = checked_ids("targets", targets, n, classes, keep);
  Buffer losses(static_cast<size_t>(n) * sizeof(double));
  py::array_t<T> dlogits(Shape{n, classes});
  const double weight = 1.0 / static_cast<double>(std::max<int64_t>(counted, 1));
  double* loss = losses.data<double>();
  const CrossEntropyArgs<T> args{
      z.data(), ids.data<int64_t>(),   keep, loss, dlogits.mutable_data(),
      classes,  static_cast<T>(weight)};
  double total = 0;
  {
    const py::gil_scoped_release unlocked;
    const FpEnv environment;
    split(n, rows_per_grain(classes), threads,
          [&](int64_t begin, int64_t end) { kernels<T>().cross_entropy(args, begin, end); });
    for (int64_t i = 0; i < n; ++i) total += loss[i];
  }
  return py::make_tuple(total * weight, dlogits);
}

py::tuple softmax_cross_entropy(const py::array& logits, const py::object& targets,
                                const py::object& mask, const py::object& threads) {
  check_matrix("logits", logits);
  const auto typed = is_float32(logits) ? cross_entropy_typed<float> : cross_entropy_typed<double>;
  return typed(logits, targets, mask, thread_count(threads));
}

template <class T>
py::array embedding_forward_typed(const py::array& weight, const py::array& ids, int threads) {
  const py::array_t<T> table = dense<T>("weight", weight, shape_of(weight));
  const int64_t count = ids.size();
  const int64_t width = table.shape(1);
  const Buffer rows = checked_ids("x", ids, count, table.shape(0), nullptr);
  py::array_t<T> y(Shape{count, width});
  const EmbeddingArgs<T> args{rows.data<int64_t>(), count, width, table.data(), y.mutable_data()};
  {
    const py::gil_scoped_release unlocked;
    split(count, rows_per_grain(width), threads,
          [&](int64_t begin, int64_t end) { kernels<T>().embedding_gather(args, begin, end); });
  }
  return std::move(y);
}

py::array embedding_forward(const py::array& weight, const py::array& ids,
                            const py::object& threads) {
  check_matrix("weight", weight);
  const auto typed =
      is_float32(weight) ? embedding_forward_typed<float> : embedding_forward_typed<double>;
  return typed(weight, ids, thread_count(threads));
}

template <class T>
void embedding_backward_typed(const py::array& ids, const py::array& dy, const py::array& dweight,
                              int threads) {
  T* out = writable<T>("dweight", dweight, shape_of(dweight));
  const int64_t count = ids.size();
  const int64_t width = dweight.shape(1);
  const py::array_t<T> gradient = dense<T>("dy", dy, {count, width});
  const Buffer rows = checked_ids("x", ids, count, dweight.shape(0), nullptr);
  const EmbeddingArgs<T> args{rows.data<int64_t>(), count, width, gradient.data(), out};
  const int64_t columns = std::max<int64_t>(16, kGrain / std::max<int64_t>(1, count) / 16 * 16);
  const py::gil_scoped_release unlocked;
  const FpEnv environment;
  split(width, columns, threads,
        [&](int64_t begin, int64_t end) { kernels<T>().embedding_scatter(args, begin, end); });
}

void embedding_backward(const py::array& ids, const py::array& dy, const py::array& dweight,
                        const py::object& threads) {
  check_matrix("dweight", dweight);
  const auto typed =
      is_float32(dweight) ? embedding_backward_typed<float> : embedding_backward_typed<double>;
  typed(ids, dy, dweight, thread_count(threads));
}

template <class T>
py::array dropout_typed(const py::array& x, double p, uint64_t key, int threads) {
  const py::array_t<T> from = dense<T>("x", x, shape_of(x));
  py::array_t<T> y(shape_of(x));
  // p * 2^53 is exact, so the rounding up is that of the real number: kept if hash * 2^-53 >= p.
  const auto threshold = static_cast<uint64_t>(std::ceil(std::ldexp(p, 53)));
  const DropoutArgs<T> args{from.data(), y.mutable_data(), key, threshold,
                            static_cast<T>(1.0 / (1.0 - p))};
  {
    const py::gil_scoped_release unlocked;
    const FpEnv environment;
    split(from.size(), kGrain, threads,
          [&](int64_t begin, int64_t end) { kernels<T>().dropout(args, begin, end); });
  }
  return std::move(y);
}

py::array dropout(const py::array& x, double p, uint64_t key, const py::object& threads) {
  if (!(p >= 0 && p < 1)) value_mismatch("p", "a number in [0, 1)", std::to_string(p));
  const auto typed = is_float32(x) ? dropout_typed<float> : dropout_typed<double>;
  return typed(x, p, key, thread_count(threads));
}

}  // namespace

void register_training(py::module_& module) {
  using py::literals::operator""_a;
  module.def("sgd_step", &sgd_step, "weights"_a, "grads"_a, "buffers"_a, py::kw_only(), "scale"_a,
             "limit"_a, "lr"_a, "momentum"_a, "weight_decay"_a, "nesterov"_a, "threads"_a,
             "One SGD step on lists of arrays, in place; buffers is empty without momentum.");
  module.def(
      "adam_step", &adam_step, "weights"_a, "grads"_a, "firsts"_a, "seconds"_a, py::kw_only(),
      "scale"_a, "limit"_a, "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "decoupled"_a,
      "step"_a, "threads"_a,
      "One step of Adam (decoupled: AdamW) on lists of arrays, in place; step counts from 1.");
  module.def("sum_squares", &sum_squares, "arrays"_a, "threads"_a,
             "The sum of all squares, accumulated in float64; the bits do not depend on threads.");
  module.def(
      "softmax_cross_entropy", &softmax_cross_entropy, "logits"_a, "targets"_a, "mask"_a,
      "threads"_a,
      "logits (n, V), targets (n) int64, mask (n) bool or None -> mean loss, dlogits (n, V).");
  module.def("embedding_forward", &embedding_forward, "weight"_a, "ids"_a, "threads"_a,
             "weight (V, E), ids (n) int64 -> weight[ids] (n, E).");
  module.def("embedding_backward", &embedding_backward, "ids"_a, "dy"_a, "dweight"_a, "threads"_a,
             "dweight (V, E) += the rows dy (n, E), at ids (n).");
  module.def("dropout", &dropout, "x"_a, "p"_a, "key"_a, "threads"_a,
             "x with each element zeroed with probability p, or else divided by 1 - p.");
}

}  // namespace fastrnn
