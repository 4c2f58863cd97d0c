// The microkernel against a scalar loop, bit for bit: every output element is one chain over k in a
// fixed order, whatever the tile, the block of k or the run of rows, so nothing but equal bits will
// do. Every count of rows and panels that a tile takes, every k around multiples of W, misaligned
// operands; whatever lies around the operands is NaN, so that a value read from outside shows, and
// around the results a sentinel. What is only fetched ahead must not matter.
#include "cpu/gemm.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/linear.h"
#include "cpu/pack.h"

namespace {

using fastrnn::LinearArgs;
using fastrnn::Run;
using fastrnn::FASTRNN_ISA::blocks;
using fastrnn::FASTRNN_ISA::even_part;
using fastrnn::FASTRNN_ISA::group_rows;
using fastrnn::FASTRNN_ISA::kBlockBytes;
using fastrnn::FASTRNN_ISA::kOuterPanels;
using fastrnn::FASTRNN_ISA::kTileRows;
using fastrnn::FASTRNN_ISA::kWidth;
using fastrnn::FASTRNN_ISA::Left;
using fastrnn::FASTRNN_ISA::linear;
using fastrnn::FASTRNN_ISA::multiply;
using fastrnn::FASTRNN_ISA::multiply_rows;
using fastrnn::FASTRNN_ISA::outer;
using fastrnn::FASTRNN_ISA::outer_panels;
using fastrnn::FASTRNN_ISA::panels_at_once;
using fastrnn::FASTRNN_ISA::Right;
using fastrnn::FASTRNN_ISA::Rows;
using fastrnn::FASTRNN_ISA::Start;
using fastrnn::FASTRNN_ISA::sum_rows;
using fastrnn::FASTRNN_ISA::tile_rows;
using fastrnn::FASTRNN_ISA::to_bits;

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kVecFuses = true;
#else
constexpr bool kVecFuses = false;  // SSE2: the same chain with two roundings a link
#endif

constexpr int kSentinel = -77;

// One link of a chain, as the ISA rounds it. The plain form must not be contracted: the build says
// -ffp-contract=off.
template <class T>
T link(T a, T b, T c) {
  return kVecFuses ? std::fma(a, b, c) : a * b + c;
}

template <class T>
void check_bits(const std::vector<T>& got, const std::vector<T>& expected, const char* what) {
  CHECK_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i)
    if (to_bits(got[i]) != to_bits(expected[i])) {
      CHECK_EQ(std::string(what) + " at " + std::to_string(i) + ": " + std::to_string(got[i]),
               std::to_string(expected[i]));
    }
  checks_made += static_cast<long>(got.size());
}

class Random {
 public:
  // In (-1, 1), with all mantissa bits in use, so that roundings differ wherever they can.
  template <class T>
  T next() {
    return static_cast<T>(static_cast<double>(static_cast<int64_t>(engine_())) * 0x1p-63);
  }
  template <class T>
  void fill(T* p, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = next<T>();
  }

 private:
  std::mt19937_64 engine_{17};
};

template <class T>
std::vector<T> filled(int64_t n, T value) {
  return std::vector<T>(static_cast<std::size_t>(n), value);
}

