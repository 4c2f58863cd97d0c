// The linear layer over many rows: packs, splits rows or panels among threads, calls the kernels of
// cpu/linear.h.
#include <algorithm>

#include "core/fpenv.h"
#include "cpu/layer.h"
#include "cpu/stack.h"

namespace fastrnn {
namespace {

// Rows handed to a thread at a time: enough to reuse the packed weights, few enough to balance.
constexpr int64_t kLinearRows = 96;

// y = x wᵀ + b with w and bias packed.
template <class T>
void multiply_rows(const Kernels<T>& k, const LinearArgs<T>& args, int threads,
                   Interrupt* interrupt) {
  const int W = k.width;
  const int64_t per_task = k.rows * (ceil_div(args.in, W) + ceil_div(args.out, W)) * W;
  const int parts = plan_threads(
      threads, static_cast<double>(args.rows) * static_cast<double>(args.in * args.out));
  const int tasks = static_cast<int>(std::min<int64_t>(parts, ceil_div(args.rows, k.rows)));
  Buffer scratch = make_buffer<T>(tasks, per_task);
  run_parallel(tasks, interrupt, [&](int task) {
    const int64_t end = cut(args.rows, tasks, task + 1);
    for (int64_t r = cut(args.rows, tasks, task); r < end; r += kLinearRows) {
      k.linear(args, r, std::min(end, r + kLinearRows),
               scratch.template data<T>() + task * per_task);
      if (interrupt != nullptr && interrupt_tick(interrupt)) return;
    }
  });
}

}  // namespace

template <class T>
void linear_forward(const T* x, int64_t stride_x, int64_t rows, int64_t in, int64_t out, const T* w,
                    const T* b, T* y, int threads, Interrupt* interrupt) {
  const FpEnv env;
  if (rows == 0) return;
  const Kernels<T>& k = typed_kernels<T>();
  const int W = k.width;
  const int64_t P = ceil_div(out, W);
  Buffer packed = make_buffer<T>(in + 1, P * W);
  T* const panels = packed.template data<T>();
  T* const bias = panels + in * P * W;
  k.pack(w, 1, out, in, 0, P, panels);
  if (b != nullptr) {
    std::memset(bias, 0, sizeof(T) * static_cast<size_t>(P * W));
    std::memcpy(bias, b, sizeof(T) * static_cast<size_t>(out));
  }
  multiply_rows(k, {rows, in, out, x, stride_x, panels, b == nullptr ? nullptr : bias, y, out},
                threads, interrupt);
}

template <class T>
void linear_backward(const T* x, int64_t stride_x, const T* dy, int64_t stride_dy, int64_t rows,
                     int64_t in, int64_t out, const T* w, T* dx, T* dw, T* db, int threads,
                     Interrupt* interrupt) {
  const FpEnv env;
  if (rows == 0) return;
  const Kernels<T>& k = typed_kernels<T>();
  const int W = k.width;
  const int64_t P = ceil_div(out, W), X = ceil_div(in, W);
  const double work = static_cast<double>(rows) * static_cast<double>(in * out);
  if (dx != nullptr) {  // dx = dy w: the rows of w as they are, `out` of them, are the packed k of
                        // the product
    Buffer packed = make_buffer<T>(out, X * W);
    T* const panels = packed.template data<T>();
    for (int64_t b = 0; b < X; ++b)
      for (int64_t o = 0; o < out; ++o) {
        T* const row = panels + (b * out + o) * W;
        const int64_t n = std::min<int64_t>(W, in - b * W);
        std::memcpy(row, w + o * in + b * W, sizeof(T) * static_cast<size_t>(n));
        std::memset(row + n, 0, sizeof(T) * static_cast<size_t>(W - n));
      }
    multiply_rows(k, {rows, out, in, dy, stride_dy, panels, nullptr, dx, in}, threads, interrupt);
  }
  if (dw == nullptr && db == nullptr) return;

  // dw: blocks of rows from the last to the first, as in the recurrent layers; threads share the
  // panels.
  constexpr int64_t kRows = 256;
  Buffer accumulators = make_buffer<T>(X * W + 1, P * W);
  T* const acc = accumulators.template data<T>();
  T* const bias = acc + X * W * P * W;
  std::memset(acc, 0, accumulators.size());
  const int64_t slab = padded_rows(std::min(rows, kRows));
  Buffer slabs = make_buffer<T>((P + X) * slab, W);
  T* const dy_panels = slabs.template data<T>();
  T* const x_panels = dy_panels + P * slab * W;
  const int parts = static_cast<int>(std::min<int64_t>(P, plan_threads(threads, work)));
  for (int64_t end = rows; end > 0; end -= std::min(end, kRows)) {
    const int64_t begin = end - std::min(end, kRows), n = end - begin;
    run_parallel(parts, interrupt, [&](int part) {
      const int64_t r0 = cut(n, parts, part), r1 = cut(n, parts, part + 1);
      k.gather(dy + begin * stride_dy, stride_dy, out, r0, r1, slab, dy_panels);
      k.gather(x + begin * stride_x, stride_x, in, r0, r1, slab, x_panels);
    });
    run_parallel(parts, interrupt, [&](int part) {
      k.outer(dy_panels, x_panels, n, slab, P, X, cut(P, parts, part), cut(P, parts, part + 1), acc,
              bias);
    });
  }
  if (dw != nullptr) k.add_gradient(acc, 1, out, in, 0, P, false, dw);
  if (db != nullptr)
    for (int64_t o = 0; o < out; ++o) db[o] += bias[o];
}

template void linear_forward(const float*, int64_t, int64_t, int64_t, int64_t, const float*,
                             const float*, float*, int, Interrupt*);
template void linear_forward(const double*, int64_t, int64_t, int64_t, int64_t, const double*,
                             const double*, double*, int, Interrupt*);
template void linear_backward(const float*, int64_t, const float*, int64_t, int64_t, int64_t,
                              int64_t, const float*, float*, float*, float*, int, Interrupt*);
template void linear_backward(const double*, int64_t, const double*, int64_t, int64_t, int64_t,
                              int64_t, const double*, double*, double*, double*, int, Interrupt*);

}  // namespace fastrnn
