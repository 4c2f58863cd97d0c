// Training kernels: the contract between the bindings and cpu/training.h.
//
// One plain struct of arguments per operation, one table of function pointers per scalar type.
// Every kernel works on a half-open range [begin, end) of rows, columns or elements, so that the
// caller may split the work among threads; the result does not depend on how it is split.
//
// Legend: n elements or rows, V classes or vocabulary, E embedding size. All matrices are row-major
// and dense.
#ifndef FASTRNN_CORE_TRAINING_KERNELS_H_
#define FASTRNN_CORE_TRAINING_KERNELS_H_

#include <stdint.h>

namespace fastrnn {

// Stochastic gradient descent with momentum (Sutskever et al. 2013, PyTorch's form):
//   g = clip(scale * grad) + weight_decay * w;   m = momentum * m + g;
//   w -= lr * (nesterov ? g + momentum * m : m)
template <class T>
struct SgdArgs {
  T* weight;      // (n) in/out
  const T* grad;  // (n) in; may be `weight` itself, must not overlap it otherwise
  T* buffer;      // (n) in/out, starts as zeros; null: no momentum. Overlaps nothing
  T scale;        // factor that clips the global norm, 1 for none
  T limit;        // gradients are clipped to [-limit, limit] after `scale`; +Inf for none
  T lr;
  T momentum;
  T weight_decay;  // the L2 penalty's factor
  bool nesterov;
};

// Adam (Kingma & Ba 2015, algorithm 1) and AdamW (Loshchilov & Hutter 2019, algorithm 2), in
// PyTorch's form:
//   w *= shrink;   g = clip(scale * grad) + weight_decay * w
//   m += (1 - beta1) * (g - m);   v = beta2 * v + (1 - beta2) * g * g
//   w -= step_size * m / (sqrt(v) / sqrt_correction2 + eps)
template <class T>
struct AdamArgs {
  T* weight;       // (n) in/out
  const T* grad;   // (n) in; may be `weight` itself, must not overlap it otherwise
  T* first;        // (n) in/out: m, starts as zeros. Overlaps nothing
  T* second;       // (n) in/out: v, starts as zeros. Overlaps nothing
  T scale;         // as in SgdArgs
  T limit;         // as in SgdArgs
  T weight_decay;  // Adam's L2 factor; 0 for AdamW
  T shrink;        // AdamW's 1 - lr * weight_decay; 1 for Adam
  T one_minus_beta1;
  T beta2;
  T one_minus_beta2;
  T step_size;         // lr / (1 - beta1^t)
  T sqrt_correction2;  // sqrt(1 - beta2^t)
  T eps;
};

// Elements per partial sum of squares. Fixed, so that the sum does not depend on threads or ISA.
constexpr int64_t kSumBlock = 4096;

// Softmax, cross-entropy and the gradient in one pass over each row of logits z with target t:
//   loss = log(sum_j exp(z_j)) - z_t;   dz_j = (softmax(z)_j - [j == t]) * weight
template <class T>
struct CrossEntropyArgs {
  const T* logits;         // (n, V) in
  const int64_t* targets;  // (n) in; each in [0, V) where the row counts
  const uint8_t* mask;  // (n) in, 0: the row does not count (loss 0, gradient 0); null: all count
  double* loss;         // (n) out
  T* dlogits;           // (n, V) out; overlaps nothing
  int64_t classes;      // V >= 1
  T weight;             // of a row in the gradient: 1 / (number of rows that count)
};

// Rows of a table: y[i] = weight[ids[i]], and dweight[ids[i]] += dy[i] in the order of i.
template <class T>
struct EmbeddingArgs {
  const int64_t* ids;  // (n) in; each in [0, V)
  int64_t count;       // n
  int64_t width;       // E
  const T* rows;       // gather: weight (V, E) in; scatter: dy (n, E) in
  T* out;              // gather: y (n, E) out; scatter: dweight (V, E) in/out. Overlaps nothing
};

// Dropout with a counter-based generator: element e is kept where
//   (splitmix64(key + e) >> 11) >= threshold,  threshold = ceil(p * 2^53),
// that is with probability 1 - p, and multiplied by `scale`; otherwise it is 0.
template <class T>
struct DropoutArgs {
  const T* x;  // (n) in
  T* y;        // (n) out; may be x
  uint64_t key;
  uint64_t threshold;
  T scale;  // 1 / (1 - p)
};

template <class T>
struct TrainingKernels {
  void (*sgd)(const SgdArgs<T>& args, int64_t begin, int64_t end);    // over elements
  void (*adam)(const AdamArgs<T>& args, int64_t begin, int64_t end);  // over elements
  // Sum of x[i]^2 over i < count, count <= kSumBlock, accumulated in double.
  double (*sum_squares)(const T* x, int64_t count);
  void (*cross_entropy)(const CrossEntropyArgs<T>& args, int64_t begin, int64_t end);  // over rows
  void (*embedding_gather)(const EmbeddingArgs<T>& args, int64_t begin, int64_t end);  // over rows
  void (*embedding_scatter)(const EmbeddingArgs<T>& args, int64_t begin,
                            int64_t end);                                   // over columns
  void (*dropout)(const DropoutArgs<T>& args, int64_t begin, int64_t end);  // over elements
};

}  // namespace fastrnn

#endif  // FASTRNN_CORE_TRAINING_KERNELS_H_
