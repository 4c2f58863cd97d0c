// The device's products against a plain loop: bit for bit in float and double, where the chain of
// multiply-adds is fixed; the sums over many rows against the slabs that cuda/matmul.h speaks of.
#include "cuda/matmul.h"

#include <cmath>
#include <random>
#include <vector>

#include "../check.h"
#include "cuda/emulator.h"

namespace {

using namespace fastrnn::cuda;

std::mt19937 random_bits(20261121);

template <class T>
T random_value() {
  std::uniform_real_distribution<double> uniform(-1, 1);
  if constexpr (sizeof(T) == 2) {
    return from_float<T>(static_cast<float>(uniform(random_bits)));
  } else {
    return static_cast<T>(uniform(random_bits));
  }
}

template <class T>
std::vector<T> random_values(int64_t n) {
  std::vector<T> values(static_cast<size_t>(n));
  for (T& value : values) value = random_value<T>();
  return values;
}

template <class T>
Memory on_device(const std::vector<T>& values) {
  Memory memory = allocate<T>(static_cast<int64_t>(values.size()), own_stream());
  copy_to_device(memory.data(), values.data(), memory.bytes(), own_stream());
  return memory;
}

template <class T>
std::vector<T> on_host(const Memory& memory) {
  std::vector<T> values(memory.bytes() / sizeof(T));
  copy_to_host(values.data(), memory.data(), memory.bytes(), own_stream());
  return values;
}

// The layouts that the library uses: a and b as they are, or transposed in memory.
template <class T, class C>
void check_matmul(int64_t M, int64_t N, int64_t K, bool a_transposed, bool b_transposed,
                  Start start) {
  const std::vector<T> a = random_values<T>(M * K), b = random_values<T>(K * N);
  const std::vector<C> bias = random_values<C>(N), before = random_values<C>(M * N);
  const Memory a_device = on_device(a), b_device = on_device(b), bias_device = on_device(bias),
               c = on_device(before);
  const Matrix<T> left =
      a_transposed ? Matrix<T>{a_device.data<T>(), 1, M} : row_major(a_device.data<T>(), K);
  const Matrix<T> right =
      b_transposed ? Matrix<T>{b_device.data<T>(), 1, K} : row_major(b_device.data<T>(), N);
  matmul<T, C>(own_stream(), M, N, K, left, right, start,
               start == Start::kBias ? bias_device.data<C>() : nullptr, c.data<C>(), N);
  const std::vector<C> got = on_host<C>(c);
  long wrong = 0;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      const auto at = static_cast<size_t>(m * N + n);
      C sum = start == Start::kZero   ? C(0)
              : start == Start::kBias ? bias[static_cast<size_t>(n)]
                                      : before[at];
      for (int64_t k = 0; k < K; ++k) {
        const T x = a[static_cast<size_t>(a_transposed ? k * M + m : m * K + k)];
        const T y = b[static_cast<size_t>(b_transposed ? n * K + k : k * N + n)];
        sum = std::fma(static_cast<C>(widen(x)), static_cast<C>(widen(y)), sum);
      }
      if (got[at] != sum) ++wrong;
    }
  }
  CHECK_EQ(wrong, 0);
}

template <class T, class C>
void check_layouts(int64_t M, int64_t N, int64_t K) {
  check_matmul<T, C>(M, N, K, false, false, Start::kBias);
  check_matmul<T, C>(M, N, K, false, true, Start::kZero);
  check_matmul<T, C>(M, N, K, true, false, Start::kAccumulate);
}

template <class T, class C>
void check_outer_products(int64_t rows, int64_t M, int64_t N) {
  const std::vector<T> a = random_values<T>(rows * M), b = random_values<T>(rows * N);
  const std::vector<C> before = random_values<C>(M * N), sums_before = random_values<C>(M);
  const Memory a_device = on_device(a), b_device = on_device(b), c = on_device(before),
               sums = on_device(sums_before);
  add_outer_products<T, C>(own_stream(), rows, M, N, a_device.data<T>(), b_device.data<T>(),
                           c.data<C>());
  add_column_sums<T, C>(own_stream(), rows, M, a_device.data<T>(), sums.data<C>());
  const std::vector<C> got = on_host<C>(c), got_sums = on_host<C>(sums);
  const double unit = sizeof(C) == 4 ? 6e-8 : 1.2e-16, n_rows = static_cast<double>(rows);
  const double tolerance = 4 * unit * (n_rows + 1);
  for (int64_t m = 0; m < M; ++m) {
    double column = sums_before[static_cast<size_t>(m)];
    for (int64_t r = 0; r < rows; ++r) column += widen(a[static_cast<size_t>(r * M + m)]);
    CHECK(std::abs(column - got_sums[static_cast<size_t>(m)]) <= tolerance);
    for (int64_t n = 0; n < N; ++n) {
      double sum = before[static_cast<size_t>(m * N + n)];
      for (int64_t r = 0; r < rows; ++r)
        sum += static_cast<double>(widen(a[static_cast<size_t>(r * M + m)])) *
               static_cast<double>(widen(b[static_cast<size_t>(r * N + n)]));
      CHECK(std::abs(sum - got[static_cast<size_t>(m * N + n)]) <= tolerance);
    }
  }
}

}  // namespace

int main() {
  for (const uint64_t seed : {uint64_t{0}, uint64_t{7}}) {  // threads in turn, and in random order
    emulator::Options options;
    options.seed = seed;
    emulator::configure(options);
    check_layouts<float, float>(1, 1, 1);
    check_layouts<float, float>(65, 63, 33);
    check_layouts<double, double>(17, 70, 40);
    check_layouts<Bfloat16, float>(20, 9, 17);
    check_layouts<Float16, float>(20, 9, 17);
    check_layouts<float, float>(5, 6, 0);
    check_layouts<float, float>(0, 6, 3);
    check_outer_products<float, float>(0, 3, 4);
    check_outer_products<float, float>(511, 5, 3);
    check_outer_products<float, float>(1100, 5, 3);  // three slabs
    check_outer_products<double, double>(700, 2, 3);
    check_outer_products<Bfloat16, float>(600, 3, 2);
  }
  check_layouts<float, float>(515, 130, 18);  // the large tile
  CHECK_EQ(emulator::live_bytes(), 0u);
  return check_report();
}
