// The grid kernels against a float64 loop: every cell, both formats, ragged batches, resets,
// chunks, both directions; that results are the same bits however the work is spread and whoever
// comes first; that NaN stays in its row and ends no wait; and what is refused.
#include "cuda/grid.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "cuda/emulator.h"
#include "cuda/grid_packing.h"
#include "cuda/half.h"

namespace {

using namespace fastrnn;
using namespace fastrnn::cuda;

// ---------------------------------------------------------------------------------------------------
// Problems and their data
// ---------------------------------------------------------------------------------------------------

template <class S>
constexpr Precision precision_of() {
  return std::is_same<S, Bfloat16>::value ? Precision::kBfloat16 : Precision::kFloat16;
}

template <class T>
Memory upload(const std::vector<T>& values) {
  Memory memory = allocate<T>(static_cast<int64_t>(values.size()), Stream());
  copy_to_device(memory.data(), values.data(), values.size() * sizeof(T), Stream());
  return memory;
}
template <class T>
std::vector<T> download(const Memory& memory) {
  std::vector<T> values(memory.bytes() / sizeof(T));
  copy_to_host(values.data(), memory.data(), memory.bytes(), Stream());
  return values;
}

bool same_bits(const void* a, const void* b, size_t bytes) {
  return bytes == 0 || std::memcmp(a, b, bytes) == 0;
}
template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && same_bits(a.data(), b.data(), a.size() * sizeof(T));
}

struct Problem {
  CellKind kind;
  int64_t H;
  std::vector<int64_t> lengths;  // of the rows, longest first
  int directions = 1;
  bool resets = false;
  bool dy = true;  // or no gradient of the outputs
  int shift = 0;   // elements by which h_rows is off its alignment

  int64_t B() const { return static_cast<int64_t>(lengths.size()); }
  int64_t T() const { return lengths[0]; }
  std::vector<int64_t> first() const {
    std::vector<int64_t> first = {0};
    for (int64_t k = 0; k < T(); ++k)
      first.push_back(first.back() + std::count_if(lengths.begin(), lengths.end(),
                                                   [&](int64_t l) { return l > k; }));
    return first;
  }
  template <class S>
  RecurrenceShape shape() const {
    return {kind, precision_of<S>(), H, B(), directions};
  }
};

// Rows of one length.
std::vector<int64_t> even(int64_t B, int64_t T) {
  return std::vector<int64_t>(static_cast<size_t>(B), T);
}
std::vector<int64_t> ragged(int64_t B, int64_t T, std::mt19937& random) {
  std::vector<int64_t> lengths = {T};
  for (int64_t b = 1; b < B; ++b) lengths.push_back(1 + static_cast<int64_t>(random() % T));
  std::sort(lengths.rbegin(), lengths.rend());
  return lengths;
}

// The inputs of one direction and, after a run, its outputs. Rows are those of all steps.
template <class S>
struct Data {
  std::vector<float> w, gx, bias, c, c_rows, dy, dh, dc, c0;
  std::vector<uint8_t> reset;
  std::vector<S> h, h_rows, gates, h0;
};

template <class S>
std::vector<S> narrow_all(const std::vector<float>& x) {
  std::vector<S> out;
  for (float v : x) out.push_back(from_float<S>(v));
  return out;
}

template <class S>
Data<S> random_data(const Problem& p, std::mt19937& random) {
  const CellTraits traits = cell_traits(p.kind);
  const auto normal = [&](int64_t n, double scale) {
    std::normal_distribution<float> d(0.0f, static_cast<float>(scale));
    std::vector<float> v(static_cast<size_t>(n));
    for (float& x : v) x = d(random);
    return v;
  };
  const int64_t rows = p.first().back(), H = p.H, B = p.B();
  Data<S> data;
  data.w = normal(traits.gates * H * H, 1.0 / std::sqrt(static_cast<double>(H)));
  data.gx = normal(rows * H * traits.gates, 1);
  data.bias = normal(H * traits.slots, 0.5);
  data.h = narrow_all<S>(normal(B * H, 0.5));
  data.c = normal(traits.has_cell ? B * H : 0, 0.5);
  data.dy = normal(rows * H, 1);
  data.dh = normal(B * H, 1);
  data.dc = normal(traits.has_cell ? B * H : 0, 1);
  for (int64_t r = 0; r < rows; ++r) data.reset.push_back(p.resets && random() % 4 == 0);
  return data;
}

