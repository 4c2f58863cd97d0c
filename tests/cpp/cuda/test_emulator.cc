// The words that kernels are written in, as the emulator has them, against plain loops; the errors
// that it must find; device memory; and the 16-bit formats of cuda/half.h.
#include "cuda/emulator.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/half.h"
#include "cuda/ptx.h"
#include "errors.h"

namespace {

using namespace fastrnn::cuda;  // what a kernel's file stands in

constexpr uint64_t kSeeds = 25;

// ---------------------------------------------------------------------------------------------------
// Helpers
// ---------------------------------------------------------------------------------------------------

void use_seed(uint64_t seed, bool delay_stores = false) {
  emulator::Options options;
  options.seed = seed;
  options.delay_stores = delay_stores;
  emulator::configure(options);
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

Launch blocks_of(unsigned blocks, int threads, size_t shared = 0) {
  Launch how;
  how.grid.x = blocks;
  how.block = threads;
  how.shared = shared;
  return how;
}

Launch clusters_of(int cluster, unsigned clusters, int threads, size_t shared) {
  Launch how = blocks_of(static_cast<unsigned>(cluster) * clusters, threads, shared);
  how.cluster = cluster;
  return how;
}

// ---------------------------------------------------------------------------------------------------
// cuda/half.h
// ---------------------------------------------------------------------------------------------------

// A 16-bit format of `mantissa` stored bits, by its definition.
struct Format {
  int mantissa, bias;
  uint16_t inf() const { return static_cast<uint16_t>((0x7FFF >> mantissa) << mantissa); }
  bool is_nan(uint16_t bits) const { return (bits & 0x7FFF) > inf(); }
  // The magnitude; of Inf, what would come next if there were no Inf.
  double magnitude(unsigned bits) const {
    const int exponent = static_cast<int>(bits >> mantissa);
    const unsigned fraction = bits & ((1u << mantissa) - 1);
    return exponent == 0 ? std::ldexp(fraction, 1 - bias - mantissa)
                         : std::ldexp(fraction + (1u << mantissa), exponent - bias - mantissa);
  }
  // The nearest, ties to even. Magnitudes are in the order of their bits; all differences are
  // exact.
  uint16_t rounded(float x) const {
    if (std::isnan(x)) return 0x7FFF;
    const unsigned sign = std::signbit(x) ? 0x8000u : 0u;
    const double magnitude_x = std::fabs(static_cast<double>(x));
    unsigned low = 0, high = inf();
    if (magnitude_x >= magnitude(high)) return static_cast<uint16_t>(sign | high);
    while (high - low > 1) {
      const unsigned middle = (low + high) / 2;
      (magnitude(middle) <= magnitude_x ? low : high) = middle;
    }
    const double down = magnitude_x - magnitude(low), up = magnitude(high) - magnitude_x;
    const bool go_up = up < down || (up == down && low % 2 == 1);
    return static_cast<uint16_t>(sign | (go_up ? high : low));
  }
};
constexpr Format kBfloat16 = {7, 127}, kFloat16 = {10, 15};

float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
template <class S>
void test_every_pattern(const Format& format) {
  for (unsigned i = 0; i < 65536; ++i) {
    const uint16_t bits = static_cast<uint16_t>(i);
    const float value = to_float(S{bits});
    if (format.is_nan(bits)) {
      CHECK(std::isnan(value));
      CHECK_EQ(from_float<S>(value).bits, 0x7FFF);
      continue;
    }
    CHECK_EQ(from_float<S>(value).bits, bits);
    CHECK_EQ(std::signbit(value), (bits & 0x8000) != 0);
    if ((bits & 0x7FFF) == format.inf()) {
      CHECK(std::isinf(value));
    } else {
      CHECK_EQ(std::fabs(static_cast<double>(value)), format.magnitude(bits & 0x7FFFu));
    }
  }
}

// Every midpoint between neighbours with what lies next to it, and any floats at all.
template <class S>
void test_rounding(const Format& format) {
  const auto check = [&](float x) {
    const uint16_t got = from_float<S>(x).bits, expected = format.rounded(x);
    if (got != expected) std::fprintf(stderr, "%a\n", static_cast<double>(x));
    CHECK_EQ(got, expected);
    CHECK(got != 0xFFFF);
    CHECK_EQ(narrow<S>(x).bits, got);
  };
  for (unsigned bits = 0; bits < format.inf(); ++bits) {
    const float middle =
        static_cast<float>((format.magnitude(bits) + format.magnitude(bits + 1)) / 2);
    for (const float x : {std::nextafter(middle, 0.0f), middle, std::nextafter(middle, INFINITY)}) {
      check(x);
      check(-x);
    }
  }
  for (const uint32_t bits : {0u, 1u, 0x007FFFFFu, 0x00800000u, 0x7F7FFFFFu, 0x7F800000u,
                              0x7F800001u, 0x7FC00000u, 0x7FFFFFFFu, 0x33000000u, 0x33000001u}) {
    check(float_of_bits(bits));
    check(float_of_bits(bits | 0x80000000u));
  }
  std::mt19937 random(std::random_device{}());
  for (int i = 0; i < 500000; ++i) check(float_of_bits(static_cast<uint32_t>(random())));
}

template <class S>
void test_pack() {
  std::mt19937 random(std::random_device{}());
  for (int i = 0; i < 10000; ++i) {
    const float low = float_of_bits(static_cast<uint32_t>(random()));
    const float high = float_of_bits(static_cast<uint32_t>(random()));
    const uint32_t expected =
        from_float<S>(low).bits | static_cast<uint32_t>(from_float<S>(high).bits) << 16;
    CHECK_EQ(pack<S>(low, high), expected);
  }
}

void test_half() {
  test_every_pattern<Bfloat16>(kBfloat16);
  test_every_pattern<Float16>(kFloat16);
  test_rounding<Bfloat16>(kBfloat16);
  test_rounding<Float16>(kFloat16);
  test_pack<Bfloat16>();
  test_pack<Float16>();
  const double third = 1.0 / 3.0;
  CHECK_EQ(widen(third), third);
  CHECK_EQ(narrow<double>(third), third);
  CHECK_EQ(widen(0.1f), 0.1f);
  CHECK_EQ(narrow<float>(0.1f), 0.1f);
  CHECK_EQ(widen(from_float<Bfloat16>(1.5f)), 1.5f);
  CHECK_EQ(widen(from_float<Float16>(-2.5f)), -2.5f);
}

// ---------------------------------------------------------------------------------------------------
// Threads, blocks, grids
// ---------------------------------------------------------------------------------------------------

FASTRNN_KERNEL void write_place(uint32_t* out) {
  const Index3 block = block_index(), grid = grid_size();
  const unsigned at = (block.z * grid.y + block.y) * grid.x + block.x;
  out[at * block_threads() + thread_index()] = at * 1000 + thread_index();
}

void test_grid() {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    use_seed(seed);
    Memory out = allocate<uint32_t>(2 * 3 * 4 * 50, Stream());
    Launch how;
    how.grid.x = 2;
    how.grid.y = 3;
    how.grid.z = 4;
    how.block = 50;
    launch(Stream(), how, write_place, out.data<uint32_t>());
    const auto got = download<uint32_t>(out);
    for (uint32_t i = 0; i < got.size(); ++i) CHECK_EQ(got[i], i / 50 * 1000 + i % 50);
  }
}

struct Count {
  int* times;
  int* order;
  int* next;
  FASTRNN_HD void operator()(int64_t i) const {
    ++times[i];
    order[(*next)++] = static_cast<int>(i);
  }
};

void test_for_each() {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    use_seed(seed);
    for (const int n : {0, 1, 2, 3, 64, 1000}) {
      const size_t size = static_cast<size_t>(n);
      std::vector<int> times(size, 0), order(size, 0);
      int next = 0;
      for_each(Stream(), n, Count{times.data(), order.data(), &next});
      CHECK_EQ(next, n);
      bool in_order = true;
      for (size_t i = 0; i < size; ++i) {
        CHECK_EQ(times[i], 1);
        in_order = in_order && order[i] == static_cast<int>(i);
      }
      if (n == 1000) CHECK_EQ(in_order, seed == 0);
    }
  }
}

