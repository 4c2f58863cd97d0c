// Matrix products on the device whose bits depend on nothing but the operands: every element is one
// chain of fused multiply-adds in the order of k, whatever the sizes and the tile. In float32 that
// is the chain of the CPU's tile (cpu/gemm.h), so the two give the same bits.
#ifndef FASTRNN_CUDA_MATMUL_H_
#define FASTRNN_CUDA_MATMUL_H_

#include <stdint.h>

#include "cuda/half.h"
#include "cuda/runtime.h"

namespace fastrnn {
namespace cuda {

// A matrix in device memory, elements (row, col) at row * row_stride + col * col_stride.
template <class T>
struct Matrix {
  const T* data;
  int64_t row_stride, col_stride;
};

template <class T>
Matrix<T> row_major(const T* data, int64_t cols) {
  return {data, cols, 1};
}
template <class T>
Matrix<T> transposed(const Matrix<T>& m) {
  return {m.data, m.col_stride, m.row_stride};
}

// What an element's chain starts from.
enum class Start { kZero, kBias, kAccumulate };

// c (M, N), rows c_stride apart, = start + a (M, K) b (K, N). bias (N) with Start::kBias, else
// null. Instances: T = float, double (C = T); Bfloat16, Float16 (C = float).
template <class T, class C>
void matmul(Stream stream, int64_t M, int64_t N, int64_t K, const Matrix<T>& a, const Matrix<T>& b,
            Start start, const C* bias, C* c, int64_t c_stride);

// c (M, N), contiguous, += aᵀ b over many rows, a (rows, M), b (rows, N), both row-major: the
// gradient of weights. Rows are summed in slabs, and the slabs' sums in order, so that small
// matrices still fill the device; the slabs follow from the number of rows alone.
template <class T, class C>
void add_outer_products(Stream stream, int64_t rows, int64_t M, int64_t N, const T* a, const T* b,
                        C* c);

// sums (cols) += the column sums of m (rows, cols), row-major; in the same slabs.
template <class T, class C>
void add_column_sums(Stream stream, int64_t rows, int64_t cols, const T* m, C* sums);

}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_MATMUL_H_
