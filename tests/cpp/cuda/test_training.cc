// The elementwise and training kernels against plain loops in float64, written here: optimisers,
// sums, losses, embedding, dropout, and copies between arrays of any strides and types.
#include "cuda/training.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../check.h"
#include "cuda/elementwise.h"
#include "cuda/emulator.h"
#include "cuda/half.h"

namespace {

using namespace fastrnn;
using namespace fastrnn::cuda;

std::mt19937_64 random_bits(20261122);

double uniform(double low = -1, double high = 1) {
  return std::uniform_real_distribution<double>(low, high)(random_bits);
}
int64_t integer(int64_t low, int64_t high) {  // both included
  return std::uniform_int_distribution<int64_t>(low, high)(random_bits);
}

template <class T>
std::vector<T> random_values(int64_t n, double low = -1, double high = 1) {
  std::vector<T> values(static_cast<size_t>(n));
  for (T& value : values) value = static_cast<T>(uniform(low, high));
  return values;
}

template <class T>
Memory on_device(const std::vector<T>& values) {
  Memory memory = allocate<T>(static_cast<int64_t>(values.size()), own_stream());
  if (!values.empty()) copy_to_device(memory.data(), values.data(), memory.bytes(), own_stream());
  return memory;
}

template <class T>
std::vector<T> on_host(const Memory& memory) {
  std::vector<T> values(memory.bytes() / sizeof(T));
  if (!values.empty()) copy_to_host(values.data(), memory.data(), memory.bytes(), own_stream());
  return values;
}

template <class T>
bool close(T got, double want, double tolerance) {
  return std::abs(static_cast<double>(got) - want) <= tolerance * std::max(1.0, std::abs(want));
}
template <class T>
constexpr double kTolerance = sizeof(T) == 4 ? 1e-6 : 1e-14;

// --- Elementwise. ------------------------------------------------------------------------------

// An array of random shape, its axes in a random order and with gaps, some of them reversed.
struct Layout {
  std::vector<int64_t> shape, strides;
  int64_t first = 0, extent = 1;  // the element with all indices 0, elements of memory
};

Layout random_layout(const std::vector<int64_t>& shape) {
  Layout layout = {shape, std::vector<int64_t>(shape.size()), 0, 1};
  std::vector<size_t> order(shape.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  if (integer(0, 2) != 0) std::shuffle(order.begin(), order.end(), random_bits);
  for (const size_t axis : order) {
    layout.strides[axis] = layout.extent * (integer(0, 3) == 0 ? 2 : 1);
    layout.extent += std::max<int64_t>(shape[axis] - 1, 0) * layout.strides[axis];
    if (integer(0, 3) == 0) {
      layout.first += std::max<int64_t>(shape[axis] - 1, 0) * layout.strides[axis];
      layout.strides[axis] = -layout.strides[axis];
    }
  }
  return layout;
}

View view_of(const Layout& layout, void* memory, DType dtype) {
  View view = {static_cast<char*>(memory) + layout.first * size_of(dtype),
               dtype,
               static_cast<int>(layout.shape.size()),
               {},
               {}};
  std::copy(layout.shape.begin(), layout.shape.end(), view.shape);
  std::copy(layout.strides.begin(), layout.strides.end(), view.strides);
  return view;
}

// Calls f with every index of the shape.
template <class F>
void for_indices(const std::vector<int64_t>& shape, const F& f) {
  int64_t size = 1;
  for (const int64_t extent : shape) size *= extent;
  std::vector<int64_t> index(shape.size());
  for (int64_t i = 0; i < size; ++i) {
    int64_t rest = i;
    for (size_t axis = shape.size(); axis-- > 0; rest /= shape[axis])
      index[axis] = rest % shape[axis];
    f(index);
  }
}
size_t place(const Layout& layout, const std::vector<int64_t>& index) {
  int64_t at = layout.first;
  for (size_t axis = 0; axis < index.size(); ++axis) at += index[axis] * layout.strides[axis];
  return static_cast<size_t>(at);
}

std::vector<int64_t> random_shape() {
  std::vector<int64_t> shape(static_cast<size_t>(integer(0, 4)));
  for (int64_t& extent : shape) extent = integer(integer(0, 9) == 0 ? 0 : 1, 6);
  return shape;
}

template <class T>
void check_strided(DType dtype) {
  for (int round = 0; round < 60; ++round) {
    const std::vector<int64_t> shape = random_shape();
    const Layout a = random_layout(shape), b = random_layout(shape), k = random_layout(shape);
    // From 0 to 2 for bool, whose elements are then 0 and 1.
    const auto from = random_values<T>(a.extent, sizeof(T) == 1 ? 0 : -1, sizeof(T) == 1 ? 2 : 1),
               old = random_values<T>(b.extent, sizeof(T) == 1 ? 0 : -1, sizeof(T) == 1 ? 2 : 1);
    std::vector<uint8_t> keep(static_cast<size_t>(k.extent));
    for (uint8_t& flag : keep) flag = integer(0, 1) != 0;
    const Memory x = on_device(from), flags = on_device(keep);
    const auto run = [&](const auto& work, const auto& want) {
      const Memory y = on_device(old);
      work(view_of(a, x.data(), dtype), view_of(b, y.data(), dtype));
      std::vector<T> expected = old;
      for_indices(shape, [&](const std::vector<int64_t>& index) {
        T& element = expected[place(b, index)];
        element = static_cast<T>(want(static_cast<double>(from[place(a, index)]),
                                      static_cast<double>(element), keep[place(k, index)] != 0));
      });
      const std::vector<T> got = on_host<T>(y);
      CHECK(std::memcmp(got.data(), expected.data(), got.size() * sizeof(T)) == 0);
    };
    const Stream stream = own_stream();
    run([&](const View& u, const View& v) { copy(stream, u, v); },
        [](double u, double, bool) { return u; });
    run([&](const View&, const View& v) { fill(stream, v, -0.25); },
        [](double, double, bool) { return sizeof(T) == 1 ? 1 : -0.25; });
    if (sizeof(T) == 1) continue;
    run([&](const View& u, const View& v) { add(stream, u, v); },
        [](double u, double v, bool) { return static_cast<double>(static_cast<T>(u + v)); });
    run([&](const View& u,
            const View& v) { where(stream, view_of(k, flags.data(), DType::kBool), u, v); },
        [](double u, double, bool keeps) { return keeps ? u : 0; });
  }
}

void check_conversions() {
  const std::vector<double> values = {0,     -0.0,     1,    -2.5, 1e-3, 65519,
                                      65520, 3.3e38,   1e39, 7,    -7,   0.333333333333,
                                      1e-37, -1.99999, 2e9,  1};
  const auto n = static_cast<int64_t>(values.size());
  const Stream stream = own_stream();
  const auto view = [&](const Memory& memory, DType dtype) {
    return View{memory.data(), dtype, 1, {n}, {1}};
  };
  const Memory from = on_device(values);
  const Memory single = allocate<float>(n, stream), half = allocate<Float16>(n, stream),
               brain = allocate<Bfloat16>(n, stream), flags = allocate<uint8_t>(n, stream),
               integers = allocate<int64_t>(n, stream);
  copy(stream, view(from, DType::kFloat64), view(single, DType::kFloat32));
  copy(stream, view(single, DType::kFloat32), view(half, DType::kFloat16));
  copy(stream, view(single, DType::kFloat32), view(brain, DType::kBfloat16));
  copy(stream, view(single, DType::kFloat32), view(flags, DType::kBool));
  const auto singles = on_host<float>(single);
  const auto halves = on_host<Float16>(half);
  const auto brains = on_host<Bfloat16>(brain);
  const auto bools = on_host<uint8_t>(flags);
  for (size_t i = 0; i < values.size(); ++i) {
    const auto want = static_cast<float>(values[i]);
    CHECK_EQ(singles[i], want);
    CHECK_EQ(halves[i].bits, from_float<Float16>(want).bits);
    CHECK_EQ(brains[i].bits, from_float<Bfloat16>(want).bits);
    CHECK_EQ(static_cast<int>(bools[i]), want != 0 ? 1 : 0);
  }
  copy(stream, view(brain, DType::kBfloat16), view(single, DType::kFloat32));
  const auto back = on_host<float>(single);
  for (size_t i = 0; i < values.size(); ++i) CHECK_EQ(back[i], to_float(brains[i]));

  const std::vector<int32_t> ids = {0, -1, 5, std::numeric_limits<int32_t>::min(),
                                    std::numeric_limits<int32_t>::max()};
  const Memory narrow = on_device(ids), wide = allocate<int64_t>(5, stream);
  copy(stream, View{narrow.data(), DType::kInt32, 1, {5}, {1}},
       View{wide.data(), DType::kInt64, 1, {5}, {1}});
  const auto widened = on_host<int64_t>(wide);
  for (size_t i = 0; i < ids.size(); ++i) CHECK_EQ(widened[i], static_cast<int64_t>(ids[i]));
}

template <class T>
void check_scale_and_clip() {
  std::vector<T> values = random_values<T>(1000, -3, 3);
  values[3] = std::numeric_limits<T>::quiet_NaN();
  const Memory x = on_device(values), y = on_device(values);
  scale(own_stream(), 1000, static_cast<T>(0.3), x.data<T>());
  clip(own_stream(), 1000, static_cast<T>(1.5), y.data<T>());
  const auto scaled = on_host<T>(x), clipped = on_host<T>(y);
  for (size_t i = 0; i < values.size(); ++i) {
    if (i == 3) {
      CHECK(std::isnan(scaled[i]) && std::isnan(clipped[i]));
      continue;
    }
    CHECK_EQ(scaled[i], values[i] * static_cast<T>(0.3));
    CHECK_EQ(clipped[i], std::min(std::max(values[i], static_cast<T>(-1.5)), static_cast<T>(1.5)));
  }
}

// --- Optimisers. -------------------------------------------------------------------------------

template <class T>
void check_sgd(bool with_momentum, bool nesterov) {
  constexpr int64_t kN = 777;
  const auto w0 = random_values<T>(kN), g0 = random_values<T>(kN, -3, 3), m0 = random_values<T>(kN);
  const Memory w = on_device(w0), g = on_device(g0), m = on_device(m0);
  const double scale = 0.7, limit = 1.1, lr = 0.05, momentum = 0.9, decay = 0.01;
  sgd(own_stream(), kN,
      SgdArgs<T>{w.data<T>(), g.data<T>(), with_momentum ? m.data<T>() : nullptr,
                 static_cast<T>(scale), static_cast<T>(limit), static_cast<T>(lr),
                 static_cast<T>(momentum), static_cast<T>(decay), nesterov});
  const auto got = on_host<T>(w), buffer = on_host<T>(m);
  for (size_t i = 0; i < w0.size(); ++i) {
    const double was = static_cast<double>(w0[i]);
    const double clipped = std::min(std::max(static_cast<double>(g0[i]) * scale, -limit), limit);
    const double gradient = clipped + decay * was;
    double step = gradient;
    if (with_momentum) {
      const double next = momentum * static_cast<double>(m0[i]) + gradient;
      CHECK(close(buffer[i], next, kTolerance<T>));
      step = nesterov ? gradient + momentum * next : next;
    } else {
      CHECK_EQ(buffer[i], m0[i]);
    }
    CHECK(close(got[i], was - lr * step, kTolerance<T>));
  }
}

template <class T>
void check_adam() {
  constexpr int64_t kN = 500;
  const auto w0 = random_values<T>(kN), g0 = random_values<T>(kN), m0 = random_values<T>(kN),
             v0 = random_values<T>(kN, 0, 1);
  const Memory w = on_device(w0), g = on_device(g0), m = on_device(m0), v = on_device(v0);
  AdamArgs<T> args = {};
  args.weight = w.data<T>();
  args.grad = g.data<T>();
  args.first = m.data<T>();
  args.second = v.data<T>();
  args.scale = static_cast<T>(0.5);
  args.limit = static_cast<T>(0.4);
  args.weight_decay = static_cast<T>(0.01);
  args.shrink = static_cast<T>(0.999);
  args.one_minus_beta1 = static_cast<T>(0.1);
  args.beta2 = static_cast<T>(0.99);
  args.one_minus_beta2 = static_cast<T>(0.01);
  args.step_size = static_cast<T>(0.003);
  args.sqrt_correction2 = static_cast<T>(0.6);
  args.eps = static_cast<T>(1e-8);
  adam(own_stream(), kN, args);
  const auto got = on_host<T>(w), first = on_host<T>(m), second = on_host<T>(v);
  for (size_t i = 0; i < w0.size(); ++i) {
    const double weight = static_cast<double>(w0[i]) * 0.999;
    const double clipped = std::min(std::max(static_cast<double>(g0[i]) * 0.5, -0.4), 0.4);
    const double gradient = clipped + 0.01 * weight;
    const double mean = 0.9 * static_cast<double>(m0[i]) + 0.1 * gradient;
    const double square = 0.99 * static_cast<double>(v0[i]) + 0.01 * gradient * gradient;
    CHECK(close(first[i], mean, kTolerance<T>));
    CHECK(close(second[i], square, kTolerance<T>));
    const double want = weight - 0.003 * mean / (std::sqrt(square) / 0.6 + 1e-8);
    CHECK(close(got[i], want, 2 * kTolerance<T>));
  }
}

template <class T>
void check_sum_squares() {
  for (const int64_t n : {0, 1, 15, 16, 17, 4095, 4096, 4097, 4096 * 9 + 5}) {
    const auto values = random_values<T>(n);
    const Memory x = on_device(values), sums = allocate<double>(sum_blocks(n), own_stream());
    sum_squares(own_stream(), n, x.data<T>(), sums.data<double>());
    const auto got = on_host<double>(sums);
    for (size_t block = 0; block < got.size(); ++block) {
      long double want = 0;
      const size_t begin = block * kSumBlock;
      for (size_t i = begin; i < std::min(begin + kSumBlock, values.size()); ++i)
        want += static_cast<long double>(values[i]) * static_cast<long double>(values[i]);
      CHECK(close(got[block], static_cast<double>(want), 1e-14));
    }
  }
}

// --- Losses and layers. ------------------------------------------------------------------------

template <class T>
void check_cross_entropy(int64_t n, int64_t classes, bool masked) {
  auto logits = random_values<T>(n * classes, -20, 20);
  std::vector<int64_t> targets(static_cast<size_t>(n));
  std::vector<uint8_t> mask(static_cast<size_t>(n));
  for (int64_t row = 0; row < n; ++row) {
    targets[static_cast<size_t>(row)] = integer(0, classes - 1);
    mask[static_cast<size_t>(row)] = integer(0, 2) != 0;
  }
  const Memory z = on_device(logits), t = on_device(targets), keep = on_device(mask),
               loss = allocate<double>(n, own_stream()),
               dz = allocate<T>(n * classes, own_stream());
  const T weight = static_cast<T>(0.125);
  cross_entropy(
      own_stream(), n,
      CrossEntropyArgs<T>{z.data<T>(), t.data<int64_t>(), masked ? keep.data<uint8_t>() : nullptr,
                          loss.data<double>(), dz.data<T>(), classes, weight});
  const auto losses = on_host<double>(loss);
  const auto gradient = on_host<T>(dz);
  for (int64_t row = 0; row < n; ++row) {
    const auto r = static_cast<size_t>(row);
    const T* const values = logits.data() + row * classes;
    double top = static_cast<double>(values[0]), sum = 0;
    for (int64_t j = 0; j < classes; ++j) top = std::max(top, static_cast<double>(values[j]));
    for (int64_t j = 0; j < classes; ++j) sum += std::exp(static_cast<double>(values[j]) - top);
    const bool counts = !masked || mask[r] != 0;
    const double want = std::log(sum) - (static_cast<double>(values[targets[r]]) - top);
    CHECK(close(losses[r], counts ? want : 0, sizeof(T) == 4 ? 1e-6 : 1e-13));
    for (int64_t j = 0; j < classes; ++j) {
      const double p = std::exp(static_cast<double>(values[j]) - top) / sum;
      const double dj = counts ? (p - (j == targets[r])) * static_cast<double>(weight) : 0;
      CHECK(close(gradient[static_cast<size_t>(row * classes + j)], dj, kTolerance<T>));
    }
  }
}

// A NaN makes its row and its loss NaN, infinite logits do not stop the others.
void check_cross_entropy_nan() {
  constexpr int64_t kClasses = 300;
  auto logits = random_values<float>(3 * kClasses);
  logits[5] = std::numeric_limits<float>::quiet_NaN();
  logits[kClasses + 299] = std::numeric_limits<float>::quiet_NaN();
  logits[2 * kClasses + 7] = -std::numeric_limits<float>::infinity();
  const Memory z = on_device(logits), t = on_device(std::vector<int64_t>{0, 1, 2}),
               loss = allocate<double>(3, own_stream()),
               dz = allocate<float>(3 * kClasses, own_stream());
  cross_entropy(own_stream(), 3,
                CrossEntropyArgs<float>{z.data<float>(), t.data<int64_t>(), nullptr,
                                        loss.data<double>(), dz.data<float>(), kClasses, 1.0f});
  const auto losses = on_host<double>(loss);
  const auto gradient = on_host<float>(dz);
  CHECK(std::isnan(losses[0]) && std::isnan(losses[1]) && std::isfinite(losses[2]));
  for (size_t i = 0; i < 2 * kClasses; ++i) CHECK(std::isnan(gradient[i]));
  for (size_t i = 2 * kClasses; i < 3 * kClasses; ++i) CHECK(std::isfinite(gradient[i]));
  CHECK_EQ(gradient[2 * kClasses + 7], 0.0f);
}

template <class T>
void check_subtract() {
  const auto p = random_values<T>(100), t = random_values<T>(100);
  std::vector<uint8_t> mask(100);
  for (uint8_t& flag : mask) flag = integer(0, 1) != 0;
  const Memory pred = on_device(p), target = on_device(t), keep = on_device(mask),
               difference = allocate<T>(100, own_stream());
  for (const bool masked : {false, true}) {
    subtract(own_stream(), 100, pred.data<T>(), target.data<T>(),
             masked ? keep.data<uint8_t>() : nullptr, difference.data<T>());
    const auto got = on_host<T>(difference);
    for (size_t i = 0; i < 100; ++i)
      CHECK_EQ(got[i], masked && mask[i] == 0 ? T(0) : static_cast<T>(p[i] - t[i]));
  }
}

template <class T>
void check_embedding() {
  constexpr int64_t kRows = 9, kWidth = 37, kCount = 50;
  const auto table = random_values<T>(kRows * kWidth), dy = random_values<T>(kCount * kWidth);
  std::vector<int64_t> ids(kCount), starts, segments, order;
  for (int64_t& id : ids) id = integer(0, kRows - 2);  // the last row occurs nowhere
  for (int64_t id = 0; id < kRows; ++id) {
    const auto before = static_cast<int64_t>(order.size());
    for (int64_t i = 0; i < kCount; ++i)
      if (ids[static_cast<size_t>(i)] == id) order.push_back(i);
    if (static_cast<int64_t>(order.size()) == before) continue;
    starts.push_back(before);
    segments.push_back(id);
  }
  starts.push_back(kCount);
  const Memory weight = on_device(table), rows = on_device(ids), gradient = on_device(dy),
               y = allocate<T>(kCount * kWidth, own_stream()), d_starts = on_device(starts),
               d_segments = on_device(segments), d_order = on_device(order);
  embedding_gather(own_stream(), EmbeddingArgs<T>{rows.data<int64_t>(), kCount, kWidth,
                                                  weight.data<T>(), y.data<T>()});
  const auto got = on_host<T>(y);
  for (int64_t i = 0; i < kCount; ++i)
    for (int64_t j = 0; j < kWidth; ++j)
      CHECK_EQ(got[static_cast<size_t>(i * kWidth + j)],
               table[static_cast<size_t>(ids[static_cast<size_t>(i)] * kWidth + j)]);
  embedding_scatter(own_stream(),
                    Scatter<T>{static_cast<int64_t>(segments.size()), kWidth,
                               d_segments.data<int64_t>(), d_starts.data<int64_t>(),
                               d_order.data<int64_t>(), gradient.data<T>(), weight.data<T>()});
  std::vector<T> want = table;  // added one by one, in the order of the rows
  for (int64_t i = 0; i < kCount; ++i)
    for (int64_t j = 0; j < kWidth; ++j)
      want[static_cast<size_t>(ids[static_cast<size_t>(i)] * kWidth + j)] +=
          dy[static_cast<size_t>(i * kWidth + j)];
  const auto sums = on_host<T>(weight);
  for (size_t i = 0; i < want.size(); ++i) CHECK_EQ(sums[i], want[i]);
}

// SplitMix64 as its authors wrote it (Steele, Lea & Flood 2014).
uint64_t splitmix(uint64_t state) {
  uint64_t z = state + 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

template <class T>
void check_dropout() {
  constexpr int64_t kN = 4000;
  constexpr uint64_t kKey = 0xFFFFFFFFFFFFF000u;  // wraps around on the way
  const auto values = random_values<T>(kN, 1, 2);
  const Memory x = on_device(values), y = allocate<T>(kN, own_stream());
  const auto threshold = static_cast<uint64_t>(std::ceil(std::ldexp(0.3, 53)));
  const T factor = static_cast<T>(1 / 0.7);
  dropout(own_stream(), kN, DropoutArgs<T>{x.data<T>(), y.data<T>(), kKey, threshold, factor});
  const auto got = on_host<T>(y);
  int64_t kept = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const bool keeps = (splitmix(kKey + i) >> 11) >= threshold;
    CHECK_EQ(got[i], keeps ? values[i] * factor : T(0));
    kept += keeps;
  }
  CHECK(kept > 2600 && kept < 3000);
}

void check_id_ranges() {
  const auto bad = [](const std::vector<int64_t>& ids, const std::vector<uint8_t>& mask) {
    const Memory values = on_device(ids), keep = on_device(mask),
                 flag = allocate<int32_t>(1, own_stream());
    check_ids(own_stream(), static_cast<int64_t>(ids.size()), values.data<int64_t>(),
              mask.empty() ? nullptr : keep.data<uint8_t>(), 5, flag.data<int32_t>());
    return on_host<int32_t>(flag)[0];
  };
  CHECK_EQ(bad({0, 4, 2}, {}), 0);
  CHECK_EQ(bad({0, 5, 2}, {}), 1);
  CHECK_EQ(bad({-1, -1, 2}, {}), 1);
  CHECK_EQ(bad({-1, 1, 9}, {0, 1, 0}), 0);
  CHECK_EQ(bad({-1, 1, 9}, {0, 1, 1}), 1);
  CHECK_EQ(bad({}, {}), 0);
}

template <class T>
void check_type() {
  check_scale_and_clip<T>();
  check_sgd<T>(false, false);
  check_sgd<T>(true, false);
  check_sgd<T>(true, true);
  check_adam<T>();
  check_sum_squares<T>();
  for (const int64_t classes : {1, 2, 16, 17, 127, 128, 129, 1000}) {
    check_cross_entropy<T>(7, classes, false);
    check_cross_entropy<T>(7, classes, true);
  }
  check_cross_entropy<T>(0, 5, false);
  check_subtract<T>();
  check_embedding<T>();
  check_dropout<T>();
}

}  // namespace

int main() {
  for (const uint64_t seed : {0u, 1u, 2u}) {
    emulator::Options options;
    options.seed = seed;
    emulator::configure(options);
    check_strided<float>(DType::kFloat32);
    check_strided<double>(DType::kFloat64);
    check_strided<uint8_t>(DType::kBool);
    check_conversions();
    check_type<float>();
    check_type<double>();
    check_cross_entropy_nan();
    check_id_ranges();
  }
  return check_report();
}
