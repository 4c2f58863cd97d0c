// The maps of cuda/fragments.h: each is a bijection onto its matrix, they agree with the (emulated)
// matrix instructions, and products of packed weights are those of the matrices.
#include "cuda/fragments.h"

#include <cmath>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "../check.h"
#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "cuda/emulator.h"
#include "cuda/ptx.h"

using namespace fastrnn;
using namespace fastrnn::cuda;

namespace {

using Cells = std::set<std::pair<int64_t, int64_t>>;

// Adds a place that must be new and within rows x cols.
void add(Cells& seen, Place at, int64_t rows, int64_t cols) {
  CHECK(at.row >= 0 && at.row < rows && at.col >= 0 && at.col < cols);
  CHECK(seen.emplace(at.row, at.col).second);
}

void test_fragments_are_bijections() {
  Cells a, b, c, cells;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int r = 0; r < 4; ++r) {
      for (int half = 0; half < 2; ++half) add(a, a_element(lane, r, half), kTileM, kTileK);
      add(c, c_element(lane, r), kTileM, kTileN);
    }
    for (int r = 0; r < 2; ++r) {
      for (int half = 0; half < 2; ++half) add(b, b_element(lane, r, half), kTileK, kTileN);
    }
    const Cell4x8 cell = cell_of_lane(lane);
    add(cells, {cell.unit, cell.row}, kTileUnits, kTileN);
  }
  CHECK_EQ(a.size(), size_t{kTileM * kTileK});
  CHECK_EQ(b.size(), size_t{kTileK * kTileN});
  CHECK_EQ(c.size(), size_t{kTileM * kTileN});
  CHECK_EQ(cells.size(), size_t{kTileUnits * kTileN});
}

void test_packing_is_a_bijection() {
  for (int64_t m_tiles : {1, 2, 3, 8, 32}) {
    for (int64_t k_tiles : {1, 2, 5, 32}) {
      const int64_t rows = m_tiles * kTileM, cols = k_tiles * kTileK;
      Cells seen;
      for (int64_t i = 0; i < rows * cols; ++i) {
        const Place at = packed_element(i, k_tiles);
        add(seen, at, rows, cols);
        CHECK_EQ(packed_index(at.row, at.col, k_tiles), i);
        // A lane's 16 bytes of a tile are its registers in order.
        const Place in_tile =
            a_element(static_cast<int>(i % kTileElements / kLaneElements),
                      static_cast<int>(i % kLaneElements / 2), static_cast<int>(i % 2));
        CHECK_EQ(at.row % kTileM, in_tile.row);
        CHECK_EQ(at.col % kTileK, in_tile.col);
        CHECK_EQ(at.row / kTileM * k_tiles + at.col / kTileK, i / kTileElements);
      }
      CHECK_EQ(static_cast<int64_t>(seen.size()), rows * cols);
    }
  }
}

void test_rows_of_the_forward_product() {
  for (int64_t H : {4, 16, 20, 512}) {
    Cells seen;
    for (int64_t row = 0; row < kGateRows * H; ++row) {
      const GateRow at = gate_row(row);
      add(seen, {at.gate, at.unit}, kGateRows, H);
      CHECK_EQ(at.unit / kTileUnits, row / kTileM);  // a tile's units are neighbours
    }
    CHECK_EQ(static_cast<int64_t>(seen.size()), kGateRows * H);
  }
}

// --- Against the instructions
// ---------------------------------------------------------------------

// One warp: a row of two tiles of A, packed, times the two k tiles of rows [n][k]; D as the lanes
// have it, and the gates of their cells.
template <class S>
FASTRNN_KERNEL void product_kernel(const S* packed, const S* rows, float* d_out, float* gates_out) {
  constexpr int kDepth = 2 * kTileK;
  S* const shared = shared_memory<S>();
  const int l = lane();
  for (int i = l; i < kTileN * kDepth; i += kLanes) shared[i] = rows[i];
  sync_threads();
  uint32_t a[2][4], b[4];
  for (int k = 0; k < 2; ++k) {
    const Word16 word = reinterpret_cast<const Word16*>(packed)[k * kLanes + l];
    for (int r = 0; r < 4; ++r) a[k][r] = word.w[r];
  }
  ldmatrix_x4(b, shared + l % 8 * kDepth + l / 8 * 8);
  float d[4] = {};
  mma_16x8x16<S>(d, a[0], b[0], b[1]);
  mma_16x8x16<S>(d, a[1], b[2], b[3]);
  float gates[kGateRows];
  gates_of_cell(d, l, gates);
  for (int r = 0; r < 4; ++r) {
    d_out[l * 4 + r] = d[r];
    gates_out[l * 4 + r] = gates[r];
  }
}

template <class T>
Memory upload(const std::vector<T>& from) {
  Memory memory = allocate<T>(static_cast<int64_t>(from.size()), own_stream());
  copy_to_device(memory.data(), from.data(), from.size() * sizeof(T), own_stream());
  return memory;
}
template <class T>
std::vector<T> download(const Memory& from) {
  std::vector<T> to(from.bytes() / sizeof(T));
  copy_to_host(to.data(), from.data(), from.bytes(), own_stream());
  return to;
}

std::vector<float> random_numbers(int64_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  std::vector<float> x(static_cast<size_t>(n));
  for (float& value : x) value = uniform(random);
  return x;
}

