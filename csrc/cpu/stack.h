// Layers and directions of a recurrent network on the CPU: packs weights, allocates, splits the
// work among threads and calls the kernels of cpu/forward.h and cpu/backward.h. The bindings fill
// the plain structs below and hold the objects.
#ifndef FASTRNN_CPU_STACK_H_
#define FASTRNN_CPU_STACK_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "core/args.h"
#include "core/interrupt.h"
#include "core/kernels.h"
#include "core/memory.h"
#include "core/schedule.h"

namespace fastrnn {

// The caller's parameters of one layer and direction, C-contiguous: (G*H, I), (G*H, H), (G*H),
// (G*H); biases may be null.
template <class T>
struct LayerWeights {
  const T *w_ih, *w_hh, *b_ih, *b_hh;
};

template <class T>
struct LayerGradients {
  T *w_ih, *w_hh, *b_ih, *b_hh;
};

// A private, immutable copy of all weights in the kernels' layout.
template <class T>
class PackedStack {
 public:
  PackedStack(const StackSpec& spec, const std::vector<LayerWeights<T>>& weights, int threads);

  const StackSpec& spec() const { return spec_; }
  const Kernels<T>& kernels() const { return kernels_; }
  PackedLayer<T> layer(int layer, int direction) const {
    return layers_[static_cast<size_t>(spec_.index(layer, direction))];
  }
  size_t bytes() const { return memory_.size(); }

 private:
  StackSpec spec_;
  const Kernels<T>& kernels_;
  Buffer memory_;
  std::vector<PackedLayer<T>> layers_;
};

// One call. Arrays are the caller's; strides in elements; states are (L*D, B, H), contiguous.
template <class T>
struct StackCall {
  int64_t steps, batch;
  LayerInput<T> input;     // dropout unused: it acts between layers
  const int64_t* lengths;  // (B) or null
  const int64_t* starts;   // (B): the layouts are ragged and the rows stand here; or null
  ResetMask reset;
  const T *h0, *c0;  // null: zeros
  T* y;              // (T, B, D*H), features contiguous; wholly written
  Layout y_layout;
  T *hn, *cn;  // out
  int threads;
  Interrupt* interrupt;
  // Training only:
  double dropout;  // between layers
  uint64_t dropout_key;
  int64_t checkpoint_every;  // 0: keep everything
};

// Inference: nothing is kept.
template <class T>
void stack_forward(const PackedStack<T>& stack, const StackCall<T>& call);

template <class T>
struct BackwardCall {
  const T* dy;  // (T, B, D*H), features contiguous, or null
  Layout dy_layout;
  const T *dhn, *dcn;  // (L*D, B, H) or null
  T* dx;               // (T, B, I), dense, wholly written; or null
  Layout dx_layout;
  T *dh0, *dc0;  // out
  std::vector<LayerGradients<T>> gradients;
  bool fresh;  // the gradients are wholly written; else accumulated into
  int threads;
  Interrupt* interrupt;
};

// What a forward pass keeps for its backward pass.
template <class T>
class StackTape {
 public:
  // Runs the forward pass of `call`.
  StackTape(std::shared_ptr<const PackedStack<T>> stack, const StackCall<T>& call);
  ~StackTape();
  StackTape(const StackTape&) = delete;
  StackTape& operator=(const StackTape&) = delete;

  // Exact back-propagation through time. Overwrites the tape: once only.
  void backward(const BackwardCall<T>& call);

  const StackSpec& spec() const;
  int64_t steps() const;
  int64_t batch() const;
  bool one_hot() const;
  size_t bytes() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// A running state that takes one step at a time without allocating.
template <class T>
class StackStream {
 public:
  using Scalar = T;
  StackStream(std::shared_ptr<const PackedStack<T>> stack, int64_t batch);
  ~StackStream();
  StackStream(const StackStream&) = delete;
  StackStream& operator=(const StackStream&) = delete;

  // x (B, I) or ids (B), distance between rows in elements; y (B, D*H) contiguous.
  void step(const T* x, const int64_t* ids, int64_t stride_b, T* y, Interrupt* interrupt);
  void get_state(T* h, T* c) const;        // (L*D, B, H)
  void set_state(const T* h, const T* c);  // null: zeros
  void reset_row(int64_t row);

  const StackSpec& spec() const;
  int64_t batch() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Linear layer on rows: y (M, out) = x (M, in) wᵀ + b.
template <class T>
void linear_forward(const T* x, int64_t stride_x, int64_t rows, int64_t in, int64_t out, const T* w,
                    const T* b, T* y, int threads, Interrupt* interrupt);

// dx (M, in) = dy w (or null: not wanted); dw (out, in) += dyᵀ x; db (out) += column sums of dy
// (either may be null).
template <class T>
void linear_backward(const T* x, int64_t stride_x, const T* dy, int64_t stride_dy, int64_t rows,
                     int64_t in, int64_t out, const T* w, T* dx, T* dw, T* db, int threads,
                     Interrupt* interrupt);

// to (rows, count) = the given columns of from, whose rows are `stride` elements apart.
template <class T>
void take_columns(const T* from, int64_t stride, int64_t rows, const int64_t* columns,
                  int64_t count, T* to, int threads);

// The given columns of to (rows, cols) += from (rows, count); one that is given twice is added
// twice.
template <class T>
void add_columns(const T* from, int64_t rows, int64_t cols, const int64_t* columns, int64_t count,
                 T* to, int threads);

// What the machine can do at most: the yardstick that benchmarks hold against our times.
struct Limits {
  double gflops;        // 1e9 additions and multiplications a second
  double tile_gflops;   // the same in our tile, on operands in the first-level cache
  double gbytes_per_s;  // read from `bytes` bytes that the threads share out; 0 when bytes is 0
};

// Measured for `seconds` each on `threads` threads (at most get_num_threads() of them run at once).
template <class T>
Limits measure_limits(int threads, int64_t bytes, double seconds);

}  // namespace fastrnn

#endif  // FASTRNN_CPU_STACK_H_
