// How a cluster of blocks runs a recurrence on its own.
//
// A cluster takes a slice of neighbouring rows of the batch, 1, 2 or 4 tiles of 8, and one
// direction, and goes through the steps until the first of its rows, the longest, has ended. It
// needs nothing from other clusters, so clusters need not run at the same time. Its blocks divide
// the H units among them, and each keeps its part of W_hh in registers, as tiles of A
// (cuda/fragments.h), from the first step to the last: a step reads no weights.
//
// Forward. Every block has the state h of all units of the slice in its shared memory, twice. In a
// step, a warp multiplies its tile, 4 units times 4 gates, with the h of the step before; after one
// exchange between lanes each lane has all gates of its cell, one of each tile of rows, and keeps
// its c in a register. The new h goes to the other buffer of every block of the cluster with
// asynchronous stores that count their bytes at an mbarrier there, whose phase ends when all of h
// has come. Nothing else is waited for. A warp sends only after it has waited for all of the old h
// and read it; so whoever has waited for all of the new h knows that every warp has finished with
// the old one, and may overwrite it. For the same reason no phase can end a second time before all
// have seen it end.
//
// Backward. dh = W_hhᵀ dG sums over all units' gates. To pass dG on would be 4 numbers a cell to
// every block; instead each block multiplies the dG of its own units with its columns of W_hhᵀ and
// sends every block the sums for that block's units: in bytes half of it. A block adds up what the
// blocks sent in an order that depends on their ranks only. Within the block dG goes through shared
// memory, twice there as well, with one barrier of the block a step, which also tells the block's
// warps from each other's reading what the sending does forward.
//
// A cell's products are summed in the same order wherever its row stands, so results do not depend
// on the batch.
//
// Below compute capability 9.0 the kernels are empty. How many registers they may use is at
// kBlocks.
#include "cuda/cluster.h"

#include <string>
#include <type_traits>

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "cuda/constants.h"
#include "cuda/fragments.h"
#include "cuda/lane.h"
#include "cuda/ptx.h"
#include "cuda/simt.h"

#if !FASTRNN_HAS_CLUSTERS
#pragma nv_diag_suppress 177  // what the empty kernels do not use
#endif

namespace fastrnn {
namespace cuda {
namespace cluster {

namespace {

using V = DeviceLane;

// How the units are divided, for H padded to kH.
template <int kH>
struct Division {
  static constexpr int kCluster = kH > 256 ? 16 : 8;  // blocks
  static constexpr int kUnits = kH / kCluster;        // of a block
  static constexpr int kWarps = kUnits / kTileUnits;
  static constexpr int kThreads = kLanes * kWarps;
};

// Blocks of a multiprocessor for which the kernels leave registers. Where one tile of rows needs
// few, more clusters than one share a multiprocessor, and one computes while the other waits. It is
// the kernels' budget: 65536 / (kBlocks * kThreads) registers a thread, at most 255, of which none
// may be spilled. 128 for H <= 256 and one tile; the largest, H = 512 and four tiles, use all 255.
template <int kH, int kTiles>
constexpr int kBlocks = kTiles > 1 || kH > 256 ? 1 : 512 / Division<kH>::kThreads;

// The cells as the kernels call them, with their kind: one kernel does for the three simple cells,
// which choose their function at run time.
template <class C>
struct Only : C {
  template <class... Args>
  FASTRNN_DEVICE FASTRNN_INLINE static void forward(CellKind, Args&... args) {
    C::forward(args...);
  }
  template <class... Args>
  FASTRNN_DEVICE FASTRNN_INLINE static void backward(CellKind, Args&... args) {
    C::backward(args...);
  }
};
struct AnyRnn : scalar::RnnTanh {
  template <class... Args>
  FASTRNN_DEVICE FASTRNN_INLINE static void forward(CellKind kind, Args&... args) {
    if (kind == CellKind::kRnnTanh) return scalar::RnnTanh::forward(args...);
    if (kind == CellKind::kRnnRelu) return scalar::RnnRelu::forward(args...);
    scalar::RnnSigmoid::forward(args...);
  }
  template <class... Args>
  FASTRNN_DEVICE FASTRNN_INLINE static void backward(CellKind kind, Args&... args) {
    if (kind == CellKind::kRnnTanh) return scalar::RnnTanh::backward(args...);
    if (kind == CellKind::kRnnRelu) return scalar::RnnRelu::backward(args...);
    scalar::RnnSigmoid::backward(args...);
  }
};
using AnyLstm = Only<scalar::Lstm>;
using AnyGru = Only<scalar::GruAfter>;

// The gate whose input product a slot starts from; -1: none, it starts from the bias.
template <class Cell>
constexpr int input_gate(int slot) {
  for (int g = 0; g < Cell::kGates; ++g) {
    if (Cell::kInputSlot[g] == slot) return g;
  }
  return -1;
}

// N values that are loaded and stored as one.
template <class T, int N>
struct alignas(sizeof(T) * N) Together {
  T v[N];
};

template <class S>
struct ForwardArgs {
  ForwardRecurrence<S> direction[kMaxDirections];
  const int64_t* first;  // (T + 1)
  int64_t k0, k1;
  int H;
  CellKind kind;
};
template <class S>
struct BackwardArgs {
  BackwardRecurrence<S> direction[kMaxDirections];
  const int64_t* first;  // (T + 1)
  int64_t k0, k1;
  int H;
  CellKind kind;
};

// The mbarriers of a block, at the start of its shared memory, in 128 bytes of their own: for each
// tile of rows two, which exchanges 0, 1, ... use in turn, like the buffers. One thread of the
// block expects the bytes of the exchange after next as soon as it has seen this one; what comes in
// before that counts as well. Tiles have mbarriers of their own since they need nothing from each
// other: while one is on its way, others are computed.
constexpr uint32_t kMbarrierBytes = 128;

template <int kTiles, uint32_t kBytes>  // of a tile, from all blocks of the cluster
struct Arrivals {
  static_assert(2 * kTiles * sizeof(uint64_t) <= kMbarrierBytes, "");
  uint64_t* mbarriers;