// A tree sum in shared memory, by sync_threads alone.
FASTRNN_KERNEL void sum_tree(const float* in, float* out) {
  float* const shared = shared_memory<float>();
  const unsigned t = thread_index(), n = block_threads();
  shared[t] = in[block_index().x * n + t];
  for (unsigned half = n / 2; half > 0; half /= 2) {
    sync_threads();
    if (t < half) shared[t] += shared[t + half];
  }
  if (t == 0) out[block_index().x] = shared[0];
}

// Threads that have returned need not come to sync_threads.
FASTRNN_KERNEL void some_return(int* out) {
  int* const shared = shared_memory<int>();
  const unsigned t = thread_index();
  if (t % 3 == 0) return;
  shared[t] = static_cast<int>(t);
  sync_threads();
  const unsigned other = t % 3 == 1 ? t + 1 : t - 1;
  out[t] = shared[other];
}

// Two halves of the block pass values within each half, at their own pace.
FASTRNN_KERNEL void named_halves(int* out) {
  int* const shared = shared_memory<int>();
  const unsigned t = thread_index(), half = t / 64;
  int value = static_cast<int>(t);
  for (int round = 0; round < (half == 0 ? 3 : 7); ++round) {
    shared[t] = value;
    named_barrier(1 + static_cast<int>(half), 64);
    value = shared[half * 64 + (t + 1) % 64];
    named_barrier(1 + static_cast<int>(half), 64);
  }
  out[t] = value;
}

void test_barriers() {
  std::mt19937 random(std::random_device{}());
  std::uniform_int_distribution<int> number(-1000, 1000);
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    use_seed(seed);
    constexpr unsigned kBlocks = 3, kThreads = 128;
    std::vector<float> in(kBlocks * kThreads);
    for (float& x : in) x = static_cast<float>(number(random));
    const Memory device_in = upload(in);
    Memory sums = allocate<float>(kBlocks, Stream());
    launch(Stream(), blocks_of(kBlocks, kThreads, kThreads * sizeof(float)), sum_tree,
           device_in.data<const float>(), sums.data<float>());
    const auto got = download<float>(sums);
    for (unsigned b = 0; b < kBlocks; ++b) {
      double sum = 0;
      for (unsigned i = 0; i < kThreads; ++i) sum += static_cast<double>(in[b * kThreads + i]);
      CHECK_EQ(static_cast<double>(got[b]), sum);
    }

    Memory out = allocate<int>(kThreads, Stream());
    launch(Stream(), blocks_of(1, 128, 129 * sizeof(int)), named_halves, out.data<int>());
    auto values = download<int>(out);
    for (int t = 0; t < 64; ++t) {
      CHECK_EQ(values[static_cast<size_t>(t)], (t + 3) % 64);
      CHECK_EQ(values[static_cast<size_t>(t) + 64], 64 + (t + 7) % 64);
    }

    launch(Stream(), blocks_of(1, 126, 128 * sizeof(int)), some_return, out.data<int>());
    values = download<int>(out);
    for (int t = 0; t < 126; ++t) {
      const int expected = t % 3 == 0 ? -1 : t % 3 == 1 ? t + 1 : t - 1;  // -1: as poisoned or left
      if (t % 3 != 0) CHECK_EQ(values[static_cast<size_t>(t)], expected);
    }
  }
}

