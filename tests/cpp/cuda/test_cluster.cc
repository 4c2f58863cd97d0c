// The cluster-local recurrence (cuda/cluster.h) on the emulator, against loops in double.
//
// What the kernels store in 16 bits they read back, so the loops here take each step's inputs (the
// state before it; going back, the gates' gradients of the step after it) from what the kernels
// wrote. Then nothing but a step's own rounding is between the two, and a value that came too late
// or from elsewhere shows.
#include "cuda/cluster.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../check.h"
#include "cuda/emulator.h"
#include "cuda/half.h"
#include "cuda/runtime.h"

using namespace fastrnn;
using namespace fastrnn::cuda;

namespace {

struct Problem {
  CellKind kind = CellKind::kLstm;
  int64_t H = 20;
  std::vector<int64_t> lengths = {5};  // of the rows, longest first
  int directions = 1;
  bool resets = false, dy = true;
  int64_t cut = 0;  // steps of the first of two chunks; 0: one chunk

  int64_t rows() const { return static_cast<int64_t>(lengths.size()); }
  int64_t T() const { return lengths[0]; }
  CellTraits traits() const { return cell_traits(kind); }
  int64_t gates() const { return traits().gates; }
  int64_t slots() const { return traits().slots; }
};

std::vector<int64_t> offsets(const Problem& p) {
  std::vector<int64_t> first(static_cast<size_t>(p.T()) + 1, 0);
  for (int64_t k = 0; k < p.T(); ++k) {
    int64_t active = 0;
    for (int64_t length : p.lengths) active += length > k;
    first[static_cast<size_t>(k) + 1] = first[static_cast<size_t>(k)] + active;
  }
  return first;
}

// The arrays of one direction, on the host.
template <class S>
struct Arrays {
  std::vector<float> w_hh, gx, bias, c0, c_rows, c, dy, dh_in, dh, dc_in, dc;
  std::vector<uint8_t> reset;
  std::vector<S> h0, h, h_rows, kept, gradients;
};

template <class T>
void fill(std::vector<T>& x, int64_t n, double scale, std::mt19937& random) {
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  x.resize(static_cast<size_t>(n));
  for (T& value : x) value = from_float<T>(static_cast<float>(scale) * uniform(random));
}

template <class S>
Arrays<S> random_arrays(const Problem& p, std::mt19937& random) {
  const int64_t rows = offsets(p).back(), B = p.rows(), H = p.H;
  const double spread = 1.5 / std::sqrt(static_cast<double>(H));
  Arrays<S> a;
  fill(a.w_hh, p.gates() * H * H, spread, random);
  fill(a.gx, rows * H * p.gates(), 1.0, random);
  fill(a.bias, H * p.slots(), 1.0, random);
  fill(a.h0, B * H, 1.0, random);
  fill(a.c0, B * H, 1.0, random);
  fill(a.dy, rows * H, 1.0, random);
  fill(a.dh_in, B * H, 1.0, random);
  fill(a.dc_in, B * H, 1.0, random);
  a.reset.assign(static_cast<size_t>(rows), 0);
  if (p.resets) {
    for (uint8_t& r : a.reset) r = random() % 3 == 0 ? static_cast<uint8_t>(1 + random() % 255) : 0;
  }
  return a;
}

// --- Running the kernels
// --------------------------------------------------------------------------

template <class T>
Memory upload(const std::vector<T>& from) {
  const Stream stream = own_stream();
  Memory memory = allocate<T>(static_cast<int64_t>(from.size()), stream);
  copy_to_device(memory.data(), from.data(), from.size() * sizeof(T), stream);
  return memory;
}
template <class T>
std::vector<T> download(const Memory& from) {
  std::vector<T> to(from.bytes() / sizeof(T));
  copy_to_host(to.data(), from.data(), from.bytes(), own_stream());
  return to;
}

template <class S>
constexpr Precision kPrecision = Precision::kBfloat16;
template <>
constexpr Precision kPrecision<Float16> = Precision::kFloat16;

template <class S>
RecurrenceShape shape_of(const Problem& p) {
  return {p.kind, kPrecision<S>, p.H, p.rows(), p.directions};
}

// The arrays of one direction, on the device.
template <class S>
struct Device {
  Memory w_forward, w_backward, gx, bias, reset, h, c, h_rows, c_rows, kept, dy, h0, c0, dh, dc;
  Memory h_cut, c_cut;  // the state between the chunks