  FASTRNN_DEVICE FASTRNN_INLINE void init() const {
    if (thread_index() != 0) return;
    for (int i = 0; i < 2 * kTiles; ++i) {
      mbarrier_init(&mbarriers[i], 1);
      mbarrier_expect(&mbarriers[i], kBytes);
    }
  }
  FASTRNN_DEVICE FASTRNN_INLINE void wait(unsigned exchange, unsigned tile) const {
    uint64_t* const mbarrier = &mbarriers[2 * tile + exchange % 2];
    mbarrier_wait(mbarrier, exchange / 2 % 2);
    if (thread_index() == 0) mbarrier_expect(mbarrier, kBytes);
  }
  // Where the mbarrier is, in any block's shared memory.
  FASTRNN_DEVICE FASTRNN_INLINE static uint32_t offset(unsigned exchange, unsigned tile) {
    return (2 * tile + exchange % 2) * static_cast<uint32_t>(sizeof(uint64_t));
  }
};

// A lane's part of a tile of packed weights.
FASTRNN_DEVICE FASTRNN_INLINE void load_tile(const void* packed, int64_t tile, uint32_t (&a)[4]) {
  const Word16 word = static_cast<const Word16*>(packed)[tile * kLanes + lane()];
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = word.w[i];
}

// What a warp works on: 4 units, in the rows of a slice of the batch.
struct WarpPlace {
  int rank, warp;  // of the block in its cluster, of the warp in its block
  int slice;       // its first row
  int first_unit;
};
template <int kH>
FASTRNN_DEVICE FASTRNN_INLINE WarpPlace place_of_warp(int slice_rows) {
  const int rank = static_cast<int>(cluster_rank());
  const int warp = static_cast<int>(thread_index()) / kLanes;
  const int cluster = static_cast<int>(block_index().x) / Division<kH>::kCluster;
  return {rank, warp, cluster * slice_rows, rank * Division<kH>::kUnits + warp * kTileUnits};
}

// Where this lane's row of ldmatrix_x4 begins, in elements, so that it gives the fragments of B of
// two neighbouring k tiles: matrices 0, 1 are k 0 ... 7, 8 ... 15 of the first, 2, 3 of the second.
FASTRNN_DEVICE FASTRNN_INLINE uint32_t matrix_row(int stride) {
  return static_cast<uint32_t>(lane() % 8 * stride + lane() / 8 * 8);
}

// --- Forward -------------------------------------------------------------------------------------

template <class S, class Cell, int kH, int kTiles>
struct ForwardLayout {
  static constexpr int kRows = kTiles * kTileN;  // of the slice
  // The state: [2][row][unit]. 16 bytes more than a row's units make ldmatrix's rows start at
  // different banks.
  static constexpr int kStride = kH + 8;
  static constexpr uint32_t kTileState = kTileN * kStride;
  static constexpr uint32_t kState = kRows * kStride;
  static constexpr size_t kShared = kMbarrierBytes + 2 * kState * sizeof(S);
  using Exchange = Arrivals<kTiles, kTileN * kH * sizeof(S)>;
};

// Where the rows of this step and the next begin and end in the chunk. Rows of a chunk are counted
// in 32 bits (check_rows).
class StepsForward {
 public:
  FASTRNN_DEVICE FASTRNN_INLINE StepsForward(const int64_t* first, int64_t k0, int64_t k1)
      : first_(first), k_(k0), k1_(k1), origin_(first[k0]) {
    row = 0;
    next = at(k0 + 1);
    after = at(k0 + 2);
  }
  FASTRNN_DEVICE FASTRNN_INLINE void advance() {
    ++k_;
    row = next;
    next = after;
    after = at(k_ + 2);
  }
  int row, next, after;  // rows of this step: [row, next), of the next, if any: [next, after)

