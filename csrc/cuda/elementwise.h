// Arrays of any shape, strides and element type in device memory, and what is done to them element
// by element. The arithmetic is the CPU's (NumPy's and cpu/training.h's): the same bits.
#ifndef FASTRNN_CUDA_ELEMENTWISE_H_
#define FASTRNN_CUDA_ELEMENTWISE_H_

#include <stdint.h>

#include "cuda/runtime.h"

namespace fastrnn {
namespace cuda {

enum class DType : int { kFloat32, kFloat64, kFloat16, kBfloat16, kInt32, kInt64, kBool };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 || dtype == DType::kInt64      ? 8
         : dtype == DType::kFloat32 || dtype == DType::kInt32    ? 4
         : dtype == DType::kFloat16 || dtype == DType::kBfloat16 ? 2
                                                                 : 1;
}
constexpr bool is_floating(DType dtype) {
  return dtype != DType::kInt32 && dtype != DType::kInt64 && dtype != DType::kBool;
}

constexpr int kMaxDimensions = 8;

// An array in device memory. Strides count elements; 0 repeats an element, negative ones go back.
struct View {
  void* data;
  DType dtype;
  int ndim;
  int64_t shape[kMaxDimensions];
  int64_t strides[kMaxDimensions];
};

// Both views of a call have the same shape, and `to` has no element twice.

// to = from, converted as NumPy does, but for subnormal float32, which is 0; from float64 to 16
// bits by way of float32. Without a conversion bits stay as they are.
void copy(Stream stream, const View& from, const View& to);
// to = value, converted likewise.
void fill(Stream stream, const View& to, double value);
// to += from; both float32 or both float64.
void add(Stream stream, const View& from, const View& to);
// to = from where keep (kBool), else 0; from and to have the same dtype.
void where(Stream stream, const View& keep, const View& from, const View& to);
// x (n) *= factor.
template <class T>
void scale(Stream stream, int64_t n, T factor, T* x);
// x (n) clipped to [-limit, limit]; NaN stays.
template <class T>
void clip(Stream stream, int64_t n, T limit, T* x);

}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_ELEMENTWISE_H_