  Device(const Problem& p, const Arrays<S>& a) {
    const int64_t rows = offsets(p).back();
    const RecurrenceShape shape = shape_of<S>(p);
    const Stream stream = own_stream();
    const Memory w = upload(a.w_hh);
    w_forward = allocate<S>(cluster::packed_elements(shape, false), stream);
    w_backward = allocate<S>(cluster::packed_elements(shape, true), stream);
    cluster::pack<S>(shape, w.data<float>(), false, w_forward.data<S>(), stream);
    cluster::pack<S>(shape, w.data<float>(), true, w_backward.data<S>(), stream);
    gx = upload(a.gx);
    bias = upload(a.bias);
    reset = upload(a.reset);
    h = upload(a.h0);
    h0 = upload(a.h0);
    c = upload(a.c0);
    c0 = upload(a.c0);
    dy = upload(a.dy);
    dh = upload(a.dh_in);
    dc = upload(a.dc_in);
    // What a kernel leaves unwritten shows as NaN.
    h_rows = upload(std::vector<S>(static_cast<size_t>(rows * p.H), S{kNan16}));
    kept = upload(std::vector<S>(static_cast<size_t>(rows * p.H * p.slots()), S{kNan16}));
    c_rows = upload(std::vector<float>(static_cast<size_t>(rows * p.H), std::nanf("")));
  }

  ForwardRecurrence<S> forward(const Problem& p, int64_t row, bool train) const {
    ForwardRecurrence<S> d = {};
    d.gx = gx.data<float>() + row * p.H * p.gates();
    d.bias = bias.data<float>();
    d.w = w_forward.data();
    d.reset = p.resets ? reset.data<uint8_t>() + row : nullptr;
    d.h = h.data<S>();
    d.c = p.traits().has_cell ? c.data<float>() : nullptr;
    d.h_rows = h_rows.data<S>() + row * p.H;
    d.gates = train ? kept.data<S>() + row * p.H * p.slots() : nullptr;
    d.c_rows = train && p.traits().has_cell ? c_rows.data<float>() + row * p.H : nullptr;
    return d;
  }

