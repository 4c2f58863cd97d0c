// Packing: every element lands where core/dims.h and core/kernels.h say it does, padding is zero,
// and nothing else is touched. The expected place is computed element by element from the layout's
// definition; sizes around multiples of the panel width W and of the packer's own blocks; sources
// that begin at any element, in allocations of exactly their size, so that a sanitizer sees any
// access past them.
#include "cpu/pack.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "check.h"

namespace {

using fastrnn::FASTRNN_ISA::add_gradient;
using fastrnn::FASTRNN_ISA::add_table_gradient;
using fastrnn::FASTRNN_ISA::blocks;
using fastrnn::FASTRNN_ISA::gather;
using fastrnn::FASTRNN_ISA::kWidth;
using fastrnn::FASTRNN_ISA::pack;
using fastrnn::FASTRNN_ISA::pack_transposed;
using fastrnn::FASTRNN_ISA::valid_lanes;

constexpr int kSentinel = -77;

// An array whose elements are 1, 2, 3, …, none of which is padding or the sentinel; the first
// `shift` elements of the memory are not part of it.
template <class T>
class Numbered {
 public:
  Numbered(int64_t n, int shift) : memory_(static_cast<std::size_t>(n + shift)), shift_(shift) {
    for (std::size_t i = 0; i < memory_.size(); ++i)
      memory_[i] = static_cast<T>(static_cast<int64_t>(i) + 1 - shift);
  }
  const T* data() const { return memory_.data() + shift_; }
  T operator[](int64_t i) const { return data()[i]; }

 private:
  std::vector<T> memory_;
  int shift_;
};

// An array of sentinels with `shift` more before and after it.
template <class T>
class Guarded {
 public:
  Guarded(int64_t n, int shift)
      : memory_(static_cast<std::size_t>(n + 2 * shift), T(kSentinel)), n_(n), shift_(shift) {}
  T* data() { return memory_.data() + shift_; }

  // expected(i) for each element; the guards must be whole.
  template <class F>
  void check(const char* what, const F& expected) {
    for (int64_t i = -shift_; i < n_ + shift_; ++i) {
      const T want = i < 0 || i >= n_ ? T(kSentinel) : expected(i);
      if (data()[i] != want)
        CHECK_EQ(std::string(what) + " at " + std::to_string(i) + ": " + std::to_string(data()[i]),
                 std::to_string(want));
    }
    checks_made += static_cast<long>(n_ + 2 * shift_);
  }

