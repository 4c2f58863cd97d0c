// The LSTM cell (Hochreiter & Schmidhuber 1997, with the forget gate of Gers, Schmidhuber & Cummins
// 2000):
//   i, f, o = σ(pre-activations), g = tanh(pre-activation), c' = f∘c + i∘g, h' = o∘tanh(c').
// See cells/rnn.h for the shape of a cell.
#ifndef FASTRNN_CELLS_LSTM_H_
#define FASTRNN_CELLS_LSTM_H_

#include "cells/activations.h"

namespace fastrnn {
namespace FASTRNN_ISA {

struct Lstm {
  static constexpr int kGates = 4;
  static constexpr int kSlots = 4;  // i, f, g, o
  static constexpr bool kHasCell = true;
  static constexpr bool kTwoPhase = false;
  static constexpr int kInputSlot[4] = {0, 1, 2, 3};
  static constexpr int kStateSlot[4] = {0, 1, 2, 3};

  template <class V>
  static FASTRNN_HD FASTRNN_INLINE V next_cell(const V (&s)[4], V c_prev) {
    return fma(s[1], c_prev, s[0] * s[2]);
  }

  template <class V>
  static FASTRNN_HD FASTRNN_INLINE void output(const V (&s)[4], V /*h_prev*/, V& c, V& h) {
    c = next_cell(s, c);
    h = s[3] * tanh(c);
  }

  template <class V>
  static FASTRNN_HD FASTRNN_INLINE void forward(V (&s)[4], V h_prev, V& c, V& h) {
    s[0] = sigmoid(s[0]);
    s[1] = sigmoid(s[1]);
    s[2] = tanh(s[2]);
    s[3] = sigmoid(s[3]);
    output(s, h_prev, c, h);
  }

  // dc in: the gradient of c' from the step after; out: the gradient of c.
  template <class V>
  static FASTRNN_HD FASTRNN_INLINE void backward(V (&s)[4], V /*h_prev*/, V c_prev, V& dh, V& dc) {
    const V one = V::set(1);
    const V i = s[0], f = s[1], g = s[2], o = s[3];
    const V tanh_c = tanh(next_cell(s, c_prev));
    dc = fma(dh * o, fnma(tanh_c, tanh_c, one), dc);
    s[0] = dc * g * (i * (one - i));
    s[1] = dc * c_prev * (f * (one - f));
    s[2] = dc * i * fnma(g, g, one);
    s[3] = dh * tanh_c * (o * (one - o));
    dc = dc * f;
    dh = V::zero();
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn

#endif  // FASTRNN_CELLS_LSTM_H_