// One product of `rows` × `panels`, k = ((groups - 1) * W + tail) * per_group; `shift` elements of
// misalignment. product(left, right, start, c, ahead) is asked for each of several starts (what c
// holds, one row for all, rows further apart) and each of several `ahead`, which is fetched from
// and never read: null, an address where nothing is, the weights again, other memory.
template <class T, class F>
void check_product(const char* what, int64_t rows, int panels, int64_t groups, int per_group,
                   int tail, int shift, Random* random, const F& product) {
  constexpr int W = kWidth<T>;
  const T nan = std::numeric_limits<T>::quiet_NaN();
  // Panels with one row before and two after the tile's, in an order that offset[] undoes.
  const int64_t a_panel = (rows + 3) * W, a_group = (per_group + 1) * a_panel;
  std::vector<T> a_memory = filled(groups * a_group + W + shift, nan);
  Left<T> left = {a_memory.data() + W + shift, a_group, {0, 0, 0, 0}, per_group, groups, tail};
  for (int q = 0; q < per_group; ++q) left.offset[q] = (per_group - 1 - q) * a_panel;

  const int64_t w_group = per_group * W * W + W, w_panel = groups * w_group + 2 * W;
  std::vector<T> w_memory = filled(panels * w_panel + shift, nan);
  const Right<T> right = {w_memory.data() + shift, w_group, w_panel};

  const auto a_at = [&](int64_t g, int q, int64_t r, int k) {
    return a_memory.data() + W + shift + g * a_group + left.offset[q] + r * W + k;
  };
  const auto w_at = [&](int64_t g, int q, int p, int k) {
    return w_memory.data() + shift + g * w_group + q * W * W + p * w_panel + k * W;
  };
  for (int64_t g = 0; g < groups; ++g)
    for (int q = 0; q < per_group; ++q)
      for (int k = 0; k < (g + 1 < groups ? W : tail); ++k) {
        for (int64_t r = 0; r < rows; ++r) *a_at(g, q, r, k) = random->next<T>();
        for (int p = 0; p < panels; ++p) random->fill(w_at(g, q, p, k), W);
      }

  // Results far apart, with sentinels around each panel's rows.
  const int64_t c_panel = (rows + 2) * W;
  std::vector<T> c_memory = filled(panels * c_panel + shift, T(kSentinel));
  T* c[4] = {nullptr, nullptr, nullptr, nullptr};
  for (int p = 0; p < panels; ++p) c[p] = c_memory.data() + shift + p * c_panel + W;

  const std::vector<T> other = filled(W, nan);
  const T* const nowhere = reinterpret_cast<const T*>(uintptr_t{64});
  for (int64_t row_stride : {int64_t{W}, int64_t{0}, int64_t{3} * W}) {
    const bool in_place = row_stride == W;
    const int64_t start_panel = (rows - 1) * row_stride + 2 * W;
    std::vector<T> start_memory = filled(panels * start_panel + shift, nan);
    Start<T> start = {{}, row_stride};
    std::vector<T> before = c_memory;
    for (int p = 0; p < panels; ++p) {
      T* const own = start_memory.data() + shift + p * start_panel;
      start.panel[p] = in_place ? c[p] : own;
      for (int64_t r = 0; r < rows; ++r) {
        random->fill(own + r * row_stride, W);
        // What the output held counts only where the sums start from it.
        for (int lane = 0; lane < W; ++lane)
          before[static_cast<std::size_t>(shift + p * c_panel + (r + 1) * W + lane)] =
              in_place ? own[r * row_stride + lane] : nan;
      }
    }
    std::vector<T> expected = before;
    for (int p = 0; p < panels; ++p)
      for (int64_t r = 0; r < rows; ++r) {
        T* const sum = expected.data() + shift + p * c_panel + (r + 1) * W;
        std::copy_n(start_memory.data() + shift + p * start_panel + r * row_stride, W, sum);
        for (int64_t g = 0; g < groups; ++g)
          for (int q = 0; q < per_group; ++q)
            for (int k = 0; k < (g + 1 < groups ? W : tail); ++k)
              for (int lane = 0; lane < W; ++lane)
                sum[lane] = link(*a_at(g, q, r, k), w_at(g, q, p, k)[lane], sum[lane]);
      }
    for (const T* ahead : {static_cast<const T*>(nullptr), nowhere, right.base, other.data()}) {
      std::copy(before.begin(), before.end(), c_memory.begin());
      product(left, right, start, c, ahead);
      check_bits(c_memory, expected, what);
    }
  }
}

template <class T>
void check_multiply(int rows, int panels, int groups, int per_group, int tail, int shift,
                    Random* random) {
  check_product<T>(
      "multiply", rows, panels, groups, per_group, tail, shift, random,
      [&](const Left<T>& left, const Right<T>& right, const Start<T>& start, T* const* c,
          const T* ahead) { multiply<T>(rows, panels, left, right, start, c, ahead); });
}

template <class T>
void test_multiply() {
  constexpr int W = kWidth<T>;
  Random random;
  for (int rows = 1; rows <= kTileRows; ++rows)
    for (int panels = 1; panels <= panels_at_once(rows); ++panels) {
      for (int groups = 1; groups <= 2; ++groups)
        for (int tail = 1; tail <= W; ++tail)
          check_multiply<T>(rows, panels, groups, 1, tail, tail % 2, &random);
      for (int per_group = 2; per_group <= 4; ++per_group)
        for (int tail : {1, W / 2 + 1, W - 1, W})
          check_multiply<T>(rows, panels, 3, per_group, tail, 1, &random);
    }
}