FASTRNN_KERNEL void forgets_to_sync(const int* in, int* out) {
  int* const shared = shared_memory<int>();
  const unsigned t = thread_index();
  shared[t] = in[t];
  out[t] = shared[(t + 1) % block_threads()];
}

void test_missing_sync_shows() {
  std::vector<int> in(64);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i);
  const Memory device_in = upload(in);
  Memory out = allocate<int>(64, Stream());
  use_seed(1);
  launch(Stream(), blocks_of(1, 64, 64 * sizeof(int)), forgets_to_sync, device_in.data<const int>(),
         out.data<int>());
  CHECK(download<int>(out) != std::vector<int>(in.begin() + 1, in.end()));
  bool unwritten = false;
  for (const int value : download<int>(out)) unwritten = unwritten || value == -1;
  CHECK(unwritten);  // the poison of fresh shared memory
}

// ---------------------------------------------------------------------------------------------------
// Warps
// ---------------------------------------------------------------------------------------------------

FASTRNN_KERNEL void shuffles(float* out_float, int* out_int) {
  const unsigned t = thread_index();
  const float value = static_cast<float>(t) + 0.5f;
  const int number = -static_cast<int>(t);
  for (int i = 0; i < 5; ++i) {
    out_float[t * 5 + static_cast<unsigned>(i)] = shuffle_xor(value, 1 << i);
    out_int[t * 5 + static_cast<unsigned>(i)] = shuffle_down(number, 1 << i);
  }
}

void test_shuffles() {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    use_seed(seed);
    Memory floats = allocate<float>(96 * 5, Stream()), ints = allocate<int>(96 * 5, Stream());
    launch(Stream(), blocks_of(1, 96), shuffles, floats.data<float>(), ints.data<int>());
    const auto got = download<float>(floats);
    const auto down = download<int>(ints);
    for (int t = 0; t < 96; ++t) {
      for (int i = 0; i < 5; ++i) {
        const size_t at = static_cast<size_t>(t * 5 + i);
        CHECK_EQ(got[at], static_cast<float>(t ^ (1 << i)) + 0.5f);
        CHECK_EQ(down[at], -(t % 32 + (1 << i) < 32 ? t + (1 << i) : t));
      }
    }
  }
}

// D = C + A B with everything loaded element by element, by the layout that PTX gives for
// mma.m16n8k16: row = group (+ 8), k = 2 * thread_in_group (+ 1) (+ 8).
template <class S>
FASTRNN_KERNEL void multiply(const S* a, const S* b, float* d) {
  const int group = lane() / 4, in_group = lane() % 4;
  const auto two = [](S low, S high) { return low.bits | static_cast<uint32_t>(high.bits) << 16; };
  uint32_t fragment[4], b_fragment[2];
  for (int r = 0; r < 4; ++r) {
    const int row = group + (r == 1 || r == 3 ? 8 : 0), k = in_group * 2 + (r >= 2 ? 8 : 0);
    fragment[r] = two(a[row * 16 + k], a[row * 16 + k + 1]);
  }
  for (int r = 0; r < 2; ++r) {
    const int k = in_group * 2 + 8 * r;
    b_fragment[r] = two(b[k * 8 + group], b[(k + 1) * 8 + group]);
  }
  float sum[4];
  for (int i = 0; i < 4; ++i) {
    sum[i] = d[(group + (i >= 2 ? 8 : 0)) * 8 + in_group * 2 + i % 2];
  }
  mma_16x8x16<S>(sum, fragment, b_fragment[0], b_fragment[1]);
  for (int i = 0; i < 4; ++i) {
    d[(group + (i >= 2 ? 8 : 0)) * 8 + in_group * 2 + i % 2] = sum[i];
  }
}

template <class S>
void test_mma() {
  std::mt19937 random(std::random_device{}());
  std::normal_distribution<float> normal;
  for (uint64_t seed = 0; seed < 10; ++seed) {
    use_seed(seed);
    std::vector<S> a(16 * 16), b(16 * 8);
    std::vector<float> c(16 * 8);
    for (S& x : a) x = from_float<S>(normal(random));
    for (S& x : b) x = from_float<S>(normal(random));
    for (float& x : c) x = normal(random);
    const Memory device_a = upload(a), device_b = upload(b), device_d = upload(c);
    launch(Stream(), blocks_of(1, 32), multiply<S>, device_a.data<const S>(),
           device_b.data<const S>(), device_d.data<float>());
    const auto d = download<float>(device_d);
    for (size_t row = 0; row < 16; ++row) {
      for (size_t column = 0; column < 8; ++column) {
        double sum = static_cast<double>(c[row * 8 + column]);
        for (size_t k = 0; k < 16; ++k) {
          sum += static_cast<double>(to_float(a[row * 16 + k])) *
                 static_cast<double>(to_float(b[k * 8 + column]));
        }
        CHECK(std::fabs(static_cast<double>(d[row * 8 + column]) - sum) <= 1e-5);
      }
    }
  }
}

