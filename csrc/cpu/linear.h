// Products without a recurrence: the linear layer's forward pass and its weight gradient, from the
// same tiles.
#ifndef FASTRNN_CPU_LINEAR_H_
#define FASTRNN_CPU_LINEAR_H_

#include <string.h>

#include "core/args.h"
#include "cpu/gemm.h"
#include "cpu/pack.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// y rows r0 … r1 - 1, a tile of rows at a time through all panels. See core/kernels.h for the
// scratch.
template <class T>
void linear(const LinearArgs<T>& a, int64_t r0, int64_t r1, T* scratch) {
  constexpr int W = kWidth<T>;
  const int64_t in = blocks(a.in, W), out = blocks(a.out, W), panel = a.in * W;
  T* const y = scratch + in * kTileRows * W;
  for (int64_t r = r0; r < r1;) {
    const int m = tile_rows(r1 - r);
    for (int i = 0; i < m; ++i)
      put_row(a.x + (r + i) * a.stride_x, a.in, int64_t{kTileRows} * W, scratch + i * W);
    const Left<T> rows = {scratch, int64_t{kTileRows} * W,      {0, 0, 0, 0}, 1,
                          in,      valid_lanes(a.in, in - 1, W)};
    const int most = panels_at_once(m);
    for (int64_t p = 0; p < out; p += most) {
      const int together = static_cast<int>(out - p < most ? out - p : most);
      T* c[4];
      Start<T> start = {{}, 0};
      for (int i = 0; i < together; ++i) {
        c[i] = y + (p + i) * kTileRows * W;
        start.panel[i] = a.bias != nullptr ? a.bias + (p + i) * W : Zeros<T>::row;
      }
      multiply<T>(m, together, rows, {a.w + p * panel, W * W, panel}, start, c);
      for (int i = 0; i < together; ++i)
        for (int row = 0; row < m; ++row)
          memcpy(a.y + (r + row) * a.stride_y + (p + i) * W, c[i] + row * W,
                 sizeof(T) * static_cast<size_t>(valid_lanes(a.out, p + i, W)));
    }
    r += m;
  }
}

template <class T>
void outer(const T* dy, const T* x, int64_t rows, int64_t panel_rows, int64_t P, int64_t K_blocks,
           int64_t p0, int64_t p1, T* acc, T* dbias) {
  constexpr int W = kWidth<T>;
  const int64_t stride = panel_rows * W;
  const Run whole = {0, rows};
  for (int64_t p = p0; p < p1; ++p) {
    for (int64_t b = 0; b < K_blocks; b += kOuterPanels)
      outer_panels(dy + p * stride, x + b * stride, stride, outer_count(K_blocks - b), {&whole, 1},
                   W, false, acc + (b * P + p) * W * W, P * W * W, kOuterPanels * P * W * W);
    if (dbias != nullptr) sum_rows(dy + p * stride, {&whole, 1}, dbias + p * W);
  }
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn

#endif  // FASTRNN_CPU_LINEAR_H_
