// The cells' equations, three ways.
//
// 1. Forward in long double against the papers' formulas, written out here once more.
// 2. Backward in long double against central differences of the forward pass.
// 3. Vec<T> and one lane of T: the same bits as each other where the ISA fuses multiply-adds, and
//    close to long double. The state made again from what a step keeps has the forward pass's bits.
//
// A cell is a template on its vector type, so long double is one more vector of one lane.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "check.h"
#include "cpu/vec.h"

namespace {

using fastrnn::FASTRNN_ISA::GruAfter;
using fastrnn::FASTRNN_ISA::GruBefore;
using fastrnn::FASTRNN_ISA::Lane;
using fastrnn::FASTRNN_ISA::Lstm;
using fastrnn::FASTRNN_ISA::RnnRelu;
using fastrnn::FASTRNN_ISA::RnnSigmoid;
using fastrnn::FASTRNN_ISA::RnnTanh;
using fastrnn::FASTRNN_ISA::to_bits;
using fastrnn::FASTRNN_ISA::Vec;

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kVecFuses = true;
#else
constexpr bool kVecFuses = false;  // SSE2: the same formulas, other roundings
#endif

// One lane of long double, with the C library's functions.
struct Exact {
  using Scalar = long double;
  static constexpr int N = 1;
  long double v;

  static Exact load(const long double* p) { return {*p}; }
  void store(long double* p) const { *p = v; }
  static Exact set(long double x) { return {x}; }
  static Exact zero() { return {0}; }

  friend Exact operator+(Exact a, Exact b) { return {a.v + b.v}; }
  friend Exact operator-(Exact a, Exact b) { return {a.v - b.v}; }
  friend Exact operator*(Exact a, Exact b) { return {a.v * b.v}; }
  friend Exact fma(Exact a, Exact b, Exact c) { return {a.v * b.v + c.v}; }
  friend Exact fnma(Exact a, Exact b, Exact c) { return {c.v - a.v * b.v}; }
  friend Exact select_gt(Exact a, Exact b, Exact x, Exact y) { return a.v > b.v ? x : y; }
  friend Exact sigmoid(Exact x) { return {1 / (1 + std::exp(-x.v))}; }
  friend Exact tanh(Exact x) { return {std::tanh(x.v)}; }
  friend Exact relu(Exact x) { return {x.v > 0 ? x.v : 0}; }
};

// What a step of a hidden unit depends on, and the gradients that enter it from above. For the GRU
// whose reset comes before the product, the product itself is one multiplication by w.
enum Input { kSlot0, kSlot1, kSlot2, kSlot3, kH, kC, kW, kDh, kDc, kInputs };
// What comes out: the new state, the same made again from what the step keeps, the gradients of the
// inputs.
enum Output {
  kNewH,
  kNewC,
  kAgainH,
  kAgainC,
  kDSlot0,
  kDSlot1,
  kDSlot2,
  kDSlot3,
  kDH,
  kDC,
  kOutputs
};

template <class V, int N>
struct Unit {
  V value[N];
  V& operator[](int i) { return value[i]; }
  const V& operator[](int i) const { return value[i]; }
};
template <class V>
using Inputs = Unit<V, kInputs>;
template <class V>
using Outputs = Unit<V, kOutputs>;

// One step forward; `s` holds what it keeps.
template <class Cell, class V>
void step(const Inputs<V>& in, V (&s)[Cell::kSlots], Outputs<V>& out) {
  for (int i = 0; i < Cell::kSlots; ++i) s[i] = in[kSlot0 + i];
  V c = in[kC], h = V::zero();
  if constexpr (Cell::kTwoPhase) {
    V rh;
    Cell::forward_gates(s[0], s[1], in[kH], rh);
    s[2] = fma(in[kW], rh, s[2]);
  }
  Cell::forward(s, in[kH], c, h);
  out[kNewH] = h;
  out[kNewC] = c;
}

// A step forward and back.
template <class Cell, class V>
Outputs<V> run(const Inputs<V>& in) {
  Outputs<V> out;
  for (int i = 0; i < kOutputs; ++i) out[i] = V::zero();
  V s[Cell::kSlots];
  step<Cell>(in, s, out);
  V c = in[kC], h = V::zero();
  Cell::output(s, in[kH], c, h);
  out[kAgainH] = h;
  out[kAgainC] = c;
  V dh = in[kDh], dc = Cell::kHasCell ? in[kDc] : V::zero();
  Cell::backward(s, in[kH], in[kC], dh, dc);
  if constexpr (Cell::kTwoPhase) {
    V rh;
    Cell::backward_reset(s[0], in[kH], in[kW] * s[2], dh, rh);
    out[kDSlot3] = rh;  // what dW_hn multiplies
  }
  for (int i = 0; i < Cell::kSlots; ++i) out[kDSlot0 + i] = s[i];
  out[kDH] = dh;
  out[kDC] = dc;
  return out;
}

// --- 1. The papers' formulas --------------------------------------------------------------------

long double sigma(long double x) { return 1 / (1 + std::exp(-x)); }

struct State {
  long double h, c;
};

template <class Cell>
State formula(const Inputs<Exact>& in);

template <>
State formula<RnnTanh>(const Inputs<Exact>& in) {
  return {std::tanh(in[kSlot0].v), in[kC].v};
}
template <>
State formula<RnnRelu>(const Inputs<Exact>& in) {
  return {std::fmax(0.0L, in[kSlot0].v), in[kC].v};
}
template <>
State formula<RnnSigmoid>(const Inputs<Exact>& in) {
  return {sigma(in[kSlot0].v), in[kC].v};
}
template <>
State formula<Lstm>(const Inputs<Exact>& in) {  // i, f, g, o
  const long double c =
      sigma(in[kSlot1].v) * in[kC].v + sigma(in[kSlot0].v) * std::tanh(in[kSlot2].v);
  return {sigma(in[kSlot3].v) * std::tanh(c), c};
}
template <>
State formula<GruAfter>(const Inputs<Exact>& in) {  // r, z, hidden n, input n
  const long double z = sigma(in[kSlot1].v);
  const long double n = std::tanh(in[kSlot3].v + sigma(in[kSlot0].v) * in[kSlot2].v);
  return {(1 - z) * n + z * in[kH].v, in[kC].v};
}
template <>
State formula<GruBefore>(const Inputs<Exact>& in) {  // r, z, n
  const long double z = sigma(in[kSlot1].v);
  const long double n = std::tanh(in[kSlot2].v + in[kW].v * (sigma(in[kSlot0].v) * in[kH].v));
  return {(1 - z) * n + z * in[kH].v, in[kC].v};
}

constexpr long double kEpsilon = std::numeric_limits<long double>::epsilon();

void check_close(long double got, long double expected, long double tolerance,
                 const std::string& what) {
  if (!(std::fabs(got - expected) <= tolerance))
    CHECK_EQ(what + " " + std::to_string(got), std::to_string(expected));
  ++checks_made;
}

class Random {
 public:
  // In (-scale, scale).
  double uniform(double scale) {
    return scale * static_cast<double>(static_cast<int64_t>(engine_())) * 0x1p-63;
  }
  int below(int n) { return static_cast<int>(engine_() % static_cast<uint64_t>(n)); }

