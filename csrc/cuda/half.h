// The 16-bit formats as they are stored, and the conversions of every stored type.
//
// Bits are the same on the host and on the device: rounding to nearest, ties to even; what
// overflows becomes Inf, subnormal numbers of both formats are kept, and every NaN becomes 0x7FFF.
// So no conversion ever gives 0xFFFF, which kernels use as the mark of a value not yet written
// (cuda/grid.h). Which NaN of float a 16-bit NaN becomes is the one thing left open.
#ifndef FASTRNN_CUDA_HALF_H_
#define FASTRNN_CUDA_HALF_H_

#include <stdint.h>

#include "cells/scalar.h"

namespace fastrnn {
namespace cuda {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr uint16_t kNan16 = 0x7FFF;  // of both formats

namespace half_detail {

// bf16 is the upper half of a float: adding just under one half of the last place that is kept,
// and 1 more where that place is odd, carries exactly where rounding goes up. The carry out of the
// mantissa raises the exponent, up to Inf, as it should.
FASTRNN_HD FASTRNN_INLINE uint16_t bfloat16_bits(float x) {
#ifdef __CUDA_ARCH__
  // As a pair with 0: the instruction for a pair runs in the ordinary pipe, that for one does not.
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(0.0f), "f"(x));
  return static_cast<uint16_t>(out);
#else
  const uint32_t bits = FASTRNN_ISA::to_bits(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return kNan16;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
#endif
}

FASTRNN_HD FASTRNN_INLINE uint16_t float16_bits(float x) {
#ifdef __CUDA_ARCH__
  uint16_t out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(x));
  return out;
#else
  const uint32_t bits = FASTRNN_ISA::to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return kNan16;
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65520: to Inf
  if (magnitude >= 0x38800000u) {                                              // 2^-14: normal
    const uint32_t rebiased = magnitude - (112u << 23);
    return static_cast<uint16_t>(sign | ((rebiased + 0xFFFu + ((rebiased >> 13) & 1u)) >> 13));
  }
  // Subnormal, in units of 2^-24: the mantissa with its leading 1 is |x| * 2^(150 - exponent).
  const uint32_t shift = 126u - (magnitude >> 23);
  if (shift > 24u) return static_cast<uint16_t>(sign);
  const uint32_t mantissa = (magnitude & 0x7FFFFFu) | 0x800000u;
  const uint32_t rest = mantissa & ((1u << shift) - 1u), half = 1u << (shift - 1u);
  uint32_t units = mantissa >> shift;
  if (rest > half || (rest == half && (units & 1u) != 0u)) ++units;
  return static_cast<uint16_t>(sign | units);
#endif
}

FASTRNN_HD FASTRNN_INLINE float float16_value(uint16_t x) {
#ifdef __CUDA_ARCH__
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x));
  return out;
#else
  const uint32_t sign = (x & 0x8000u) << 16, exponent = (x >> 10) & 0x1Fu, mantissa = x & 0x3FFu;
  if (exponent == 0x1Fu) {  // Inf, NaN
    return FASTRNN_ISA::from_bits<float>(sign | 0x7F800000u | (mantissa << 13));
  }
  if (exponent == 0u) {  // zero, subnormal: exact, since 2^-24 is a normal float
    const float value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return FASTRNN_ISA::from_bits<float>(sign | FASTRNN_ISA::to_bits(value));
  }
  return FASTRNN_ISA::from_bits<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
#endif
}

template <class S>
struct Convert;
template <>
struct Convert<Bfloat16> {
  FASTRNN_HD FASTRNN_INLINE static Bfloat16 from(float x) { return {bfloat16_bits(x)}; }
};
template <>
struct Convert<Float16> {
  FASTRNN_HD FASTRNN_INLINE static Float16 from(float x) { return {float16_bits(x)}; }
};
template <>
struct Convert<float> {
  FASTRNN_HD FASTRNN_INLINE static float from(float x) { return x; }
};
template <>
struct Convert<double> {  // only what is already double, or is exact
  FASTRNN_HD FASTRNN_INLINE static double from(double x) { return x; }
};

}  // namespace half_detail

// A stored value as float. Exact, but for double.
FASTRNN_HD FASTRNN_INLINE float to_float(Bfloat16 x) {
  return FASTRNN_ISA::from_bits<float>(static_cast<uint32_t>(x.bits) << 16);
}
FASTRNN_HD FASTRNN_INLINE float to_float(Float16 x) { return half_detail::float16_value(x.bits); }
FASTRNN_HD FASTRNN_INLINE float to_float(float x) { return x; }
FASTRNN_HD FASTRNN_INLINE float to_float(double x) { return static_cast<float>(x); }

// from_float<S>(x): x rounded to S.
template <class S>
FASTRNN_HD FASTRNN_INLINE S from_float(float x) {
  return half_detail::Convert<S>::from(x);
}

// Between what is stored and what is computed with: float for the 16-bit formats and float, double
// for double (Accumulator<S> of cuda/recurrence.h). widen(x), narrow<S>(a).
FASTRNN_HD FASTRNN_INLINE float widen(Bfloat16 x) { return to_float(x); }
FASTRNN_HD FASTRNN_INLINE float widen(Float16 x) { return to_float(x); }
FASTRNN_HD FASTRNN_INLINE float widen(float x) { return x; }
FASTRNN_HD FASTRNN_INLINE double widen(double x) { return x; }

template <class S>
FASTRNN_HD FASTRNN_INLINE S narrow(float x) {
  return half_detail::Convert<S>::from(x);
}
template <class S>
FASTRNN_HD FASTRNN_INLINE S narrow(double x) {
  static_assert(sizeof(S) == sizeof(double), "a sum in double is stored as double only");
  return half_detail::Convert<S>::from(x);
}

// Two 16-bit numbers in a register, `low` in the lower half: one instruction on the device.
template <class S>
FASTRNN_HD FASTRNN_INLINE uint32_t pack(float low, float high);
template <>
FASTRNN_HD FASTRNN_INLINE uint32_t pack<Bfloat16>(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#else
  return half_detail::bfloat16_bits(low) |
         (static_cast<uint32_t>(half_detail::bfloat16_bits(high)) << 16);
#endif
}
template <>
FASTRNN_HD FASTRNN_INLINE uint32_t pack<Float16>(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#else
  return half_detail::float16_bits(low) |
         (static_cast<uint32_t>(half_detail::float16_bits(high)) << 16);
#endif
}

}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_HALF_H_
