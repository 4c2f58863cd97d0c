// The simple recurrent cell (Elman 1990): h' = f(W_ih x + b_ih + W_hh h + b_hh), f one of tanh,
// relu, sigmoid.
//
// A cell is a struct of static functions on a vector V of hidden units (or on one, cells/scalar.h).
// `s` holds what a step keeps per unit, its slots: on entry the pre-activations, on return what
// backward needs. Derivatives are written in terms of the activations' outputs, so that nothing
// else has to be kept.
#ifndef FASTRNN_CELLS_RNN_H_
#define FASTRNN_CELLS_RNN_H_

#include "cells/activations.h"

namespace fastrnn {
namespace FASTRNN_ISA {

struct TanhFunction {
  template <class V>
  static FASTRNN_HD FASTRNN_INLINE V value(V x) {
    return tanh(x);
  }
  template <class V>
  static FASTRNN_HD FASTRNN_INLINE V times_slope(V d, V y) {  // d * (1 - y²)
    return d * fnma(y, y, V::set(1));
  }
};

struct ReluFunction {
  template <class V>
  static FASTRNN_HD FASTRNN_INLINE V value(V x) {
    return relu(x);
  }
  template <class V>
  static FASTRNN_HD FASTRNN_INLINE V times_slope(V d, V y) {  // d where y > 0
    return select_gt(y, V::zero(), d, V::zero());
  }
};

struct SigmoidFunction {
  template <class V>
  static FASTRNN_HD FASTRNN_INLINE V value(V x) {
    return sigmoid(x);
  }
  template <class V>
  static FASTRNN_HD FASTRNN_INLINE V times_slope(V d, V y) {  // d * y * (1 - y)
    return d * (y * (V::set(1) - y));
  }
};

template <class F>
struct Rnn {
  static constexpr int kGates = 1;
  static constexpr int kSlots = 1;
  static constexpr bool kHasCell = false;
  static constexpr bool kTwoPhase = false;
  static constexpr int kInputSlot[1] = {0};  // the slot that gate g's input product goes to
  static constexpr int kStateSlot[1] = {0};  // the slot that gate g's product with h goes to

  // The new state from the activated slots: the second half of `forward`, and what back-propagation
  // runs again instead of keeping every state.
  template <class V>
  static FASTRNN_HD FASTRNN_INLINE void output(const V (&s)[1], V /*h_prev*/, V& /*c*/, V& h) {
    h = s[0];
  }

  template <class V>
  static FASTRNN_HD FASTRNN_INLINE void forward(V (&s)[1], V h_prev, V& c, V& h) {
    s[0] = F::value(s[0]);
    output(s, h_prev, c, h);
  }

  // dh in: the gradient of h'; out: what of it reaches h past the gates. s out: gradients of the
  // pre-activations.
  template <class V>
  static FASTRNN_HD FASTRNN_INLINE void backward(V (&s)[1], V /*h_prev*/, V /*c_prev*/, V& dh,
                                                 V& /*dc*/) {
    s[0] = F::times_slope(dh, s[0]);
    dh = V::zero();
  }
};

using RnnTanh = Rnn<TanhFunction>;
using RnnRelu = Rnn<ReluFunction>;
using RnnSigmoid = Rnn<SigmoidFunction>;

}  // namespace FASTRNN_ISA
}  // namespace fastrnn

#endif  // FASTRNN_CELLS_RNN_H_