// Four 8 x 8 matrices with rows at odd places of shared memory; each element says where it stands.
FASTRNN_KERNEL void load_matrices(uint32_t* out) {
  unsigned char* const shared = shared_memory<unsigned char>();
  const unsigned l = static_cast<unsigned>(lane());
  const unsigned row_at = (l * 7 % 32) * 48;
  uint16_t row[8];
  for (unsigned i = 0; i < 8; ++i) row[i] = static_cast<uint16_t>(l * 8 + i);  // matrix l / 8
  memcpy(shared + row_at, row, sizeof(row));
  sync_threads();
  uint32_t r[4];
  ldmatrix_x4(r, shared + row_at);
  for (unsigned m = 0; m < 4; ++m) out[l * 4 + m] = r[m];
}

void test_ldmatrix() {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    use_seed(seed);
    Memory out = allocate<uint32_t>(128, Stream());
    launch(Stream(), blocks_of(1, 32, 32 * 48), load_matrices, out.data<uint32_t>());
    const auto got = download<uint32_t>(out);
    for (uint32_t l = 0; l < 32; ++l) {
      for (uint32_t m = 0; m < 4; ++m) {
        const uint32_t element = m * 64 + l / 4 * 8 + l % 4 * 2;
        CHECK_EQ(got[l * 4 + m], element | (element + 1) << 16);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------
// Clusters
// ---------------------------------------------------------------------------------------------------

// What goes wrong in the exchange below.
enum Fault : int {
  kNoFault,
  kOneBuffer,     // the next values may overwrite those being read
  kFewBytes,      // expects less than comes
  kManyBytes,     // expects more than comes
  kNoInit,        // no mbarrier
  kEarlySend,     // nobody waits for the others' mbarriers to be there
  kOverwritten,   // a store on top of the mbarrier
  kReturnsEarly,  // blocks return with stores to them under way
  kNoWait,        // one thread does not wait
  kWrongBlock     // the mbarrier is not of the block that the data goes to
};

// Every block of a cluster sends a row of 32 numbers to all and adds up what it gets, `steps`
// times: double-buffered, one wait a step. By the time a block sends the row of a step, it has all
// rows of the step before, so all others have read those of two steps before. out: [rank][32].
FASTRNN_KERNEL void exchange(int steps, int fault, uint32_t* out) {
  const unsigned t = thread_index(), rank = cluster_rank(), size = grid_size().x;
  uint64_t* const full = shared_memory<uint64_t>();      // [2]
  uint32_t* const rows = shared_memory<uint32_t>() + 4;  // [2][size][32], behind the mbarriers
  const uint32_t bytes = size * 128 + (fault == kManyBytes ? 8 : 0) - (fault == kFewBytes ? 8 : 0);
  if (t == 0 && fault != kNoInit) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_expect(&full[i], bytes);
    }
  }
  if (fault != kEarlySend) cluster_sync();
  uint32_t value = rank * 100 + t;
  for (int step = 0; step < steps; ++step) {
    const int buffer = fault == kOneBuffer ? 0 : step % 2;
    const int phase = fault == kOneBuffer ? step : step / 2;
    uint32_t* const received = rows + static_cast<unsigned>(buffer) * size * 32;
    const uint32_t next = shuffle_down(value, 1);
    for (unsigned to = 0; t % 2 == 0 && to < size; ++to) {
      const SharedAddress counter = remote(&full[buffer], fault == kWrongBlock ? rank : to);
      store_async(remote(received + rank * 32, to) + t * 4, value, next, counter);
    }
    if (fault == kReturnsEarly && step + 1 == steps) return;
    if (fault != kNoWait || t != 5) mbarrier_wait(&full[buffer], static_cast<unsigned>(phase) & 1u);
    value = 1;
    for (unsigned from = 0; from < size; ++from) value += received[from * 32 + t];
    shuffle_xor(value, 1);  // all have read
    if (t == 0 && step + 2 < steps) mbarrier_expect(&full[buffer], bytes);
    if (t == 0 && fault == kOverwritten) full[0] = 0;
  }
  out[rank * 32 + t] = value;
  cluster_sync();
}

std::vector<uint32_t> exchange_expected(uint32_t blocks, int steps) {
  std::vector<uint32_t> values(blocks * 32);
  for (uint32_t i = 0; i < blocks * 32; ++i) values[i] = i / 32 * 100 + i % 32;
  for (int step = 0; step < steps; ++step) {
    for (uint32_t t = 0; t < 32; ++t) {
      uint32_t sum = 1;
      for (uint32_t b = 0; b < blocks; ++b) sum += values[b * 32 + t];
      for (uint32_t b = 0; b < blocks; ++b) values[b * 32 + t] = sum;
    }
  }
  return values;
}

void launch_exchange(int blocks, int steps, Fault fault, const Memory& out) {
  const size_t shared = 16 + 2 * 128 * static_cast<size_t>(blocks);
  launch(Stream(), clusters_of(blocks, 1, 32, shared), exchange, steps, static_cast<int>(fault),
         out.data<uint32_t>());
}

void test_exchange() {
  for (uint64_t seed = 0; seed < 2 * kSeeds; ++seed) {
    use_seed(seed);
    constexpr int kBlocks = 5, kSteps = 9;
    Memory out = allocate<uint32_t>(kBlocks * 32, Stream());
    launch_exchange(kBlocks, kSteps, kNoFault, out);
    CHECK(download<uint32_t>(out) == exchange_expected(kBlocks, kSteps));
  }
}

// What the exchange with that fault comes to for some seeds: wrong values, or Errors.
struct Outcome {
  int wrong = 0;
  std::set<std::string> errors;
  bool says(const char* part) const {
    for (const std::string& error : errors) {
      if (error.find(part) != std::string::npos) return true;
    }
    for (const std::string& error : errors) contains(error, part);
    return false;
  }
};
Outcome outcome_of(Fault fault, uint64_t first_seed, uint64_t last_seed) {
  constexpr int kBlocks = 3, kSteps = 7;
  Outcome outcome;
  for (uint64_t seed = first_seed; seed <= last_seed; ++seed) {
    use_seed(seed);
    Memory out = allocate<uint32_t>(kBlocks * 32, Stream());
    const std::string error = error_of([&] { launch_exchange(kBlocks, kSteps, fault, out); });
    if (!error.empty()) {
      outcome.errors.insert(error);
    } else if (download<uint32_t>(out) != exchange_expected(kBlocks, kSteps)) {
      ++outcome.wrong;
    }
  }
  return outcome;
}

void test_exchange_faults() {
  const Outcome one_buffer = outcome_of(kOneBuffer, 1, kSeeds);
  CHECK(one_buffer.wrong + static_cast<int>(one_buffer.errors.size()) > 0);
  CHECK(outcome_of(kNoWait, 1, kSeeds).wrong > 0);
  CHECK(outcome_of(kFewBytes, 0, 0).says("bytes more than"));
  CHECK(outcome_of(kFewBytes, 1, kSeeds).says("bytes more than"));
  CHECK(outcome_of(kManyBytes, 0, 0).says("bytes missing 8"));
  CHECK(outcome_of(kManyBytes, 1, kSeeds).says("bytes missing 8"));
  CHECK(outcome_of(kNoInit, 0, 0).says("not initialised"));
  CHECK(outcome_of(kEarlySend, 1, kSeeds).says("not initialised"));
  CHECK(outcome_of(kOverwritten, 0, 0).says("overwritten"));
  CHECK(outcome_of(kReturnsEarly, 1, 4 * kSeeds).says("return"));
  CHECK(outcome_of(kWrongBlock, 0, 0).says("mbarrier of another block"));
}

// Phases by themselves: arrivals and bytes must both be complete, in any order; the parity
// alternates.
FASTRNN_KERNEL void phases(int* out) {
  uint64_t* const bar = shared_memory<uint64_t>();
  uint32_t* const data = shared_memory<uint32_t>() + 4;
  const unsigned t = thread_index();
  if (t == 0) mbarrier_init(bar, 2);
  cluster_sync();
  mbarrier_wait(bar, 1);  // the phase before the first counts as over
  sync_threads();         // here and below: none may fall a phase behind
  if (t == 0) {
    const SharedAddress self = remote(bar, 0);
    store_async(remote(data, 0), Word16{{1, 2, 3, 4}}, self);  // before it is expected
    mbarrier_expect(bar, 24);
    store_async(remote(data + 4, 0), 5, 6, self);
  }
  if (t == 1) mbarrier_expect(bar, 0);
  mbarrier_wait(bar, 0);
  int sum = 0;
  for (int i = 0; i < 6; ++i) sum += static_cast<int>(data[i]);
  sync_threads();
  if (t < 2) mbarrier_expect(bar, 0);
  mbarrier_wait(bar, 1);
  out[t] = sum;
}

// A wait that comes a whole phase late waits for the phase after the next.
FASTRNN_KERNEL void late_wait() {
  uint64_t* const bar = shared_memory<uint64_t>();
  if (thread_index() == 0) mbarrier_init(bar, 1);
  sync_threads();
  if (thread_index() == 0) {
    mbarrier_expect(bar, 0);
    mbarrier_expect(bar, 0);
  } else {
    mbarrier_wait(bar, 0);
  }
}

FASTRNN_KERNEL void too_many_arrivals(int count) {
  uint64_t* const bar = shared_memory<uint64_t>();
  if (thread_index() == 0) mbarrier_init(bar, count);
  sync_threads();
  mbarrier_expect(bar, 8);
}

FASTRNN_KERNEL void init_twice() {
  uint64_t* const bar = shared_memory<uint64_t>();
  mbarrier_init(bar, 1);
}

void test_mbarrier() {
  int late = 0;
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    use_seed(seed);
    const std::string error = error_of([] { launch(Stream(), blocks_of(1, 2, 8), late_wait); });
    if (!error.empty()) CHECK(contains(error, "deadlock"));
    late += error.empty() ? 0 : 1;
  }
  CHECK(late > 0 && late < static_cast<int>(kSeeds));
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    use_seed(seed);
    Memory out = allocate<int>(40, Stream());
    launch(Stream(), blocks_of(1, 40, 64), phases, out.data<int>());
    for (const int sum : download<int>(out)) CHECK_EQ(sum, 21);
    CHECK(contains(error_of([] { launch(Stream(), blocks_of(1, 2, 8), too_many_arrivals, 1); }),
                   "all its arrivals"));
    CHECK(contains(error_of([] { launch(Stream(), blocks_of(1, 2, 8), init_twice); }),
                   "initialised already"));
    CHECK(contains(error_of([] { launch(Stream(), blocks_of(1, 2, 4), init_twice); }),
                   "not in the block's 4 bytes"));
  }
}