  BackwardRecurrence<S> backward(const Problem& p, int64_t row, bool second) const {
    BackwardRecurrence<S> d = {};
    d.dy = p.dy ? dy.data<float>() + row * p.H : nullptr;
    d.w = w_backward.data();
    d.reset = p.resets ? reset.data<uint8_t>() + row : nullptr;
    d.h_rows = h_rows.data<S>() + row * p.H;
    d.h0 = (second ? h_cut : h0).template data<S>();
    if (p.traits().has_cell) {
      d.c_rows = c_rows.data<float>() + row * p.H;
      d.c0 = (second ? c_cut : c0).template data<float>();
      d.dc = dc.data<float>();
    }
    d.gates = kept.data<S>() + row * p.H * p.slots();
    d.dh = dh.data<float>();
    return d;
  }
};

// Runs the problem forward and, if `train`, backward; the results go into `arrays`.
template <class S>
void run(const Problem& p, std::vector<Arrays<S>>& arrays, bool train = true) {
  const std::vector<int64_t> first = offsets(p);
  const Memory first_device = upload(first);
  const RecurrenceShape shape = shape_of<S>(p);
  const Stream stream = own_stream();
  std::vector<Device<S>> device;
  for (const Arrays<S>& a : arrays) device.emplace_back(p, a);
  const std::vector<int64_t> ends =
      p.cut > 0 ? std::vector<int64_t>{0, p.cut, p.T()} : std::vector<int64_t>{0, p.T()};
  for (size_t i = 0; i + 1 < ends.size(); ++i) {
    const Steps steps = {ends[i], ends[i + 1], first_device.data<int64_t>(), first.data()};
    std::vector<ForwardRecurrence<S>> d;
    for (Device<S>& direction : device) {
      if (i == 1) {
        direction.h_cut = upload(download<S>(direction.h));
        direction.c_cut = upload(download<float>(direction.c));
      }
      d.push_back(direction.forward(p, first[static_cast<size_t>(ends[i])], train));
    }
    cluster::forward<S>(shape, steps, d.data(), stream);
  }
  for (size_t d = 0; d < device.size(); ++d) {
    arrays[d].h = download<S>(device[d].h);
    arrays[d].c = download<float>(device[d].c);
    arrays[d].h_rows = download<S>(device[d].h_rows);
    arrays[d].c_rows = download<float>(device[d].c_rows);
    arrays[d].kept = download<S>(device[d].kept);
  }
  if (!train) return;
  for (size_t i = ends.size() - 1; i-- > 0;) {
    const Steps steps = {ends[i], ends[i + 1], first_device.data<int64_t>(), first.data()};
    std::vector<BackwardRecurrence<S>> d;
    for (const Device<S>& direction : device) {
      d.push_back(direction.backward(p, first[static_cast<size_t>(ends[i])], i == 1));
    }
    cluster::backward<S>(shape, steps, d.data(), stream);
  }
  for (size_t d = 0; d < device.size(); ++d) {
    arrays[d].gradients = download<S>(device[d].kept);
    arrays[d].dh = download<float>(device[d].dh);
    arrays[d].dc = download<float>(device[d].dc);
  }
  synchronize(stream);
}

// --- The loops in double
// --------------------------------------------------------------------------

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

// One cell, forward: a[g] = gate g's part of the input (and bias), u[g] its part of the state.
// slot: what is kept.
void cell_forward(CellKind kind, const double* a, const double* u, double b_q, double h_prev,
                  double c_prev, double* slot, double* h, double* c) {
  switch (kind) {
    case CellKind::kLstm:
      slot[0] = sigmoid(a[0] + u[0]);
      slot[1] = sigmoid(a[1] + u[1]);
      slot[2] = std::tanh(a[2] + u[2]);
      slot[3] = sigmoid(a[3] + u[3]);
      *c = slot[1] * c_prev + slot[0] * slot[2];
      *h = slot[3] * std::tanh(*c);
      return;
    case CellKind::kGruAfter:
      slot[0] = sigmoid(a[0] + u[0]);
      slot[1] = sigmoid(a[1] + u[1]);
      slot[2] = u[2] + b_q;
      slot[3] = std::tanh(a[2] + slot[0] * slot[2]);
      *h = (1 - slot[1]) * slot[3] + slot[1] * h_prev;
      return;
    case CellKind::kRnnTanh:
      *h = slot[0] = std::tanh(a[0] + u[0]);
      return;
    case CellKind::kRnnRelu:
      *h = slot[0] = std::max(a[0] + u[0], 0.0);
      return;
    default:
      *h = slot[0] = sigmoid(a[0] + u[0]);
      return;
  }
}

// One cell, backward. g: gradients of the slots; dh, dc: in of the state after, out of the state
// before, dh without the product.
void cell_backward(CellKind kind, const double* slot, double h_prev, double c_prev, double* dh,
                   double* dc, double* g) {
  switch (kind) {
    case CellKind::kLstm: {
      const double i = slot[0], f = slot[1], z = slot[2], o = slot[3];
      const double tanh_c = std::tanh(f * c_prev + i * z);
      const double d = *dc + *dh * o * (1 - tanh_c * tanh_c);
      g[0] = d * z * i * (1 - i);
      g[1] = d * c_prev * f * (1 - f);
      g[2] = d * i * (1 - z * z);
      g[3] = *dh * tanh_c * o * (1 - o);
      *dc = d * f;
      *dh = 0;
      return;
    }
    case CellKind::kGruAfter: {
      const double r = slot[0], z = slot[1], q = slot[2], n = slot[3];
      g[3] = *dh * (1 - z) * (1 - n * n);
      g[2] = g[3] * r;
      g[1] = *dh * (h_prev - n) * z * (1 - z);
      g[0] = g[3] * q * r * (1 - r);
      *dh *= z;
      return;
    }
    case CellKind::kRnnTanh:
      g[0] = *dh * (1 - slot[0] * slot[0]);
      break;
    case CellKind::kRnnRelu:
      g[0] = slot[0] > 0 ? *dh : 0;
      break;
    default:
      g[0] = *dh * slot[0] * (1 - slot[0]);
      break;
  }
  *dh = 0;
}

// One unit in the last place of S near x, at least that of 2^-7; a value rounded to S may be half
// of it away, and a little more where float32 and double fall on different sides of a tie.
template <class S>
double unit(double x) {
  const int bits = std::is_same<S, Bfloat16>::value ? 8 : 11;
  return std::ldexp(1.0, std::max(std::ilogb(std::abs(x) + 1e-30), -7) + 1 - bits);
}

template <class S>
std::vector<double> rounded_weights(const std::vector<float>& w) {
  std::vector<double> out;
  for (float x : w) out.push_back(to_float(from_float<S>(x)));
  return out;
}

size_t index(int64_t i) { return static_cast<size_t>(i); }

struct Worst {
  double half = 0, single = 0;  // of 16 bits, in units in the last place; of float32, absolute
  template <class S>
  void stored(S got, double expected) {
    const double error = std::abs(to_float(got) - expected) / unit<S>(expected);
    half = error <= half ? half : error;  // a NaN counts
  }
  void exact(float got, double expected) {
    const double error = std::abs(got - expected) / (1 + std::abs(expected));
    single = error <= single ? single : error;
  }
};

template <class S>
void check_forward(const Problem& p, const Arrays<S>& a, Worst& worst) {
  const std::vector<int64_t> first = offsets(p);
  const std::vector<double> w = rounded_weights<S>(a.w_hh);
  const int64_t H = p.H, G = p.gates();
  for (int64_t k = 0; k < p.T(); ++k) {
    for (int64_t j = 0; j < first[index(k + 1)] - first[index(k)]; ++j) {
      const int64_t row = first[index(k)] + j;
      const bool dropped = a.reset[index(row)] != 0;
      const S* const before =
          k == 0 ? &a.h0[index(j * H)] : &a.h_rows[index((first[index(k - 1)] + j) * H)];
      for (int64_t u = 0; u < H; ++u) {
        double x[4] = {}, s[4] = {}, slot[4] = {}, h = 0, c = 0, c_prev = 0;
        for (int64_t g = 0; g < G; ++g) {
          x[g] = a.gx[index((row * H + u) * G + g)];
          for (int64_t v = 0; v < H && !dropped; ++v) {
            s[g] += w[index((g * H + u) * H + v)] * to_float(before[v]);
          }
        }
        if (p.traits().has_cell && !dropped) {
          c_prev =
              k == 0 ? a.c0[index(j * H + u)] : a.c_rows[index((first[index(k - 1)] + j) * H + u)];
        }
        const double b_q = p.kind == CellKind::kGruAfter ? a.bias[index(u * 4 + 2)] : 0.0;
        cell_forward(p.kind, x, s, b_q, dropped ? 0.0 : to_float(before[u]), c_prev, slot, &h, &c);
        worst.stored(a.h_rows[index(row * H + u)], h);
        for (int64_t i = 0; i < p.slots(); ++i) {
          worst.stored(a.kept[index((row * H + u) * p.slots() + i)], slot[i]);
        }
        if (p.traits().has_cell) worst.exact(a.c_rows[index(row * H + u)], c);
      }
    }
  }
  for (int64_t j = 0; j < p.rows(); ++j) {  // final states, bit for bit
    const int64_t last = p.lengths[index(j)] - 1;
    for (int64_t u = 0; u < H; ++u) {
      const int64_t at = last < 0 ? 0 : (first[index(last)] + j) * H + u;
      CHECK_EQ(a.h[index(j * H + u)].bits,
               (last < 0 ? a.h0[index(j * H + u)] : a.h_rows[index(at)]).bits);
      if (p.traits().has_cell) {
        CHECK_EQ(a.c[index(j * H + u)], last < 0 ? a.c0[index(j * H + u)] : a.c_rows[index(at)]);
      }
    }
  }
}

template <class S>
void check_backward(const Problem& p, const Arrays<S>& a, Worst& worst) {
  const std::vector<int64_t> first = offsets(p);
  const std::vector<double> w = rounded_weights<S>(a.w_hh);
  const int64_t H = p.H, G = p.gates(), slots = p.slots();
  std::vector<double> dh(a.dh_in.begin(), a.dh_in.end()), dc(a.dc_in.begin(), a.dc_in.end());
  for (int64_t k = p.T() - 1; k >= 0; --k) {
    for (int64_t j = 0; j < first[index(k + 1)] - first[index(k)]; ++j) {
      const int64_t row = first[index(k)] + j;
      const bool dropped = a.reset[index(row)] != 0;
      const int64_t before = k == 0 ? j : first[index(k - 1)] + j;
      for (int64_t u = 0; u < H; ++u) {
        const int64_t at = j * H + u;
        double slot[4] = {}, g[4] = {};
        for (int64_t i = 0; i < slots; ++i)
          slot[i] = to_float(a.kept[index((row * H + u) * slots + i)]);
        const double h_prev =
            dropped ? 0.0 : to_float((k == 0 ? a.h0 : a.h_rows)[index(before * H + u)]);
        const double c_prev = dropped || !p.traits().has_cell
                                  ? 0.0
                                  : (k == 0 ? a.c0 : a.c_rows)[index(before * H + u)];
        if (p.dy) dh[index(at)] += a.dy[index(row * H + u)];
        cell_backward(p.kind, slot, h_prev, c_prev, &dh[index(at)], &dc[index(at)], g);
        for (int64_t i = 0; i < slots; ++i) {
          worst.stored(a.gradients[index((row * H + u) * slots + i)], g[i]);
        }
        if (dropped) dh[index(at)] = dc[index(at)] = 0;
      }
      for (int64_t v = 0; v < H && !dropped; ++v) {
        for (int64_t g = 0; g < G; ++g) {
          for (int64_t u = 0; u < H; ++u) {
            dh[index(j * H + v)] += w[index((g * H + u) * H + v)] *
                                    to_float(a.gradients[index((row * H + u) * slots + g)]);
          }
        }
      }
    }
  }
  for (size_t i = 0; i < dh.size(); ++i) {
    worst.exact(a.dh[i], dh[i]);
    if (p.traits().has_cell) worst.exact(a.dc[i], dc[i]);
  }
}

// --- The tests
// ------------------------------------------------------------------------------------

template <class S>
std::vector<Arrays<S>> arrays_for(const Problem& p, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<Arrays<S>> arrays;
  for (int d = 0; d < p.directions; ++d) arrays.push_back(random_arrays<S>(p, random));
  return arrays;
}

std::string describe(const Problem& p, const Worst& worst) {
  return "cell " + std::to_string(static_cast<int>(p.kind)) + ", H " + std::to_string(p.H) +
         ", B " + std::to_string(p.rows()) + ", T " + std::to_string(p.T()) + ": 16 bits " +
         std::to_string(worst.half) + " ulp, float " + std::to_string(worst.single * 1e6) + "e-6";
}

template <class S>
void check_against_loops(const Problem& p, unsigned seed) {
  std::vector<Arrays<S>> arrays = arrays_for<S>(p, seed);
  run(p, arrays);
  Worst worst;
  for (const Arrays<S>& a : arrays) {
    check_forward(p, a, worst);
    check_backward(p, a, worst);
  }
  check_that(worst.half < 0.52 && worst.single < 1e-6, __FILE__, __LINE__, describe(p, worst));
}

template <class T>
void check_same(const std::vector<T>& a, const std::vector<T>& b) {
  CHECK_EQ(a.size(), b.size());
  CHECK(std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}
template <class S>
void check_same(const std::vector<Arrays<S>>& a, const std::vector<Arrays<S>>& b) {
  for (size_t d = 0; d < a.size(); ++d) {
    check_same(a[d].h, b[d].h);
    check_same(a[d].c, b[d].c);
    check_same(a[d].h_rows, b[d].h_rows);
    check_same(a[d].c_rows, b[d].c_rows);
    check_same(a[d].kept, b[d].kept);
    check_same(a[d].gradients, b[d].gradients);
    check_same(a[d].dh, b[d].dh);
    check_same(a[d].dc, b[d].dc);
  }
}

emulator::Options hopper() {
  emulator::Options options;
  options.major = 9;
  options.minor = 0;
  options.multiprocessors = 132;
  options.shared_per_block = 227 * 1024;
  return options;
}

constexpr CellKind kCells[] = {CellKind::kLstm, CellKind::kGruAfter, CellKind::kRnnTanh,
                               CellKind::kRnnRelu, CellKind::kRnnSigmoid};

std::vector<int64_t> ragged(int64_t B, int64_t T) {
  std::vector<int64_t> lengths;
  for (int64_t j = 0; j < B; ++j) lengths.push_back(std::max<int64_t>(T - j * T / (B + 1), 1));
  return lengths;
}

template <class S>
void test_cells() {
  for (CellKind kind : kCells) {
    Problem p;
    p.kind = kind;
    p.H = 20;
    p.lengths = ragged(9, 6);
    p.resets = true;
    p.directions = 2;
    check_against_loops<S>(p, 1);
    p.H = 100;
    p.lengths = {3};
    p.resets = false;
    p.directions = 1;
    p.dy = false;
    check_against_loops<S>(p, 2);
  }
}

// Every kernel: with few multiprocessors, only clusters that take 2 or 4 tiles of rows fit side by
// side. (An emulated one has room for 2048 threads and 228 KiB.)
template <class S>
void test_rows_and_sizes() {
  const struct {
    int64_t H, B, T;
    int multiprocessors, directions;
  } cases[] = {{128, 5, 4, 132, 1}, {128, 20, 4, 132, 1}, {128, 20, 2, 1, 1}, {100, 20, 3, 2, 2},
               {1, 3, 3, 132, 1},   {130, 9, 3, 132, 1},  {256, 12, 2, 1, 1}, {129, 34, 2, 4, 1},
               {257, 2, 3, 132, 1}, {512, 8, 2, 132, 1},  {300, 20, 2, 3, 1}, {400, 50, 2, 16, 1}};
  unsigned seed = 10;
  for (const auto& c : cases) {
    emulator::Options options = hopper();
    options.multiprocessors = c.multiprocessors;
    emulator::configure(options);
    for (CellKind kind : {CellKind::kLstm, CellKind::kGruAfter, CellKind::kRnnTanh}) {
      if (c.H > 256 && kind != CellKind::kLstm && std::is_same<S, Float16>::value) continue;
      Problem p;
      p.kind = kind;
      p.H = c.H;
      p.lengths = ragged(c.B, c.T);
      p.resets = c.B == 20;
      p.directions = c.directions;
      check_against_loops<S>(p, ++seed);
    }
  }
  emulator::configure(hopper());
}

// Interleavings at random, deliveries late and out of order: the same bits each time.
template <class S>
void test_interleavings() {
  for (CellKind kind : {CellKind::kLstm, CellKind::kGruAfter, CellKind::kRnnTanh}) {
    Problem p;
    p.kind = kind;
    p.H = 50;
    p.lengths = {7, 7, 5, 4, 4, 4, 4, 4, 3, 3, 3, 2, 2, 2, 2, 2, 2, 1};  // 3 slices of 8
    p.resets = true;
    std::vector<Arrays<S>> expected = arrays_for<S>(p, 3);
    run(p, expected);
    for (uint64_t seed = 0; seed < 10; ++seed) {
      emulator::Options options = hopper();
      options.seed = seed;  // 0: as before, once more
      options.delay_stores = seed != 0;
      options.multiprocessors = seed % 2 == 0 ? 132 : 1;  // 1: of 16
      emulator::configure(options);
      std::vector<Arrays<S>> got = arrays_for<S>(p, 3);
      run(p, got);
      check_same(got, expected);
    }
    emulator::configure(hopper());
  }
}

// The same with few rows and many orders: one warp may be a step behind while the others of its
// block go on, which takes a rare one.
template <class S>
void test_one_warp_behind() {
  Problem p;
  p.H = 50;
  p.lengths = {4, 4, 4};
  std::vector<Arrays<S>> expected = arrays_for<S>(p, 6);
  run(p, expected);
  for (uint64_t seed = 1; seed <= 120; ++seed) {
    emulator::Options options = hopper();
    options.seed = seed;
    emulator::configure(options);
    std::vector<Arrays<S>> got = arrays_for<S>(p, 6);
    run(p, got);
    check_same(got, expected);
  }
  emulator::configure(hopper());
}

// Two chunks give the bits of one, also where rows end within the first or where a chunk begins.
template <class S>
void test_chunks() {
  for (CellKind kind : {CellKind::kLstm, CellKind::kGruAfter, CellKind::kRnnSigmoid}) {
    Problem p;
    p.kind = kind;
    p.H = 36;
    p.lengths = {6, 6, 6, 5, 4, 4, 3, 2, 1};
    p.resets = true;
    std::vector<Arrays<S>> expected = arrays_for<S>(p, 4);
    run(p, expected);
    for (int64_t cut : {1, 3, 4, 5}) {
      p.cut = cut;
      std::vector<Arrays<S>> got = arrays_for<S>(p, 4);
      run(p, got);
      check_same(got, expected);
    }
  }
}

// A row's results do not depend on the rows beside it.
template <class S>
void test_rows_alone() {
  Problem p;
  p.H = 60;
  p.lengths = {4, 4, 4, 4, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 1, 1};  // 3 slices of 8
  std::vector<Arrays<S>> all = arrays_for<S>(p, 5);
  emulator::Options options = hopper();
  options.multiprocessors = 1;  // so that slices are of 16 rows
  emulator::configure(options);
  run(p, all);
  emulator::configure(hopper());
  const std::vector<int64_t> first = offsets(p);
  for (int64_t j : {0, 3, 8, 17}) {
    Problem one = p;
    one.lengths = {p.lengths[index(j)]};
    std::vector<Arrays<S>> alone(1);
    const auto take = [&](auto& to, const auto& from, int64_t width) {  // of the rows' arrays
      for (int64_t k = 0; k < one.T(); ++k) {
        const auto at = from.begin() + (first[index(k)] + j) * width;
        to.insert(to.end(), at, at + width);
      }
    };
    const auto state = [&](auto& to, const auto& from) {
      to.assign(from.begin() + j * p.H, from.begin() + (j + 1) * p.H);
    };
    const Arrays<S>& a = all[0];
    Arrays<S>& b = alone[0];
    b.w_hh = a.w_hh;
    b.bias = a.bias;
    take(b.gx, a.gx, p.H * 4);
    take(b.dy, a.dy, p.H);
    take(b.reset, a.reset, 1);
    state(b.h0, a.h0);
    state(b.c0, a.c0);
    state(b.dh_in, a.dh_in);
    state(b.dc_in, a.dc_in);
    run(one, alone);
    std::vector<S> gradients, h_rows;
    std::vector<float> dh;
    take(gradients, a.gradients, p.H * 4);
    take(h_rows, a.h_rows, p.H);
    state(dh, a.dh);
    check_same(b.gradients, gradients);
    check_same(b.h_rows, h_rows);
    check_same(b.dh, dh);
  }
}

// A reset keeps NaN and Inf of the state, and of other rows, out.
template <class S>
void test_resets_drop_nan() {
  for (CellKind kind : kCells) {
    Problem p;
    p.kind = kind;
    p.H = 24;
    p.lengths = {3, 3, 3};
    p.resets = true;
    std::vector<Arrays<S>> arrays = arrays_for<S>(p, 6);
    Arrays<S>& a = arrays[0];
    std::fill(a.reset.begin(), a.reset.end(), uint8_t{0});
    a.reset[1] = 1;  // row 1 of step 0
    for (int64_t u = 0; u < p.H; ++u) {
      a.h0[index(p.H + u)] = S{kNan16};
      a.c0[index(p.H + u)] = std::nanf("");
    }
    run(p, arrays);
    Worst worst;
    check_forward(p, a, worst);
    check_backward(p, a, worst);
    check_that(worst.half < 0.52 && worst.single < 1e-6, __FILE__, __LINE__, describe(p, worst));
    for (int64_t u = 0; u < p.H; ++u) CHECK_EQ(a.dh[index(p.H + u)], 0.0f);
    // Without the reset the NaN stays in its row.
    a.reset[1] = 0;
    run(p, arrays);
    for (int64_t u = 0; u < p.H; ++u) {
      CHECK(!std::isnan(to_float(a.h_rows[index(u)])));
      CHECK(!std::isnan(to_float(a.h_rows[index(2 * p.H + u)])));
      CHECK(std::isnan(to_float(a.h_rows[index(p.H + u)])) || kind == CellKind::kRnnRelu);
    }
  }
}

// The gradient of a slot that h does not go to, GRU's n, may overflow its 16 bits without harm: it
// has no weights.
void test_slot_without_weights() {
  using S = Float16;
  Problem p;
  p.kind = CellKind::kGruAfter;
  p.H = 4;
  p.lengths = {2};
  std::vector<Arrays<S>> arrays = arrays_for<S>(p, 9);
  Arrays<S>& a = arrays[0];
  for (int64_t u = 0; u < p.H; ++u) {
    a.h0[index(u)] = from_float<S>(0.0f);
    a.gx[index(u * 3)] = a.gx[index(u * 3 + 1)] = -9.0f;  // r, z near 0
    a.gx[index(u * 3 + 2)] = 0.0f;
    a.dy[index(u)] = 1e5f;  // dn = dy (1 - z) (1 - n^2) in the first step
  }
  run(p, arrays);
  for (int64_t u = 0; u < p.H; ++u) {
    CHECK(std::isinf(to_float(a.gradients[index(u * 4 + 3)])));
    CHECK(std::isfinite(a.dh[index(u)]));
  }
}

// Inference writes the same states and nothing else; rows that have ended stay as they were.
void test_inference() {
  using S = Bfloat16;
  Problem p;
  p.H = 33;
  p.lengths = {4, 3, 1};
  std::vector<Arrays<S>> trained = arrays_for<S>(p, 7), inferred = trained;
  run(p, trained);
  run(p, inferred, false);
  check_same(inferred[0].h_rows, trained[0].h_rows);
  check_same(inferred[0].h, trained[0].h);
  check_same(inferred[0].c, trained[0].c);
  for (S x : inferred[0].kept) CHECK_EQ(x.bits, kNan16);
  for (float x : inferred[0].c_rows) CHECK(std::isnan(x));
}

void test_refusals() {
  const DeviceInfo device = device_info();
  const auto reason = [&](RecurrenceShape shape, const DeviceInfo& on) {
    return cluster::refuse(shape, on);
  };
  const auto contains = [](const std::string& text, const char* part) {
    check_that(text.find(part) != std::string::npos, __FILE__, __LINE__, text + ": " + part);
  };
  const RecurrenceShape good = {CellKind::kLstm, Precision::kBfloat16, 512, 64, 1};
  CHECK_EQ(reason(good, device), "");
  for (CellKind kind : kCells) {
    for (int64_t H : {1, 128, 129, 256, 257, 512}) {
      RecurrenceShape shape = good;
      shape.kind = kind;
      shape.H = H;
      CHECK_EQ(reason(shape, device), "");
      shape.precision = Precision::kFloat16;
      CHECK_EQ(reason(shape, device), "");
    }
  }
  for (Precision precision : {Precision::kFloat32, Precision::kTf32, Precision::kFloat64}) {
    RecurrenceShape shape = good;
    shape.precision = precision;
    contains(reason(shape, device), "16 bits");
  }
  RecurrenceShape shape = good;
  shape.kind = CellKind::kGruBefore;
  contains(reason(shape, device), "reset gate");
  shape = good;
  shape.H = 513;
  contains(reason(shape, device), "513");
  DeviceInfo old = device;
  old.major = 8;
  old.minor = 6;
  contains(reason(good, old), "8.6");
  emulator::Options options = hopper();
  options.multiprocessors = 1;
  emulator::configure(options);
  contains(reason(good, device_info()), "cluster of 16 blocks");
  emulator::configure(hopper());
}

// No steps, and a chunk in which no row is left, change nothing.
void test_nothing_to_do() {
  using S = Float16;
  Problem p;
  p.H = 8;
  p.lengths = {2, 1};
  std::vector<Arrays<S>> arrays = arrays_for<S>(p, 8);
  const Device<S> device(p, arrays[0]);
  const std::vector<int64_t> first = {0, 2, 3, 3};  // one step more than any row has
  const Memory first_device = upload(first);
  for (int64_t k0 : {1, 2}) {
    const Steps steps = {2, k0 + 1, first_device.data<int64_t>(), first.data()};
    const ForwardRecurrence<S> f = device.forward(p, 3, true);
    const BackwardRecurrence<S> b = device.backward(p, 3, false);
    cluster::forward<S>(shape_of<S>(p), steps, &f, own_stream());
    cluster::backward<S>(shape_of<S>(p), steps, &b, own_stream());
    synchronize(own_stream());
  }
  check_same(download<S>(device.h), arrays[0].h0);
  check_same(download<float>(device.dh), arrays[0].dh_in);
}

}  // namespace

int main() {
  emulator::configure(hopper());
  test_refusals();
  test_nothing_to_do();
  test_inference();
  test_slot_without_weights();
  test_cells<Bfloat16>();
  test_cells<Float16>();
  test_interleavings<Bfloat16>();
  test_one_warp_behind<Bfloat16>();
  test_interleavings<Float16>();
  test_chunks<Bfloat16>();
  test_chunks<Float16>();
  test_rows_alone<Bfloat16>();
  test_rows_alone<Float16>();
  test_resets_drop_nan<Bfloat16>();
  test_resets_drop_nan<Float16>();
  test_rows_and_sizes<Bfloat16>();
  test_rows_and_sizes<Float16>();
  return check_report();
}
