// The limits that benchmarks hold against our times, measured in the same run and on the same
// instruction set: how fast the arithmetic units multiply and add, how fast memory is read, and how
// fast our own tile goes while it needs nothing from beyond the first-level cache. No kernel beats
// the first two; what is lost between the first and the third are the tile's loads, and what shares
// the core with it.
#ifndef FASTRNN_CPU_LIMITS_H_
#define FASTRNN_CPU_LIMITS_H_

#include "cpu/gemm.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// Enough independent chains to hide the latency of a multiply-add (4 to 5 cycles on 2 units), few
// enough for 16 registers.
constexpr int kLimitChains = 12;

// Returns the operations done: a multiply-add is two.
template <class T>
double fma_peak(int64_t iterations) {
  using V = Vec<T>;
  V chain[kLimitChains];
#pragma GCC unroll 12
  for (int i = 0; i < kLimitChains; ++i) chain[i] = V::set(static_cast<T>(i));
  const V a = V::set(static_cast<T>(0.999)),
          b = V::set(static_cast<T>(1e-3));  // converges to 1: no subnormals
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kLimitChains; ++i) chain[i] = fma(chain[i], a, b);
  }
  V sum = V::zero();
#pragma GCC unroll 12
  for (int i = 0; i < kLimitChains; ++i) sum = sum + chain[i];
  T lanes[V::N];
  sum.store(lanes);
  __asm__ volatile("" : : "r"(lanes) : "memory");  // as if somebody looked at the result
  return 2.0 * kLimitChains * V::N * static_cast<double>(iterations);
}

// The largest tile on 16 KB of weights again and again. tile_peak_scratch: elements it needs,
// zeroed.
template <class T>
constexpr int kTilePeakPanels = panels_at_once(kTileRows);
template <class T>
constexpr int64_t kTilePeakBlocks =
    16384 / (kTilePeakPanels<T> * kWidth<T> * kWidth<T> * static_cast<int64_t>(sizeof(T)));

template <class T>
int64_t tile_peak_scratch() {
  constexpr int W = kWidth<T>;
  return kTilePeakBlocks<T> * W * (kTileRows + kTilePeakPanels<T> * W) +
         kTilePeakPanels<T> * kTileRows * W;
}

template <class T>
double tile_peak(T* scratch, int64_t iterations) {
  constexpr int W = kWidth<T>, NP = kTilePeakPanels<T>;
  constexpr int64_t K = kTilePeakBlocks<T> * W;
  const Right<T> weights = {scratch, W * W, K * W};
  const Left<T> rows = {scratch + NP * K * W, kTileRows * W, {0, 0, 0, 0}, 1, K / W, W};
  T* c[4];
  for (int p = 0; p < NP; ++p) c[p] = scratch + K * (kTileRows + NP * W) + p * kTileRows * W;
  const Start<T> start = go_on<T>(NP, c);
  for (int64_t n = 0; n < iterations; ++n) multiply<T>(kTileRows, NP, rows, weights, start, c);
  return 2.0 * kTileRows * NP * W * static_cast<double>(K * iterations);
}

// Reads p [n], n a multiple of 8 vectors, `repeats` times: a load and an addition a vector, as a
// product with one row reads its weights. Returns the sum.
template <class T>
double read_memory(const T* p, int64_t n, int64_t repeats) {
  using V = Vec<T>;
  constexpr int kSums = 8;
  V sum[kSums];
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i) sum[i] = V::zero();
  for (int64_t r = 0; r < repeats; ++r) {
    for (int64_t i = 0; i < n; i += kSums * V::N) {
#pragma GCC unroll 8
      for (int j = 0; j < kSums; ++j) sum[j] = sum[j] + V::load(p + i + j * V::N);
    }
    __asm__ volatile("" : : "r"(p) : "memory");  // as if the memory changed between two passes
  }
  V total = V::zero();
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i) total = total + sum[i];
  T lanes[V::N];
  total.store(lanes);
  double result = 0;
  for (int i = 0; i < V::N; ++i) result += static_cast<double>(lanes[i]);
  return result;
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn

#endif  // FASTRNN_CPU_LIMITS_H_
