// Vec<T>: one SIMD register of floats or doubles, for the ISA this file is compiled for.
//
// The compiler's macros choose the ISA; nothing else in the engine knows the register width.
// Arithmetic, comparisons and bit operations are the compiler's vector extension (GCC and Clang
// give every ISA the same operators), so that only four things are written per ISA, in Isa<T>:
// fused multiply-add, minimum and maximum, and partial loads and stores. Everything is in the ISA's
// own namespace and always inlined (see cells/scalar.h).
//
//             bytes   float   double   fma
//   SSE2        16      4       2      multiply, then add: two roundings
//   NEON        16      4       2      fused
//   AVX2        32      8       4      fused
//   AVX-512     64     16       8      fused
//
// The fused ISAs give equal bits for equal expressions; the build must keep -ffp-contract=off.
#ifndef FASTRNN_CPU_VEC_H_
#define FASTRNN_CPU_VEC_H_

#include "cells/scalar.h"

#if defined(__AVX512F__)
#define FASTRNN_VEC_BYTES 64
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__)
#define FASTRNN_VEC_BYTES 32
#include <immintrin.h>
#elif defined(__SSE2__)
#define FASTRNN_VEC_BYTES 16
#include <immintrin.h>
#elif defined(__aarch64__)
#define FASTRNN_VEC_BYTES 16
#include <arm_neon.h>
#else
#error "vec.h needs SSE2, AVX2 with FMA, AVX-512F or AArch64 NEON"
#endif

namespace fastrnn {
namespace FASTRNN_ISA {

// An operand of an assembler statement that reads and writes a vector register.
#if defined(__aarch64__)
#define FASTRNN_HELD(x) "+w"(x)
#else
#define FASTRNN_HELD(x) "+v"(x)
#endif

// Registers there are to keep a tile's accumulators in.
#if FASTRNN_VEC_BYTES == 64 || defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif

// The registers themselves: T's lanes, the same lanes as unsigned integers, and as the signed
// integers in which comparisons answer (-1 true, 0 false).
template <class T, class B, class M>
struct RegisterOf {
  typedef T Native __attribute__((vector_size(FASTRNN_VEC_BYTES)));
  typedef B Bits __attribute__((vector_size(FASTRNN_VEC_BYTES)));
  typedef M Mask __attribute__((vector_size(FASTRNN_VEC_BYTES)));

  // The lanes J of a followed by b.
  template <int... J>
  static FASTRNN_INLINE Native pick(Native a, Native b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, J...);
#else
    return __builtin_shuffle(a, b, Mask{J...});
#endif
  }
};
template <class T>
struct Register;
template <>
struct Register<float> : RegisterOf<float, uint32_t, int32_t> {};
template <>
struct Register<double> : RegisterOf<double, uint64_t, int64_t> {};

template <class T>
struct Isa;

#if FASTRNN_VEC_BYTES == 64

template <>
struct Isa<float> {
  using V = Register<float>::Native;
  static FASTRNN_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static FASTRNN_INLINE V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }
  static FASTRNN_INLINE V min(V a, V b) { return _mm512_min_ps(a, b); }
  static FASTRNN_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
  static FASTRNN_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static FASTRNN_INLINE V load_n(const float* p, int n) {
    return _mm512_maskz_loadu_ps(first(n), p);
  }
  static FASTRNN_INLINE void store_n(float* p, int n, V v) {
    _mm512_mask_storeu_ps(p, first(n), v);
  }
};

template <>
struct Isa<double> {
  using V = Register<double>::Native;
  static FASTRNN_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
  static FASTRNN_INLINE V fnma(V a, V b, V c) { return _mm512_fnmadd_pd(a, b, c); }
  static FASTRNN_INLINE V min(V a, V b) { return _mm512_min_pd(a, b); }
  static FASTRNN_INLINE V max(V a, V b) { return _mm512_max_pd(a, b); }
  static FASTRNN_INLINE __mmask8 first(int n) { return static_cast<__mmask8>((1u << n) - 1u); }
  static FASTRNN_INLINE V load_n(const double* p, int n) {
    return _mm512_maskz_loadu_pd(first(n), p);
  }
  static FASTRNN_INLINE void store_n(double* p, int n, V v) {
    _mm512_mask_storeu_pd(p, first(n), v);
  }
};

#elif FASTRNN_VEC_BYTES == 32

template <>
struct Isa<float> {
  using V = Register<float>::Native;
  static FASTRNN_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static FASTRNN_INLINE V fnma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }
  static FASTRNN_INLINE V min(V a, V b) { return _mm256_min_ps(a, b); }
  static FASTRNN_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }
  static FASTRNN_INLINE __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static FASTRNN_INLINE V load_n(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static FASTRNN_INLINE void store_n(float* p, int n, V v) { _mm256_maskstore_ps(p, first(n), v); }
};

