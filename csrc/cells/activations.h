// sigmoid, tanh and relu on a vector of floats or doubles: branch-free, one division, NaN in NaN
// out.
#ifndef FASTRNN_CELLS_ACTIVATIONS_H_
#define FASTRNN_CELLS_ACTIVATIONS_H_

#include "cells/scalar.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float kLog2e = 0x1.715476p+0f;
  static constexpr float kLn2Hi = 0x1.62e400p-1f;  // 15 bits: n * kLn2Hi is exact for |n| <= 512
  static constexpr float kLn2Lo = 0x1.7f7d1cp-20f;
  static constexpr float kSigmoidMin = -88.0f;  // n >= -127, where 2^n is 0
  static constexpr float kSigmoidMax = 60.0f;
  static constexpr float kTanhMax = 60.0f;

  template <class V>
  FASTRNN_HD static FASTRNN_INLINE V quotient(V r) {
    V q = V::set(0x1.6bec02p-10f);
    q = fma(q, r, V::set(0x1.1227b0p-7f));
    q = fma(q, r, V::set(0x1.555674p-5f));
    q = fma(q, r, V::set(0x1.5554b0p-3f));
    return fma(q, r, V::set(0x1.fffffep-2f));
  }
};

template <>
struct ExpConstants<double> {
  static constexpr double kLog2e = 0x1.71547652b82fep+0;
  static constexpr double kLn2Hi =
      0x1.62e42fefa3800p-1;  // 42 bits: n * kLn2Hi is exact for |n| <= 2048
  static constexpr double kLn2Lo = 0x1.ef35793c76730p-45;
  static constexpr double kSigmoidMin = -709.0;
  static constexpr double kSigmoidMax = 100.0;
  static constexpr double kTanhMax = 100.0;

  template <class V>
  FASTRNN_HD static FASTRNN_INLINE V quotient(V r) {
    V q = V::set(0x1.ae6ba9a892300p-26);
    q = fma(q, r, V::set(0x1.28a2066132debp-22));
    q = fma(q, r, V::set(0x1.71de88260b2cbp-19));
    q = fma(q, r, V::set(0x1.a019a74aa628ap-16));
    q = fma(q, r, V::set(0x1.a01a0174fad84p-13));
    q = fma(q, r, V::set(0x1.6c16c17ee714fp-10));
    q = fma(q, r, V::set(0x1.1111111119011p-7));
    q = fma(q, r, V::set(0x1.555555555228fp-5));
    q = fma(q, r, V::set(0x1.5555555555539p-3));
    return fma(q, r, V::set(0x1.0000000000005p-1));
  }
};

// expm1(r) for |r| <= ln(2)/2.
template <class V>
FASTRNN_HD FASTRNN_INLINE V expm1_reduced(V r) {
  return fma(r * r, ExpConstants<typename V::Scalar>::quotient(r), r);
}

// 1 / (1 + exp(-x)).
template <class V>
FASTRNN_HD FASTRNN_INLINE V sigmoid(V x) {
  using T = typename V::Scalar;
  using C = ExpConstants<T>;
  const V magic = V::set(FloatBits<T>::kMagic);
  const V y = max(V::set(C::kSigmoidMin), min(V::set(C::kSigmoidMax), x));
  const V m = fma(y, V::set(C::kLog2e), magic);
  const V n = m - magic;
  const V r = fma(n, V::set(C::kLn2Lo), fma(n, V::set(C::kLn2Hi), -y));
  const V s = pow2_from_magic(m);
  return s / (V::set(T(1)) + s + expm1_reduced(r));
}

// (exp(2x) - 1) / (exp(2x) + 1).
template <class V>
FASTRNN_HD FASTRNN_INLINE V tanh(V x) {
  using T = typename V::Scalar;
  using C = ExpConstants<T>;
  const V magic = V::set(FloatBits<T>::kMagic);
  const V a = abs(x);
  const V y = min(V::set(C::kTanhMax), a + a);
  const V m = fma(y, V::set(C::kLog2e), magic);
  const V n = m - magic;
  const V r = fnma(n, V::set(C::kLn2Lo), fnma(n, V::set(C::kLn2Hi), y));
  const V s = pow2_from_magic(m);
  const V e = fma(s, expm1_reduced(r), s - V::set(T(1)));
  return copysign(e / (e + V::set(T(2))), x);
}

// max(x, 0); NaN and both zeros stay what they are.
template <class V>
FASTRNN_HD FASTRNN_INLINE V relu(V x) {
  return max(V::zero(), x);
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn

#endif  // FASTRNN_CELLS_ACTIVATIONS_H_
