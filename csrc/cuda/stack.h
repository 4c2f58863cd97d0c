// Layers and directions of a recurrent network on the device: packs weights, allocates, and runs
// the large products over all steps (cuda/matmul.h) around the recurrences (cuda/recurrence.h),
// layer by layer. The counterpart of cpu/stack.h; the bindings fill the plain structs below.
#ifndef FASTRNN_CUDA_STACK_H_
#define FASTRNN_CUDA_STACK_H_

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "core/dims.h"
#include "core/interrupt.h"
#include "cuda/plan.h"
#include "cuda/rows.h"

namespace fastrnn {
namespace cuda {

// Parameters of one layer and direction in device memory, C-contiguous, as cpu/stack.h has them.
template <class A>
struct DeviceWeights {
  const A *w_ih, *w_hh, *b_ih, *b_hh;
};
template <class A>
struct DeviceGradients {  // accumulated into
  A *w_ih, *w_hh, *b_ih, *b_hh;
};

// A private, immutable copy of all weights on the device, and their packed forms, made when they
// are first needed. Calls may use it on any streams at a time; each has a SharedUse (stack.cc),
// which keeps the memory until its work is done.
template <class S>
class DeviceStack {
 public:
  using A = Accumulator<S>;
  DeviceStack(const StackSpec& spec, Precision precision,
              const std::vector<DeviceWeights<A>>& weights, Stream stream);

  const StackSpec& spec() const { return spec_; }
  Precision precision() const { return precision_; }
  size_t bytes() const;

  // Of layer and direction `index`; ready for work on `stream`.
  const S* input_weights(int index, bool backward, Stream stream) const;
  const S* state_weights(int index, const RecurrenceShape& shape, Family family, bool backward,
                         Stream stream) const;
  const A* gate_bias(int index) const;   // [H*G]
  const A* state_bias(int index) const;  // [H][slots]
  RecurrenceShape shape(int64_t B) const;

 private:
  struct Layer {
    Memory weights;  // w_ih, w_hh, gate bias, state bias
    const A *w_ih, *w_hh, *gate_bias, *state_bias;
  };
  struct Form {
    Memory memory;
    Event made;
  };
  // The packed form `form` of `index`, made by `make(out)` if there is none yet.
  template <class Make>
  const S* packed(int index, int form, int64_t elements, Stream stream, const Make& make) const;

  StackSpec spec_;
  Precision precision_;
  std::vector<Layer> layers_;
  mutable std::mutex mutex_;
  mutable Event made_;  // layers_
  mutable std::map<std::pair<int, int>, Form> packed_;
};

// One call. All arrays are device memory, except for lengths.
template <class S>
struct DeviceCall {
  using A = Accumulator<S>;
  int64_t steps, batch;
  DeviceArrayRef x;    // (T, B, I); data null where ids are given
  const int64_t* ids;  // (T, B), each in [0, I)
  DeviceLayout ids_layout;
  const int64_t* lengths;  // (B), host memory, or null
  const uint8_t* reset;    // (T, B) or null
  DeviceLayout reset_layout;
  const A *h0, *c0;  // (L*D, B, H), or null: zeros
  DeviceArrayRef y;  // (T, B, D*H), wholly written
  A *hn, *cn;        // out
  Stream stream;
  Interrupt* interrupt;
  // Training only:
  double dropout;
  uint64_t dropout_key;
  int64_t checkpoint_every;          // 0: keep everything
  std::vector<int64_t> host_ids;     // the ids again, in host memory, with the same strides
  std::vector<int64_t> host_starts;  // (B) what ids_layout.starts has, or empty
};

// Inference: nothing is kept.
template <class S>
void device_forward(const DeviceStack<S>& stack, const DeviceCall<S>& call);

template <class S>
struct DeviceBackwardCall {
  using A = Accumulator<S>;
  DeviceArrayRef dy;   // (T, B, D*H); data null: zeros
  const A *dhn, *dcn;  // (L*D, B, H) or null
  DeviceArrayRef dx;   // (T, B, I), wholly written; data null: not wanted
  A *dh0, *dc0;        // out
  std::vector<DeviceGradients<A>> gradients;
  Stream stream;
  Interrupt* interrupt;
};

// What a forward pass keeps for its backward pass.
template <class S>
class DeviceTape {
  using A = Accumulator<S>;

 public:
  // Runs the forward pass of `call`.
  DeviceTape(std::shared_ptr<const DeviceStack<S>> stack, const DeviceCall<S>& call);
  ~DeviceTape();
  DeviceTape(const DeviceTape&) = delete;
  DeviceTape& operator=(const DeviceTape&) = delete;

  // Exact back-propagation through time. Uses up the tape: once only.
  void backward(const DeviceBackwardCall<S>& call);
  size_t bytes() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_STACK_H_