 private:
  FASTRNN_DEVICE FASTRNN_INLINE int at(int64_t k) const {
    return static_cast<int>(first_[k < k1_ ? k : k1_] - origin_);
  }
  const int64_t* first_;
  int64_t k_, k1_, origin_;
};

// What a step reads of one cell, loaded a step ahead.
template <class Cell>
struct Inputs {
  float x[Cell::kGates];
  bool dropped;
};

template <class S, class Cell>
FASTRNN_DEVICE FASTRNN_INLINE Inputs<Cell> load_inputs(const ForwardRecurrence<S>& d, bool alive,
                                                       int row, int unit, int H) {
  constexpr int G = Cell::kGates;
  Inputs<Cell> in = {};
  if (!alive) return in;
  const float* const x = d.gx + (static_cast<int64_t>(row) * H + unit) * G;
  if constexpr (G == 4) {
    const auto together = *reinterpret_cast<const Together<float, G>*>(x);
    for_constants<G>([&](auto g) { in.x[decltype(g)::value] = together.v[decltype(g)::value]; });
  } else {
    for_constants<G>([&](auto g) { in.x[decltype(g)::value] = x[decltype(g)::value]; });
  }
  in.dropped = d.reset != nullptr && d.reset[row] != 0;
  return in;
}

// The bias of the unit's slots that start from one.
template <class Cell>
FASTRNN_DEVICE FASTRNN_INLINE void load_bias(const float* from, int unit, int H,
                                             float (&bias)[Cell::kSlots]) {
  for_constants<Cell::kSlots>([&](auto s) {
    constexpr int slot = decltype(s)::value;
    bias[slot] = 0.0f;
    if constexpr (input_gate<Cell>(slot) < 0) {
      if (unit < H) bias[slot] = from[unit * Cell::kSlots + slot];
    }
  });
}

// What a cell carries from step to step, and the slots of the step.
template <class S, class Cell>
struct CellState {
  S h;
  float c;
  V slot[Cell::kSlots];
};

// One step of one cell. product: of the gates with the state before; bias: of the slots that need
// one.
template <class S, class Cell>
FASTRNN_DEVICE FASTRNN_INLINE void forward_cell(CellKind kind, const Inputs<Cell>& in,
                                                const float (&product)[kGateRows],
                                                const float (&bias)[Cell::kSlots],
                                                CellState<S, Cell>& cell) {
  for_constants<Cell::kSlots>([&](auto s) {
    constexpr int slot = decltype(s)::value;
    constexpr int gate = input_gate<Cell>(slot);
    float sum;
    if constexpr (gate >= 0) {
      sum = in.x[gate];
    } else {
      sum = bias[slot];
    }
    if constexpr (slot < Cell::kGates) sum = in.dropped ? sum : sum + product[slot];
    cell.slot[slot] = V::set(sum);
  });
  const V h_prev = V::set(in.dropped ? 0.0f : to_float(cell.h));
  V c = V::set(in.dropped ? 0.0f : cell.c), h;
  Cell::forward(kind, cell.slot, h_prev, c, h);
  cell.h = from_float<S>(h.v);
  cell.c = c.v;
}

// Writes a step's results of one cell.
template <class S, class Cell>
FASTRNN_DEVICE FASTRNN_INLINE void keep_cell(const ForwardRecurrence<S>& d, int row, int unit,
                                             int H, const CellState<S, Cell>& cell) {
  const int64_t at = static_cast<int64_t>(row) * H + unit;
  d.h_rows[at] = cell.h;
  if (d.gates == nullptr) return;
  Together<S, Cell::kSlots> kept;
  for_constants<Cell::kSlots>(
      [&](auto s) { kept.v[decltype(s)::value] = from_float<S>(cell.slot[decltype(s)::value].v); });
  reinterpret_cast<Together<S, Cell::kSlots>*>(d.gates)[at] = kept;
  if constexpr (Cell::kHasCell) d.c_rows[at] = cell.c;
}

// The product of the warp's tiles with the state of 8 rows: the cell's gates. Four sums side by
// side, since a product waits for the one before that adds to the same sum.
template <int kKTiles, class S>
FASTRNN_DEVICE FASTRNN_INLINE void gate_products(const uint32_t (&a)[kKTiles][4], const S* rows,
                                                 float (&gates)[kGateRows]) {
  float d[4][4] = {};
#pragma unroll
  for (int k = 0; k < kKTiles; k += 2) {
    uint32_t b[4];
    ldmatrix_x4(b, rows + k * kTileK);
    mma_16x8x16<S>(d[k % 4], a[k], b[0], b[1]);
    mma_16x8x16<S>(d[k % 4 + 1], a[k + 1], b[2], b[3]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) d[0][i] = (d[0][i] + d[1][i]) + (d[2][i] + d[3][i]);
  gates_of_cell(d[0], lane(), gates);
}

// The blocks that this lane sends its 4 units of a row to: a quarter of them, the lanes of the
// units' other cells the rest. They begin at the block's own, so that the blocks do not all send to
// the same one at a time.
template <int kCluster>
struct Destinations {
  SharedAddress base[kCluster / 4];  // of their shared memory
  FASTRNN_DEVICE FASTRNN_INLINE Destinations(const void* shared, int rank, int unit) {
#pragma unroll
    for (int i = 0; i < kCluster / 4; ++i) {
      const int to = (rank + unit * (kCluster / 4) + i) % kCluster;
      base[i] = remote(shared, static_cast<unsigned>(to));
    }
  }
};

// Sends the h of the warp's 4 units of a row, of which each of 4 lanes brings one. offset: of
// the first unit's h, and of the mbarrier, in the blocks' shared memory.
template <int kCluster>
FASTRNN_DEVICE FASTRNN_INLINE void send_state(uint16_t h, int unit,
                                              const Destinations<kCluster>& to, uint32_t offset,
                                              uint32_t mbarrier) {
  const uint32_t mine = h, other = shuffle_xor(mine, 4);
  const uint32_t pair = unit & 1 ? other | mine << 16 : mine | other << 16;
  const uint32_t others = shuffle_xor(pair, 8);
  const uint32_t low = unit & 2 ? others : pair, high = unit & 2 ? pair : others;
#pragma unroll
  for (int i = 0; i < kCluster / 4; ++i) {
    store_async(to.base[i] + offset, low, high, to.base[i] + mbarrier);
  }
}

// Copies the state before the chunk to the first buffer, h [rows][H] to [kRows][kStride].
template <class Layout, int kH, class S>
FASTRNN_DEVICE FASTRNN_INLINE void load_state(const S* h, int slice, int rows, int H, S* state) {
  for (int i = static_cast<int>(thread_index()); i < Layout::kRows * kH;
       i += Division<kH>::kThreads) {
    const int row = slice + i / kH, unit = i % kH;
    state[i / kH * Layout::kStride + unit] =
        row < rows && unit < H ? h[static_cast<int64_t>(row) * H + unit] : from_float<S>(0.0f);
  }
}

template <class S, class Cell, int kH, int kTiles>
FASTRNN_KERNEL void FASTRNN_LAUNCH_BOUNDS(Division<kH>::kThreads, (kBlocks<kH, kTiles>))
    forward_kernel(const ForwardArgs<S> args) {
#if FASTRNN_HAS_CLUSTERS
  using Layout = ForwardLayout<S, Cell, kH, kTiles>;
  constexpr int kKTiles = kH / kTileK;
  const ForwardRecurrence<S>& d = args.direction[block_index().y];
  const WarpPlace at = place_of_warp<kH>(Layout::kRows);
  const Cell4x8 mine = cell_of_lane(lane());
  const int unit = at.first_unit + mine.unit, row0 = at.slice + mine.row, H = args.H;
  StepsForward steps(args.first, args.k0, args.k1);
  const int rows = steps.next;  // of the chunk's first step: no step has more

  unsigned char* const shared = shared_memory<unsigned char>();
  S* const state = reinterpret_cast<S*>(shared + kMbarrierBytes);
  const typename Layout::Exchange arrivals = {reinterpret_cast<uint64_t*>(shared)};
  arrivals.init();
  load_state<Layout, kH>(d.h, at.slice, rows, H, state);
  uint32_t weights[kKTiles][4];
#pragma unroll
  for (int k = 0; k < kKTiles; ++k) {
    load_tile(d.w, static_cast<int64_t>(at.first_unit / kTileUnits) * kKTiles + k, weights[k]);
  }
  float bias[Cell::kSlots];
  load_bias<Cell>(d.bias, unit, H, bias);
  CellState<S, Cell> cell[kTiles];
  Inputs<Cell> in[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int row = row0 + n * kTileN;
    const bool alive = row < rows && unit < H;
    const int64_t i = static_cast<int64_t>(row) * H + unit;
    cell[n].h = alive ? d.h[i] : from_float<S>(0.0f);
    if constexpr (Cell::kHasCell) cell[n].c = alive ? d.c[i] : 0.0f;
    in[n] = load_inputs<S, Cell>(d, alive, row, unit, H);
  }
  const Destinations<Division<kH>::kCluster> to(shared, at.rank, mine.unit);
  cluster_sync();

  // From the first element of a tile: what the lane reads, and what it writes in other blocks.
  const uint32_t read = matrix_row(Layout::kStride);
  const uint32_t written = static_cast<uint32_t>(mine.row * Layout::kStride + at.first_unit);
  for (unsigned step = 0; steps.next - steps.row > at.slice; ++step) {
    const bool more = steps.after - steps.next > at.slice;
    const uint32_t from = step % 2 * Layout::kState, next = (step + 1) % 2 * Layout::kState;
#pragma unroll
    for (unsigned n = 0; n < kTiles; ++n) {
      const int row = row0 + static_cast<int>(n) * kTileN;
      if (step > 0) arrivals.wait(step - 1, n);
      float gates[kGateRows];
      gate_products(weights, state + (from + n * Layout::kTileState + read), gates);
      const bool alive = steps.row + row < steps.next && unit < H;
      if (alive) forward_cell<S, Cell>(args.kind, in[n], gates, bias, cell[n]);
      if (more) {
        const uint32_t offset = (next + n * Layout::kTileState + written) * uint32_t{sizeof(S)};
        send_state(cell[n].h.bits, mine.unit, to, kMbarrierBytes + offset,
                   arrivals.offset(step, n));
      }
      if (alive) keep_cell<S, Cell>(d, steps.row + row, unit, H, cell[n]);
      in[n] = load_inputs<S, Cell>(d, steps.next + row < steps.after && unit < H, steps.next + row,
                                   unit, H);
    }
    steps.advance();
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int row = row0 + n * kTileN;
    if (row >= rows || unit >= H) continue;
    const int64_t i = static_cast<int64_t>(row) * H + unit;
    d.h[i] = cell[n].h;
    if constexpr (Cell::kHasCell) d.c[i] = cell[n].c;
  }
  // Each block has waited for all that was sent to it; none leaves before those it sent to have.
  cluster_sync();
#endif
}

// --- Backward ------------------------------------------------------------------------------------

template <class S, class Cell, int kH, int kTiles>
struct BackwardLayout {
  using D = Division<kH>;
  static constexpr int kRows = kTiles * kTileN;  // of the slice
  // What came from the blocks: [2][tile][rank][unit][row of 8] of float.
  static constexpr int kBlockSums = D::kUnits * kTileN;
  static constexpr uint32_t kTileSums = D::kCluster * kBlockSums;
  static constexpr uint32_t kSums = kTiles * kTileSums;
  // dG of the block's units, the right operand of the product: [2][row][unit][slot].
  static constexpr int kDepth = D::kUnits * Cell::kSlots;
  static constexpr int kStride = (kDepth < 2 * kTileK ? 2 * kTileK : kDepth) + 8;
  static constexpr uint32_t kTileGradients = kTileN * kStride;
  static constexpr uint32_t kGradients = kRows * kStride;
  static constexpr size_t kGradientsAt = kMbarrierBytes + 2 * kSums * sizeof(float);
  static constexpr size_t kShared = kGradientsAt + 2 * kGradients * sizeof(S);
  using Exchange = Arrivals<kTiles, kTileSums * sizeof(float)>;
  // The product: kH rows in tiles, of which each warp has kMTiles.
  static constexpr int kMTiles = kH / kTileM / D::kWarps;
  static constexpr int kKTiles = kDepth / kTileK;
  static constexpr int kBlockTiles = D::kUnits / kTileM;  // m tiles of a block's units
};

// Where the rows of this step and the two before it begin.
class StepsBackward {
 public:
  // Starts at the last step that has more than `slice` rows; there is one. The number of rows only
  // falls from step to step.
  FASTRNN_DEVICE FASTRNN_INLINE StepsBackward(const int64_t* first, int64_t k0, int64_t k1,
                                              int slice)
      : first_(first), k_(k1 - 1), k0_(k0), origin_(first[k0]) {
    if (first[k1] - first[k1 - 1] <= slice) {
      int64_t low = k0, high = k1 - 1;
      while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        (first[middle + 1] - first[middle] > slice ? low : high) = middle;
      }
      k_ = low;
    }
    end = at(k_ + 1);
    row = at(k_);
    before = at(k_ - 1);
    before2 = at(k_ - 2);
  }
  FASTRNN_DEVICE FASTRNN_INLINE bool done() const { return k_ < k0_; }
  // Whether it is the chunk's first step: what was before it is in h0, c0.
  FASTRNN_DEVICE FASTRNN_INLINE bool first_step() const { return k_ == k0_; }
  FASTRNN_DEVICE FASTRNN_INLINE bool second_step() const { return k_ == k0_ + 1; }
  FASTRNN_DEVICE FASTRNN_INLINE void advance() {
    --k_;
    end = row;
    row = before;
    before = before2;
    before2 = at(k_ - 2);
  }
  // Rows of this step: [row, end), of the one before: [before, row), none if this is the first.
  int end, row, before, before2;

 private:
  FASTRNN_DEVICE FASTRNN_INLINE int at(int64_t k) const {
    return static_cast<int>(first_[k > k0_ ? k : k0_] - origin_);
  }
  const int64_t* first_;
  int64_t k_, k0_, origin_;
};

template <class S, class Cell>
using SlotGradients = Together<S, Cell::kSlots>;

// What a step back reads of one cell, loaded a step ahead.
template <class S, class Cell>
struct Kept {
  Together<S, Cell::kSlots> slot;
  S h_prev;
  float c_prev, dy;
  bool dropped;
};

// row: of the step in the chunk; prev: of h_prev and c_prev, in the chunk's rows or, `initial`, in
// h0 and c0.
template <class S, class Cell>
FASTRNN_DEVICE FASTRNN_INLINE Kept<S, Cell> load_kept(const BackwardRecurrence<S>& d, bool alive,
                                                      int row, int prev, bool initial, int unit,
                                                      int H) {
  Kept<S, Cell> kept = {};
  if (!alive) return kept;
  const int64_t at = static_cast<int64_t>(row) * H + unit;
  const int64_t before = static_cast<int64_t>(prev) * H + unit;
  kept.slot = reinterpret_cast<const Together<S, Cell::kSlots>*>(d.gates)[at];
  kept.h_prev = (initial ? d.h0 : d.h_rows)[before];
  if constexpr (Cell::kHasCell) kept.c_prev = (initial ? d.c0 : d.c_rows)[before];
  if (d.dy != nullptr) kept.dy = d.dy[at];
  kept.dropped = d.reset != nullptr && d.reset[row] != 0;
  return kept;
}

// The gradients that a cell hands from step to step.
struct Carried {
  float dh, dc;
};

// One step back of one cell: gradients of its slots.
template <class S, class Cell>
FASTRNN_DEVICE FASTRNN_INLINE SlotGradients<S, Cell> backward_cell(CellKind kind,
                                                                   const Kept<S, Cell>& kept,
                                                                   Carried& carried) {
  V slot[Cell::kSlots];
  for_constants<Cell::kSlots>([&](auto s) {
    slot[decltype(s)::value] = V::set(to_float(kept.slot.v[decltype(s)::value]));
  });
  V dh = V::set(carried.dh + kept.dy), dc = V::set(carried.dc);
  V h_prev = V::set(kept.dropped ? 0.0f : to_float(kept.h_prev));
  V c_prev = V::set(kept.dropped ? 0.0f : kept.c_prev);
  Cell::backward(kind, slot, h_prev, c_prev, dh, dc);
  carried.dh = kept.dropped ? 0.0f : dh.v;
  carried.dc = kept.dropped ? 0.0f : dc.v;
  SlotGradients<S, Cell> out;
  for_constants<Cell::kSlots>(
      [&](auto s) { out.v[decltype(s)::value] = from_float<S>(slot[decltype(s)::value].v); });
  return out;
}

// The sum of what the blocks sent for this lane's cell, in the order of their ranks modulo 4.
// sums: [rank][unit][row], at the lane's cell.
template <int kCluster, int kBlockCells>
FASTRNN_DEVICE FASTRNN_INLINE float sum_of_blocks(const float* sums) {
  float sum[4] = {};
#pragma unroll
  for (int r = 0; r < kCluster; ++r) sum[r % 4] += sums[r * kBlockCells];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Sends an m tile of sums, 16 units by 8 rows, of which d is the lane's part, to the block they
// belong to. After an exchange between neighbouring lanes each has 4 rows of one unit: 16 bytes.
FASTRNN_DEVICE FASTRNN_INLINE void send_sums(const float (&d)[4], SharedAddress to,
                                             SharedAddress mbarrier) {
  const bool odd = lane() % 2 != 0;
  const float first = shuffle_xor(odd ? d[0] : d[2], 1);
  const float second = shuffle_xor(odd ? d[1] : d[3], 1);
  const float v[4] = {odd ? first : d[0], odd ? second : d[1], odd ? d[2] : first,
                      odd ? d[3] : second};
  Word16 word;
#pragma unroll
  for (int i = 0; i < 4; ++i) word.w[i] = scalar::to_bits(v[i]);
  store_async(to, word, mbarrier);
}
// Where, in units and rows of a tile, as a number in [unit][row of 8].
FASTRNN_DEVICE FASTRNN_INLINE int sent_place() {
  const int unit = lane() / 4 + lane() % 2 * 8, row = lane() % 4 / 2 * 4;
  return unit * kTileN + row;
}

template <class S, class Cell, int kH, int kTiles>
struct BackwardProduct {
  using D = Division<kH>;
  using Layout = BackwardLayout<S, Cell, kH, kTiles>;
  // With few tiles of sums, two sums side by side for each.
  static constexpr int kSums = Layout::kMTiles < 4 ? 2 : 1;
  // The blocks whose units' sums the warp makes. Warps, and blocks, begin with different ones, so
  // that not all send to the same one at a time.
  static constexpr int kOwners = Layout::kMTiles / Layout::kBlockTiles;
  uint32_t weights[Layout::kMTiles][Layout::kKTiles][4];
  SharedAddress owner[kOwners];  // their shared memory
  uint32_t place;                // the lane's there, in the first tile of this block's sums
  uint32_t read;                 // what the lane reads, from the first element of the gradients

  FASTRNN_DEVICE FASTRNN_INLINE BackwardProduct(const void* packed, unsigned char* shared, int rank,
                                                int warp) {
    constexpr int kRowTiles = kH * Cell::kSlots / kTileK;
#pragma unroll
    for (int m = 0; m < Layout::kMTiles; ++m) {
      const int to = (rank + warp * kOwners + m / Layout::kBlockTiles) % D::kCluster;
      const int64_t tile = to * Layout::kBlockTiles + m % Layout::kBlockTiles;
#pragma unroll
      for (int k = 0; k < Layout::kKTiles; ++k) {
        load_tile(packed, tile * kRowTiles + rank * Layout::kKTiles + k, weights[m][k]);
      }
      owner[m / Layout::kBlockTiles] = remote(shared, static_cast<unsigned>(to));
    }
    place = kMbarrierBytes + static_cast<uint32_t>(rank * Layout::kBlockSums + sent_place()) *
                                 uint32_t{sizeof(float)};
    read = matrix_row(Layout::kStride);
  }

  // Multiplies the gradients of 8 rows, [row][unit][slot] in shared memory, and sends the sums.
  // offset: of the rows' sums from the first.
  FASTRNN_DEVICE FASTRNN_INLINE void multiply_and_send(const S* gradients, uint32_t offset,
                                                       uint32_t mbarrier) const {
    constexpr uint32_t kTileBytes = kTileM * kTileN * sizeof(float);
    float d[Layout::kMTiles][kSums][4] = {};
#pragma unroll
    for (int k = 0; k < Layout::kKTiles; k += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, gradients + read + k * kTileK);
#pragma unroll
      for (int m = 0; m < Layout::kMTiles; ++m) {
        mma_16x8x16<S>(d[m][0], weights[m][k], b[0], b[1]);
        if constexpr (Layout::kKTiles > 1) {
          mma_16x8x16<S>(d[m][kSums - 1], weights[m][k + 1], b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < Layout::kMTiles; ++m) {
      if constexpr (kSums == 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) d[m][0][i] += d[m][1][i];
      }
      const SharedAddress to = owner[m / Layout::kBlockTiles];
      const uint32_t tile = static_cast<uint32_t>(m % Layout::kBlockTiles) * kTileBytes;
      send_sums(d[m][0], to + (place + offset + tile), to + mbarrier);
    }
  }
};

// The slots that h was multiplied into; the others have no weights, but 0 * Inf would be NaN.
template <class S, class Cell>
FASTRNN_DEVICE FASTRNN_INLINE SlotGradients<S, Cell> state_slots(SlotGradients<S, Cell> all) {
  for_constants<Cell::kSlots>([&](auto s) {
    constexpr int slot = decltype(s)::value;
    if constexpr (slot >= Cell::kGates) all.v[slot] = from_float<S>(0.0f);
  });
  return all;
}

template <class S, class Cell, int kH, int kTiles>
FASTRNN_KERNEL void FASTRNN_LAUNCH_BOUNDS(Division<kH>::kThreads, (kBlocks<kH, kTiles>))
    backward_kernel(const BackwardArgs<S> args) {
#if FASTRNN_HAS_CLUSTERS
  using Layout = BackwardLayout<S, Cell, kH, kTiles>;
  const BackwardRecurrence<S>& d = args.direction[block_index().y];
  const WarpPlace at = place_of_warp<kH>(Layout::kRows);
  const int block_unit = at.warp * kTileUnits + lane() / kTileN, tile_row = lane() % kTileN;
  const int unit = at.first_unit + lane() / kTileN, row0 = at.slice + tile_row, H = args.H;
  StepsBackward steps(args.first, args.k0, args.k1, at.slice);
  const int rows = static_cast<int>(args.first[args.k0 + 1] - args.first[args.k0]);

  unsigned char* const shared = shared_memory<unsigned char>();
  const float* const sums =
      reinterpret_cast<float*>(shared + kMbarrierBytes) + block_unit * kTileN + tile_row;
  S* const gradients = reinterpret_cast<S*>(shared + Layout::kGradientsAt);
  const typename Layout::Exchange arrivals = {reinterpret_cast<uint64_t*>(shared)};
  arrivals.init();
  const BackwardProduct<S, Cell, kH, kTiles> product(d.w, shared, at.rank, at.warp);
  Carried carried[kTiles];
  Kept<S, Cell> kept[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int row = row0 + n * kTileN;
    const bool exists = row < rows && unit < H;
    const int64_t i = static_cast<int64_t>(row) * H + unit;
    carried[n] = {exists ? d.dh[i] : 0.0f, 0.0f};
    if constexpr (Cell::kHasCell) carried[n].dc = exists ? d.dc[i] : 0.0f;
    kept[n] = load_kept<S, Cell>(d, steps.row + row < steps.end && unit < H, steps.row + row,
                                 (steps.first_step() ? 0 : steps.before) + row, steps.first_step(),
                                 unit, H);
  }
  cluster_sync();

  // Bit n: the lane's cell of tile n has used the state before, so that sums come to its dh.
  unsigned open = 0;
  const auto add_sums = [&](unsigned exchange, unsigned n) {
    arrivals.wait(exchange, n);
    const float sum = sum_of_blocks<Division<kH>::kCluster, Layout::kBlockSums>(
        sums + (exchange % 2 * Layout::kSums + n * Layout::kTileSums));
    if (open >> n & 1) carried[n].dh += sum;
  };
  unsigned step = 0;
  for (; !steps.done(); ++step) {
    S* const buffer = gradients + step % 2 * Layout::kGradients;
#pragma unroll
    for (unsigned n = 0; n < kTiles; ++n) {
      const int row = row0 + static_cast<int>(n) * kTileN;
      if (step > 0) add_sums(step - 1, n);
      SlotGradients<S, Cell> out = {};
      if (steps.row + row < steps.end && unit < H) {
        open = kept[n].dropped ? open & ~(1u << n) : open | 1u << n;
        out = backward_cell<S, Cell>(args.kind, kept[n], carried[n]);
        const int64_t i = static_cast<int64_t>(steps.row + row) * H + unit;
        reinterpret_cast<SlotGradients<S, Cell>*>(d.gates)[i] = out;
      }
      S* const mine = buffer + n * Layout::kTileGradients + tile_row * Layout::kStride;
      reinterpret_cast<SlotGradients<S, Cell>*>(mine)[block_unit] = state_slots<S, Cell>(out);
      kept[n] = load_kept<S, Cell>(
          d, steps.before + row < steps.row && unit < H, steps.before + row,
          (steps.second_step() ? 0 : steps.before2) + row, steps.second_step(), unit, H);
    }
    sync_threads();
#pragma unroll
    for (unsigned n = 0; n < kTiles; ++n) {
      const uint32_t offset = step % 2 * Layout::kSums + n * Layout::kTileSums;
      product.multiply_and_send(buffer + n * Layout::kTileGradients,
                                offset * uint32_t{sizeof(float)}, arrivals.offset(step, n));
    }
    steps.advance();
  }
#pragma unroll
  for (unsigned n = 0; n < kTiles; ++n) {
    add_sums(step - 1, n);
    const int row = row0 + static_cast<int>(n) * kTileN;
    if (row >= rows || unit >= H) continue;
    const int64_t i = static_cast<int64_t>(row) * H + unit;
    d.dh[i] = carried[n].dh;
    if constexpr (Cell::kHasCell) d.dc[i] = carried[n].dc;
  }
  // Each block has waited for all that was sent to it; none leaves before those it sent to have.
  cluster_sync();
#endif
}

// --- Choosing the kernel -------------------------------------------------------------------------

constexpr int64_t kMaxH = 512;
constexpr int kMostTiles = 4;  // of 8 rows, for a cluster

// H padded to what kernels there are for.
int64_t padded(int64_t H) { return H <= 128 ? 128 : H <= 256 ? 256 : kMaxH; }

// Calls f(cell, integral_constant of the padded H).
template <class F>
auto with_kernel(const RecurrenceShape& shape, const F& f) {
  const auto with_size = [&](auto cell) {
    switch (padded(shape.H)) {
      case 128:
        return f(cell, std::integral_constant<int, 128>());
      case 256:
        return f(cell, std::integral_constant<int, 256>());
      default:
        return f(cell, std::integral_constant<int, 512>());
    }
  };
  switch (shape.kind) {
    case CellKind::kLstm:
      return with_size(AnyLstm());
    case CellKind::kGruAfter:
      return with_size(AnyGru());
    default:
      return with_size(AnyRnn());
  }
}

template <class S, class Cell, int kH, int kTiles>
struct ForwardPass {
  using Args = ForwardArgs<S>;
  using Layout = ForwardLayout<S, Cell, kH, kTiles>;
  static constexpr auto kKernel = &forward_kernel<S, Cell, kH, kTiles>;
};
template <class S, class Cell, int kH, int kTiles>
struct BackwardPass {
  using Args = BackwardArgs<S>;
  using Layout = BackwardLayout<S, Cell, kH, kTiles>;
  static constexpr auto kKernel = &backward_kernel<S, Cell, kH, kTiles>;
};

template <class Layout, int kH>
Launch launch_of(int64_t rows, int directions) {
  using D = Division<kH>;
  Launch how;
  how.grid.x = static_cast<unsigned>((rows + Layout::kRows - 1) / Layout::kRows * D::kCluster);
  how.grid.y = static_cast<unsigned>(directions);
  how.block = D::kThreads;
  how.shared = Layout::kShared;
  how.cluster = D::kCluster;
  return how;
}

// Runs all steps of the slices. The fewer rows a cluster has, the shorter its steps are; but all
// clusters should run at the same time, if there are kernels that take as many rows as that needs.
template <template <class, class, int, int> class Pass, class S, class Cell, int kH, int kTiles = 1>
void run(const typename Pass<S, Cell, kH, kTiles>::Args& args, int64_t rows, int directions,
         Stream stream) {
  using P = Pass<S, Cell, kH, kTiles>;
  const Launch how = launch_of<typename P::Layout, kH>(rows, directions);
  if constexpr (kTiles < kMostTiles) {
    using Next = Pass<S, Cell, kH, 2 * kTiles>;
    const int64_t clusters = int64_t{how.grid.x} / how.cluster * how.grid.y;
    if (clusters > 1 && clusters > resident_clusters(P::kKernel, how) &&
        resident_clusters(Next::kKernel, launch_of<typename Next::Layout, kH>(1, 1)) > 0) {
      return run<Pass, S, Cell, kH, 2 * kTiles>(args, rows, directions, stream);
    }
  }
  launch(stream, how, P::kKernel, args);
}

template <class Args, class Direction>
Args arguments(const RecurrenceShape& shape, const Steps& steps, const Direction* directions) {
  Args args = {};
  for (int d = 0; d < shape.directions; ++d) args.direction[d] = directions[d];
  args.first = steps.first;
  args.k0 = steps.k0;
  args.k1 = steps.k1;
  args.H = static_cast<int>(shape.H);
  args.kind = shape.kind;
  return args;
}

// Rows of the chunk's first step; 0: nothing to do. Kernels count a chunk's rows in 32 bits.
int64_t check_rows(const Steps& steps) {
  if (steps.k0 >= steps.k1) return 0;
  const int64_t* const first = steps.first_host;
  if (first[steps.k1] - first[steps.k0] > INT32_MAX) {
    throw Error("cluster: a chunk of more than 2^31 - 1 rows");
  }
  return first[steps.k0 + 1] - first[steps.k0];
}

// Clusters of the kernel that the device can run at once.
template <template <class, class, int, int> class Pass, class Cell, int kH>
int resident(Precision precision) {
  const auto count = [](auto s) {
    using P = Pass<decltype(s), Cell, kH, 1>;
    return resident_clusters(P::kKernel, launch_of<typename P::Layout, kH>(1, 1));
  };
  return precision == Precision::kBfloat16 ? count(Bfloat16()) : count(Float16());
}

std::string number(int64_t n) { return std::to_string(n); }

}  // namespace

std::string refuse(const RecurrenceShape& shape, const DeviceInfo& device) {
  if (shape.precision != Precision::kBfloat16 && shape.precision != Precision::kFloat16) {
    return "the weights fit into a cluster's registers only in 16 bits";
  }
  if (cell_traits(shape.kind).two_phase) {
    return "a GRU with the reset gate before the product multiplies twice a step";
  }
  if (shape.H > kMaxH) {
    return "H = " + number(shape.H) + ": the weights of at most " + number(kMaxH) +
           " units fit into a cluster's registers";
  }
  if (device.major < 9) {
    return "compute capability " + number(device.major) + "." + number(device.minor) +
           ": clusters of blocks need 9.0";
  }
  return with_kernel(shape, [&](auto cell, auto size) -> std::string {
    using Cell = decltype(cell);
    constexpr int kH = decltype(size)::value;
    if (resident<ForwardPass, Cell, kH>(shape.precision) > 0 &&
        resident<BackwardPass, Cell, kH>(shape.precision) > 0) {
      return "";
    }
    return "the device has no room for a cluster of " + number(Division<kH>::kCluster) + " blocks";
  });
}

int64_t packed_elements(const RecurrenceShape& shape, bool backward) {
  const int64_t size = padded(shape.H);
  return backward ? backward_elements(size, cell_traits(shape.kind).slots) : forward_elements(size);
}

template <class S>
void pack(const RecurrenceShape& shape, const float* w_hh, bool backward, S* out, Stream stream) {
  const CellTraits traits = cell_traits(shape.kind);
  const int64_t n = packed_elements(shape, backward), size = padded(shape.H);
  if (backward) {
    for_each(stream, n, PackBackward<S>{w_hh, shape.H, traits.gates, traits.slots, size, out});
  } else {
    for_each(stream, n, PackForward<S>{w_hh, shape.H, traits.gates, size, out});
  }
}

template <class S>
void forward(const RecurrenceShape& shape, const Steps& steps,
             const ForwardRecurrence<S>* directions, Stream stream) {
  const int64_t rows = check_rows(steps);
  if (rows == 0) return;
  const auto args = arguments<ForwardArgs<S>>(shape, steps, directions);
  with_kernel(shape, [&](auto cell, auto size) {
    run<ForwardPass, S, decltype(cell), decltype(size)::value>(args, rows, shape.directions,
                                                               stream);
  });
}

template <class S>
void backward(const RecurrenceShape& shape, const Steps& steps,
              const BackwardRecurrence<S>* directions, Stream stream) {
  const int64_t rows = check_rows(steps);
  if (rows == 0) return;
  const auto args = arguments<BackwardArgs<S>>(shape, steps, directions);
  with_kernel(shape, [&](auto cell, auto size) {
    run<BackwardPass, S, decltype(cell), decltype(size)::value>(args, rows, shape.directions,
                                                                stream);
  });
}

#define FASTRNN_INSTANTIATE(S)                                                                  \
  template void pack<S>(const RecurrenceShape&, const float*, bool, S*, Stream);                \
  template void forward<S>(const RecurrenceShape&, const Steps&, const ForwardRecurrence<S>*,   \
                           Stream);                                                             \
  template void backward<S>(const RecurrenceShape&, const Steps&, const BackwardRecurrence<S>*, \
                            Stream);
FASTRNN_INSTANTIATE(Bfloat16)
FASTRNN_INSTANTIATE(Float16)

}  // namespace cluster
}  // namespace cuda
}  // namespace fastrnn
