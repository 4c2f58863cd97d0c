// Scalar<T>: the vector concept of cpu/vec.h with one lane.
//
// The cells (rnn.h, lstm.h, gru.h, activations.h) are templates on a vector type V. On the CPU V is
// Vec<T>; here V is a plain number, for CUDA threads and as the tests' oracle: every fused
// multiply-add of an FMA machine's Vec is one here too, so Scalar<T> gives the same bits, lane by
// lane.
//
// This header also defines what every file of the cells needs: FASTRNN_HD, FASTRNN_INLINE and the
// namespace fastrnn::FASTRNN_ISA. Code compiled once per ISA must not share inline functions
// between ISAs (the linker would keep one copy, possibly the one the machine cannot run), so each
// ISA has its own namespace; without an ISA it is "scalar".
#ifndef FASTRNN_CELLS_SCALAR_H_
#define FASTRNN_CELLS_SCALAR_H_

#include <stdint.h>
#include <string.h>

#ifndef FASTRNN_ISA
#define FASTRNN_ISA scalar
#endif

#ifdef __CUDACC__
#define FASTRNN_HD __host__ __device__
#define FASTRNN_INLINE __forceinline__
#else
#define FASTRNN_HD
#define FASTRNN_INLINE inline __attribute__((always_inline))
#endif

namespace fastrnn {
namespace FASTRNN_ISA {

// IEEE-754 layout of T, for the integer arithmetic on exponents: the unsigned type of T's size, the
// mantissa's stored bits, the exponent's bias, and kMagic = 1.5 * 2^kMantissaBits. Adding kMagic to
// a number of magnitude below 2^(kMantissaBits - 1) rounds it to an integer n (ties to even) and
// leaves n, in two's complement, in the low bits.
template <class T>
struct FloatBits;

template <>
struct FloatBits<float> {
  using Bits = uint32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr Bits kBias = 127;
  static constexpr Bits kSign = 0x80000000u;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
};

template <>
struct FloatBits<double> {
  using Bits = uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr Bits kBias = 1023;
  static constexpr Bits kSign = 0x8000000000000000u;
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
};

FASTRNN_HD FASTRNN_INLINE float fused(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return ::fmaf(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
FASTRNN_HD FASTRNN_INLINE double fused(double a, double b, double c) {
#ifdef __CUDA_ARCH__
  return ::fma(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

// One lane. Scalar<T>, below, is its public name: a class cannot have a member type of its own
// name, and the vector concept asks for V::Scalar.
template <class T>
struct Lane {
  using Scalar = T;
  static constexpr int N = 1;
  T v;

  FASTRNN_HD FASTRNN_INLINE static Lane load(const T* p) { return {*p}; }
  FASTRNN_HD FASTRNN_INLINE void store(T* p) const { *p = v; }
  FASTRNN_HD FASTRNN_INLINE static Lane load_n(const T* p, int n) { return {n > 0 ? *p : T(0)}; }
  FASTRNN_HD FASTRNN_INLINE void store_n(T* p, int n) const {
    if (n > 0) *p = v;
  }
  FASTRNN_HD FASTRNN_INLINE static Lane set(T x) { return {x}; }
  FASTRNN_HD FASTRNN_INLINE static Lane zero() { return {T(0)}; }

  FASTRNN_HD FASTRNN_INLINE friend Lane operator+(Lane a, Lane b) { return {a.v + b.v}; }
  FASTRNN_HD FASTRNN_INLINE friend Lane operator-(Lane a, Lane b) { return {a.v - b.v}; }
  FASTRNN_HD FASTRNN_INLINE friend Lane operator*(Lane a, Lane b) { return {a.v * b.v}; }
  FASTRNN_HD FASTRNN_INLINE friend Lane operator/(Lane a, Lane b) { return {a.v / b.v}; }
  FASTRNN_HD FASTRNN_INLINE friend Lane operator-(Lane a) { return {-a.v}; }
};

template <class T>
using Scalar = Lane<T>;

// a * b + c and c - a * b, rounded once.
template <class T>
FASTRNN_HD FASTRNN_INLINE Lane<T> fma(Lane<T> a, Lane<T> b, Lane<T> c) {
  return {fused(a.v, b.v, c.v)};
}
template <class T>
FASTRNN_HD FASTRNN_INLINE Lane<T> fnma(Lane<T> a, Lane<T> b, Lane<T> c) {
  return {fused(-a.v, b.v, c.v)};
}

// b where either operand is NaN, or both are zero.
template <class T>
FASTRNN_HD FASTRNN_INLINE Lane<T> min(Lane<T> a, Lane<T> b) {
  return {a.v < b.v ? a.v : b.v};
}
template <class T>
FASTRNN_HD FASTRNN_INLINE Lane<T> max(Lane<T> a, Lane<T> b) {
  return {a.v > b.v ? a.v : b.v};
}

// a > b ? x : y; y where a or b is NaN.
template <class T>
FASTRNN_HD FASTRNN_INLINE Lane<T> select_gt(Lane<T> a, Lane<T> b, Lane<T> x, Lane<T> y) {
  return {a.v > b.v ? x.v : y.v};
}

template <class T>
FASTRNN_HD FASTRNN_INLINE typename FloatBits<T>::Bits to_bits(T x) {
  typename FloatBits<T>::Bits bits;
  memcpy(&bits, &x, sizeof(x));
  return bits;
}
template <class T>
FASTRNN_HD FASTRNN_INLINE T from_bits(typename FloatBits<T>::Bits bits) {
  T x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// |a|, and the magnitude of `mag` with the sign bit of `sgn`; bit operations, so they hold for ±0,
// Inf and NaN.
template <class T>
FASTRNN_HD FASTRNN_INLINE Lane<T> abs(Lane<T> a) {
  return {from_bits<T>(to_bits(a.v) & ~FloatBits<T>::kSign)};
}
template <class T>
FASTRNN_HD FASTRNN_INLINE Lane<T> copysign(Lane<T> mag, Lane<T> sgn) {
  return {from_bits<T>((to_bits(mag.v) & ~FloatBits<T>::kSign) |
                       (to_bits(sgn.v) & FloatBits<T>::kSign))};
}

// a, negated where the sign bit of `sgn` is set.
template <class T>
FASTRNN_HD FASTRNN_INLINE Lane<T> flip_sign(Lane<T> a, Lane<T> sgn) {
  return {from_bits<T>(to_bits(a.v) ^ (to_bits(sgn.v) & FloatBits<T>::kSign))};
}

// 2^n for m = n + kMagic, n an integer in [-kBias, kBias + 1]: shifting m's bits left by the
// mantissa's width pushes kMagic's own bits out and leaves n in the exponent field, to which the
// bias is added. The ends are 0 and Inf.
template <class T>
FASTRNN_HD FASTRNN_INLINE Lane<T> pow2_from_magic(Lane<T> m) {
  using L = FloatBits<T>;
  return {from_bits<T>((to_bits(m.v) << L::kMantissaBits) + (L::kBias << L::kMantissaBits))};
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn

#endif  // FASTRNN_CELLS_SCALAR_H_