template <class T>
void check_multiply_rows(int64_t rows, int panels, int64_t groups, int per_group, int tail,
                         Random* random) {
  check_product<T>(
      "multiply_rows", rows, panels, groups, per_group, tail, tail % 2, random,
      [&](const Left<T>& left, const Right<T>& right, const Start<T>& start, T* const* c,
          const T* next) { multiply_rows<T>(rows, panels, left, right, start, c, next); });
}

// Any number of rows; k that is a part of a block, just one, one and a group, two and two groups.
template <class T>
void test_multiply_rows() {
  constexpr int W = kWidth<T>;
  Random random;
  for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 47, 48, 49, 100}) {
    const int most = panels_at_once(static_cast<int>(std::min<int64_t>(rows, kTileRows)));
    for (int panels = 1; panels <= most; ++panels)
      for (int per_group = 1; per_group <= 4; ++per_group) {
        const int64_t bytes = int64_t{per_group} * panels * W * W * static_cast<int>(sizeof(T));
        const int64_t block = std::max<int64_t>(1, kBlockBytes / bytes);  // groups
        check_multiply_rows<T>(rows, panels, 1, per_group, 1 + per_group % W, &random);
        check_multiply_rows<T>(rows, panels, 3, per_group, W - 1, &random);
        // Blocks are long, and take the same way for every number of tiles.
        if (rows != 7 && rows != 13) continue;
        check_multiply_rows<T>(rows, panels, block, per_group, W, &random);
        check_multiply_rows<T>(rows, panels, block + 1, per_group, 1, &random);
        check_multiply_rows<T>(rows, panels, block + 1, per_group, W, &random);
        check_multiply_rows<T>(rows, panels, 2 * block + 2, per_group, W - 1, &random);
      }
  }
}

// take(left) cuts n rows into pieces of at most `most`: no more of them than it takes, and no two
// that differ by more than a row. Any piece has room for the panels chosen by the rows as a whole.
template <class F>
void check_cut(int64_t n, int64_t most, const F& take) {
  int64_t left = n, pieces = 0, least = n, largest = 0;
  while (left > 0) {
    const int64_t piece = take(left);
    CHECK(piece >= 1 && piece <= left);
    if (piece < 1) return;
    left -= piece;
    ++pieces;
    least = std::min(least, piece);
    largest = std::max(largest, piece);
  }
  CHECK_EQ(left, 0);
  CHECK_EQ(pieces, (n + most - 1) / most);
  CHECK(largest <= most);
  CHECK(largest - least <= 1);
  const auto panels = [](int64_t rows) {
    return panels_at_once(static_cast<int>(std::min<int64_t>(rows, kTileRows)));
  };
  CHECK(panels(largest) >= panels(n) && panels(least) >= panels(n));
}

void test_cuts_of_rows() {
  for (int64_t n = 1; n <= 1000; ++n) {
    for (int64_t most : {1, 2, 3, 7, 20, 1000})
      check_cut(n, most, [most](int64_t left) { return even_part(left, most); });
    check_cut(n, kTileRows, [](int64_t left) { return tile_rows(left); });
    check_cut(n, 8 * kTileRows, [](int64_t left) { return group_rows(left); });
  }
}

// Rows of a panel that are runs, and gaps between them.
struct RunsCase {
  int64_t rows = 0;  // of the panel, those of the gaps included
  std::vector<Run> runs;

  Rows get() const { return {runs.data(), static_cast<int64_t>(runs.size())}; }

  // f(k) for every row of every run, in the order of the chain.
  template <class F>
  void for_each(const F& f) const {
    for (const Run& run : runs)
      for (int64_t k = run.row + run.rows - 1; k >= run.row; --k) f(k);
  }
};

// Runs of so many rows each, `gap` rows apart (-1: by turns 0, 1, 2 and 3), the first run the one
// that lies last.
RunsCase runs_of(const std::vector<int64_t>& rows, int64_t gap) {
  RunsCase result;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    result.rows += gap >= 0 ? gap : static_cast<int64_t>(i % 4);
    result.runs.insert(result.runs.begin(), {result.rows, rows[i]});
    result.rows += rows[i];
  }
  result.rows += 2;
  return result;
}

