// Packing: the caller's row-major weights into the panels that the microkernel reads, and gradients
// back out. The layouts are those of core/dims.h; panel p = s*G + g holds gate g of hidden units
// s*W … s*W + W - 1.
#ifndef FASTRNN_CPU_PACK_H_
#define FASTRNN_CPU_PACK_H_

#include <string.h>

#include "core/dims.h"
#include "cpu/gemm.h"

namespace fastrnn {
namespace FASTRNN_ISA {

FASTRNN_INLINE int64_t blocks(int64_t n, int64_t w) { return (n + w - 1) / w; }

// Valid lanes of block b when n columns are cut into blocks of w.
FASTRNN_INLINE int valid_lanes(int64_t n, int64_t b, int w) {
  const int64_t left = n - b * w;
  return left < w ? static_cast<int>(left) : w;
}

// dst[c * dst_stride + r] = src[r * src_stride + c] for `rows` × `cols` elements: squares of
// vectors, and what is left over one by one.
template <class T>
FASTRNN_INLINE void transpose(const T* src, int64_t src_stride, int64_t rows, int64_t cols, T* dst,
                              int64_t dst_stride) {
  using V = Vec<T>;
  constexpr int N = V::N;
  int64_t c = 0;
  for (; c + N <= cols; c += N) {
    int64_t r = 0;
    for (; r + N <= rows; r += N) {
      V square[N];
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) square[i] = V::load(src + (r + i) * src_stride + c);
      V::transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) square[i].store(dst + (c + i) * dst_stride + r);
    }
    for (; r < rows; ++r)
      for (int i = 0; i < N; ++i) dst[(c + i) * dst_stride + r] = src[r * src_stride + c + i];
  }
  for (; c < cols; ++c)
    for (int64_t r = 0; r < rows; ++r) dst[c * dst_stride + r] = src[r * src_stride + c];
}

// w (G*H, K) → out [S*G][K][W], panels panel0 … panel1 - 1; lanes past H are zero.
template <class T>
void pack(const T* w, int64_t gates, int64_t H, int64_t K, int64_t panel0, int64_t panel1, T* out) {
  constexpr int W = kWidth<T>;
  for (int64_t p = panel0; p < panel1; ++p) {
    const int64_t s = p / gates, g = p % gates;
    const int lanes = valid_lanes(H, s, W);
    T* const dst = out + p * K * W;
    transpose(w + (g * H + s * W) * K, K, lanes, K, dst, W);
    for (int64_t k = 0; k < K && lanes < W; ++k)
      for (int lane = lanes; lane < W; ++lane) dst[k * W + lane] = 0;
  }
}

// panels [P][K][W] → out [ceil(K/W)][P*W][W], blocks block0 … block1 - 1: row (p, lane) of block b
// holds k = b*W ….
template <class T>
void pack_transposed(const T* panels, int64_t P, int64_t K, int64_t block0, int64_t block1,
                     T* out) {
  constexpr int W = kWidth<T>;
  for (int64_t b = block0; b < block1; ++b) {
    const int n = valid_lanes(K, b, W);
    for (int64_t p = 0; p < P; ++p) {
      T* const dst = out + (b * P + p) * W * W;
      transpose(panels + (p * K + b * W) * W, W, n, W, dst, W);
      for (int lane = 0; lane < W && n < W; ++lane)
        for (int k = n; k < W; ++k) dst[lane * W + k] = 0;
    }
  }
}

// dst[i] = (first ? 0 : dst[i]) + src[i], i < n <= W. An addition in either case: 0 + -0 is 0, as
// if dst had been cleared.
template <class T>
FASTRNN_INLINE void add_lanes(const T* src, int n, bool first, T* dst) {
  using V = Vec<T>;
  if (n == kWidth<T>) {
    for (int v = 0; v < kWidth<T>; v += V::N)
      ((first ? V::zero() : V::load(dst + v)) + V::load(src + v)).store(dst + v);
    return;
  }
  for (int i = 0; i < n; ++i) dst[i] = (first ? T(0) : dst[i]) + src[i];
}

// dw (G*H, K) += acc [ceil(K/W)][S*G*W][W], or = with `first`, the units of superblocks s0 … s1
// - 1.
template <class T>
void add_gradient(const T* acc, int64_t gates, int64_t H, int64_t K, int64_t s0, int64_t s1,
                  bool first, T* dw) {
  constexpr int W = kWidth<T>;
  const int64_t X = blocks(K, W), block = blocks(H, W) * gates * W * W;
  for (int64_t g = 0; g < gates; ++g)
    for (int64_t s = s0; s < s1; ++s)
      for (int u = 0; u < valid_lanes(H, s, W); ++u) {
        const T* src = acc + ((s * gates + g) * W + u) * W;
        T* const dst = dw + (g * H + s * W + u) * K;
        for (int64_t b = 0; b < X; ++b, src += block)
          add_lanes(src, valid_lanes(K, b, W), first, dst + b * W);
      }
}

// The same with acc [S*G][K][W].
template <class T>
void add_table_gradient(const T* acc, int64_t gates, int64_t H, int64_t K, int64_t s0, int64_t s1,
                        bool first, T* dw) {
  constexpr int W = kWidth<T>;
  constexpr int64_t kBlock = 2 * W;  // tokens at once
  T turned[W * kBlock];
  for (int64_t g = 0; g < gates; ++g)
    for (int64_t s = s0; s < s1; ++s) {
      const int lanes = valid_lanes(H, s, W);
      T* const dst = dw + (g * H + s * W) * K;
      for (int64_t k0 = 0; k0 < K; k0 += kBlock) {
        const int64_t n = k0 + kBlock < K ? kBlock : K - k0;
        transpose(acc + ((s * gates + g) * K + k0) * W, W, n, W, turned, kBlock);
        for (int u = 0; u < lanes; ++u)
          for (int64_t k = 0; k < n; k += W)
            add_lanes(turned + u * kBlock + k, valid_lanes(n, k / W, W), first,
                      dst + u * K + k0 + k);
      }
    }
}

// Row `row` of a blocked matrix from n contiguous values; the lanes past n are zero.
template <class T>
FASTRNN_INLINE void put_row(const T* src, int64_t n, int64_t panel_stride, T* dst) {
  constexpr int W = kWidth<T>;
  for (int64_t b = 0; b < blocks(n, W); ++b, dst += panel_stride) {
    const int lanes = valid_lanes(n, b, W);
    const T* const from = src + b * W;
    if (lanes == W) {
      Vec<T>::load(from).store(dst);
      Vec<T>::load(from + Vec<T>::N).store(dst + Vec<T>::N);
      continue;
    }
    for (int lane = 0; lane < W; ++lane) dst[lane] = lane < lanes ? from[lane] : T(0);
  }
}

template <class T>
void gather(const T* x, int64_t stride_x, int64_t cols, int64_t r0, int64_t r1, int64_t panel_rows,
            T* out) {
  constexpr int W = kWidth<T>;
  for (int64_t r = r0; r < r1; ++r) put_row(x + r * stride_x, cols, panel_rows * W, out + r * W);
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn

#endif  // FASTRNN_CPU_PACK_H_