// ---------------------------------------------------------------------------------------------------
// Relaxed loads and stores
// ---------------------------------------------------------------------------------------------------

constexpr uint32_t kUnwritten = 0xFFFFFFFFu;

// Each block adds up what all blocks wrote the step before, which it waits for, and writes its own:
// rows[step][block], fresh memory being the sign that nothing is there yet. 32 threads.
FASTRNN_KERNEL void all_to_all(int steps, Word16* rows) {
  const unsigned blocks = grid_size().x, own = block_index().x, t = thread_index();
  uint32_t* const sums = shared_memory<uint32_t>();
  for (int step = 0; step < steps; ++step) {
    Word16* const row = rows + static_cast<unsigned>(step) * blocks;
    uint32_t sum = 0;
    for (unsigned b = t; step > 0 && b < blocks; b += 32) {
      Word16 v;
      do v = load_relaxed(row - blocks + b);
      while (v.w[0] == kUnwritten);
      sum += v.w[3];
      if (v.w[0] != v.w[3] || v.w[1] != v.w[3] + 1) sum += 1000000;  // torn
    }
    sums[t] = sum;
    sync_threads();
    if (t == 0) {
      uint32_t total = own;
      for (int i = 0; i < 32; ++i) total += sums[i];
      store_relaxed(row + own, {{total, total + 1, 7, total}});
    }
    sync_threads();
  }
}

