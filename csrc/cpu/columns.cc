// Some columns of a matrix: W_ih over the tokens of a large vocabulary that occur in a call, out of
// the caller's matrix and its gradient back in. Bound by memory, and so plain loops; threads share
// the rows.
#include "core/fpenv.h"
#include "cpu/layer.h"

namespace fastrnn {
namespace {

template <class F>
void for_rows(int64_t rows, int64_t count, int threads, const F& f) {
  const int parts = plan_threads(threads, static_cast<double>(rows * count));
  run_parallel(parts, nullptr, [&](int part) {
    for (int64_t r = cut(rows, parts, part); r < cut(rows, parts, part + 1); ++r) f(r);
  });
}

}  // namespace

template <class T>
void take_columns(const T* from, int64_t stride, int64_t rows, const int64_t* columns,
                  int64_t count, T* to, int threads) {
  for_rows(rows, count, threads, [&](int64_t r) {
    for (int64_t k = 0; k < count; ++k) to[r * count + k] = from[r * stride + columns[k]];
  });
}

template <class T>
void add_columns(const T* from, int64_t rows, int64_t cols, const int64_t* columns, int64_t count,
                 T* to, int threads) {
  const FpEnv env;
  for_rows(rows, count, threads, [&](int64_t r) {
    for (int64_t k = 0; k < count; ++k) to[r * cols + columns[k]] += from[r * count + k];
  });
}

template void take_columns(const float*, int64_t, int64_t, const int64_t*, int64_t, float*, int);
template void take_columns(const double*, int64_t, int64_t, const int64_t*, int64_t, double*, int);
template void add_columns(const float*, int64_t, int64_t, const int64_t*, int64_t, float*, int);
template void add_columns(const double*, int64_t, int64_t, const int64_t*, int64_t, double*, int);

}  // namespace fastrnn