// ---------------------------------------------------------------------------------------------------
// Runs
// ---------------------------------------------------------------------------------------------------

template <class S>
Memory packed(const Problem& p, const Data<S>& data, bool backward) {
  const RecurrenceShape shape = p.shape<S>();
  const Memory w = upload(data.w);
  Memory out = allocate<S>(grid::packed_elements(shape, backward), Stream());
  grid::pack<S>(shape, w.data<float>(), backward, out.data<S>(), Stream());
  return out;
}

template <class T>
std::vector<T> part(const std::vector<T>& all, int64_t from, int64_t to) {
  return std::vector<T>(all.begin() + from, all.begin() + to);
}
template <class T>
void append(std::vector<T>& all, const std::vector<T>& more) {
  all.insert(all.end(), more.begin(), more.end());
}

// Forward over the chunks that begin at the steps `cuts` (and at 0): fills h_rows, gates, c_rows
// and advances h, c of all directions.
template <class S>
void run_forward(const Problem& p, std::vector<Data<S>>& all, std::vector<int64_t> cuts = {},
                 bool training = true) {
  const RecurrenceShape shape = p.shape<S>();
  const CellTraits traits = cell_traits(p.kind);
  const std::vector<int64_t> first = p.first();
  const Memory first_memory = upload(first);
  std::vector<Memory> w;
  for (Data<S>& data : all) {
    w.push_back(packed(p, data, false));
    data.h0 = data.h;
    data.c0 = data.c;
  }
  cuts.insert(cuts.begin(), 0);
  cuts.push_back(p.T());
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    const Steps steps = {cuts[i], cuts[i + 1], first_memory.data<int64_t>(), first.data()};
    const int64_t from = first[cuts[i]], to = first[cuts[i + 1]], rows = to - from, H = p.H;
    struct Device {
      Memory gx, bias, reset, h, c, h_rows, gates, c_rows;
    };
    std::vector<Device> device;
    std::vector<ForwardRecurrence<S>> args;
    for (size_t d = 0; d < all.size(); ++d) {
      Data<S>& data = all[d];
      const int64_t G = traits.gates;
      device.push_back({upload(part(data.gx, from * H * G, to * H * G)), upload(data.bias),
                        upload(part(data.reset, from, to)), upload(data.h), upload(data.c),
                        allocate<S>(rows * H + p.shift, Stream()),
                        allocate<S>(training ? rows * H * traits.slots : 0, Stream()),
                        allocate<float>(training && traits.has_cell ? rows * H : 0, Stream())});
      const Device& on = device.back();
      args.push_back(
          {on.gx.template data<float>(), on.bias.template data<float>(), w[d].data(),
           p.resets ? on.reset.template data<uint8_t>() : nullptr, on.h.template data<S>(),
           traits.has_cell ? on.c.template data<float>() : nullptr,
           on.h_rows.template data<S>() + p.shift, training ? on.gates.template data<S>() : nullptr,
           training && traits.has_cell ? on.c_rows.template data<float>() : nullptr});
    }
    grid::forward<S>(shape, steps, args.data(), Stream());
    synchronize(Stream());
    for (size_t d = 0; d < all.size(); ++d) {
      all[d].h = download<S>(device[d].h);
      all[d].c = download<float>(device[d].c);
      const std::vector<S> h_rows = download<S>(device[d].h_rows);
      append(all[d].h_rows, part(h_rows, p.shift, static_cast<int64_t>(h_rows.size())));
      append(all[d].gates, download<S>(device[d].gates));
      append(all[d].c_rows, download<float>(device[d].c_rows));
    }
  }
}

