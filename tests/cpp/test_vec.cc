// Vec<T> of the ISA this file is compiled for, and the one-lane Scalar<T>: every operation against
// plain C++ on special and random operands, partial loads and stores against unmapped memory.
#include "cpu/vec.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cells/scalar.h"
#include "check.h"

namespace {

using fastrnn::FASTRNN_ISA::FloatBits;
using fastrnn::FASTRNN_ISA::from_bits;
using fastrnn::FASTRNN_ISA::Lane;
using fastrnn::FASTRNN_ISA::to_bits;
using fastrnn::FASTRNN_ISA::Vec;

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kVecFuses = true;
#else
constexpr bool kVecFuses = false;  // SSE2
#endif

// Whether V's fma rounds once.
template <class V>
constexpr bool kFuses = kVecFuses || V::N == 1;

template <class T>
std::vector<T> special_values() {
  using L = std::numeric_limits<T>;
  std::vector<T> values;
  for (T x :
       {T(0), L::denorm_min(), L::min() / 2, L::min(), L::epsilon(), T(0.5), T(1), 1 + L::epsilon(),
        T(3), FloatBits<T>::kMagic, L::max(), L::infinity(), L::quiet_NaN()}) {
    values.push_back(x);
    values.push_back(-x);
  }
  return values;
}

// Operands: every pair of special values (with a third one), then numbers of ordinary size, then
// arbitrary bit patterns.
template <class T>
struct Operands {
  std::vector<T> a, b, c;
  Operands() {
    const std::vector<T> special = special_values<T>();
    std::mt19937_64 random(7);
    std::uniform_real_distribution<T> ordinary(T(-4), T(4));
    for (T x : special) {
      for (T y : special) push(x, y, special[random() % special.size()]);
    }
    for (int i = 0; i < 2000; ++i) push(ordinary(random), ordinary(random), ordinary(random));
    auto any = [&random] {
      return from_bits<T>(static_cast<typename FloatBits<T>::Bits>(random()));
    };
    for (int i = 0; i < 2000; ++i) push(any(), any(), any());
    while (a.size() % 16 != 0) push(0, 0, 0);
  }
  void push(T x, T y, T z) {
    a.push_back(x);
    b.push_back(y);
    c.push_back(z);
  }
};

// Equal bits, or NaN both: which NaN comes out of arithmetic is the machine's choice.
template <class T>
bool same(T got, T expected) {
  if (std::isnan(expected)) return std::isnan(got);
  return to_bits(got) == to_bits(expected);
}

template <class T>
bool same_bits(T got, T expected) {
  return to_bits(got) == to_bits(expected);
}

// Applies `vector_op` to V's lanes of the operands and compares each lane with `scalar_op` of it.
template <class V, class VectorOp, class ScalarOp, class Same>
void compare(const char* name, VectorOp vector_op, ScalarOp scalar_op, Same equal) {
  using T = typename V::Scalar;
  static const Operands<T> operands;
  for (std::size_t i = 0; i < operands.a.size(); i += V::N) {
    const T *a = &operands.a[i], *b = &operands.b[i], *c = &operands.c[i];
    T out[V::N];
    vector_op(V::load(a), V::load(b), V::load(c)).store(out);
    for (int j = 0; j < V::N; ++j) {
      const T expected = scalar_op(a[j], b[j], c[j]);
      if (equal(out[j], expected)) {
        ++checks_made;
      } else {
        std::ostringstream text;
        text.precision(17);
        text << name << "(" << a[j] << ", " << b[j] << ", " << c[j] << "), N = " << V::N
             << ": expected " << expected << ", got " << out[j];
        check_that(false, __FILE__, __LINE__, text.str());
      }
    }
  }
}

// Of Vec only: what is written in assembler.
template <class T>
void test_accumulate() {
  using V = Vec<T>;
  compare<V>(
      "accumulate(a, b, c)",
      [](V a, V b, V c) {
        b.hold();
        accumulate(a, b, c);
        return c;
      },
      [](T a, T b, T c) -> T { return kFuses<V> ? std::fma(a, b, c) : a * b + c; },
      [](T got, T expected) { return same(got, expected); });
}

template <class V>
void test_operations() {
  using T = typename V::Scalar;
  const auto arithmetic = [](T got, T expected) { return same(got, expected); };
  const auto bitwise = [](T got, T expected) { return same_bits(got, expected); };

#define COMPARE(equal, vector_expression, scalar_expression) \
  compare<V>(                                                \
      #vector_expression,                                    \
      [](V a, V b, V c) {                                    \
        (void)a, (void)b, (void)c;                           \
        return vector_expression;                            \
      },                                                     \
      [](T a, T b, T c) -> T {                               \
        (void)a, (void)b, (void)c;                           \
        return scalar_expression;                            \
      },                                                     \
      equal)

  COMPARE(arithmetic, a + b, a + b);
  COMPARE(arithmetic, a - b, a - b);
  COMPARE(arithmetic, a * b, a * b);
  COMPARE(arithmetic, a / b, a / b);
  COMPARE(arithmetic, fma(a, b, c), kFuses<V> ? std::fma(a, b, c) : a * b + c);
  COMPARE(arithmetic, fnma(a, b, c), kFuses<V> ? std::fma(-a, b, c) : c - a * b);
  // b where either is NaN or both are zero: the bits of one operand, never a new value.
  COMPARE(bitwise, min(a, b), a < b ? a : b);
  COMPARE(bitwise, max(a, b), a > b ? a : b);
  COMPARE(bitwise, select_gt(a, b, b, c), a > b ? b : c);
  COMPARE(bitwise, -a, from_bits<T>(to_bits(a) ^ FloatBits<T>::kSign));
  COMPARE(bitwise, abs(a), std::fabs(a));
  COMPARE(bitwise, copysign(a, b), std::copysign(a, b));
  COMPARE(bitwise, flip_sign(a, b),
          std::signbit(b) ? from_bits<T>(to_bits(a) ^ FloatBits<T>::kSign) : a);
#undef COMPARE

  for (T x : special_values<T>()) {
    T out[V::N];
    V::set(x).store(out);
    for (T y : out) CHECK(same_bits(y, x));
  }
  T out[V::N];
  V::zero().store(out);
  for (T y : out) CHECK(same_bits(y, T(0)));
}

// 2^n for every n of the range, made as the activations make it, and each lane on its own.
template <class V>
void test_pow2() {
  using T = typename V::Scalar;
  constexpr int kBias = static_cast<int>(FloatBits<T>::kBias);
  const V magic = V::set(FloatBits<T>::kMagic);
  for (int first = -kBias; first <= kBias + 1; ++first) {
    T n[V::N], out[V::N], rounded[V::N];
    for (int j = 0; j < V::N; ++j)
      n[j] = static_cast<T>(first + j <= kBias + 1 ? first + j : -kBias);
    // 0.4 away from n, to be rounded off.
    const V m = fma(V::load(n), V::set(T(1)), V::set(T(0.375)) + magic);
    (m - magic).store(rounded);
    pow2_from_magic(m).store(out);
    for (int j = 0; j < V::N; ++j) {
      CHECK_EQ(rounded[j], n[j]);
      const T expected = n[j] == -kBias ? T(0) : std::ldexp(T(1), static_cast<int>(n[j]));
      CHECK_EQ(out[j], expected);
    }
  }
  T out[V::N];
  pow2_from_magic(V::set(static_cast<T>(kBias + 1)) + magic).store(out);
  for (T y : out) CHECK_EQ(y, std::numeric_limits<T>::infinity());
}

// Pages whose neighbours on both sides may not be touched.
class GuardedPages {
 public:
  GuardedPages() : page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {
    void* map = mmap(nullptr, 3 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(map != MAP_FAILED);
    begin_ = static_cast<char*>(map) + page_;
    CHECK_EQ(mprotect(begin_, page_, PROT_READ | PROT_WRITE), 0);
  }
  ~GuardedPages() { munmap(begin_ - page_, 3 * page_); }
  GuardedPages(const GuardedPages&) = delete;
  GuardedPages& operator=(const GuardedPages&) = delete;

  template <class T>
  T* begin() const {
    return reinterpret_cast<T*>(begin_);
  }
  template <class T>
  T* end() const {
    return reinterpret_cast<T*>(begin_ + page_);
  }

 private:
  std::size_t page_;
  char* begin_;
};

// Every count and alignment; the count goes through a volatile, so that no compiler specialises it.
template <class V>
void test_partial_access() {
  using T = typename V::Scalar;
  const GuardedPages pages;
  const T sentinel = T(-77);
  for (volatile int count = 0; count <= V::N; count = count + 1) {
    const int n = count;
    // At the very end and the very beginning of what may be touched.
    for (T* p : {pages.end<T>() - n, pages.begin<T>()}) {
      for (int j = 0; j < n; ++j) p[j] = static_cast<T>(j + 1);
      T out[V::N];
      V::load_n(p, n).store(out);
      for (int j = 0; j < V::N; ++j) CHECK(same_bits(out[j], j < n ? static_cast<T>(j + 1) : T(0)));

      T values[V::N];
      for (int j = 0; j < V::N; ++j) values[j] = static_cast<T>(j + 100);
      V::load(values).store_n(p, n);
      for (int j = 0; j < n; ++j) CHECK_EQ(p[j], values[j]);
    }
    // At every misalignment, with neighbours that must survive.
    for (int offset = 0; offset <= V::N; ++offset) {
      T memory[3 * V::N];
      for (T& x : memory) x = sentinel;
      T values[V::N];
      for (int j = 0; j < V::N; ++j) values[j] = static_cast<T>(j);
      V::load(values).store_n(memory + offset, n);
      for (int j = 0; j < 3 * V::N; ++j) {
        const bool written = j >= offset && j < offset + n;
        CHECK_EQ(memory[j], written ? static_cast<T>(j - offset) : sentinel);
      }
      T out[V::N];
      V::load_n(memory + offset, n).store(out);
      for (int j = 0; j < V::N; ++j) CHECK_EQ(out[j], j < n ? static_cast<T>(j) : T(0));
    }
  }
}

template <class V>
void test_whole_access() {
  using T = typename V::Scalar;
  const GuardedPages pages;
  for (int offset = 0; offset <= 2 * V::N; ++offset) {
    T* p = pages.end<T>() - V::N - offset;
    for (int j = 0; j < V::N; ++j) p[j] = static_cast<T>(offset + j);
    T out[V::N + 2];
    out[0] = out[V::N + 1] = T(-77);
    V::load(p).store(out + 1);
    for (int j = 0; j < V::N; ++j) CHECK_EQ(out[j + 1], static_cast<T>(offset + j));
    CHECK_EQ(out[0], T(-77));
    CHECK_EQ(out[V::N + 1], T(-77));
    V::set(T(5)).store(p);
    for (int j = 0; j < V::N; ++j) CHECK_EQ(p[j], T(5));
  }
}

template <class V>
void test_all() {
  test_operations<V>();
  test_pow2<V>();
  test_partial_access<V>();
  test_whole_access<V>();
}

}  // namespace

int main() {
  CHECK_EQ(sizeof(Vec<float>), sizeof(float) * Vec<float>::N);
  CHECK_EQ(sizeof(Vec<double>), sizeof(double) * Vec<double>::N);
  test_all<Vec<float>>();
  test_all<Vec<double>>();
  test_all<Lane<float>>();
  test_all<Lane<double>>();
  test_accumulate<float>();
  test_accumulate<double>();
  return check_report();
}