template <>
struct Isa<double> {
  using V = Register<double>::Native;
  static FASTRNN_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
  static FASTRNN_INLINE V fnma(V a, V b, V c) { return _mm256_fnmadd_pd(a, b, c); }
  static FASTRNN_INLINE V min(V a, V b) { return _mm256_min_pd(a, b); }
  static FASTRNN_INLINE V max(V a, V b) { return _mm256_max_pd(a, b); }
  static FASTRNN_INLINE __m256i first(int n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static FASTRNN_INLINE V load_n(const double* p, int n) { return _mm256_maskload_pd(p, first(n)); }
  static FASTRNN_INLINE void store_n(double* p, int n, V v) { _mm256_maskstore_pd(p, first(n), v); }
};

#else  // 16 bytes: SSE2 and NEON

// Neither has masked memory operations; one guarded access per lane, unrolled, never touches memory
// past n.
template <class T>
struct PartialAccess {
  using V = typename Register<T>::Native;
  static FASTRNN_INLINE V load_n(const T* p, int n) {
    V v = {};
    for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(T)); ++i) {
      if (i < n) v[i] = p[i];
    }
    return v;
  }
  static FASTRNN_INLINE void store_n(T* p, int n, V v) {
    for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(T)); ++i) {
      if (i < n) p[i] = v[i];
    }
  }
};

#if defined(__SSE2__)

template <>
struct Isa<float> : PartialAccess<float> {
  static FASTRNN_INLINE V fma(V a, V b, V c) { return a * b + c; }
  static FASTRNN_INLINE V fnma(V a, V b, V c) { return c - a * b; }
  static FASTRNN_INLINE V min(V a, V b) { return _mm_min_ps(a, b); }
  static FASTRNN_INLINE V max(V a, V b) { return _mm_max_ps(a, b); }
};

template <>
struct Isa<double> : PartialAccess<double> {
  static FASTRNN_INLINE V fma(V a, V b, V c) { return a * b + c; }
  static FASTRNN_INLINE V fnma(V a, V b, V c) { return c - a * b; }
  static FASTRNN_INLINE V min(V a, V b) { return _mm_min_pd(a, b); }
  static FASTRNN_INLINE V max(V a, V b) { return _mm_max_pd(a, b); }
};

#else  // NEON

// vminq and vmaxq return NaN where either operand is; ours return b: a comparison and a select.

template <>
struct Isa<float> : PartialAccess<float> {
  static FASTRNN_INLINE V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
  static FASTRNN_INLINE V fnma(V a, V b, V c) { return vfmsq_f32(c, a, b); }
  static FASTRNN_INLINE V min(V a, V b) { return a < b ? a : b; }
  static FASTRNN_INLINE V max(V a, V b) { return a > b ? a : b; }
};

template <>
struct Isa<double> : PartialAccess<double> {
  static FASTRNN_INLINE V fma(V a, V b, V c) { return vfmaq_f64(c, a, b); }
  static FASTRNN_INLINE V fnma(V a, V b, V c) { return vfmsq_f64(c, a, b); }
  static FASTRNN_INLINE V min(V a, V b) { return a < b ? a : b; }
  static FASTRNN_INLINE V max(V a, V b) { return a > b ? a : b; }
};

#endif
#endif

// The numbers 0 … n - 1 as template arguments.
template <int... J>
struct Lanes {};
template <int n, int... J>
struct Count : Count<n - 1, n - 1, J...> {};
template <int... J>
struct Count<0, J...> {
  static FASTRNN_INLINE Lanes<J...> lanes() { return {}; }
};

template <class T>
struct Vec {
  using Scalar = T;
  using Native = typename Register<T>::Native;
  using Bits = typename Register<T>::Bits;
  static constexpr int N = FASTRNN_VEC_BYTES / static_cast<int>(sizeof(T));
  Native v;

  // Makes the compiler forget where the value was loaded from: it may else read it from there again
  // for every use.
  FASTRNN_INLINE void hold() { __asm__("" : FASTRNN_HELD(v)); }

  // N elements from or to p, of any alignment.
  static FASTRNN_INLINE Vec load(const T* p) {
    Vec r;
    __builtin_memcpy(&r.v, p, sizeof(r.v));
    return r;
  }
  FASTRNN_INLINE void store(T* p) const { __builtin_memcpy(p, &v, sizeof(v)); }

