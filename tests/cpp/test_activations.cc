// The activations against the C library in a wider type: float against double, double against long
// double. Prints the largest error in ULP, and where; fails above the promised 2.
//
// By default every 1021st float; `test_activations --full` takes all 2^32 of them (some minutes).
// The figures in cells/activations.h are those of the full sweep and 2^27 doubles with AVX2, and of
// every 61st float and 2^18 doubles with SSE2.
//
// An error is counted in units in the last place of the true result, wherever that is a normal
// number. Below, a kernel may give 0 (its flush mode) or come as near as it likes.
#include "cells/activations.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "core/fpenv.h"
#include "cpu/vec.h"

namespace {

using fastrnn::FpEnv;
using fastrnn::FASTRNN_ISA::FloatBits;
using fastrnn::FASTRNN_ISA::from_bits;
using fastrnn::FASTRNN_ISA::Lane;
using fastrnn::FASTRNN_ISA::to_bits;
using fastrnn::FASTRNN_ISA::Vec;

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kVecFuses = true;
#else
constexpr bool kVecFuses = false;  // SSE2: the same formulas, other roundings
#endif

constexpr double kPromisedUlp = 2.0;

// The type the truth is computed in: wide enough for its own error not to count.
template <class T>
struct Wider;
template <>
struct Wider<float> {
  using Type = double;
};
template <>
struct Wider<double> {
  using Type = long double;
};

struct Sigmoid {
  static constexpr const char* kName = "sigmoid";
  static constexpr bool kOdd = false;
  template <class V>
  static V value(V x) {
    return sigmoid(x);
  }
  template <class W>
  static W truth(W x) {
    return 1 / (1 + std::exp(-x));
  }
};

struct Tanh {
  static constexpr const char* kName = "tanh";
  static constexpr bool kOdd = true;
  template <class V>
  static V value(V x) {
    return tanh(x);
  }
  template <class W>
  static W truth(W x) {
    return std::tanh(x);
  }
};

// exp_nonpos at -|x|.
struct Exp {
  static constexpr const char* kName = "exp";
  static constexpr bool kOdd = false;
  template <class V>
  static V value(V x) {
    return exp_nonpos(-abs(x));
  }
  template <class W>
  static W truth(W x) {
    return std::exp(-std::fabs(x));
  }
};

// |got - truth| in units in the last place of a T of truth's size.
double ulp_error(float got, double truth) {
  const uint64_t exponent = to_bits(truth) & 0x7ff0000000000000u;
  return std::fabs(got - truth) / (from_bits<double>(exponent) * 0x1p-23);
}
double ulp_error(double got, long double truth) {
  int exponent = 0;
  std::frexp(truth, &exponent);
  return static_cast<double>(std::fabs(got - truth) / std::ldexp(1.0L, exponent - 53));
}

template <class T>
struct Worst {
  double ulp = 0;
  T at = 0;
};

// F at `count` points (a multiple of 16), with V = Vec<T> and with one lane, checked against the
// truth and the bounds; the worst error so far in `worst`, and a hash of the results' bits in
// `hash`.
template <class F, class T>
void check_points(const T* x, int count, Worst<T>* worst, uint64_t* hash) {
  using V = Vec<T>;
  using W = typename Wider<T>::Type;
  const T upper = 1, lower = F::kOdd ? T(-1) : T(0);
  for (int i = 0; i < count; i += V::N) {
    T y[V::N];
    F::value(V::load(x + i)).store(y);
    for (int j = 0; j < V::N; ++j) {
      const T at = x[i + j];
      const T one_lane = F::value(Lane<T>::set(at)).v;
      if (std::isnan(at)) {
        if (!std::isnan(y[j]) || !std::isnan(one_lane)) CHECK_EQ(y[j], at);
        continue;
      }
      if (kVecFuses ? to_bits(y[j]) != to_bits(one_lane)
                    : !(std::fabs(y[j] - one_lane) <=
                        std::fabs(y[j]) * 4 * std::numeric_limits<T>::epsilon())) {
        CHECK_EQ(y[j], one_lane);
      }
      if (!(y[j] >= lower && y[j] <= upper) ||
          (F::kOdd && std::signbit(y[j]) != std::signbit(at))) {
        check_that(false, __FILE__, __LINE__,
                   std::string(F::kName) + " out of bounds at " + std::to_string(at));
      }
      *hash = (*hash ^ to_bits(y[j])) * 0x100000001b3u;
      const W truth = F::truth(static_cast<W>(at));
      if (std::fabs(truth) < std::numeric_limits<T>::min()) {
        if (!(std::fabs(y[j]) <= std::numeric_limits<T>::min()))
          CHECK_EQ(y[j], static_cast<T>(truth));
        continue;
      }
      const double error = ulp_error(y[j], truth);
      if (!(error <= worst->ulp)) *worst = {error, at};
    }
  }
  checks_made += count;
}

template <class F, class T>
void report(const Worst<T>& worst, uint64_t hash) {
  std::printf("%-8s %-7s %.3f ULP at %a (%g), bits %016llx\n", F::kName,
              sizeof(T) == 4 ? "float" : "double", worst.ulp, static_cast<double>(worst.at),
              static_cast<double>(worst.at), static_cast<unsigned long long>(hash));
  CHECK(worst.ulp <= kPromisedUlp);
}

constexpr int kBlock = 4096;

// Every `stride`-th float of all 2^32. The ISAs that fuse must give the same bits: `bits`, their
// hash.
template <class F>
void sweep_floats(uint32_t stride, uint64_t bits) {
  Worst<float> worst;
  uint64_t hash = 0xcbf29ce484222325u;
  std::vector<float> x(kBlock);
  for (uint64_t first = 0; first < (uint64_t{1} << 32); first += uint64_t{stride} * kBlock) {
    for (int i = 0; i < kBlock; ++i) {
      const uint64_t pattern = first + uint64_t{stride} * static_cast<uint64_t>(i);
      x[static_cast<std::size_t>(i)] =
          from_bits<float>(pattern < (uint64_t{1} << 32) ? static_cast<uint32_t>(pattern) : 0);
    }
    check_points<F>(x.data(), kBlock, &worst, &hash);
  }
  report<F>(worst, hash);
  if (kVecFuses) CHECK_EQ(hash, bits);
}

// Doubles: of ordinary size, of every size, and around the points where the code or the result
// changes: n's boundaries, multiples of ln(2) / 2, saturation.
template <class F>
void sample_doubles(int blocks, uint64_t bits) {
  std::mt19937_64 random(11);  // its sequence is the standard's; the distributions' are not
  const auto uniform = [&random] { return static_cast<double>(random() >> 11) * 0x1p-53; };
  Worst<double> worst;
  uint64_t hash = 0xcbf29ce484222325u;
  std::vector<double> x(kBlock);
  for (int block = 0; block < blocks; ++block) {
    for (int i = 0; i < kBlock; ++i) {
      const double sign = (random() & 1) != 0 ? -1 : 1;
      double value = 0;
      switch (i % 8) {
        case 0:
          value = from_bits<double>(random());
          break;
        case 1: {
          const double mantissa = 1 + uniform();
          value = std::ldexp(mantissa, -static_cast<int>(random() % 60));
          break;
        }
        case 2:
          value = uniform() * 720;
          break;
        case 3: {
          const double multiple = static_cast<double>(random() % 200) * 0.34657359027997264;
          const double shift = i % 16 == 3 ? 0.0859375 : 0;
          value = (multiple + shift) * (1 + (uniform() - 0.5) * 0x1p-40);
          break;
        }
        default:
          value = uniform() * (i % 2 == 0 ? 2 : 24);
      }
      x[static_cast<std::size_t>(i)] = sign * value;
    }
    check_points<F>(x.data(), kBlock, &worst, &hash);
  }
  report<F>(worst, hash);
  if (kVecFuses) CHECK_EQ(hash, bits);
}

template <class F, class V>
typename V::Scalar at(typename V::Scalar x) {
  typename V::Scalar y[V::N];
  F::value(V::set(x)).store(y);
  for (auto lane : y) CHECK(to_bits(lane) == to_bits(y[0]));
  return y[0];
}

template <class V>
void test_special_values() {
  using T = typename V::Scalar;
  using L = std::numeric_limits<T>;
  const T inf = L::infinity();
  CHECK_EQ((at<Sigmoid, V>(T(0))), T(0.5));
  CHECK_EQ((at<Sigmoid, V>(-T(0))), T(0.5));
  CHECK_EQ((at<Sigmoid, V>(L::denorm_min())), T(0.5));
  for (T x : {T(100), L::max(), inf}) CHECK_EQ((at<Sigmoid, V>(x)), T(1));
  for (T x : {T(-800), L::lowest(), -inf}) {
    CHECK_EQ((at<Sigmoid, V>(x)), T(0));
    CHECK(!std::signbit(at<Sigmoid, V>(x)));
  }
  for (T x : {T(0), -T(0), L::denorm_min()}) CHECK_EQ((at<Exp, V>(x)), T(1));
  for (T x : {T(800), inf}) CHECK(to_bits(at<Exp, V>(x)) == to_bits(T(0)));
  for (T sign : {T(1), T(-1)}) {
    CHECK(to_bits(at<Tanh, V>(sign * T(0))) == to_bits(sign * T(0)));
    // tanh(x) = x (1 - x² / 3 ...) is x itself for tiny x, subnormals included outside flush mode.
    for (T x : {L::denorm_min(), L::min() / 4, L::min(), L::epsilon() / 16})
      CHECK_EQ((at<Tanh, V>(sign * x)), sign * x);
    for (T x : {T(20), T(1000), L::max(), inf}) CHECK_EQ((at<Tanh, V>(sign * x)), sign);
    CHECK(std::isnan(at<Sigmoid, V>(sign * L::quiet_NaN())));
    CHECK(std::isnan(at<Tanh, V>(sign * L::quiet_NaN())));
    CHECK(std::isnan(at<Exp, V>(sign * L::quiet_NaN())));
  }

  struct Relu {
    static V value(V x) { return relu(x); }
  };
  for (T x : {T(0), L::denorm_min(), L::min(), T(1.5), L::max(), inf}) {
    CHECK(to_bits(at<Relu, V>(x)) == to_bits(x));
    CHECK(to_bits(at<Relu, V>(-x)) == to_bits(x == 0 ? -x : T(0)));
  }
  CHECK(std::isnan(at<Relu, V>(L::quiet_NaN())));

  // A NaN or an infinity stays in its own lane.
  if constexpr (V::N > 1) {
    T x[V::N] = {L::quiet_NaN(), inf}, y[V::N], z[V::N];
    if (V::N > 2) x[V::N - 1] = -inf;
    sigmoid(V::load(x)).store(y);
    tanh(V::load(x)).store(z);
    for (int j = 0; j < V::N; ++j) {
      CHECK_EQ(std::isnan(y[j]), j == 0);
      CHECK_EQ(std::isnan(z[j]), j == 0);
    }
  }
}

// Every float from `from` (a little past where the true result rounds to `limit`) to `to` gives it.
template <class F>
void test_saturation(float from, float to, float limit) {
  const auto past = to_bits(to);
  for (auto bits = to_bits(from); bits <= past; ++bits) {
    const float x = from_bits<float>(bits);
    if (F::value(Vec<float>::set(x)).v[0] != limit) CHECK_EQ(x, limit);
  }
  checks_made += static_cast<long>(past - to_bits(from));
}

// The kernels run with subnormals flushed: wherever the true result is normal that changes nothing.
template <class F, class T>
void test_flush_mode() {
  using V = Vec<T>;
  const T smallest = 4 * std::numeric_limits<T>::min();
  std::mt19937_64 random(3);
  for (int i = 0; i < 100000; ++i) {
    T x[V::N], plain[V::N], flushed[V::N];
    for (T& value : x) value = from_bits<T>(static_cast<typename FloatBits<T>::Bits>(random()));
    F::value(V::load(x)).store(plain);
    {
      const FpEnv environment;
      volatile T barrier[V::N];  // the compiler may not move the work out of the environment
      for (int j = 0; j < V::N; ++j) barrier[j] = x[j];
      for (int j = 0; j < V::N; ++j) x[j] = barrier[j];
      F::value(V::load(x)).store(flushed);
      for (int j = 0; j < V::N; ++j) barrier[j] = flushed[j];
      for (int j = 0; j < V::N; ++j) flushed[j] = barrier[j];
    }
    for (int j = 0; j < V::N; ++j) {
      if (std::fabs(plain[j]) < smallest) {
        CHECK(std::fabs(flushed[j]) <= smallest);
      } else if (!std::isnan(x[j])) {
        CHECK_EQ(flushed[j], plain[j]);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool full = argc > 1 && std::strcmp(argv[1], "--full") == 0;
  // The hashes change only when the formulas or coefficients do.
  const uint32_t stride = full ? 1 : 1021;
  const int blocks = full ? 1 << 15 : 64;
  sweep_floats<Sigmoid>(stride, full ? 0x48b8534967262012u : 0xebab3dcd67324e3du);
  sweep_floats<Tanh>(stride, full ? 0xb199e18d85827d45u : 0x1a576bc63105baadu);
  sweep_floats<Exp>(stride, full ? 0x77eb87c51fb786d1u : 0x8af03339e197f1fdu);
  sample_doubles<Sigmoid>(blocks, full ? 0x87c9311488eb12ddu : 0xd8fb8a53b995890fu);
  sample_doubles<Tanh>(blocks, full ? 0x3e036c52b2229f4au : 0xd3f6254eaa9e832bu);
  sample_doubles<Exp>(blocks, full ? 0x898c581a3b818bf5u : 0x94c42851211928a0u);
  test_special_values<Vec<float>>();
  test_special_values<Vec<double>>();
  test_special_values<Lane<float>>();
  test_special_values<Lane<double>>();
  test_saturation<Tanh>(9.02f, 30.0f, 1.0f);
  test_saturation<Tanh>(-9.02f, -30.0f, -1.0f);
  test_saturation<Sigmoid>(17.4f, 90.0f, 1.0f);
  test_saturation<Sigmoid>(-88.0f, -200.0f, 0.0f);
  test_flush_mode<Sigmoid, float>();
  test_flush_mode<Sigmoid, double>();
  test_flush_mode<Tanh, float>();
  test_flush_mode<Tanh, double>();
  test_flush_mode<Exp, float>();
  test_flush_mode<Exp, double>();
  return check_report();
}