void test_all_to_all() {
  constexpr unsigned kBlocks = 6;
  constexpr int kSteps = 6;
  uint32_t expected[kSteps][kBlocks];
  for (int step = 0; step < kSteps; ++step) {
    for (unsigned b = 0; b < kBlocks; ++b) {
      expected[step][b] = b;
      for (unsigned other = 0; step > 0 && other < kBlocks; ++other) {
        expected[step][b] += expected[step - 1][other];
      }
    }
  }
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    use_seed(seed, /*delay_stores=*/true);
    Memory rows = allocate<Word16>(kSteps * kBlocks, Stream());
    Launch how = blocks_of(kBlocks, 32, 128);
    how.cooperative = true;
    launch(Stream(), how, all_to_all, kSteps, rows.data<Word16>());
    const auto got = download<Word16>(rows);
    for (int step = 0; step < kSteps; ++step) {
      for (unsigned b = 0; b < kBlocks; ++b) {
        CHECK_EQ(got[static_cast<unsigned>(step) * kBlocks + b].w[3], expected[step][b]);
      }
    }
  }
}

// Block 0 writes a then b; block 1 reads b then a. Nothing orders them: b may be seen before a.
FASTRNN_KERNEL void two_stores(Word16* memory, uint32_t* seen) {
  if (block_index().x == 0) {
    store_relaxed(memory, {{1, 1, 1, 1}});
    store_relaxed(memory + 1, {{1, 1, 1, 1}});
    store_relaxed(memory, {{2, 2, 2, 2}});
    for (int i = 0; i < 10; ++i) load_relaxed(memory + 2);
    seen[2] = load_relaxed(memory).w[0];  // its own last store, at least
  } else {
    uint32_t newest = 0;
    for (int i = 0; i < 20; ++i) {
      const Word16 b = load_relaxed(memory + 1), a = load_relaxed(memory);
      if (b.w[0] == 1 && a.w[0] == kUnwritten) seen[0] = 1;
      const uint32_t now = a.w[0] == kUnwritten ? 0 : a.w[0];
      if (now < newest) seen[1] = 1;  // an older value after a newer one
      newest = now;
    }
  }
}

FASTRNN_KERNEL void store_then_sync(Word16* memory, uint32_t* seen) {
  if (thread_index() == 0) store_relaxed(memory, {{1, 2, 3, 4}});
  sync_threads();
  if (thread_index() == 32) *seen = memory->w[3];
}

void test_relaxed_order() {
  int reordered = 0;
  for (uint64_t seed = 1; seed < 200; ++seed) {
    for (const bool delay : {false, true}) {
      use_seed(seed, delay);
      Memory memory = allocate<Word16>(3, Stream());
      const Memory seen = upload(std::vector<uint32_t>{0, 0, 0});
      Launch how = blocks_of(2, 1);
      how.cooperative = true;
      launch(Stream(), how, two_stores, memory.data<Word16>(), seen.data<uint32_t>());
      const auto got = download<uint32_t>(seen);
      if (delay) {
        reordered += static_cast<int>(got[0]);
      } else {
        CHECK_EQ(got[0], 0u);
      }
      CHECK_EQ(got[1], 0u);
      CHECK_EQ(got[2], 2u);
      CHECK_EQ(download<Word16>(memory)[0].w[0], 2u);

      launch(Stream(), blocks_of(1, 64), store_then_sync, memory.data<Word16>(),
             seen.data<uint32_t>());
      CHECK_EQ(download<uint32_t>(seen)[0], 4u);
    }
  }
  CHECK(reordered > 0);
}

FASTRNN_KERNEL void polls_for_nothing(const Word16* memory) {
  while (load_relaxed(memory).w[0] == kUnwritten) {
  }
}

FASTRNN_KERNEL void misaligned_load(const unsigned char* memory) { load_relaxed(memory + 8); }

void test_relaxed_errors() {
  for (uint64_t seed = 0; seed < 3; ++seed) {
    use_seed(seed);
    Memory memory = allocate<Word16>(2, Stream());
    CHECK(contains(error_of([&] {
                     launch(Stream(), blocks_of(1, 32), polls_for_nothing,
                            memory.data<const Word16>());
                   }),
                   "does not come"));
    CHECK(contains(error_of([&] {
                     launch(Stream(), blocks_of(1, 1), misaligned_load,
                            memory.data<const unsigned char>());
                   }),
                   "alignment"));
  }
}

