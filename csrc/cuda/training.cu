#include "cuda/training.h"

#include <math.h>

#include "cells/activations.h"
#include "cells/dropout.h"
#include "cuda/simt.h"

namespace fastrnn {
namespace cuda {

namespace {

FASTRNN_HD inline float square_root(float x) { return ::sqrtf(x); }
FASTRNN_HD inline double square_root(double x) { return ::sqrt(x); }

// The gradient after both kinds of clipping; NaN stays NaN.
template <class T>
FASTRNN_HD T clipped(T grad, T scale, T limit) {
  const T g = grad * scale;
  return g > limit ? limit : (g < -limit ? -limit : g);
}

template <class T>
struct Sgd {
  SgdArgs<T> a;
  FASTRNN_HD void operator()(int64_t i) const {
    const T w = a.weight[i];
    const T g = clipped(a.grad[i], a.scale, a.limit) + a.weight_decay * w;
    if (a.buffer == nullptr) {
      a.weight[i] = w - a.lr * g;
      return;
    }
    const T m = a.momentum * a.buffer[i] + g;
    a.buffer[i] = m;
    a.weight[i] = w - a.lr * (a.nesterov ? g + a.momentum * m : m);
  }
};

template <class T>
struct Adam {
  AdamArgs<T> a;
  FASTRNN_HD void operator()(int64_t i) const {
    const T w = a.weight[i] * a.shrink;
    const T g = clipped(a.grad[i], a.scale, a.limit) + a.weight_decay * w;
    const T m = a.first[i] + a.one_minus_beta1 * (g - a.first[i]);
    const T v = a.beta2 * a.second[i] + a.one_minus_beta2 * (g * g);
    a.first[i] = m;
    a.second[i] = v;
    a.weight[i] = w - a.step_size * (m / (square_root(v) / a.sqrt_correction2 + a.eps));
  }
};

constexpr int kSumLanes = 16;  // of cpu/training.h: sums run in this many lanes, on every device
constexpr int kSumThreads = 128;

// (a0 + a8) + ..., halving; lanes in shared memory, a lane a thread.
FASTRNN_DEVICE void sum_lanes(double* lanes, int lane_index) {
  for (int half = kSumLanes / 2; half > 0; half /= 2) {
    sync_threads();
    if (lane_index < half) lanes[lane_index] += lanes[lane_index + half];
  }
  sync_threads();
}

// A group of kSumLanes threads a block of kSumBlock elements.
template <class T>
FASTRNN_KERNEL void FASTRNN_LAUNCH_BOUNDS(kSumThreads, 1)
    sum_squares_kernel(int64_t n, const T* x, double* sums) {
  constexpr int kGroups = kSumThreads / kSumLanes;
  const int group = static_cast<int>(thread_index()) / kSumLanes;
  const int j = static_cast<int>(thread_index()) % kSumLanes;
  const int64_t block = static_cast<int64_t>(block_index().x) * kGroups + group;
  const int64_t begin = block * kSumBlock;
  const int64_t end = begin + kSumBlock < n ? begin + kSumBlock : n;
  double sum = 0;
  for (int64_t i = begin + j; i < end; i += kSumLanes) {
    const double value = static_cast<double>(x[i]);
    sum += value * value;
  }
  double* const lanes = shared_memory<double>() + group * kSumLanes;
  lanes[j] = sum;
  sum_lanes(lanes, j);
  if (j == 0 && begin < n) sums[block] = lanes[0];
}

// The largest of the threads' values, in values[0]; all threads are through when it returns. NaN is
// ignored: it comes back with the exponentials.
template <class T>
FASTRNN_DEVICE void largest(T* values) {
  const int t = static_cast<int>(thread_index());
  for (int half = kSumThreads / 2; half > 0; half /= 2) {
    sync_threads();
    if (t < half && !(values[t] >= values[t + half])) {
      if (values[t + half] == values[t + half]) values[t] = values[t + half];
    }
  }
  sync_threads();
}

// One block a row. As the CPU does it: exponentials with the largest taken out, their sum in 16
// lanes of double, one multiplication for the gradient.
template <class T>
FASTRNN_KERNEL void FASTRNN_LAUNCH_BOUNDS(kSumThreads, 1)
    cross_entropy_kernel(CrossEntropyArgs<T> a) {
  using V = scalar::Scalar<T>;
  const int64_t row = block_index().x, classes = a.classes;
  const int t = static_cast<int>(thread_index());
  T* const dz = a.dlogits + row * classes;
  if (a.mask != nullptr && a.mask[row] == 0) {
    for (int64_t i = t; i < classes; i += kSumThreads) dz[i] = T(0);
    if (t == 0) a.loss[row] = 0;
    return;
  }
  const T* const z = a.logits + row * classes;
  double* const lanes = shared_memory<double>();
  T* const tops = reinterpret_cast<T*>(lanes + kSumLanes);
  T top = z[t < classes ? t : 0];
  for (int64_t i = t; i < classes; i += kSumThreads) top = z[i] > top || top != top ? z[i] : top;
  tops[t] = top;
  largest(tops);
  top = tops[0];
  for (int64_t i = t; i < classes; i += kSumThreads) {
    (scalar::exp_nonpos(V::set(z[i]) - V::set(top))).store(dz + i);
  }
  sync_threads();
  if (t < kSumLanes) {
    double sum = 0;
    for (int64_t i = t; i < classes; i += kSumLanes) sum += static_cast<double>(dz[i]);
    lanes[t] = sum;
  }
  sum_lanes(lanes, t);
  const double sum = lanes[0];
  const int64_t target = a.targets[row];
  const T factor = static_cast<T>(static_cast<double>(a.weight) / sum);
  for (int64_t i = t; i < classes; i += kSumThreads) {
    const T p = dz[i] * factor;
    dz[i] = i == target ? p - a.weight : p;
  }
  if (t == 0) {
    const double excess = static_cast<double>(z[target]) - static_cast<double>(top);
    a.loss[row] = ::log(sum) - excess;
  }
}

template <class T>
struct Subtract {
  const T *pred, *target;
  const uint8_t* keep;
  T* difference;
  FASTRNN_HD void operator()(int64_t i) const {
    difference[i] = keep == nullptr || keep[i] != 0 ? pred[i] - target[i] : T(0);
  }
};

template <class T>
struct Gather {
  EmbeddingArgs<T> a;
  FASTRNN_HD void operator()(int64_t i) const {
    a.out[i] = a.rows[a.ids[i / a.width] * a.width + i % a.width];
  }
};

// A thread a segment and column.
template <class T>
struct AddRows {
  Scatter<T> a;
  FASTRNN_HD void operator()(int64_t i) const {
    const int64_t s = i / a.width, j = i % a.width;
    T* const to = a.out + a.ids[s] * a.width + j;
    T sum = *to;
    for (int64_t k = a.starts[s]; k < a.starts[s + 1]; ++k) sum += a.dy[a.order[k] * a.width + j];
    *to = sum;
  }
};

template <class T>
struct Drop {
  DropoutArgs<T> a;
  FASTRNN_HD void operator()(int64_t i) const {
    const T scaled = a.x[i] * a.scale;
    a.y[i] = scalar::dropout_keeps(a.key, static_cast<uint64_t>(i), a.threshold) ? scaled : T(0);
  }
};

// All who find one write the same.
struct CheckIds {
  const int64_t* ids;
  const uint8_t* mask;
  int64_t limit;
  int32_t* bad;
  FASTRNN_HD void operator()(int64_t i) const {
    const bool counts = mask == nullptr || mask[i] != 0;
    if (counts && (ids[i] < 0 || ids[i] >= limit)) *bad = 1;
  }
};

}  // namespace

template <class T>
void sgd(Stream stream, int64_t n, const SgdArgs<T>& args) {
  for_each(stream, n, Sgd<T>{args});
}

template <class T>
void adam(Stream stream, int64_t n, const AdamArgs<T>& args) {
  for_each(stream, n, Adam<T>{args});
}

template <class T>
void sum_squares(Stream stream, int64_t n, const T* x, double* sums) {
  if (n == 0) return;
  constexpr int64_t kGroups = kSumThreads / kSumLanes;
  Launch how;
  how.grid.x = static_cast<unsigned>((sum_blocks(n) + kGroups - 1) / kGroups);
  how.block = kSumThreads;
  how.shared = kSumThreads * sizeof(double);
  launch(stream, how, sum_squares_kernel<T>, n, x, sums);
}

template <class T>
void cross_entropy(Stream stream, int64_t n, const CrossEntropyArgs<T>& args) {
  if (n == 0) return;
  Launch how;
  how.grid.x = static_cast<unsigned>(n);
  how.block = kSumThreads;
  how.shared = kSumLanes * sizeof(double) + kSumThreads * sizeof(T);
  launch(stream, how, cross_entropy_kernel<T>, args);
}

template <class T>
void subtract(Stream stream, int64_t n, const T* pred, const T* target, const uint8_t* keep,
              T* difference) {
  for_each(stream, n, Subtract<T>{pred, target, keep, difference});
}

template <class T>
void embedding_gather(Stream stream, const EmbeddingArgs<T>& args) {
  for_each(stream, args.count * args.width, Gather<T>{args});
}

template <class T>
void embedding_scatter(Stream stream, const Scatter<T>& args) {
  for_each(stream, args.segments * args.width, AddRows<T>{args});
}

template <class T>
void dropout(Stream stream, int64_t n, const DropoutArgs<T>& args) {
  for_each(stream, n, Drop<T>{args});
}

void check_ids(Stream stream, int64_t n, const int64_t* ids, const uint8_t* mask, int64_t limit,
               int32_t* bad) {
  fill_bytes(bad, 0, sizeof(*bad), stream);
  for_each(stream, n, CheckIds{ids, mask, limit, bad});
}

#define FASTRNN_TRAINING(T)                                                        \
  template void sgd(Stream, int64_t, const SgdArgs<T>&);                           \
  template void adam(Stream, int64_t, const AdamArgs<T>&);                         \
  template void sum_squares(Stream, int64_t, const T*, double*);                   \
  template void cross_entropy(Stream, int64_t, const CrossEntropyArgs<T>&);        \
  template void subtract(Stream, int64_t, const T*, const T*, const uint8_t*, T*); \
  template void embedding_gather(Stream, const EmbeddingArgs<T>&);                 \
  template void embedding_scatter(Stream, const Scatter<T>&);                      \
  template void dropout(Stream, int64_t, const DropoutArgs<T>&)

FASTRNN_TRAINING(float);
FASTRNN_TRAINING(double);

}  // namespace cuda
}  // namespace fastrnn
