// sigmoid, tanh and relu on a vector of floats or doubles, and exp for x <= 0: branch-free, at most
// one division, exact at ±0 and ±Inf, NaN in NaN out, at most 2 ULP from the true result wherever
// that is a normal number (the measured figures are at each function; tests/cpp/test_activations.cc
// checks them per ISA).
//
// All but relu reduce their argument by multiples n of ln(2), so that what is left is a polynomial
// on a short interval and a power of two, s = 2^n, made by integer shifts (pow2_from_magic). The
// coefficients below are minimax fits (Remez exchange in 300-bit arithmetic, relative error of the
// quantity named at each), rounded to T.
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
  // ln(2) = hi + lo. hi has 15 bits, so that n * hi is exact even without a fused multiply-add.
  static constexpr float kLn2Hi = 0x1.62e400p-1f;
  static constexpr float kLn2Lo = 0x1.7f7d1cp-20f;
  static constexpr float kSigmoidMin = -88.0f;  // n = -127, where s is 0 and so is the result
  static constexpr float kSigmoidMax = 60.0f;   // 1 + exp(-60) rounds to 1

  // (e^r - 1) / r for |r| <= ln(2) / 2: degree 5, error 2^-28.9 of e^r.
  template <class V>
  FASTRNN_HD static FASTRNN_INLINE V expm1_over(V r) {
    V g = V::set(0x1.6ae6dep-10f);
    g = fma(g, r, V::set(0x1.1267d8p-7f));
    g = fma(g, r, V::set(0x1.555824p-5f));
    g = fma(g, r, V::set(0x1.555418p-3f));
    g = fma(g, r, V::set(0x1.fffffcp-2f));
    return fma(g, r, V::set(1.0f));
  }

  // (tanh(r) / r - 1) / r^2 for |r| <= 0.2596, w = r^2: degree 2, error 2^-27.9 of tanh(r).
  template <class V>
  FASTRNN_HD static FASTRNN_INLINE V tanh_series(V w) {
    V q = V::set(-0x1.a3b3dap-5f);
    q = fma(q, w, V::set(0x1.10d998p-3f));
    return fma(q, w, V::set(-0x1.555506p-2f));
  }

  // a - n * ln(2) / 2 for tanh. ln(2) / 2 rounds to 0x1.62e430p-2 with an error of only 2^-30, so
  // that one step is enough: the result's sensitivity to it falls as 2^-n.
  template <class V>
  FASTRNN_HD static FASTRNN_INLINE V minus_half_ln2(V a, V n) {
    return fnma(n, V::set(0x1.62e430p-2f), a);
  }
};

template <>
struct ExpConstants<double> {
  static constexpr double kLog2e = 0x1.71547652b82fep+0;
  static constexpr double kLn2Hi = 0x1.62e42fefa3800p-1;  // 42 bits, for |n| < 2^11
  static constexpr double kLn2Lo = 0x1.ef35793c76730p-45;
  static constexpr double kSigmoidMin = -709.0;
  static constexpr double kSigmoidMax = 100.0;

  // Degree 10, error 2^-58.0 of e^r.
  template <class V>
  FASTRNN_HD static FASTRNN_INLINE V expm1_over(V r) {
    V g = V::set(0x1.ad59305aba610p-26);
    g = fma(g, r, V::set(0x1.28afcf06b2bdfp-22));
    g = fma(g, r, V::set(0x1.71df495859281p-19));
    g = fma(g, r, V::set(0x1.a019972175de5p-16));
    g = fma(g, r, V::set(0x1.a01a01115be95p-13));
    g = fma(g, r, V::set(0x1.6c16c1856fca9p-10));
    g = fma(g, r, V::set(0x1.111111112fa37p-7));
    g = fma(g, r, V::set(0x1.5555555550137p-5));
    g = fma(g, r, V::set(0x1.55555555554b3p-3));
    g = fma(g, r, V::set(0x1.000000000000bp-1));
    return fma(g, r, V::set(1.0));
  }

  // Degree 6, error 2^-56.9 of tanh(r).
  template <class V>
  FASTRNN_HD static FASTRNN_INLINE V tanh_series(V w) {
    V q = V::set(-0x1.56cfb3c600f76p-10);
    q = fma(q, w, V::set(0x1.d4c4c3e228232p-9));
    q = fma(q, w, V::set(-0x1.2266e347c1ce4p-7));
    q = fma(q, w, V::set(0x1.664f2bc62d21ep-6));
    q = fma(q, w, V::set(-0x1.ba1ba17da4f9ep-5));
    q = fma(q, w, V::set(0x1.11111110f2de8p-3));
    return fma(q, w, V::set(-0x1.55555555554b2p-2));
  }

  template <class V>
  FASTRNN_HD static FASTRNN_INLINE V minus_half_ln2(V a, V n) {
    return fnma(n, V::set(0.5 * kLn2Lo), fnma(n, V::set(0.5 * kLn2Hi), a));
  }
};

