// Bindings of the training kernels: optimiser steps, norms, softmax cross-entropy, embedding,
// dropout.
//
// The Python layer validates and converts what users pass; what is checked here is what memory
// safety needs. Arrays are C-contiguous, aligned and of one dtype (float32 or float64). The GIL is
// released while a kernel runs.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "core/fpenv.h"
#include "core/memory.h"
#include "core/threads.h"
#include "core/training_kernels.h"
#include "dispatch.h"

namespace py = pybind11;

namespace fastrnn {
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

int check_threads(int threads) {
  if (threads < 1)
    throw py::value_error("threads: expected an integer from 1 to 1024, got " +
                          std::to_string(threads));
  return std::min(threads, kMaxThreads);
}

// --- arrays
// ---------------------------------------------------------------------------------------------------------

bool is_float32(const py::array& array) { return py::isinstance<py::array_t<float>>(array); }

// The elements of `array`, which has dtype T and, unless size < 0, `size` of them.
template <class T>
const T* elements(const py::array& array, const char* name, int64_t size = -1) {
  if (!py::isinstance<py::array_t<T>>(array)) {
    throw py::type_error(std::string(name) + ": expected " +
                         py::str(py::dtype::of<T>()).cast<std::string>() + ", got " +
                         py::str(array.dtype()).cast<std::string>());
  }
  constexpr int kWanted = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if ((array.flags() & kWanted) != kWanted) {
    throw py::value_error(std::string(name) + ": expected an aligned C-contiguous array");
  }
  if (size >= 0 && array.size() != size) {
    throw py::value_error(std::string(name) + ": expected " + std::to_string(size) +
                          " elements, got " + std::to_string(array.size()));
  }
  return static_cast<const T*>(array.data());
}

template <class T>
T* writable(py::array& array, const char* name, int64_t size = -1) {
  elements<T>(array, name, size);
  if (!array.writeable()) throw py::value_error(std::string(name) + ": expected a writable array");
  return static_cast<T*>(array.mutable_data());
}

void check_matrix(const py::array& array, const char* name) {
  if (array.ndim() != 2) {
    throw py::value_error(std::string(name) + ": expected 2 dimensions, got " +
                          std::to_string(array.ndim()));
  }
}

// A private copy of `ids`, each in [0, limit) where `mask` (null: everywhere) is set: the kernels
// index memory with them, and nothing that another thread does to the caller's array may change
// them after the check.
Buffer checked_ids(const py::array& ids, int64_t limit, const uint8_t* mask, const char* name) {
  const int64_t* from = elements<int64_t>(ids, name);
  const auto count = static_cast<size_t>(ids.size());
  Buffer copy(count * sizeof(int64_t));
  int64_t* to = copy.data<int64_t>();
  for (size_t i = 0; i < count; ++i) {
    const int64_t id = from[i];
    if (id >= 0 && id < limit) {
      to[i] = id;
    } else if (mask != nullptr && mask[i] == 0) {
      to[i] = 0;
    } else {
      throw py::value_error(std::string(name) + ": expected integers in [0, " +
                            std::to_string(limit) + "), got " + std::to_string(id));
    }
  }
  return copy;
}

// --- optimisers
// -----------------------------------------------------------------------------------------------------

using Arrays = std::vector<py::array>;

void check_counts(const Arrays& weights, const Arrays& others, const char* name) {
  if (others.size() != weights.size()) {
    throw py::value_error(std::string(name) + ": expected " + std::to_string(weights.size()) +
                          " arrays, got " + std::to_string(others.size()));
  }
}

// Every item's pointers are taken and checked before the first is updated: a call does all of it or
// nothing.
template <class T, class Args>
void run_step(std::vector<Args>& items, const std::vector<int64_t>& sizes, int threads,
              void (*kernel)(const Args&, int64_t, int64_t)) {
  py::gil_scoped_release unlocked;
  FpEnv environment;
  for (size_t k = 0; k < items.size(); ++k) {
    split(sizes[k], kGrain, threads,
          [&](int64_t begin, int64_t end) { kernel(items[k], begin, end); });
  }
}

template <class T>
void sgd_typed(Arrays& weights, const Arrays& grads, Arrays& buffers, double scale, double limit,
               double lr, double momentum, double weight_decay, bool nesterov, int threads) {
  std::vector<SgdArgs<T>> items;
  std::vector<int64_t> sizes;
  for (size_t k = 0; k < weights.size(); ++k) {
    const int64_t n = weights[k].size();
    T* weight = writable<T>(weights[k], "weights");
    T* buffer = buffers.empty() ? nullptr : writable<T>(buffers[k], "buffers", n);
    items.push_back({weight, elements<T>(grads[k], "grads", n), buffer, static_cast<T>(scale),
                     static_cast<T>(limit), static_cast<T>(lr), static_cast<T>(momentum),
                     static_cast<T>(weight_decay), nesterov});
    sizes.push_back(n);
  }
  run_step<T>(items, sizes, threads, kernels<T>().sgd);
}

void sgd_step(Arrays weights, const Arrays& grads, Arrays buffers, double scale, double limit,
              double lr, double momentum, double weight_decay, bool nesterov, int threads) {
  check_counts(weights, grads, "grads");
  if (!buffers.empty()) check_counts(weights, buffers, "buffers");
  if (weights.empty()) return;
  const auto typed = is_float32(weights[0]) ? sgd_typed<float> : sgd_typed<double>;
  typed(weights, grads, buffers, scale, limit, lr, momentum, weight_decay, nesterov,
        check_threads(threads));
}

struct AdamOptions {
  double scale, limit, lr, beta1, beta2, eps, weight_decay;
  bool decoupled;
  int64_t step;  // 1 at the first
};

template <class T>
void adam_typed(Arrays& weights, const Arrays& grads, Arrays& firsts, Arrays& seconds,
                const AdamOptions& o, int threads) {
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
  std::vector<int64_t> sizes;
  for (size_t k = 0; k < weights.size(); ++k) {
    const int64_t n = weights[k].size();
    AdamArgs<T> item = common;
    item.weight = writable<T>(weights[k], "weights");
    item.grad = elements<T>(grads[k], "grads", n);
    item.first = writable<T>(firsts[k], "firsts", n);
    item.second = writable<T>(seconds[k], "seconds", n);
    items.push_back(item);
    sizes.push_back(n);
  }
  run_step<T>(items, sizes, threads, kernels<T>().adam);
}

void adam_step(Arrays weights, const Arrays& grads, Arrays firsts, Arrays seconds, double scale,
               double limit, double lr, double beta1, double beta2, double eps, double weight_decay,
               bool decoupled, int64_t step, int threads) {
  check_counts(weights, grads, "grads");
  check_counts(weights, firsts, "firsts");
  check_counts(weights, seconds, "seconds");
  if (step < 1)
    throw py::value_error("step: expected a positive integer, got " + std::to_string(step));
  if (weights.empty()) return;
  const AdamOptions options{scale, limit, lr, beta1, beta2, eps, weight_decay, decoupled, step};
  const auto typed = is_float32(weights[0]) ? adam_typed<float> : adam_typed<double>;
  typed(weights, grads, firsts, seconds, options, check_threads(threads));
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
  for (const py::array& array : arrays) {
    const T* x = elements<T>(array, "arrays");
    for (int64_t i = 0; i < array.size(); i += kSumBlock) {
      blocks.push_back({x + i, std::min(kSumBlock, array.size() - i)});
    }
  }
  std::vector<double> sums(blocks.size());
  py::gil_scoped_release unlocked;
  FpEnv environment;
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

double sum_squares(const Arrays& arrays, int threads) {
  if (arrays.empty()) return 0;
  return is_float32(arrays[0]) ? sum_squares_typed<float>(arrays, check_threads(threads))
                               : sum_squares_typed<double>(arrays, check_threads(threads));
}

// --- losses and layers
// ----------------------------------------------------------------------------------------------

template <class T>
py::tuple cross_entropy_typed(const py::array& logits, const py::array& targets,
                              const py::object& mask, int threads) {
  const T* z = elements<T>(logits, "logits");
  const int64_t n = logits.shape(0);
  const int64_t classes = logits.shape(1);
  if (targets.size() != n) {
    throw py::value_error("targets: expected " + std::to_string(n) + " elements, got " +
                          std::to_string(targets.size()));
  }
  const uint8_t* keep = nullptr;
  int64_t counted = n;
  if (!mask.is_none()) {
    keep = reinterpret_cast<const uint8_t*>(elements<bool>(mask.cast<py::array>(), "mask", n));
    counted = n - std::count(keep, keep + n, uint8_t{0});
  }
  const Buffer ids = checked_ids(targets, classes, keep, "targets");
  py::array_t<T> dlogits({n, classes});
  Buffer losses(static_cast<size_t>(n) * sizeof(double));
  CrossEntropyArgs<T> args{};
  args.logits = z;
  args.targets = ids.data<int64_t>();
  args.mask = keep;
  args.loss = losses.data<double>();
  args.dlogits = dlogits.mutable_data();
  args.classes = classes;
  args.weight = static_cast<T>(1.0 / static_cast<double>(std::max<int64_t>(counted, 1)));
  double total = 0;
  {
    py::gil_scoped_release unlocked;
    FpEnv environment;
    split(n, rows_per_grain(classes), threads,
          [&](int64_t begin, int64_t end) { kernels<T>().cross_entropy(args, begin, end); });
    for (int64_t i = 0; i < n; ++i) total += args.loss[i];
  }
  return py::make_tuple(total / static_cast<double>(std::max<int64_t>(counted, 1)), dlogits);
}

py::tuple softmax_cross_entropy(const py::array& logits, const py::array& targets,
                                const py::object& mask, int threads) {
  check_matrix(logits, "logits");
  return is_float32(logits)
             ? cross_entropy_typed<float>(logits, targets, mask, check_threads(threads))
             : cross_entropy_typed<double>(logits, targets, mask, check_threads(threads));
}

template <class T>
py::array embedding_forward_typed(const py::array& weight, const py::array& ids, int threads) {
  const T* table = elements<T>(weight, "weight");
  const Buffer rows = checked_ids(ids, weight.shape(0), nullptr, "x");
  const int64_t count = ids.size();
  const int64_t width = weight.shape(1);
  py::array_t<T> y({count, width});
  const EmbeddingArgs<T> args{rows.data<int64_t>(), count, width, table, y.mutable_data()};
  {
    py::gil_scoped_release unlocked;
    split(count, rows_per_grain(width), threads,
          [&](int64_t begin, int64_t end) { kernels<T>().embedding_gather(args, begin, end); });
  }
  return std::move(y);
}

py::array embedding_forward(const py::array& weight, const py::array& ids, int threads) {
  check_matrix(weight, "weight");
  return is_float32(weight) ? embedding_forward_typed<float>(weight, ids, check_threads(threads))
                            : embedding_forward_typed<double>(weight, ids, check_threads(threads));
}

template <class T>
void embedding_backward_typed(const py::array& ids, const py::array& dy, py::array& dweight,
                              int threads) {
  const int64_t width = dweight.shape(1);
  const int64_t count = ids.size();
  const Buffer rows = checked_ids(ids, dweight.shape(0), nullptr, "x");
  if (dy.shape(0) != count || dy.shape(1) != width) {
    throw py::value_error("dy: expected shape (" + std::to_string(count) + ", " +
                          std::to_string(width) + ")");
  }
  const EmbeddingArgs<T> args{rows.data<int64_t>(), count, width, elements<T>(dy, "dy"),
                              writable<T>(dweight, "dweight")};
  py::gil_scoped_release unlocked;
  FpEnv environment;
  const int64_t columns = std::max<int64_t>(16, kGrain / std::max<int64_t>(1, count) / 16 * 16);
  split(width, columns, threads,
        [&](int64_t begin, int64_t end) { kernels<T>().embedding_scatter(args, begin, end); });
}

void embedding_backward(const py::array& ids, const py::array& dy, py::array dweight, int threads) {
  check_matrix(dy, "dy");
  check_matrix(dweight, "dweight");
  const auto typed =
      is_float32(dweight) ? embedding_backward_typed<float> : embedding_backward_typed<double>;
  typed(ids, dy, dweight, check_threads(threads));
}

template <class T>
py::array dropout_typed(const py::array& x, double p, uint64_t key, int threads) {
  const T* from = elements<T>(x, "x");
  py::array_t<T> y(std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
  // p * 2^53 is exact, so the rounding up is that of the real number: kept if hash * 2^-53 >= p.
  const auto threshold = static_cast<uint64_t>(std::ceil(std::ldexp(p, 53)));
  const DropoutArgs<T> args{from, y.mutable_data(), key, threshold,
                            static_cast<T>(1.0 / (1.0 - p))};
  {
    py::gil_scoped_release unlocked;
    FpEnv environment;
    split(x.size(), kGrain, threads,
          [&](int64_t begin, int64_t end) { kernels<T>().dropout(args, begin, end); });
  }
  return std::move(y);
}

py::array dropout(const py::array& x, double p, uint64_t key, int threads) {
  if (!(p >= 0 && p < 1))
    throw py::value_error("p: expected a number in [0, 1), got " + std::to_string(p));
  return is_float32(x) ? dropout_typed<float>(x, p, key, check_threads(threads))
                       : dropout_typed<double>(x, p, key, check_threads(threads));
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