// ---------------------------------------------------------------------------------------------------
// Errors of synchronisation
// ---------------------------------------------------------------------------------------------------

FASTRNN_KERNEL void diverges(int which, float* out) {
  const unsigned t = thread_index();
  float x = static_cast<float>(t);
  float d[4] = {};
  const uint32_t a[4] = {};
  switch (which) {
    case 0:  // two kinds
      if (t < 16) {
        x = shuffle_xor(x, 1);
      } else {
        mma_16x8x16<Float16>(d, a, 0, 0);
      }
      break;
    case 1:  // two places
      if (t < 16) {
        x = shuffle_xor(x, 1);
      } else {
        x = shuffle_xor(x, 2);
      }
      break;
    case 2:  // one lane is gone
      if (t == 3) return;
      x = shuffle_xor(x, 1);
      break;
    case 3:  // lanes at two barriers
      if (t < 16) {
        sync_threads();
      } else {
        named_barrier(1, 32);
      }
      break;
    case 4:  // one thread does not come to the barrier but waits for what never comes
      if (t == 0) {
        mbarrier_init(shared_memory<uint64_t>(), 1);
        mbarrier_wait(shared_memory<uint64_t>(), 0);
      }
      sync_threads();
      break;
    case 5:  // half of the named barrier's threads
      if (t < 32) named_barrier(2, 64);
      break;
    case 6:
      named_barrier(0, 32);
      break;
    case 7:
      named_barrier(1, 48);
      break;
    case 8:  // the warps do not agree
      named_barrier(1, t < 32 ? 64 : 128);
      break;
    case 9:  // half a warp at a named barrier, the other half leaves
      if (t % 32 < 16) named_barrier(1, 64);
      break;
    case 10:
      remote(shared_memory<char>(), 1);
      break;
    case 11: {
      uint32_t r[4];
      ldmatrix_x4(r, shared_memory<char>() + 8);
      break;
    }
    default:
      x = shuffle_xor(x, 1);
      break;
  }
  out[t] = x + d[0];
}

void test_divergence() {
  const char* const expected[] = {"diverged",     "diverged",   "",        "diverged",  "deadlock",
                                  "deadlock",     "1 to 15",    "1 to 15", "others of", "",
                                  "has no block", "not aligned"};
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    use_seed(seed);
    for (int which = 0; which < 12; ++which) {
      Memory out = allocate<float>(128, Stream());
      const std::string error = error_of(
          [&] { launch(Stream(), blocks_of(1, 128, 64), diverges, which, out.data<float>()); });
      CHECK(!error.empty());
      CHECK(contains(error, expected[which]));
      CHECK(contains(error, "test_emulator.cc:"));
    }
    // A warp that is not whole.
    CHECK(contains(error_of([&] {
                     Memory out = allocate<float>(128, Stream());
                     launch(Stream(), blocks_of(1, 40, 64), diverges, 12, out.data<float>());
                   }),
                   "has 8 threads"));
  }
  CHECK(contains(error_of([] { sync_threads(); }), "outside a kernel"));
  // After all these failures the next launch is none the worse.
  test_grid();
}

void test_deadlock_report() {
  use_seed(0);
  Memory out = allocate<float>(128, Stream());
  const std::string error =
      error_of([&] { launch(Stream(), blocks_of(1, 128, 64), diverges, 4, out.data<float>()); });
  CHECK(contains(error, "block (0, 0, 0), threads 0 to 0 wait at mbarrier_wait"));
  CHECK(contains(error, "threads 1 to 127 wait at sync_threads"));
  CHECK(contains(error, "arrivals missing 1"));
}

// ---------------------------------------------------------------------------------------------------
// Launches
// ---------------------------------------------------------------------------------------------------

FASTRNN_KERNEL void nothing() {}

void test_launch_checks() {
  const auto refused = [](const Launch& how) {
    return error_of([&] { launch(Stream(), how, nothing); });
  };
  emulator::Options options;
  options.multiprocessors = 4;
  options.shared_per_block = 100000;
  emulator::configure(options);
  CHECK_EQ(refused(blocks_of(1000, 1024)), "");
  CHECK(contains(refused(blocks_of(0, 32)), "grid"));
  CHECK(contains(refused(blocks_of(1, 1025)), "threads"));
  CHECK(contains(refused(blocks_of(1, 0)), "threads"));
  CHECK(contains(refused(blocks_of(1, 32, 100001)), "shared memory"));
  CHECK_EQ(resident_blocks(nothing, 1024, 0), 2);
  CHECK_EQ(resident_blocks(nothing, 32, 100000), 1);
  CHECK_EQ(resident_blocks(nothing, 32, 0), 32);
  CHECK_EQ(resident_blocks(nothing, 32, 100001), 0);

  Launch cooperative = blocks_of(8, 1024);
  cooperative.cooperative = true;
  CHECK_EQ(refused(cooperative), "");
  cooperative.grid.x = 9;
  CHECK(contains(refused(cooperative), "cooperative"));
  cooperative = blocks_of(5, 32, 100000);
  cooperative.cooperative = true;
  CHECK(contains(refused(cooperative), "cooperative"));

  CHECK_EQ(refused(clusters_of(4, 10, 32, 100000)), "");
  CHECK_EQ(resident_clusters(nothing, clusters_of(2, 1, 32, 100000)), 2);
  CHECK(contains(refused(clusters_of(8, 1, 32, 100000)), "no cluster fits"));
  CHECK(contains(refused(clusters_of(17, 1, 32, 0)), "at most 16"));
  Launch uneven = blocks_of(9, 32);
  uneven.cluster = 4;
  CHECK(contains(refused(uneven), "whole number"));
  options.major = 8;
  emulator::configure(options);
  CHECK(contains(refused(clusters_of(2, 1, 32, 0)), "9.0"));
  CHECK_EQ(device_info().major, 8);
  CHECK_EQ(device_info().multiprocessors, 4);

  use_seed(0);
  CHECK_EQ(resident_clusters(nothing, clusters_of(16, 1, 256, 200000)), 7);  // as on an H200
}