// Backward over the same chunks, the last one first: gates become gradients, dh, dc go to the
// start.
template <class S>
void run_backward(const Problem& p, std::vector<Data<S>>& all, std::vector<int64_t> cuts = {}) {
  const RecurrenceShape shape = p.shape<S>();
  const CellTraits traits = cell_traits(p.kind);
  const std::vector<int64_t> first = p.first();
  const Memory first_memory = upload(first);
  std::vector<Memory> w;
  for (const Data<S>& data : all) w.push_back(packed(p, data, true));
  cuts.insert(cuts.begin(), 0);
  cuts.push_back(p.T());
  for (size_t i = cuts.size() - 1; i-- > 0;) {
    const int64_t k0 = cuts[i], H = p.H, slots = traits.slots;
    const Steps steps = {k0, cuts[i + 1], first_memory.data<int64_t>(), first.data()};
    const int64_t from = first[k0], to = first[cuts[i + 1]];
    struct Device {
      Memory dy, reset, h_rows, c_rows, h0, c0, gates, dh, dc;
    };
    std::vector<Device> device;
    std::vector<BackwardRecurrence<S>> args;
    for (size_t d = 0; d < all.size(); ++d) {
      Data<S>& data = all[d];
      // The states before k0: of a row that is at work there, its last one in the chunk before.
      std::vector<S> h0 = data.h0;
      std::vector<float> c0 = data.c0;
      for (int64_t j = 0; k0 > 0 && j < first[k0 + 1] - first[k0]; ++j) {
        const int64_t row = first[k0 - 1] + j;
        std::copy_n(data.h_rows.begin() + row * H, H, h0.begin() + j * H);
        if (traits.has_cell) std::copy_n(data.c_rows.begin() + row * H, H, c0.begin() + j * H);
      }
      const bool c = traits.has_cell;
      device.push_back({upload(part(data.dy, from * H, to * H)), upload(part(data.reset, from, to)),
                        upload(part(data.h_rows, from * H, to * H)),
                        upload(c ? part(data.c_rows, from * H, to * H) : data.c_rows), upload(h0),
                        upload(c0), upload(part(data.gates, from * H * slots, to * H * slots)),
                        upload(data.dh), upload(data.dc)});
      const Device& on = device.back();
      args.push_back({p.dy ? on.dy.template data<float>() : nullptr, w[d].data(),
                      p.resets ? on.reset.template data<uint8_t>() : nullptr,
                      on.h_rows.template data<S>(), c ? on.c_rows.template data<float>() : nullptr,
                      on.h0.template data<S>(), c ? on.c0.template data<float>() : nullptr,
                      on.gates.template data<S>(), on.dh.template data<float>(),
                      c ? on.dc.template data<float>() : nullptr});
    }
    grid::backward<S>(shape, steps, args.data(), Stream());
    synchronize(Stream());
    for (size_t d = 0; d < all.size(); ++d) {
      const std::vector<S> gates = download<S>(device[d].gates);
      std::copy(gates.begin(), gates.end(), all[d].gates.begin() + from * H * slots);
      all[d].dh = download<float>(device[d].dh);
      all[d].dc = download<float>(device[d].dc);
    }
  }
}

// ---------------------------------------------------------------------------------------------------
// The reference
// ---------------------------------------------------------------------------------------------------

template <class S>
double rounded(double x) {
  return to_float(from_float<S>(static_cast<float>(x)));
}
double sigma(double x) { return 1.0 / (1.0 + std::exp(-x)); }

// One cell of the forward pass. pre: the gates' inputs; product: of the gates with h.
void reference_cell(CellKind kind, const double* in, const double* product, double q_bias,
                    double h_prev, double& c, double* slots, double& h) {
  switch (kind) {
    case CellKind::kLstm: {
      const double i = sigma(in[0] + product[0]), f = sigma(in[1] + product[1]),
                   g = std::tanh(in[2] + product[2]), o = sigma(in[3] + product[3]);
      c = f * c + i * g;
      h = o * std::tanh(c);
      slots[0] = i, slots[1] = f, slots[2] = g, slots[3] = o;
      return;
    }
    case CellKind::kGruAfter: {
      const double r = sigma(in[0] + product[0]), z = sigma(in[1] + product[1]),
                   q = q_bias + product[2], n = std::tanh(in[2] + r * q);
      h = (1 - z) * n + z * h_prev;
      slots[0] = r, slots[1] = z, slots[2] = q, slots[3] = n;
      return;
    }
    default: {
      const double a = in[0] + product[0];
      h = kind == CellKind::kRnnTanh   ? std::tanh(a)
          : kind == CellKind::kRnnRelu ? (a > 0 ? a : 0)
                                       : sigma(a);
      slots[0] = h;
    }
  }
}