template <class S>
void test_instructions() {
  constexpr int kDepth = 2 * kTileK;
  const std::vector<float> weights = random_numbers(kTileM * kDepth, 1);
  const std::vector<float> rows = random_numbers(kTileN * kDepth, 2);
  std::vector<S> packed(weights.size()), state(rows.size());
  for (int row = 0; row < kTileM; ++row) {
    for (int col = 0; col < kDepth; ++col) {
      packed[static_cast<size_t>(packed_index(row, col, 2))] =
          from_float<S>(weights[static_cast<size_t>(row * kDepth + col)]);
    }
  }
  for (size_t i = 0; i < rows.size(); ++i) state[i] = from_float<S>(rows[i]);
  const Memory packed_device = upload(packed), state_device = upload(state);
  const Memory d_device = allocate<float>(kLanes * 4, own_stream());
  const Memory gates_device = allocate<float>(kLanes * 4, own_stream());
  Launch how;
  how.block = kLanes;
  how.shared = state.size() * sizeof(S);
  launch(own_stream(), how, &product_kernel<S>, packed_device.data<S>(), state_device.data<S>(),
         d_device.data<float>(), gates_device.data<float>());
  const std::vector<float> d = download<float>(d_device), gates = download<float>(gates_device);
  const auto expected = [&](int64_t row, int64_t n) {
    double sum = 0;
    for (int64_t k = 0; k < kDepth; ++k) {
      sum += double{to_float(from_float<S>(weights[static_cast<size_t>(row * kDepth + k)]))} *
             to_float(state[static_cast<size_t>(n * kDepth + k)]);
    }
    return sum;
  };
  for (int l = 0; l < kLanes; ++l) {
    for (int r = 0; r < 4; ++r) {
      const Place at = c_element(l, r);
      CHECK(std::abs(d[static_cast<size_t>(l * 4 + r)] - expected(at.row, at.col)) < 1e-5);
      const Cell4x8 cell = cell_of_lane(l);
      for (int64_t row = 0; row < kTileM; ++row) {
        const GateRow gate = gate_row(row);
        if (gate.gate != r || gate.unit != cell.unit) continue;
        CHECK(std::abs(gates[static_cast<size_t>(l * 4 + r)] - expected(row, cell.row)) < 1e-5);
      }
    }
  }
}

// --- Packed weights
// -------------------------------------------------------------------------------

// What stands in the packed matrices, times a vector, is the matrix's product, for H that is
// padded.
template <class S, class Cell>
void test_packed_products(int64_t H, int64_t padded) {
  static_assert(gates_are_slots<Cell>(), "");
  const int G = Cell::kGates, slots = Cell::kSlots;
  const std::vector<float> w = random_numbers(G * H * H, 3);
  const std::vector<float> h = random_numbers(padded, 4), dg = random_numbers(slots * padded, 5);
  const Memory w_device = upload(w);
  const Memory forward = allocate<S>(forward_elements(padded), own_stream());
  const Memory backward = allocate<S>(backward_elements(padded, slots), own_stream());
  for_each(own_stream(), forward_elements(padded),
           PackForward<S>{w_device.data<float>(), H, G, padded, forward.data<S>()});
  for_each(own_stream(), backward_elements(padded, slots),
           PackBackward<S>{w_device.data<float>(), H, G, slots, padded, backward.data<S>()});
  const auto weight = [&](int64_t g, int64_t u, int64_t v) {
    return double{to_float(from_float<S>(w[static_cast<size_t>((g * H + u) * H + v)]))};
  };

  std::vector<double> gates(static_cast<size_t>(kGateRows * padded)),
      dh(static_cast<size_t>(padded));
  const std::vector<S> f = download<S>(forward), b = download<S>(backward);
  for (size_t i = 0; i < f.size(); ++i) {
    const Place at = packed_element(static_cast<int64_t>(i), padded / kTileK);
    gates[static_cast<size_t>(at.row)] += double{to_float(f[i])} * h[static_cast<size_t>(at.col)];
  }
  for (size_t i = 0; i < b.size(); ++i) {
    const Place at = packed_element(static_cast<int64_t>(i), slots * padded / kTileK);
    dh[static_cast<size_t>(at.row)] += double{to_float(b[i])} * dg[static_cast<size_t>(at.col)];
  }
  for (int64_t row = 0; row < kGateRows * padded; ++row) {
    const GateRow at = gate_row(row);
    double sum = 0;
    for (int64_t v = 0; v < H && at.gate < G && at.unit < H; ++v) {
      sum += weight(at.gate, at.unit, v) * h[static_cast<size_t>(v)];
    }
    CHECK(std::abs(gates[static_cast<size_t>(row)] - sum) < 1e-9);
  }
  for (int64_t v = 0; v < padded; ++v) {
    double sum = 0;
    for (int64_t g = 0; g < G && v < H; ++g) {
      for (int64_t u = 0; u < H; ++u) {
        sum += weight(g, u, v) * dg[static_cast<size_t>(u * slots + Cell::kStateSlot[g])];
      }
    }
    CHECK(std::abs(dh[static_cast<size_t>(v)] - sum) < 1e-9);
  }
}

template <class S>
void test_all_packed_products() {
  for (const auto& sizes : {std::pair<int64_t, int64_t>{1, 16}, {20, 32}, {50, 64}, {64, 64}}) {
    test_packed_products<S, scalar::Lstm>(sizes.first, sizes.second);
    test_packed_products<S, scalar::GruAfter>(sizes.first, sizes.second);
    test_packed_products<S, scalar::RnnTanh>(sizes.first, sizes.second);
  }
}

}  // namespace

int main() {
  test_fragments_are_bijections();
  test_packing_is_a_bijection();
  test_rows_of_the_forward_product();
  test_instructions<Bfloat16>();
  test_instructions<Float16>();
  test_all_packed_products<Bfloat16>();
  test_all_packed_products<Float16>();
  return check_report();
}
