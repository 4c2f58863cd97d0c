// What the kernels with a time loop give the cells to compute with: a float like Scalar<float>
// (cells/scalar.h), with the same results, but for a quotient that takes no branch.
//
// The compiler's own exact quotient jumps to a subroutine where an operand's exponent is extreme,
// and the code of two quotients cannot be interleaved. A step of the LSTM has five, each at the end
// of a long chain of dependent operations; without the jump the gates' four go side by side.
//
// What the jump is for cannot occur. The cells divide in sigmoid() and tanh() only
// (cells/activations.h), where the divisor is a NaN or in [0.5, 2^90], and the dividend a NaN or of
// a magnitude of at most 2^90. A reciprocal to within a few units in the last place, one Newton
// step, and the quotient corrected by its remainder give the rounded quotient, like the subroutine,
// if the remainder is a normal number; where the dividend is below 2^-100, the error is less than 2
// units in the last place.
#ifndef FASTRNN_CUDA_LANE_H_
#define FASTRNN_CUDA_LANE_H_

#include "cells/scalar.h"

namespace fastrnn {
namespace cuda {

struct DeviceLane {
  using Scalar = float;
  static constexpr int N = 1;
  float v;

  FASTRNN_HD FASTRNN_INLINE static DeviceLane set(float x) { return {x}; }
  FASTRNN_HD FASTRNN_INLINE static DeviceLane zero() { return {0.0f}; }

  FASTRNN_HD FASTRNN_INLINE friend DeviceLane operator+(DeviceLane a, DeviceLane b) {
    return {a.v + b.v};
  }
  FASTRNN_HD FASTRNN_INLINE friend DeviceLane operator-(DeviceLane a, DeviceLane b) {
    return {a.v - b.v};
  }
  FASTRNN_HD FASTRNN_INLINE friend DeviceLane operator*(DeviceLane a, DeviceLane b) {
    return {a.v * b.v};
  }
  FASTRNN_HD FASTRNN_INLINE friend DeviceLane operator-(DeviceLane a) { return {-a.v}; }

  FASTRNN_HD FASTRNN_INLINE friend DeviceLane operator/(DeviceLane a, DeviceLane b) {
#ifdef __CUDA_ARCH__
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b.v));
    r = FASTRNN_ISA::fused(FASTRNN_ISA::fused(-b.v, r, 1.0f), r, r);
    const float q = a.v * r;
    return {FASTRNN_ISA::fused(FASTRNN_ISA::fused(-b.v, q, a.v), r, q)};
#else
    return {a.v / b.v};
#endif
  }
};

FASTRNN_HD FASTRNN_INLINE FASTRNN_ISA::Scalar<float> scalar_of(DeviceLane a) { return {a.v}; }

// The functions that cells call, as in cells/scalar.h.
FASTRNN_HD FASTRNN_INLINE DeviceLane fma(DeviceLane a, DeviceLane b, DeviceLane c) {
  return {FASTRNN_ISA::fused(a.v, b.v, c.v)};
}
FASTRNN_HD FASTRNN_INLINE DeviceLane fnma(DeviceLane a, DeviceLane b, DeviceLane c) {
  return {FASTRNN_ISA::fused(-a.v, b.v, c.v)};
}
FASTRNN_HD FASTRNN_INLINE DeviceLane min(DeviceLane a, DeviceLane b) {
  return {FASTRNN_ISA::min(scalar_of(a), scalar_of(b)).v};
}
FASTRNN_HD FASTRNN_INLINE DeviceLane max(DeviceLane a, DeviceLane b) {
  return {FASTRNN_ISA::max(scalar_of(a), scalar_of(b)).v};
}
FASTRNN_HD FASTRNN_INLINE DeviceLane select_gt(DeviceLane a, DeviceLane b, DeviceLane x,
                                               DeviceLane y) {
  return {a.v > b.v ? x.v : y.v};
}
FASTRNN_HD FASTRNN_INLINE DeviceLane abs(DeviceLane a) {
  return {FASTRNN_ISA::abs(scalar_of(a)).v};
}
FASTRNN_HD FASTRNN_INLINE DeviceLane flip_sign(DeviceLane a, DeviceLane sgn) {
  return {FASTRNN_ISA::flip_sign(scalar_of(a), scalar_of(sgn)).v};
}
FASTRNN_HD FASTRNN_INLINE DeviceLane pow2_from_magic(DeviceLane m) {
  return {FASTRNN_ISA::pow2_from_magic(scalar_of(m)).v};
}

}  // namespace cuda
}  // namespace fastrnn

#endif  // FASTRNN_CUDA_LANE_H_