// The cell backward. s: in the slots, out the gradients of their pre-activations; dh, dc: in of the
// new state, out of the old one, past the gates.
void reference_backward_cell(CellKind kind, double* s, double h_prev, double c_prev, double& dh,
                             double& dc) {
  switch (kind) {
    case CellKind::kLstm: {
      const double i = s[0], f = s[1], g = s[2], o = s[3], t = std::tanh(f * c_prev + i * g);
      const double total = dc + dh * o * (1 - t * t);
      s[0] = total * g * i * (1 - i);
      s[1] = total * c_prev * f * (1 - f);
      s[2] = total * i * (1 - g * g);
      s[3] = dh * t * o * (1 - o);
      dc = total * f;
      dh = 0;
      return;
    }
    case CellKind::kGruAfter: {
      const double r = s[0], z = s[1], q = s[2], n = s[3];
      s[3] = dh * (1 - z) * (1 - n * n);
      s[2] = s[3] * r;
      s[1] = dh * (h_prev - n) * z * (1 - z);
      s[0] = s[3] * q * r * (1 - r);
      dh *= z;
      return;
    }
    default: {
      const double y = s[0];
      s[0] = kind == CellKind::kRnnTanh   ? dh * (1 - y * y)
             : kind == CellKind::kRnnRelu ? (y > 0 ? dh : 0)
                                          : dh * y * (1 - y);
      dh = 0;
    }
  }
}

struct Reference {
  std::vector<double> h_rows, gates, c_rows, h, c, dh, dc;
};

template <class S>
std::vector<double> rounded_weights(const Data<S>& data) {
  std::vector<double> w;
  for (float x : data.w) w.push_back(rounded<S>(x));
  return w;
}

// W_hh (G*H, H) times the states of a row.
std::vector<double> product_of(const std::vector<double>& w, const double* h, int64_t rows,
                               int64_t H) {
  std::vector<double> out(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t k = 0; k < H; ++k) sum += w[r * H + k] * h[k];
    out[r] = sum;
  }
  return out;
}

template <class S>
Reference reference_forward(const Problem& p, const Data<S>& data) {
  const CellTraits traits = cell_traits(p.kind);
  const std::vector<int64_t> first = p.first();
  const int64_t H = p.H, G = traits.gates, slots = traits.slots;
  const std::vector<double> w = rounded_weights(data);
  Reference out;
  for (S x : data.h0) out.h.push_back(to_float(x));
  out.c.assign(data.c0.begin(), data.c0.end());
  out.c.resize(out.h.size());
  out.h_rows.resize(first.back() * H);
  out.c_rows.resize(first.back() * H);
  out.gates.resize(first.back() * H * slots);
  for (int64_t k = 0; k < p.T(); ++k) {
    for (int64_t j = 0; j < first[k + 1] - first[k]; ++j) {
      const int64_t row = first[k] + j;
      double* const h = &out.h[j * H];
      double* const c = &out.c[j * H];
      if (p.resets && data.reset[row]) std::fill_n(h, H, 0.0), std::fill_n(c, H, 0.0);
      const std::vector<double> product = product_of(w, h, G * H, H);
      for (int64_t u = 0; u < H; ++u) {
        double in[4], of_gates[4], h_new;
        for (int64_t g = 0; g < G; ++g) {
          in[g] = data.gx[(row * H + u) * G + g];
          of_gates[g] = product[g * H + u];
        }
        reference_cell(p.kind, in, of_gates, slots == 4 ? data.bias[u * slots + 2] : 0, h[u], c[u],
                       &out.gates[(row * H + u) * slots], h_new);
        out.h_rows[row * H + u] = rounded<S>(h_new);
        out.c_rows[row * H + u] = c[u];
      }
      std::copy_n(&out.h_rows[row * H], H, h);
    }
  }
  return out;
}

