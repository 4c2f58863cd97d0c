// The GRU cell, in both of its forms: h' = (1-z)∘n + z∘h with r, z = σ(pre-activations) and
//   reset after the product (cuDNN's and PyTorch's form):  n = tanh(W_in x + b_in + r∘(W_hn h +
//   b_hn)) reset before the product (Cho et al. 2014):            n = tanh(W_in x + b_in + b_hn +
//   W_hn (r∘h))
// See cells/rnn.h for the shape of a cell. The second form needs r before n's product, so it is
// computed in two phases, forward and backward.
#ifndef FASTRNN_CELLS_GRU_H_
#define FASTRNN_CELLS_GRU_H_

#include "cells/activations.h"

namespace fastrnn {
namespace FASTRNN_ISA {

struct GruAfter {
  static constexpr int kGates = 3;
  static constexpr int kSlots = 4;  // r, z, q = W_hn h + b_hn, n
  static constexpr bool kHasCell = false;
  static constexpr bool kTwoPhase = false;
  static constexpr int kInputSlot[3] = {0, 1, 3};
  static constexpr int kStateSlot[3] = {0, 1, 2};

  template <class V>
  static FASTRNN_HD FASTRNN_INLINE void output(const V (&s)[4], V h_prev, V& /*c*/, V& h) {
    h = fma(s[1], h_prev - s[3], s[3]);  // (1-z) n + z h
  }

  template <class V>
  static FASTRNN_HD FASTRNN_INLINE void forward(V (&s)[4], V h_prev, V& c, V& h) {
    s[0] = sigmoid(s[0]);
    s[1] = sigmoid(s[1]);
    s[3] = tanh(fma(s[0], s[2], s[3]));
    output(s, h_prev, c, h);
  }

  template <class V>
  static FASTRNN_HD FASTRNN_INLINE void backward(V (&s)[4], V h_prev, V /*c_prev*/, V& dh,
                                                 V& /*dc*/) {
    const V one = V::set(1);
    const V r = s[0], z = s[1], q = s[2], n = s[3];
    s[3] = dh * (one - z) * fnma(n, n, one);
    s[2] = s[3] * r;
    s[1] = dh * (h_prev - n) * (z * (one - z));
    s[0] = s[3] * q * (r * (one - r));
    dh = dh * z;
  }
};

struct GruBefore {
  static constexpr int kGates = 3;
  static constexpr int kSlots = 3;  // r, z, n
  static constexpr bool kHasCell = false;
  static constexpr bool kTwoPhase = true;  // gates 0, 1 multiply h; gate 2 multiplies r∘h
  static constexpr int kInputSlot[3] = {0, 1, 2};
  static constexpr int kStateSlot[3] = {0, 1, 2};

  // Phase 1: the gates and what n's product multiplies.
  template <class V>
  static FASTRNN_HD FASTRNN_INLINE void forward_gates(V& r, V& z, V h_prev, V& rh) {
    r = sigmoid(r);
    z = sigmoid(z);
    rh = r * h_prev;
  }

  template <class V>
  static FASTRNN_HD FASTRNN_INLINE void output(const V (&s)[3], V h_prev, V& /*c*/, V& h) {
    h = fma(s[1], h_prev - s[2], s[2]);
  }

  // Phase 2.
  template <class V>
  static FASTRNN_HD FASTRNN_INLINE void forward(V (&s)[3], V h_prev, V& c, V& h) {
    s[2] = tanh(s[2]);
    output(s, h_prev, c, h);
  }

  // Phase 1: z, n and the direct path; s[0] still holds r.
  template <class V>
  static FASTRNN_HD FASTRNN_INLINE void backward(V (&s)[3], V h_prev, V /*c_prev*/, V& dh,
                                                 V& /*dc*/) {
    const V one = V::set(1);
    const V z = s[1], n = s[2];
    s[2] = dh * (one - z) * fnma(n, n, one);
    s[1] = dh * (h_prev - n) * (z * (one - z));
    dh = dh * z;
  }

  // Phase 2, after drh = dn W_hn: r's gradient, r∘h again, and r's part of dh.
  template <class V>
  static FASTRNN_HD FASTRNN_INLINE void backward_reset(V& r, V h_prev, V drh, V& dh, V& rh) {
    const V slope = r * (V::set(1) - r);
    rh = r * h_prev;
    dh = fma(drh, r, dh);
    r = drh * h_prev * slope;
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn

#endif  // FASTRNN_CELLS_GRU_H_