  // The first n lanes, 0 <= n <= N. Memory past n is neither read nor written (it may be unmapped);
  // lanes past n of a load are 0.
  static FASTRNN_INLINE Vec load_n(const T* p, int n) { return {Isa<T>::load_n(p, n)}; }
  FASTRNN_INLINE void store_n(T* p, int n) const { Isa<T>::store_n(p, n, v); }

  // x in every lane: the extension broadcasts a scalar operand, and x - (+0) is x for every x, -0
  // included. The compiler folds the subtraction away.
  static FASTRNN_INLINE Vec set(T x) { return {x - Native{}}; }
  static FASTRNN_INLINE Vec zero() { return {Native{}}; }

  friend FASTRNN_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend FASTRNN_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend FASTRNN_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend FASTRNN_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
  friend FASTRNN_INLINE Vec operator-(Vec a) { return {-a.v}; }

  // a * b + c and c - a * b.
  friend FASTRNN_INLINE Vec fma(Vec a, Vec b, Vec c) { return {Isa<T>::fma(a.v, b.v, c.v)}; }
  friend FASTRNN_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {Isa<T>::fnma(a.v, b.v, c.v)}; }

  // c = fma(a, b, c) in c's own register. Left to itself, GCC lets the sum take the place of a
  // factor here and there, and in a loop moves it back: a tenth of a tile's instructions.
  friend FASTRNN_INLINE void accumulate(Vec a, Vec b, Vec& c) {
#if FASTRNN_VEC_BYTES >= 32
    if constexpr (sizeof(T) == 4) {
      __asm__("vfmadd231ps %2, %1, %0" : FASTRNN_HELD(c.v) : "v"(a.v), "v"(b.v));
    } else {
      __asm__("vfmadd231pd %2, %1, %0" : FASTRNN_HELD(c.v) : "v"(a.v), "v"(b.v));
    }
#else
    c = fma(a, b, c);
#endif
  }

  // b where either operand is NaN, or both are zero.
  friend FASTRNN_INLINE Vec min(Vec a, Vec b) { return {Isa<T>::min(a.v, b.v)}; }
  friend FASTRNN_INLINE Vec max(Vec a, Vec b) { return {Isa<T>::max(a.v, b.v)}; }

  // a > b ? x : y; y where a or b is NaN.
  friend FASTRNN_INLINE Vec select_gt(Vec a, Vec b, Vec x, Vec y) {
    return {a.v > b.v ? x.v : y.v};
  }

  // |a|, and the magnitude of `mag` with the sign bit of `sgn`; bit operations, so they hold for
  // ±0, Inf and NaN.
  friend FASTRNN_INLINE Vec abs(Vec a) { return {(Native)((Bits)a.v & ~FloatBits<T>::kSign)}; }
  friend FASTRNN_INLINE Vec copysign(Vec mag, Vec sgn) {
    return {(Native)(((Bits)mag.v & ~FloatBits<T>::kSign) | ((Bits)sgn.v & FloatBits<T>::kSign))};
  }

  // a, negated where the sign bit of `sgn` is set.
  friend FASTRNN_INLINE Vec flip_sign(Vec a, Vec sgn) {
    return {(Native)((Bits)a.v ^ ((Bits)sgn.v & FloatBits<T>::kSign))};
  }

  // rows[i] lane j and rows[j] lane i change places: log2(N) rounds, of which round S moves the
  // lanes that have bit S set in row i and those that have not in row i + S.
  static FASTRNN_INLINE void transpose(Vec (&rows)[N]) { exchange<1>(rows, Count<N>::lanes()); }

  template <int S, int... J>
  static FASTRNN_INLINE void exchange(Vec (&rows)[N], Lanes<J...> lanes) {
    if constexpr (S < N) {
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) {
        if ((i & S) != 0) continue;
        const Native a = rows[i].v, b = rows[i + S].v;
        rows[i].v = Register<T>::template pick<(J & S ? N + J - S : J)...>(a, b);
        rows[i + S].v = Register<T>::template pick<(J & S ? N + J : J + S)...>(a, b);
      }
      exchange<2 * S>(rows, lanes);
    }
  }

  // 2^n for m = n + FloatBits<T>::kMagic, n an integer in [-kBias, kBias + 1]; the ends are 0 and
  // Inf (cells/scalar.h).
  friend FASTRNN_INLINE Vec pow2_from_magic(Vec m) {
    using L = FloatBits<T>;
    return {(Native)(((Bits)m.v << L::kMantissaBits) + (L::kBias << L::kMantissaBits))};
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn

#endif  // FASTRNN_CPU_VEC_H_