// From the tape that the forward pass left in `data` (before run_backward replaced the gates).
template <class S>
Reference reference_backward(const Problem& p, const Data<S>& data) {
  const CellTraits traits = cell_traits(p.kind);
  const std::vector<int64_t> first = p.first();
  const int64_t H = p.H, G = traits.gates, slots = traits.slots;
  const std::vector<double> w = rounded_weights(data);
  Reference out;
  out.dh.assign(data.dh.begin(), data.dh.end());
  out.dc.assign(data.dc.begin(), data.dc.end());
  out.dc.resize(out.dh.size());
  for (S x : data.gates) out.gates.push_back(to_float(x));
  for (int64_t k = p.T() - 1; k >= 0; --k) {
    for (int64_t j = 0; j < first[k + 1] - first[k]; ++j) {
      const int64_t row = first[k] + j;
      const bool reset = p.resets && data.reset[row] != 0;
      std::vector<double> rounded_slots(static_cast<size_t>(H * slots));
      for (int64_t u = 0; u < H; ++u) {
        double& dh = out.dh[j * H + u];
        double h_prev = 0, c_prev = 0;
        if (!reset) {
          h_prev = k > 0 ? to_float(data.h_rows[(first[k - 1] + j) * H + u])
                         : to_float(data.h0[j * H + u]);
          if (traits.has_cell)
            c_prev = k > 0 ? data.c_rows[(first[k - 1] + j) * H + u] : data.c0[j * H + u];
        }
        if (p.dy) dh += data.dy[row * H + u];
        double* const s = &out.gates[(row * H + u) * slots];
        reference_backward_cell(p.kind, s, h_prev, c_prev, dh, out.dc[j * H + u]);
        for (int64_t i = 0; i < slots; ++i) rounded_slots[u * slots + i] = rounded<S>(s[i]);
      }
      for (int64_t k_in = 0; k_in < H; ++k_in) {
        double sum = 0;
        for (int64_t u = 0; u < H; ++u)
          for (int64_t g = 0; g < G; ++g)
            sum += w[(g * H + u) * H + k_in] * rounded_slots[u * slots + g];
        out.dh[j * H + k_in] = reset ? 0 : out.dh[j * H + k_in] + sum;
        if (reset) out.dc[j * H + k_in] = 0;
      }
    }
  }
  return out;
}

double value(float x) { return x; }
double value(Bfloat16 x) { return to_float(x); }
double value(Float16 x) { return to_float(x); }

// The largest difference, relative to the largest magnitude or 1.
template <class T>
double difference(const std::vector<T>& got, const std::vector<double>& expected) {
  double most = 0, scale = 1;
  for (size_t i = 0; i < got.size(); ++i) {
    const double d = std::fabs(value(got[i]) - expected[i]);
    most = std::isnan(d) ? HUGE_VAL : std::max(most, d);
    scale = std::max(scale, std::fabs(expected[i]));
  }
  return most / scale;
}

template <class T>
void check_close(const std::vector<T>& got, const std::vector<double>& expected, double limit,
                 const char* what, const Problem& p) {
  const double d = difference(got, expected);
  if (!(d <= limit)) {
    std::fprintf(stderr, "%s: %g of %g (cell %d, H %d, B %d, T %d)\n", what, d, limit,
                 static_cast<int>(p.kind), static_cast<int>(p.H), static_cast<int>(p.B()),
                 static_cast<int>(p.T()));
  }
  CHECK(d <= limit);
}

// Two roundings to S fall apart now and then, and go on from there.
template <class S>
constexpr double tolerance() {
  return std::is_same<S, Bfloat16>::value ? 0.012 : 0.0015;
}

template <class S>
void check_against_reference(const Problem& p, std::mt19937& random) {
  std::vector<Data<S>> all;
  for (int d = 0; d < p.directions; ++d) all.push_back(random_data<S>(p, random));
  run_forward(p, all);
  std::vector<Reference> backward;
  for (const Data<S>& data : all) {
    const Reference r = reference_forward(p, data);
    check_close(data.h_rows, r.h_rows, tolerance<S>(), "h_rows", p);
    check_close(data.gates, r.gates, tolerance<S>(), "gates", p);
    check_close(data.h, r.h, tolerance<S>(), "h", p);
    if (cell_traits(p.kind).has_cell) {
      check_close(data.c_rows, r.c_rows, tolerance<S>(), "c_rows", p);
      check_close(data.c, r.c, tolerance<S>(), "c", p);
    }
    backward.push_back(reference_backward(p, data));
  }
  run_backward(p, all);
  for (size_t d = 0; d < all.size(); ++d) {
    check_close(all[d].gates, backward[d].gates, tolerance<S>(), "dgates", p);
    check_close(all[d].dh, backward[d].dh, tolerance<S>(), "dh", p);
    if (cell_traits(p.kind).has_cell)
      check_close(all[d].dc, backward[d].dc, tolerance<S>(), "dc", p);
  }
}

// ---------------------------------------------------------------------------------------------------
// Tests
// ---------------------------------------------------------------------------------------------------

constexpr CellKind kKinds[] = {CellKind::kLstm, CellKind::kGruAfter, CellKind::kRnnTanh,
                               CellKind::kRnnRelu, CellKind::kRnnSigmoid};

emulator::Options device_of(int multiprocessors, uint64_t seed = 0) {
  emulator::Options options;
  options.multiprocessors = multiprocessors;
  options.seed = seed;
  options.delay_stores = seed != 0;
  return options;
}

