// Training on the device: optimisers, sums of squares, losses, embedding, dropout. Formulas, order
// of sums and rounding are those of the CPU (core/training_kernels.h, cpu/training.h): the same
// bits where the machine has fused multiply-adds, the logarithm of a loss apart, which is the
// library's.
//
// All pointers are device memory, dense and row-major, unless they say otherwise. n elements or
// rows, V classes or vocabulary, E embedding size.
#ifndef FASTRNN_CUDA_TRAINING_H_
#define FASTRNN_CUDA_TRAINING_H_

#include <stdint.h>

#include "core/training_kernels.h"
#include "cuda/runtime.h"

namespace fastrnn {
namespace cuda {

// Instances of all templates: float and double.

template <class T>
void sgd(Stream stream, int64_t n, const SgdArgs<T>& args);
template <class T>
void adam(Stream stream, int64_t n, const AdamArgs<T>& args);

// sums[i], i < sum_blocks(n): the sum of squares of x[i * kSumBlock], ..., of kSumBlock elements.
inline int64_t sum_blocks(int64_t n) { return (n + kSumBlock - 1) / kSumBlock; }
template <class T>
void sum_squares(Stream stream, int64_t n, const T* x, double* sums);

// args.loss, args.dlogits of n rows; see CrossEntropyArgs.
template <class T>
void cross_entropy(Stream stream, int64_t n, const CrossEntropyArgs<T>& args);

// difference (n) = pred - target, 0 where keep (null: everywhere set) is 0.
template <class T>
void subtract(Stream stream, int64_t n, const T* pred, const T* target, const uint8_t* keep,
              T* difference);

// args.out (n, E) = rows of the table; the ids are in range.
template <class T>
void embedding_gather(Stream stream, const EmbeddingArgs<T>& args);

// out (V, E), row ids[s] += its rows of dy in rising order. The rows of segment s < segments are
// order[starts[s]], ..., order[starts[s + 1] - 1].
template <class T>
struct Scatter {
  int64_t segments, width;
  const int64_t* ids;     // (segments)
  const int64_t* starts;  // (segments + 1)
  const int64_t* order;   // (n)
  const T* dy;            // (n, E)
  T* out;                 // (V, E) in/out
};
template <class T>
void embedding_scatter(Stream stream, const Scatter<T>& args);

template <class T>
void dropout(Stream stream, int64_t n, const DropoutArgs<T>& args);

// *bad (1 element) = 0 if each of the n ids is in [0, limit) where mask (null: everywhere set) is
// not 0, else 1.
void check_ids(Stream stream, int64_t n, const int64_t* ids, const uint8_t* mask, int64_t limit,
               int32_t* bad);

}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_TRAINING_H_