 private:
  std::mt19937_64 engine_{23};
};

template <class Cell>
Inputs<Exact> random_inputs(Random* random) {
  Inputs<Exact> in;
  for (int i = 0; i < kInputs; ++i) in[i] = Exact::set(random->uniform(i < kH ? 4 : 1));
  return in;
}

template <class Cell>
void test_forward(const char* name) {
  Random random;
  for (int trial = 0; trial < 2000; ++trial) {
    const Inputs<Exact> in = random_inputs<Cell>(&random);
    const Outputs<Exact> out = run<Cell>(in);
    const State want = formula<Cell>(in);
    check_close(out[kNewH].v, want.h, 64 * kEpsilon, std::string(name) + ": h");
    check_close(out[kNewC].v, want.c, 64 * kEpsilon, std::string(name) + ": c");
  }
}

// --- 2. Central differences ---------------------------------------------------------------------

// dh * h' + dc * c' with input i moved by e.
template <class Cell>
long double loss(Inputs<Exact> in, int i, long double e) {
  in[i].v += e;
  Exact s[Cell::kSlots];
  Outputs<Exact> out;
  step<Cell>(in, s, out);
  return in[kDh].v * out[kNewH].v + (Cell::kHasCell ? in[kDc].v * out[kNewC].v : 0);
}

template <class Cell>
void test_backward(const char* name) {
  Random random;
  // Differences of fourth order are off by about e^4 / 30 = 3e-18, and by roundings of epsilon / e.
  const long double e = 1e-4L, tolerance = 1e-14L + 1e5L * kEpsilon;
  for (int trial = 0; trial < 2000; ++trial) {
    const Inputs<Exact> in = random_inputs<Cell>(&random);
    if (std::fabs(in[kSlot0].v) < 4 * e) continue;  // relu's corner
    const Outputs<Exact> out = run<Cell>(in);
    const auto check = [&](int input, int output) {
      const auto f = [&](long double d) { return loss<Cell>(in, input, d); };
      const long double slope = (8 * (f(e) - f(-e)) - (f(2 * e) - f(-2 * e))) / (12 * e);
      check_close(out[output].v, slope, tolerance,
                  std::string(name) + ": gradient of input " + std::to_string(input));
    };
    for (int i = 0; i < Cell::kSlots; ++i) check(kSlot0 + i, kDSlot0 + i);
    check(kH, kDH);
    if (Cell::kHasCell) check(kC, kDC);
    if (Cell::kTwoPhase) {
      const long double r = sigma(in[kSlot0].v);
      check_close(out[kDSlot3].v, r * in[kH].v, 64 * kEpsilon, std::string(name) + ": r h");
    }
  }
}

// --- 3. Vectors, one lane, long double ----------------------------------------------------------

// Pre-activations of ordinary size, in saturation, and beyond every limit.
template <class T>
T preactivation(Random* random) {
  const T infinity = std::numeric_limits<T>::infinity();
  switch (random->below(8)) {
    case 0:
      return static_cast<T>(random->uniform(30));
    case 1:
      return static_cast<T>(random->uniform(1e4));
    case 2: {
      const T odd[] = {T(0),
                       -T(0),
                       infinity,
                       -infinity,
                       std::numeric_limits<T>::max(),
                       std::numeric_limits<T>::min()};
      return odd[random->below(6)];
    }
    default:
      return static_cast<T>(random->uniform(4));
  }
}

template <class Cell, class T>
void test_lanes(const char* name) {
  using V = Vec<T>;
  Random random;
  for (int trial = 0; trial < 2000; ++trial) {
    const bool ordinary = trial % 2 == 0;
    T in[kInputs][V::N], out[kOutputs][V::N];
    for (int i = 0; i < kInputs; ++i)
      for (T& x : in[i])
        x = i < kH && !ordinary ? preactivation<T>(&random)
                                : static_cast<T>(random.uniform(i < kH ? 4 : 1));
    Inputs<V> wide;
    for (int i = 0; i < kInputs; ++i) wide[i] = V::load(in[i]);
    const Outputs<V> got = run<Cell>(wide);
    for (int i = 0; i < kOutputs; ++i) got[i].store(out[i]);

    for (int lane = 0; lane < V::N; ++lane) {
      if (!std::isnan(out[kNewH][lane]))
        CHECK(to_bits(out[kAgainH][lane]) == to_bits(out[kNewH][lane]));
      if (!std::isnan(out[kNewC][lane]))
        CHECK(to_bits(out[kAgainC][lane]) == to_bits(out[kNewC][lane]));
      Inputs<Lane<T>> narrow;
      Inputs<Exact> exact;
      long double largest = 0;  // beyond some size long double has values where T has 0 * Inf
      for (int i = 0; i < kInputs; ++i) {
        narrow[i] = Lane<T>::set(in[i][lane]);
        exact[i] = Exact::set(in[i][lane]);
        largest = std::fmax(largest, std::fabs(exact[i].v));
      }
      const Outputs<Lane<T>> one = run<Cell>(narrow);
      const Outputs<Exact> truth = run<Cell>(exact);
      for (int i = 0; i < kOutputs; ++i) {
        const T x = out[i][lane], y = one[i].v;
        const std::string what = std::string(name) + ": output " + std::to_string(i);
        if (kVecFuses && !(std::isnan(x) && std::isnan(y)) && to_bits(x) != to_bits(y))
          CHECK_EQ(what + " " + std::to_string(x), std::to_string(y));
        // Inputs of size 1 and a few operations, each within 2 ULP.
        const long double tolerance = 24 * std::numeric_limits<T>::epsilon();
        if (ordinary) {
          check_close(x, truth[i].v, tolerance, what);
          check_close(y, truth[i].v, tolerance, what + " of one lane");
        } else if (largest < 1e5L && std::fabs(truth[i].v) < 1) {
          check_close(x, truth[i].v, tolerance, what + " in saturation");
        }
      }
      checks_made += kOutputs;
    }
  }
}

template <class Cell>
void test_cell(const char* name) {
  test_forward<Cell>(name);
  test_backward<Cell>(name);
  test_lanes<Cell, float>(name);
  test_lanes<Cell, double>(name);
}

}  // namespace

int main() {
  test_cell<RnnTanh>("RnnTanh");
  test_cell<RnnRelu>("RnnRelu");
  test_cell<RnnSigmoid>("RnnSigmoid");
  test_cell<Lstm>("Lstm");
  test_cell<GruAfter>("GruAfter");
  test_cell<GruBefore>("GruBefore");
  return check_report();
}