// No conversion gives the halfword that rows are filled with; so none of two gives the word.
template <class S>
void test_sentinel() {
  for (uint32_t high = 0; high < 0x10000; ++high) {
    const float wide = to_float(S{static_cast<uint16_t>(high)});
    CHECK(from_float<S>(wide).bits != 0xFFFF);
    for (uint32_t low : {0x0u, 0x1u, 0x1FFFu, 0x2000u, 0x7FFFu, 0x8000u, 0x8001u, 0xFFFFu}) {
      const uint32_t bits = high << 16 | low;
      float x;
      std::memcpy(&x, &bits, sizeof(x));
      const uint16_t one = from_float<S>(x).bits;
      CHECK(one != 0xFFFF);
      CHECK(!std::isnan(x) || one == kNan16);
      const uint32_t two = cuda::pack<S>(x, x);
      CHECK(two == (static_cast<uint32_t>(one) << 16 | one));
    }
  }
}

// Every element of W_hh stands in exactly one place, the others are padding.
void test_packing() {
  for (CellKind kind : kKinds) {
    const int gates = cell_traits(kind).gates;
    for (int64_t H : {1, 16, 20, 72, 130}) {
      for (bool backward : {false, true}) {
        const RecurrenceShape shape = {kind, Precision::kBfloat16, H, 1, 1};
        const int64_t elements = grid::packed_elements(shape, backward);
        const int64_t blocks = (H + 15) / 16, K = backward ? blocks * 16 * gates : (H + 7) / 8 * 8;
        const int64_t pairs = (K + 31) / 32;
        const int m_tiles = backward ? 1 : gates;
        CHECK_EQ(elements, blocks * 16 * pairs * 32 * m_tiles);
        std::set<std::tuple<int64_t, int64_t, int64_t>> seen;
        int64_t inside = 0;
        for (int64_t i = 0; i < elements; ++i) {
          const grid::PackedPlace at = grid::packed_place(i, m_tiles, pairs);
          CHECK(at.block < blocks && at.m_tile < m_tiles && at.row < 16 && at.k < pairs * 32);
          const grid::WeightPlace w =
              backward ? grid::backward_place(at, gates) : grid::forward_place(at);
          CHECK(w.gate < gates);
          CHECK(seen.emplace(w.gate, w.unit, w.from).second);
          if (w.unit < H && w.from < H) ++inside;
        }
        CHECK_EQ(inside, gates * H * H);
      }
    }
  }
}

// The pair's k that a lane's A registers multiply are those of its word of B.
void test_fragments() {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int t = 0; t < 2; ++t) {
      for (int i = 0; i < kLaneElements; ++i) {
        const int64_t index = t * kTileElements + lane * kLaneElements + i;
        const grid::PackedPlace at = grid::packed_place(index, 1, 1);
        // Kernels take elements 0, 1 | 4, 5 | 2, 3 | 6, 7 for the registers 0 ... 3.
        const int r = i / 4 + 2 * (i / 2 % 2);
        const fastrnn::cuda::Place a = a_element(lane, r, i % 2);
        CHECK_EQ(at.row, a.row);
        // The lane of B that holds this column of the tile, and which of its word's elements.
        bool found = false;
        for (int q = 0; q < 4; ++q)
          for (int b = 0; b < 2; ++b)
            for (int half = 0; half < 2; ++half)
              if (b_element(q, b, half).row == a.col) {
                found = true;
                CHECK_EQ(at.k, 8 * q + 4 * t + 2 * b + half);
              }
        CHECK(found);
      }
    }
  }
}

template <class S>
void test_reference(std::mt19937& random) {
  emulator::configure(device_of(132));
  for (CellKind kind : kKinds) {
    check_against_reference<S>({kind, 20, even(1, 6), 1, false, false}, random);
    check_against_reference<S>({kind, 72, ragged(5, 5, random), 2, true}, random);
    check_against_reference<S>({kind, 130, ragged(9, 4, random), 1, true}, random);
    check_against_reference<S>({kind, 64, ragged(40, 4, random), 2, true, true, 3}, random);
  }
}

// Weights that do not all fit in registers, and several batches of words.
template <class S>
void test_large(CellKind kind, int64_t H, std::mt19937& random) {
  emulator::configure(device_of(132));
  check_against_reference<S>({kind, H, {3, 1}}, random);
}

