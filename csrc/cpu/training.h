// Training kernels for one ISA: optimisers, losses, embedding, dropout (contract:
// core/training_kernels.h).
//
// Everything but the exponential is plain loops that the compiler vectorises: no fused
// multiply-adds, and sums run in a fixed number of lanes, so that all ISAs give the same bits here,
// whatever their vector length.
//
// Compiled once per ISA (see cpu/kernels.cc): no std:: templates, everything in the ISA's
// namespace.
#ifndef FASTRNN_CPU_TRAINING_H_
#define FASTRNN_CPU_TRAINING_H_

#include <string.h>

#include "cells/activations.h"
#include "cells/dropout.h"
#include "core/training_kernels.h"
#include "cpu/vec.h"

namespace fastrnn {
namespace FASTRNN_ISA {
namespace training {

FASTRNN_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
FASTRNN_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// Lanes of a sum or maximum: a multiple of every ISA's vector length.
constexpr int kSumLanes = 16;

// (a0 + a8) + ..., halving: the same order on every ISA.
FASTRNN_INLINE double sum_lanes(double* lanes) {
  for (int half = kSumLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// The gradient after both kinds of clipping; NaN stays NaN.
template <class T>
FASTRNN_INLINE T clipped(T grad, T scale, T limit) {
  const T g = grad * scale;
  return g > limit ? limit : (g < -limit ? -limit : g);
}

template <class T>
void sgd(const SgdArgs<T>& args, int64_t begin, int64_t end) {
  const SgdArgs<T> a = args;  // a copy, so that stores to the arrays cannot seem to change it
  if (a.buffer == nullptr) {
    for (int64_t i = begin; i < end; ++i) {
      const T w = a.weight[i];
      a.weight[i] = w - a.lr * (clipped(a.grad[i], a.scale, a.limit) + a.weight_decay * w);
    }
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    const T w = a.weight[i];
    const T g = clipped(a.grad[i], a.scale, a.limit) + a.weight_decay * w;
    const T m = a.momentum * a.buffer[i] + g;
    a.buffer[i] = m;
    a.weight[i] = w - a.lr * (a.nesterov ? g + a.momentum * m : m);
  }
}

template <class T>
void adam(const AdamArgs<T>& args, int64_t begin, int64_t end) {
  const AdamArgs<T> a = args;
  for (int64_t i = begin; i < end; ++i) {
    const T w = a.weight[i] * a.shrink;
    const T g = clipped(a.grad[i], a.scale, a.limit) + a.weight_decay * w;
    const T m = a.first[i] + a.one_minus_beta1 * (g - a.first[i]);
    const T v = a.beta2 * a.second[i] + a.one_minus_beta2 * (g * g);
    a.first[i] = m;
    a.second[i] = v;
    a.weight[i] = w - a.step_size * (m / (square_root(v) / a.sqrt_correction2 + a.eps));
  }
}

template <class T>
double sum_squares(const T* x, int64_t count) {
  double lanes[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) {
    for (int j = 0; j < kSumLanes; ++j) {
      const double value = static_cast<double>(x[i + j]);
      lanes[j] += value * value;
    }
  }
  for (int j = 0; i + j < count; ++j) {
    const double value = static_cast<double>(x[i + j]);
    lanes[j] += value * value;
  }
  return sum_lanes(lanes);
}

// The largest of a row, NaN ignored (it comes back with the exponentials).
template <class T>
T row_max(const T* z, int64_t count) {
  T lanes[kSumLanes];
  for (int j = 0; j < kSumLanes; ++j) lanes[j] = z[j < count ? j : 0];
  int64_t i = kSumLanes;
  for (; i + kSumLanes <= count; i += kSumLanes) {
    for (int j = 0; j < kSumLanes; ++j) lanes[j] = z[i + j] > lanes[j] ? z[i + j] : lanes[j];
  }
  for (; i < count; ++i) lanes[0] = z[i] > lanes[0] ? z[i] : lanes[0];
  T best = lanes[0];
  for (int j = 1; j < kSumLanes; ++j) best = lanes[j] > best || best != best ? lanes[j] : best;
  return best;
}

template <class T>
double row_sum(const T* x, int64_t count) {
  double lanes[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) {
    for (int j = 0; j < kSumLanes; ++j) lanes[j] += static_cast<double>(x[i + j]);
  }
  for (int j = 0; i + j < count; ++j) lanes[j] += static_cast<double>(x[i + j]);
  return sum_lanes(lanes);
}

// With the row's maximum taken out, loss = log(sum_j exp(z_j - max)) - (z_t - max): no overflow,
// and the exponentials are kept in dlogits, where one multiplication turns them into the gradient.
template <class T>
void cross_entropy(const CrossEntropyArgs<T>& args, int64_t begin, int64_t end) {
  using V = Vec<T>;
  const int64_t classes = args.classes;
  for (int64_t row = begin; row < end; ++row) {
    T* dz = args.dlogits + row * classes;
    if (args.mask != nullptr && args.mask[row] == 0) {
      args.loss[row] = 0;
      memset(dz, 0, static_cast<size_t>(classes) * sizeof(T));
      continue;
    }
    const T* z = args.logits + row * classes;
    const int64_t target = args.targets[row];
    const T top = row_max(z, classes);
    const V shift = V::set(top);
    int64_t i = 0;
    for (; i + V::N <= classes; i += V::N) exp_nonpos(V::load(z + i) - shift).store(dz + i);
    if (i < classes) {
      const int rest = static_cast<int>(classes - i);
      exp_nonpos(V::load_n(z + i, rest) - shift).store_n(dz + i, rest);
    }
    const double sum = row_sum(dz, classes);
    const double excess = static_cast<double>(z[target]) - static_cast<double>(top);
    args.loss[row] = __builtin_log(sum) - excess;
    const T factor = static_cast<T>(static_cast<double>(args.weight) / sum);
    for (int64_t j = 0; j < classes; ++j) dz[j] *= factor;
    dz[target] -= args.weight;
  }
}

template <class T>
void embedding_gather(const EmbeddingArgs<T>& args, int64_t begin, int64_t end) {
  const size_t bytes = static_cast<size_t>(args.width) * sizeof(T);
  for (int64_t i = begin; i < end; ++i) {
    memcpy(args.out + i * args.width, args.rows + args.ids[i] * args.width, bytes);
  }
}

// Threads divide the columns: every one goes through all rows in order, so repeated ids are added
// in one order.
template <class T>
void embedding_scatter(const EmbeddingArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < args.count; ++i) {
    const T* from = args.rows + i * args.width;
    T* to = args.out + args.ids[i] * args.width;
    for (int64_t j = begin; j < end; ++j) to[j] += from[j];
  }
}

// Decisions first, a block at a time, as masks of all ones or zeros; then their use. So neither
// loop has a branch.
template <class T>
void dropout(const DropoutArgs<T>& args, int64_t begin, int64_t end) {
  using Bits = typename FloatBits<T>::Bits;
  constexpr int64_t kBlock = 256;
  const DropoutArgs<T> a = args;
  Bits keep[kBlock];
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t count = end - start < kBlock ? end - start : kBlock;
    const uint64_t first = static_cast<uint64_t>(start);
    for (int64_t i = 0; i < count; ++i) {
      const bool keeps = dropout_keeps(a.key, first + static_cast<uint64_t>(i), a.threshold);
      keep[i] = Bits(0) - static_cast<Bits>(keeps);
    }
    for (int64_t i = 0; i < count; ++i) {
      const T scaled = a.x[start + i] * a.scale;
      Bits bits;
      memcpy(&bits, &scaled, sizeof(T));
      bits &= keep[i];
      memcpy(&a.y[start + i], &bits, sizeof(T));
    }
  }
}

}  // namespace training

template <class T>
TrainingKernels<T> training_kernels() {
  return {training::sgd<T>,
          training::adam<T>,
          training::sum_squares<T>,
          training::cross_entropy<T>,
          training::embedding_gather<T>,
          training::embedding_scatter<T>,
          training::dropout<T>};
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn

#endif  // FASTRNN_CPU_TRAINING_H_
