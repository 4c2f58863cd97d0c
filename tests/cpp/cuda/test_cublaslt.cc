// How cuBLASLt is asked for a product, with fake_cublaslt.cc in its place (FASTRNN_CUBLASLT): every
// form that the library uses, against a plain loop.
#include "cuda/cublaslt.h"

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "../check.h"
#include "cuda/emulator.h"

namespace {

using namespace fastrnn::cuda;

std::mt19937 random_bits(20261122);

template <class T>
std::vector<T> random_values(int64_t n) {
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<T> values(static_cast<size_t>(n));
  for (T& value : values) value = from_float<T>(uniform(random_bits));
  return values;
}

template <class T>
Memory on_device(const std::vector<T>& values) {
  Memory memory = allocate<T>(static_cast<int64_t>(values.size()), own_stream());
  copy_to_device(memory.data(), values.data(), memory.bytes(), own_stream());
  return memory;
}

template <class T>
void check_product(int64_t M, int64_t N, int64_t K, bool a_transposed, Start start) {
  const std::vector<T> a = random_values<T>(M * K), b = random_values<T>(K * N);
  const std::vector<float> bias = random_values<float>(N), before = random_values<float>(M * N);
  const Memory a_device = on_device(a), b_device = on_device(b), bias_device = on_device(bias),
               c = on_device(before);
  CHECK(cublaslt::multiply<T>(own_stream(), M, N, K, a_device.data<T>(), a_transposed,
                              b_device.data<T>(), start, bias_device.data<float>(),
                              c.data<float>()));
  std::vector<float> got(before.size());
  copy_to_host(got.data(), c.data(), c.bytes(), own_stream());
  double worst = 0;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      const auto at = static_cast<size_t>(m * N + n);
      double sum = start == Start::kZero   ? 0.0
                   : start == Start::kBias ? static_cast<double>(bias[static_cast<size_t>(n)])
                                           : static_cast<double>(before[at]);
      for (int64_t k = 0; k < K; ++k)
        sum += static_cast<double>(
                   to_float(a[static_cast<size_t>(a_transposed ? k * M + m : m * K + k)])) *
               static_cast<double>(to_float(b[static_cast<size_t>(k * N + n)]));
      worst = std::fmax(worst, std::fabs(sum - static_cast<double>(got[at])));
    }
  }
  CHECK(worst < 1e-6 * static_cast<double>(K + 1));
}

template <class T>
void check_forms() {
  for (const Start start : {Start::kZero, Start::kBias, Start::kAccumulate}) {
    check_product<T>(5, 7, 3, false, start);
    check_product<T>(7, 5, 9, true, start);
    check_product<T>(1, 4, 1, false, start);
  }
}

}  // namespace

int main() {
  CHECK(cublaslt::description().find("(version 130000)") != std::string::npos);
  check_forms<float>();
  check_forms<Bfloat16>();
  check_forms<Float16>();
  // Nothing to compute, and a product that the library has no kernel for: the caller has its own.
  float* const none = nullptr;
  CHECK(!cublaslt::multiply<float>(own_stream(), 0, 4, 4, none, false, none, Start::kZero, none,
                                   none));
  CHECK(!cublaslt::multiply<float>(own_stream(), 4, 13, 4, none, false, none, Start::kZero, none,
                                   none));
  CHECK_EQ(emulator::live_bytes(), 0u);
  return check_report();
}