template <class S>
bool same_results(const std::vector<Data<S>>& a, const std::vector<Data<S>>& b) {
  bool same = a.size() == b.size();
  for (size_t d = 0; same && d < a.size(); ++d) {
    same = same_bits(a[d].h_rows, b[d].h_rows) && same_bits(a[d].gates, b[d].gates) &&
           same_bits(a[d].c_rows, b[d].c_rows) && same_bits(a[d].h, b[d].h) &&
           same_bits(a[d].c, b[d].c) && same_bits(a[d].dh, b[d].dh) && same_bits(a[d].dc, b[d].dc);
  }
  return same;
}

// The bits depend neither on chunks, nor on how many blocks there are (blocks of 16 units or 8,
// replicas, one launch or two), nor on the order in which threads and stores come.
template <class S>
void test_same_bits(CellKind kind, std::mt19937& random) {
  Problem p = {kind, 40, ragged(21, 5, random), 2, true};
  std::vector<Data<S>> input;
  for (int d = 0; d < 2; ++d) input.push_back(random_data<S>(p, random));
  const auto run = [&](const emulator::Options& options, const std::vector<int64_t>& cuts) {
    emulator::configure(options);
    std::vector<Data<S>> all = input;
    run_forward(p, all, cuts);
    run_backward(p, all, cuts);
    return all;
  };
  const std::vector<Data<S>> expected = run(device_of(132), {});
  CHECK(same_results(run(device_of(132), {2}), expected));
  CHECK(same_results(run(device_of(132), {1, 2, 4}), expected));
  for (int multiprocessors : {3, 5, 6, 12}) {
    CHECK(same_results(run(device_of(multiprocessors), {}), expected));
  }
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    CHECK(same_results(run(device_of(132, seed), {}), expected));
    CHECK(same_results(run(device_of(4, seed), {3}), expected));
  }
}

// A row's bits do not depend on the others, and inference gives those of training.
template <class S>
void test_alone(CellKind kind, std::mt19937& random) {
  emulator::configure(device_of(132));
  const Problem p = {kind, 48, even(17, 3)};
  std::vector<Data<S>> all = {random_data<S>(p, random)};
  const Data<S> input = all[0];
  run_forward(p, all, {}, false);
  for (int64_t row : {0, 7, 16}) {
    const Problem one = {kind, 48, even(1, 3)};
    std::vector<Data<S>> alone = {input};
    const int64_t G = cell_traits(kind).gates, H = p.H;
    alone[0].gx.clear();
    for (int64_t k = 0; k < 3; ++k)
      append(alone[0].gx, part(input.gx, (k * 17 + row) * H * G, (k * 17 + row + 1) * H * G));
    alone[0].h = part(input.h, row * H, (row + 1) * H);
    if (!input.c.empty()) alone[0].c = part(input.c, row * H, (row + 1) * H);
    run_forward(one, alone);
    for (int64_t k = 0; k < 3; ++k)
      CHECK(same_bits(&alone[0].h_rows[k * H], &all[0].h_rows[(k * 17 + row) * H], H * sizeof(S)));
    CHECK(same_bits(alone[0].h, part(all[0].h, row * H, (row + 1) * H)));
  }
}

// NaN of any sign and payload, in the input and in the initial state, stays in its row, and nobody
// waits for it for ever.
template <class S>
void test_nan(CellKind kind, std::mt19937& random) {
  emulator::configure(device_of(132, 5));
  const Problem p = {kind, 72, even(10, 4)};
  std::vector<Data<S>> clean = {random_data<S>(p, random)}, dirty = clean;
  const int64_t H = p.H, G = cell_traits(kind).gates;
  const uint32_t all_ones = 0xFFFFFFFFu;
  float nan;
  std::memcpy(&nan, &all_ones, sizeof(nan));
  for (int64_t u : {70, 71}) dirty[0].h[3 * H + u].bits = 0xFFFF;  // row 3, before the first step
  dirty[0].gx[((10 + 8) * H + 5) * G] = nan;                       // row 8, step 1
  for (int64_t u = 0; u < H; ++u) dirty[0].dh[1 * H + u] = nan;    // row 1, backward
  for (std::vector<Data<S>>* all : {&clean, &dirty}) {
    run_forward(p, *all);
    run_backward(p, *all);
  }
  int64_t nans = 0;
  for (int64_t k = 0; k < 4; ++k) {
    for (int64_t j = 0; j < 10; ++j) {
      const int64_t row = (k * 10 + j) * H;
      const S* const got = &dirty[0].h_rows[row];
      const bool touched = j == 3 || (j == 8 && k >= 1);
      if (!touched) CHECK(same_bits(got, &clean[0].h_rows[row], H * sizeof(S)));
      for (int64_t u = 0; u < H; ++u) {
        CHECK(got[u].bits != 0xFFFF);
        nans += std::isnan(to_float(got[u]));
      }
    }
  }
  // relu passes NaN on, the others, too: from the step after, in all units.
  CHECK(nans >= (4 + 2) * H);
  for (int64_t j = 0; j < 10; ++j) {
    const bool touched = j == 3 || j == 8 || j == 1;
    const bool same = same_bits(&dirty[0].dh[j * H], &clean[0].dh[j * H], H * sizeof(float));
    CHECK_EQ(same, !touched);
  }
}