// exp(x) for x <= 0: s e^r with x = n ln(2) + r. 0 where the result would be subnormal; at 0 it
// is 1.
//
// Measured maximum, ULP: float 1.06 (every float), double 0.92; without fused multiply-add 1.32
// and 1.13.
template <class V>
FASTRNN_HD FASTRNN_INLINE V exp_nonpos(V x) {
  using T = typename V::Scalar;
  using C = ExpConstants<T>;
  const V magic = V::set(FloatBits<T>::kMagic);
  const V y = max(V::set(C::kSigmoidMin), x);
  const V m = fma(y, V::set(C::kLog2e), magic);
  const V n = m - magic;
  const V r = fnma(n, V::set(C::kLn2Lo), fnma(n, V::set(C::kLn2Hi), y));
  return pow2_from_magic(m) * fma(C::expm1_over(r), r, V::set(T(1)));
}

// 1 / (1 + exp(-x)).
//
// With x = n ln(2) - r, |r| <= ln(2) / 2 and s = 2^n, exp(-x) = e^r / s, so
//   sigmoid(x) = s / (s + e^r) = s / ((1 + s) + r g(r)),   g(r) = (e^r - 1) / r.
// s is exact, so the result's error is the denominator's, 0.5 ULP and a little, and the division's.
// Keeping e^r - 1 apart makes 1 + s exact for |n| < 24; what its rounding drops beyond (at n = -24
// as much as 2^-24 of a denominator of 0.7) is `lost`, exact, and goes in with r g(r). s is never
// Inf: the clamp to n = -127 makes it 0 at the low end, where the true result is subnormal.
//
// Measured maximum, ULP: float 1.83 (every float), double 1.76; without fused multiply-add 1.77
// and 1.57.
template <class V>
FASTRNN_HD FASTRNN_INLINE V sigmoid(V x) {
  using T = typename V::Scalar;
  using C = ExpConstants<T>;
  const V one = V::set(T(1));
  const V magic = V::set(FloatBits<T>::kMagic);
  const V y = max(V::set(C::kSigmoidMin), min(V::set(C::kSigmoidMax), x));
  const V m = fma(y, V::set(C::kLog2e), magic);
  const V n = m - magic;
  const V r = fma(n, V::set(C::kLn2Lo), fma(n, V::set(C::kLn2Hi), -y));
  const V s = pow2_from_magic(m);
  const V sum = one + s;
  const V lost = s - (sum - one);
  return s / (sum + fma(C::expm1_over(r), r, lost));
}

// tanh(x), odd, from a = |x| = n ln(2) / 2 + r. With s = 2^n = e^(2(a - r)) and t = tanh(r), where
// e^(2r) = (1 + t) / (1 - t),
//   tanh(a) = (s e^(2r) - 1) / (s e^(2r) + 1) = N / D,
//   N = (s - 1) + (s + 1) t,   D = (s + 1) + (s - 1) t = N + 2 (1 - t).
// tanh's own series has half as many terms as expm1's, and for n = 0 N / D = 2t / 2 exactly (t >= 0
// there, and then D rounds to 2): the error is t's. D is computed from N, so that N's rounding
// error, shared, hardly moves the quotient once D is near N.
//
// The errors are largest for n = 1 and quotients just below 1/4 (a small quotient of rounded N and
// D) and for n = 2 below 1/2. So n is rounded from a - kShift, which moves the ends of the
// intervals of a up, from 0.173 and 0.520 to 0.259 and 0.606, where tanh is just above 1/4 and
// 1/2: 1.7 instead of 2.3 ULP, for one subtraction. It makes r run from -0.088 to 0.260.
//
// Measured maximum, ULP: float 1.75 (every float), double 1.87; without fused multiply-add 1.66
// and 1.67.
template <class V>
FASTRNN_HD FASTRNN_INLINE V tanh(V x) {
  using T = typename V::Scalar;
  using C = ExpConstants<T>;
  constexpr T kShift = T(0.0859375);
  constexpr T kMax = T(20);  // from 19.1 on (float: 9.1) the result rounds to 1
  const V one = V::set(T(1));
  const V two = V::set(T(2));
  const V magic = V::set(FloatBits<T>::kMagic);
  const V a = min(V::set(kMax), abs(x));
  const V m = fma(a - V::set(kShift), V::set(2 * C::kLog2e), magic);
  const V n = m - magic;
  const V r = C::minus_half_ln2(a, n);
  const V w = r * r;
  const V t = fma(r * w, C::tanh_series(w), r);
  const V s = pow2_from_magic(m);
  const V numerator = fma(s + one, t, s - one);
  const V denominator = numerator + fnma(two, t, two);
  return flip_sign(numerator / denominator, x);
}

// max(x, 0); NaN and both zeros stay what they are.
template <class V>
FASTRNN_HD FASTRNN_INLINE V relu(V x) {
  return max(V::zero(), x);
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn

#endif  // FASTRNN_CELLS_ACTIVATIONS_H_
