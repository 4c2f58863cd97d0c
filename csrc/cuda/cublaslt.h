// Matrix products by NVIDIA's cuBLASLt, where the machine has it: the library is looked for at run
// time, among what is loaded already, in NVIDIA's Python packages, and where the system keeps
// libraries. fastrnn links nothing of it.
#ifndef FASTRNN_CUDA_CUBLASLT_H_
#define FASTRNN_CUDA_CUBLASLT_H_

#include <stdint.h>

#include <string>

#include "cuda/matmul.h"

namespace fastrnn {
namespace cuda {
namespace cublaslt {

// Where the library in use was found, or why there is none.
std::string description();

// c (M, N) = start + a b, contiguous row-major: a (M, K), or (K, M) if it is transposed; b (K, N).
// S = float: operands rounded to TF32 (10 bits); Bfloat16, Float16: sums in float32. Returns false,
// and does nothing, where cuBLASLt is absent or has no kernel for this.
template <class S>
bool multiply(Stream stream, int64_t M, int64_t N, int64_t K, const S* a, bool a_transposed,
              const S* b, Start start, const float* bias, float* c);

}  // namespace cublaslt
}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_CUBLASLT_H_