void test_refusals() {
  emulator::configure(device_of(132));
  const DeviceInfo large = device_info();
  const auto refused = [](const RecurrenceShape& shape, const DeviceInfo& device,
                          const char* because) {
    const std::string why = grid::refuse(shape, device);
    const bool as_expected =
        *because == '\0' ? why.empty() : why.find(because) != std::string::npos;
    if (!as_expected) std::fprintf(stderr, "refuse: '%s' without '%s'\n", why.c_str(), because);
    return as_expected;
  };
  const Precision bf16 = Precision::kBfloat16, fp16 = Precision::kFloat16;
  for (CellKind kind : kKinds) {
    for (int64_t H : {1, 20, 512, 768, 1000, 1024, 1536, 2048}) {
      for (int64_t B : {1, 8, 32, 128}) {
        CHECK(refused({kind, bf16, H, B, 1}, large, ""));
        CHECK(refused({kind, fp16, H, B, 2}, large, ""));
      }
    }
  }
  CHECK(refused({CellKind::kLstm, bf16, 2113, 1, 1}, large, "133 multiprocessors"));
  CHECK(refused({CellKind::kLstm, bf16, 2048, 4096, 1}, large, "shared memory"));
  CHECK(refused({CellKind::kGruBefore, bf16, 512, 1, 1}, large, "reset gate before"));
  CHECK(refused({CellKind::kLstm, Precision::kFloat32, 512, 1, 1}, large, "16 bits"));
  CHECK(refused({CellKind::kLstm, Precision::kTf32, 512, 1, 1}, large, "16 bits"));
  DeviceInfo old = large;
  old.major = 7;
  CHECK(refused({CellKind::kLstm, bf16, 512, 1, 1}, old, "compute capability"));
  DeviceInfo small = large;  // a GeForce of compute capability 8.6
  small.major = 8;
  small.minor = 6;
  small.multiprocessors = 82;
  small.shared_per_block = 99 * 1024;
  CHECK(refused({CellKind::kLstm, bf16, 1024, 128, 2}, small, ""));
  CHECK(refused({CellKind::kLstm, bf16, 2048, 1, 1}, small, "multiprocessors"));
}

// A grid that does not fit is an Error before anything is launched.
void test_too_large() {
  emulator::configure(device_of(2));
  std::mt19937 random(7);
  const Problem p = {CellKind::kLstm, 40, even(1, 2)};
  std::vector<Data<Bfloat16>> all = {random_data<Bfloat16>(p, random)};
  std::string message;
  try {
    run_forward(p, all);
  } catch (const Error& error) {
    message = error.what();
  }
  CHECK(message.find("3 multiprocessors") != std::string::npos);
  CHECK(!grid::refuse(p.shape<Bfloat16>(), device_info()).empty());
}

template <class S>
void test_format(std::mt19937& random) {
  test_sentinel<S>();
  test_reference<S>(random);
  for (CellKind kind : {CellKind::kLstm, CellKind::kGruAfter, CellKind::kRnnRelu}) {
    test_same_bits<S>(kind, random);
    test_alone<S>(kind, random);
    test_nan<S>(kind, random);
  }
}

}  // namespace

int main() {
  std::mt19937 random(20251121);
  test_packing();
  test_fragments();
  test_format<Bfloat16>(random);
  test_format<Float16>(random);
  test_large<Bfloat16>(CellKind::kLstm, 1064, random);
  test_large<Float16>(CellKind::kGruAfter, 1288, random);
  test_refusals();
  test_too_large();
  CHECK_EQ(emulator::live_bytes(), size_t{0});
  emulator::configure({});
  return check_report();
}