 private:
  std::vector<T> memory_;
  int64_t n_;
  int shift_;
};

// f(gates, H, K, shift) for sizes around the panel width and the packer's blocks of 64.
template <class T, class F>
void for_sizes(const F& f) {
  constexpr int64_t W = kWidth<T>;
  int shift = 0;
  for (int64_t gates : {1, 3, 4})
    for (int64_t H : {int64_t{1}, W - 1, W, W + 1, 2 * W, 2 * W + 3})
      for (int64_t K : {int64_t{1}, W - 1, W, W + 1, 2 * W + 1, int64_t{63}, int64_t{64},
                        int64_t{65}, int64_t{130}})
        f(gates, H, K, shift++ % 4);
}

// Element (g*H + u, k) of w is at panel s*G + g, row k, lane u - s*W, where s = u / W.
template <class T>
void test_pack() {
  constexpr int W = kWidth<T>;
  for_sizes<T>([](int64_t gates, int64_t H, int64_t K, int shift) {
    const Numbered<T> w(gates * H * K, shift);
    const int64_t panels = blocks(H, W) * gates;
    for (const auto& range :
         {std::pair<int64_t, int64_t>{0, panels}, {1, panels}, {0, panels - 1}}) {
      Guarded<T> out(panels * K * W, shift + 1);
      pack(w.data(), gates, H, K, range.first, range.second, out.data());
      out.check("pack", [&](int64_t i) {
        const int64_t lane = i % W, k = i / W % K, panel = i / W / K;
        if (panel < range.first || panel >= range.second) return T(kSentinel);
        const int64_t g = panel % gates, u = panel / gates * W + lane;
        return u < H ? w[(g * H + u) * K + k] : T(0);
      });
    }
  });
}

// Element (panel, k, lane) of the source is at block k / W, row panel*W + lane, column k % W.
template <class T>
void test_pack_transposed() {
  constexpr int W = kWidth<T>;
  for_sizes<T>([](int64_t P, int64_t, int64_t K, int shift) {
    const Numbered<T> panels(P * K * W, shift);
    const int64_t n = blocks(K, W);
    for (const auto& range : {std::pair<int64_t, int64_t>{0, n}, {1, n}, {0, n - 1}}) {
      Guarded<T> out(n * P * W * W, shift + 1);
      pack_transposed(panels.data(), P, K, range.first, range.second, out.data());
      out.check("pack_transposed", [&](int64_t i) {
        const int64_t column = i % W, lane = i / W % W, panel = i / W / W % P, b = i / W / W / P;
        if (b < range.first || b >= range.second) return T(kSentinel);
        const int64_t k = b * W + column;
        return k < K ? panels[(panel * K + k) * W + lane] : T(0);
      });
    }
  });
}

// dw[g*H + u][k] += acc[block of k][(s*G + g)*W + lane of u][k % W], from what dw held; for the
// first superblocks = instead, whatever dw held.
template <class T>
void test_add_gradient() {
  constexpr int W = kWidth<T>;
  for_sizes<T>([](int64_t gates, int64_t H, int64_t K, int shift) {
    const int64_t rows = blocks(H, W) * gates * W;
    const Numbered<T> acc(blocks(K, W) * rows * W, shift);
    Guarded<T> dw(gates * H * K, shift + 1);
    const int64_t S = blocks(H, W), cut = (S + 1) / 2;
    add_gradient(acc.data(), gates, H, K, cut, S, false, dw.data());
    add_gradient(acc.data(), gates, H, K, 0, cut, true, dw.data());
    dw.check("add_gradient", [&](int64_t i) {
      const int64_t k = i % K, u = i / K % H, g = i / K / H;
      const int64_t row = (u / W * gates + g) * W + u % W;
      return (u / W < cut ? T(0) : T(kSentinel)) + acc[(k / W * rows + row) * W + k % W];
    });
  });
}

// The layout of pack(), read back: for one-hot inputs.
template <class T>
void test_add_table_gradient() {
  constexpr int W = kWidth<T>;
  for_sizes<T>([](int64_t gates, int64_t H, int64_t K, int shift) {
    const Numbered<T> acc(blocks(H, W) * gates * K * W, shift);
    Guarded<T> dw(gates * H * K, shift + 1);
    const int64_t S = blocks(H, W), cut = (S + 1) / 2;
    add_table_gradient(acc.data(), gates, H, K, cut, S, false, dw.data());
    add_table_gradient(acc.data(), gates, H, K, 0, cut, true, dw.data());
    dw.check("add_table_gradient", [&](int64_t i) {
      const int64_t k = i % K, u = i / K % H, g = i / K / H;
      return (u / W < cut ? T(0) : T(kSentinel)) + acc[((u / W * gates + g) * K + k) * W + u % W];
    });
  });
}

// Element (r, k) is at [k / W][r][k % W]; lanes past the columns are zero, rows outside of r0 … r1
// - 1 are left alone.
template <class T>
void test_gather() {
  constexpr int W = kWidth<T>;
  for_sizes<T>([](int64_t extra, int64_t rows, int64_t cols, int shift) {
    const int64_t stride = cols + extra - 1, panel_rows = rows + extra;
    const Numbered<T> x((rows - 1) * stride + cols, shift);
    for (int64_t r0 : {int64_t{0}, rows - 1}) {
      Guarded<T> out(blocks(cols, W) * panel_rows * W, shift + 1);
      gather(x.data(), stride, cols, r0, rows, panel_rows, out.data());
      out.check("gather", [&](int64_t i) {
        const int64_t lane = i % W, r = i / W % panel_rows, k = i / W / panel_rows * W + lane;
        if (r < r0 || r >= rows) return T(kSentinel);
        return k < cols ? x[r * stride + k] : T(0);
      });
    }
  });
}

template <class T>
void test_all() {
  constexpr int W = kWidth<T>;
  for (int64_t n = 1; n <= 3 * W; ++n) {
    const int64_t count = blocks(n, W);
    CHECK(count * W >= n && (count - 1) * W < n);
    int64_t lanes = 0;
    for (int64_t b = 0; b < count; ++b) lanes += valid_lanes(n, b, W);
    CHECK_EQ(lanes, n);
  }
  test_pack<T>();
  test_pack_transposed<T>();
  test_add_gradient<T>();
  test_add_table_gradient<T>();
  test_gather<T>();
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  return check_report();
}