std::vector<RunsCase> runs_cases() {
  std::vector<RunsCase> cases = {{2, {}}};
  for (int64_t n : {0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 64}) cases.push_back(runs_of({n}, n % 3));
  for (int64_t gap : {-1, 0, 1, 5})
    for (const std::vector<int64_t>& rows : std::vector<std::vector<int64_t>>{
             {1, 1}, {1, 4}, {4, 1}, {3, 1, 2}, {5, 8, 1, 13}, {1, 1, 1, 1, 1, 1, 1}, {40, 3, 17}})
      cases.push_back(runs_of(rows, gap));
  // A slab in parts: by turns a run of either half, each half from its end.
  RunsCase halves;
  halves.rows = 30;
  for (int64_t step = 4; step >= 0; --step) {
    halves.runs.push_back({15 + 2 * step, 2});
    halves.runs.push_back({3 * step, 3 - step / 4});
  }
  cases.push_back(halves);
  return cases;
}

// c[p] [W][W] += aᵀ b[p], k as the runs go, or = for the first, whatever c held; columns of a past
// `lanes` are NaN and their rows of c untouched.
template <class T>
void test_outer_panels() {
  constexpr int W = kWidth<T>;
  const T nan = std::numeric_limits<T>::quiet_NaN();
  Random random;
  for (const RunsCase& runs : runs_cases())
    for (int panels = 1; panels <= kOuterPanels; ++panels)
      for (int lanes = 1; lanes <= W; ++lanes) {
        const int shift = lanes % 2;
        const int64_t b_stride = (runs.rows + 1) * W, c_stride = (W + 3) * W;
        std::vector<T> a = filled(runs.rows * W + shift, nan);
        std::vector<T> b = filled(panels * b_stride + shift, nan);
        std::vector<T> c = filled((panels * (W + 3) + 1) * W + shift, T(kSentinel));
        T *const a0 = a.data() + shift, *const b0 = b.data() + shift,
                 *const c0 = c.data() + shift + W;
        runs.for_each([&](int64_t k) {
          random.fill(a0 + k * W, lanes);
          for (int p = 0; p < panels; ++p) random.fill(b0 + p * b_stride + k * W, W);
        });
        const bool first = lanes % 4 >= 2;
        for (int p = 0; p < panels; ++p) {
          random.fill(c0 + p * c_stride, lanes * W);
          if (first) std::fill_n(c0 + p * c_stride, lanes * W, nan);
        }
        std::vector<T> expected = c;
        for (int p = 0; p < panels; ++p)
          for (int i = 0; i < lanes; ++i) {
            T* const sum = expected.data() + shift + p * c_stride + (i + 1) * W;
            if (first) std::fill_n(sum, W, T(0));
            runs.for_each([&](int64_t k) {
              for (int j = 0; j < W; ++j)
                sum[j] = link(a0[k * W + i], b0[p * b_stride + k * W + j], sum[j]);
            });
          }
        const int64_t ahead = lanes % 3 == 0 ? 0 : lanes % 3 == 1 ? panels * c_stride : 1 << 20;
        outer_panels(a0, b0, b_stride, panels, runs.get(), lanes, first, c0, c_stride, ahead);
        check_bits(c, expected, "outer_panels");
      }
}

template <class T>
void check_sum_rows(const RunsCase& runs, int shift, Random* random) {
  constexpr int W = kWidth<T>;
  std::vector<T> a = filled(runs.rows * W + shift, std::numeric_limits<T>::quiet_NaN());
  std::vector<T> sum = filled(3 * W + shift, T(kSentinel));
  runs.for_each([&](int64_t k) { random->fill(a.data() + shift + k * W, W); });
  random->fill(sum.data() + shift + W, W);
  std::vector<T> expected = sum;
  runs.for_each([&](int64_t k) {
    for (int j = 0; j < W; ++j)
      expected[static_cast<std::size_t>(shift + W + j)] +=
          a[static_cast<std::size_t>(shift + k * W + j)];
  });
  sum_rows(a.data() + shift, runs.get(), sum.data() + shift + W);
  check_bits(sum, expected, "sum_rows");
}

