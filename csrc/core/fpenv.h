// The floating-point environment that kernels run in: round to nearest, subnormals read and written
// as zero (they would cost up to 100 times an ordinary operation), no traps. The caller's own
// environment comes back unchanged.
//
// The members are forced inline because this header may be included where other instruction sets
// are enabled: an out-of-line copy compiled there could be the one the linker keeps for everybody.
#ifndef FASTRNN_CORE_FPENV_H_
#define FASTRNN_CORE_FPENV_H_

#if defined(__x86_64__) || (defined(__i386__) && defined(__SSE2__))
#include <xmmintrin.h>
#endif

namespace fastrnn {

// Set for the lifetime of the object, on the calling thread only; may be nested. Pool threads
// (threads.h) hold one for their whole life, so a backend needs one at its entry and none in its
// tasks.
class FpEnv {
 public:
#if defined(__x86_64__) || (defined(__i386__) && defined(__SSE2__))
  // 0x1f80: all exceptions masked, round to nearest; 0x8000: flush to zero; 0x0040: denormals are
  // zero.
  __attribute__((always_inline)) inline FpEnv() : saved_(_mm_getcsr()) { _mm_setcsr(0x9fc0U); }
  __attribute__((always_inline)) inline ~FpEnv() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
  // Bit 24: flush to zero, inputs too; rounding mode 0: to nearest; traps off.
  __attribute__((always_inline)) inline FpEnv() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_) : : "memory");
    __asm__ volatile("msr fpcr, %0" : : "r"(1UL << 24) : "memory");
  }
  __attribute__((always_inline)) inline ~FpEnv() {
    __asm__ volatile("msr fpcr, %0" : : "r"(saved_) : "memory");
  }
#else
  FpEnv() {}
  ~FpEnv() {}
#endif
  FpEnv(const FpEnv&) = delete;
  FpEnv& operator=(const FpEnv&) = delete;

 private:
#if defined(__aarch64__)
  unsigned long saved_;
#elif defined(__x86_64__) || (defined(__i386__) && defined(__SSE2__))
  unsigned int saved_;
#endif
};

}  // namespace fastrnn

#endif  // FASTRNN_CORE_FPENV_H_
