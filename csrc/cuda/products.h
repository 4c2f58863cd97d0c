// The products over all steps of a layer, in its precision: float32 (strict) and float64 with the
// kernels of cuda/matmul.h, whose bits depend on nothing but the operands; the other precisions
// with cuBLASLt where the machine has it (cuda/cublaslt.h), else likewise.
#ifndef FASTRNN_CUDA_PRODUCTS_H_
#define FASTRNN_CUDA_PRODUCTS_H_

#include "cuda/cublaslt.h"
#include "cuda/matmul.h"
#include "cuda/recurrence.h"

namespace fastrnn {
namespace cuda {

// As matmul(), of contiguous row-major matrices a (M, K), b (K, N), c (M, N).
template <class S>
void product(Stream stream, Precision precision, int64_t M, int64_t N, int64_t K, const S* a,
             const S* b, Start start, const Accumulator<S>* bias, Accumulator<S>* c) {
  if constexpr (sizeof(S) <= 4) {
    if (precision != Precision::kFloat32 &&
        cublaslt::multiply<S>(stream, M, N, K, a, false, b, start, bias, c))
      return;
  }
  matmul<S, Accumulator<S>>(stream, M, N, K, row_major(a, K), row_major(b, N), start, bias, c, N);
}

// As add_outer_products().
template <class S>
void outer_product(Stream stream, Precision precision, int64_t rows, int64_t M, int64_t N,
                   const S* a, const S* b, Accumulator<S>* c) {
  if constexpr (sizeof(S) <= 4) {
    if (precision != Precision::kFloat32 &&
        cublaslt::multiply<S>(stream, M, N, rows, a, true, b, Start::kAccumulate, nullptr, c))
      return;
  }
  add_outer_products<S, Accumulator<S>>(stream, rows, M, N, a, b, c);
}

}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_PRODUCTS_H_