template <class T>
void test_sum_rows() {
  Random random;
  for (int shift = 0; shift <= 2; ++shift) {
    for (int64_t rows = 0; rows <= 20; ++rows)
      check_sum_rows<T>(runs_of({rows}, 0), shift, &random);
    for (const RunsCase& runs : runs_cases()) check_sum_rows<T>(runs, shift, &random);
  }
}

// The linear layer: y = bias + Σ_k x w, k ascending, any range of rows; and its weight gradient.
template <class T>
void test_linear() {
  constexpr int W = kWidth<T>;
  Random random;
  for (int in : {1, W - 1, W, 2 * W + 3})
    for (int out : {1, W - 1, W, W + 1, 5 * W + 2})
      for (int rows : {1, 2, 3, kTileRows, kTileRows + 1, 2 * kTileRows + 3}) {
        const bool with_bias = rows % 2 == 0;
        const int64_t stride_x = in + 2, stride_y = out + 3, panels = blocks(out, W);
        std::vector<T> x = filled(rows * stride_x, std::numeric_limits<T>::quiet_NaN());
        for (int r = 0; r < rows; ++r) random.fill(x.data() + r * stride_x, in);
        std::vector<T> w = filled(panels * in * W, T(0)), bias = filled(panels * W, T(0));
        random.fill(w.data(), panels * in * W);
        random.fill(bias.data(), panels * W);
        std::vector<T> y = filled(rows * stride_y, T(kSentinel)), expected = y;
        const int r0 = rows > 2 ? 1 : 0;
        for (int r = r0; r < rows; ++r)
          for (int j = 0; j < out; ++j) {
            T sum = with_bias ? bias[static_cast<std::size_t>(j)] : T(0);
            for (int k = 0; k < in; ++k)
              sum = link(x[static_cast<std::size_t>(r * stride_x + k)],
                         w[static_cast<std::size_t>((j / W * in + k) * W + j % W)], sum);
            expected[static_cast<std::size_t>(r * stride_y + j)] = sum;
          }
        std::vector<T> scratch = filled((blocks(in, W) + panels) * kTileRows * W, T(kSentinel));
        const LinearArgs<T> args = {
            rows,     in,      out, x.data(), stride_x, w.data(), with_bias ? bias.data() : nullptr,
            y.data(), stride_y};
        linear(args, r0, rows, scratch.data());
        check_bits(y, expected, "linear");
      }

  const int64_t P = 3, K_blocks = 3, rows = 5, panel_rows = 7;
  std::vector<T> dy = filled(P * panel_rows * W, T(0)), x = filled(K_blocks * panel_rows * W, T(0));
  random.fill(dy.data(), P * panel_rows * W);
  random.fill(x.data(), K_blocks * panel_rows * W);
  for (const bool with_bias : {false, true}) {
    std::vector<T> acc = filled(K_blocks * P * W * W, T(kSentinel)), expected = acc;
    std::vector<T> dbias = filled(P * W, T(kSentinel)), expected_bias = dbias;
    const auto at = [](int64_t i) { return static_cast<std::size_t>(i); };
    for (int64_t p = 1; p < P; ++p)
      for (int64_t lane = 0; lane < W; ++lane)
        for (int64_t k = rows - 1; k >= 0; --k) {
          const T d = dy[at((p * panel_rows + k) * W + lane)];
          if (with_bias) expected_bias[at(p * W + lane)] += d;
          for (int64_t b = 0; b < K_blocks; ++b)
            for (int64_t j = 0; j < W; ++j) {
              T& sum = expected[at(((b * P + p) * W + lane) * W + j)];
              sum = link(d, x[at((b * panel_rows + k) * W + j)], sum);
            }
        }
    outer(dy.data(), x.data(), rows, panel_rows, P, K_blocks, 1, P, acc.data(),
          with_bias ? dbias.data() : nullptr);
    check_bits(acc, expected, "outer");
    check_bits(dbias, expected_bias, "outer's bias");
  }
}

template <class T>
void test_all() {
  test_multiply<T>();
  test_multiply_rows<T>();
  test_outer_panels<T>();
  test_sum_rows<T>();
  test_linear<T>();
}

}  // namespace

int main() {
  test_cuts_of_rows();
  test_all<float>();
  test_all<double>();
  return check_report();
}