// ---------------------------------------------------------------------------------------------------
// cuda/runtime.h
// ---------------------------------------------------------------------------------------------------

void test_memory() {
  emulator::Options options;
  options.memory = 10000;
  emulator::configure(options);
  CHECK_EQ(emulator::live_bytes(), 0u);
  {
    Memory a(1000, Stream()), b(9000, Stream());
    CHECK_EQ(emulator::live_bytes(), 10000u);
    CHECK_EQ(free_memory(), 0u);
    CHECK_EQ(reinterpret_cast<uintptr_t>(a.data()) % 256, 0u);
    for (const uint8_t byte : download<uint8_t>(a)) CHECK_EQ(byte, 0xFF);
    bool threw = false;
    try {
      Memory c(1, Stream());
    } catch (const std::bad_alloc&) {
      threw = true;
    }
    CHECK(threw);
    Memory none(0, Stream());
    CHECK(none.data() == nullptr);
    Memory moved = std::move(a);
    CHECK(a.data() == nullptr);
    CHECK_EQ(moved.bytes(), 1000u);
    b = Memory();
    CHECK_EQ(emulator::live_bytes(), 1000u);

    std::vector<char> host(2000, 1);
    char* const device = moved.data<char>();
    const Stream stream = own_stream();
    CHECK_EQ(error_of([&] { copy_to_device(device + 500, host.data(), 500, stream); }), "");
    CHECK(contains(error_of([&] { copy_to_device(device + 501, host.data(), 500, stream); }),
                   "one block of device memory"));
    CHECK(contains(error_of([&] { copy_to_device(host.data(), host.data(), 1, stream); }),
                   "one block of device memory"));
    CHECK(contains(error_of([&] { copy_to_device(device, device + 1, 1, stream); }),
                   "host memory is due"));
    CHECK(contains(error_of([&] { copy_to_host(device, device + 1, 1, stream); }),
                   "host memory is due"));
    CHECK(contains(error_of([&] { copy_to_host(host.data(), device - 1, 2, stream); }),
                   "one block of device memory"));
    CHECK_EQ(error_of([&] { copy_on_device(device, device + 500, 500, stream); }), "");
    CHECK_EQ(device[499], 1);
    CHECK(
        contains(error_of([&] { copy_on_device(device, device + 499, 500, stream); }), "overlap"));
    CHECK_EQ(error_of([&] { fill_bytes(device, 3, 1000, stream); }), "");
    CHECK(contains(error_of([&] { fill_bytes(device, 3, 1001, stream); }), "1001 bytes"));
    copy_to_host(host.data(), device, 1000, stream);
    CHECK_EQ(host[999], 3);
    synchronize(stream);
  }
  CHECK_EQ(emulator::live_bytes(), 0u);
  use_seed(0);
}

struct Increment {
  int* counter;
  FASTRNN_HD void operator()(int64_t) const { ++*counter; }
};
FASTRNN_KERNEL void double_it(int* value) { *value *= 2; }

void test_graph() {
  use_seed(0);
  const Memory value = upload(std::vector<int>{1});
  Memory copy = allocate<int>(1, Stream());
  Graph graph = Graph::record([&](Stream stream) {
    for_each(stream, 3, Increment{value.data<int>()});
    launch(stream, blocks_of(1, 1), double_it, value.data<int>());
    copy_on_device(copy.data(), value.data(), sizeof(int), stream);
    CHECK(contains(error_of([&] { synchronize(stream); }), "recorded"));
    CHECK(contains(error_of([&] { Memory(4, stream); }), "recorded"));
    CHECK(contains(error_of([&] { copy_to_host(nullptr, value.data(), 4, stream); }), "recorded"));
  });
  CHECK_EQ(download<int>(value)[0], 1);  // nothing has run
  graph.replay(Stream());
  CHECK_EQ(download<int>(value)[0], 8);
  Graph moved = std::move(graph);
  moved.replay(own_stream());
  CHECK_EQ(download<int>(copy)[0], 22);
  CHECK(contains(error_of([&] { graph.replay(Stream()); }), "not recorded"));
}

void test_fork() {
  require_device();
  const pid_t child = fork();
  if (child == 0) {
    int status = 1;
    try {
      own_stream();
    } catch (const Unavailable& error) {
      status = std::string(error.what()).find("spawn") == std::string::npos ? 2 : 0;
    }
    _exit(status);
  }
  int status = -1;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK_EQ(status, 0);
}

}  // namespace

int main() {
  test_half();
  test_grid();
  test_for_each();
  test_barriers();
  test_missing_sync_shows();
  test_shuffles();
  test_mma<Bfloat16>();
  test_mma<Float16>();
  test_ldmatrix();
  test_exchange();
  test_exchange_faults();
  test_mbarrier();
  test_all_to_all();
  test_relaxed_order();
  test_relaxed_errors();
  test_divergence();
  test_deadlock_report();
  test_launch_checks();
  test_memory();
  test_graph();
  test_fork();
  return check_report();
}
