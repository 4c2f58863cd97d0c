#include "cuda/step.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "cuda/constants.h"
#include "cuda/simt.h"

namespace fastrnn {
namespace cuda {
namespace step {

namespace {

constexpr int kUnits = 16;     // hidden units of a block
constexpr int kThreads = 128;  // 8 groups of 16 threads, one a unit
constexpr int kGroups = kThreads / kUnits;
constexpr int kRows = 2;       // of a thread, so 16 of a block
constexpr int kDepth = 32;     // state elements in shared memory at a time
constexpr int kRecorded = 32;  // steps of a recorded group

// What the launches of a chunk read from device memory, so that a recorded group of steps serves
// any call: its kernels know only where this stands and how far into the group they are.
template <class S>
struct ForwardArgs {
  ForwardRecurrence<S> direction[kMaxDirections];
  S* rh[kMaxDirections];  // scratch [B][H] of a two-phase cell
  const int64_t* first;
  int64_t H, k0, k1;
  int64_t k;  // the group's first step
};

template <class S>
struct BackwardArgs {
  BackwardRecurrence<S> direction[kMaxDirections];
  S* rh_rows[kMaxDirections];
  const int64_t* first;
  int64_t H, k0, k1;
  int64_t k;  // the group's first step; it goes down from there
};

template <class A>
FASTRNN_HD scalar::Scalar<A> lane_of(A x) {
  return scalar::Scalar<A>::set(x);
}

// The rows of the states that step k starts from, and whether a reset drops that of row j.
template <class S>
struct Previous {
  const S* h;  // [active][H]
  const uint8_t* reset;

  FASTRNN_HD S at(int64_t j, int64_t unit, int64_t H) const {
    return reset != nullptr && reset[j] != 0 ? from_float<S>(0.0f) : h[j * H + unit];
  }
};

// sum[i][g] += sum over k of left(row j0 + group + i * kGroups, k) * right[k][columns of the unit's
// gates], in the order of k. left(j, k) is an element, 0 beyond the rows; right has `columns`
// columns, of which this block's begin at `column0`, COUNT a unit.
template <int COUNT, class A, class S, class Left>
FASTRNN_DEVICE void multiply(const Left& left, int64_t K, const S* right, int64_t columns,
                             int64_t column0, A (&sum)[kRows][COUNT]) {
  constexpr int kTileRows = kGroups * kRows, kColumns = kUnits * COUNT;
  A* const tile_left = shared_memory<A>();                     // [kDepth][kTileRows + 1]
  A* const tile_right = tile_left + kDepth * (kTileRows + 1);  // [kDepth][kColumns]
  const int thread = static_cast<int>(thread_index());
  const int unit = thread % kUnits, group = thread / kUnits;
  for (int64_t k0 = 0; k0 < K; k0 += kDepth) {
    const int depth = K - k0 < kDepth ? static_cast<int>(K - k0) : kDepth;
    for (int e = thread; e < kDepth * kTileRows; e += kThreads) {
      const int d = e % kDepth, row = e / kDepth;
      tile_left[d * (kTileRows + 1) + row] = d < depth ? left(row, k0 + d) : A(0);
    }
    for (int e = thread; e < kDepth * kColumns; e += kThreads) {
      const int d = e / kColumns;
      const int64_t column = column0 + e % kColumns;
      tile_right[e] = d < depth && column < columns
                          ? static_cast<A>(widen(right[(k0 + d) * columns + column]))
                          : A(0);
    }
    sync_threads();
    for (int d = 0; d < depth; ++d) {
      A w[COUNT];
#pragma unroll
      for (int g = 0; g < COUNT; ++g) w[g] = tile_right[d * kColumns + unit * COUNT + g];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const A x = tile_left[d * (kTileRows + 1) + group + i * kGroups];
#pragma unroll
        for (int g = 0; g < COUNT; ++g) sum[i][g] = scalar::fused(x, w[g], sum[i][g]);
      }
    }
    sync_threads();
  }
}

template <class A, int COUNT>
constexpr size_t shared_bytes() {
  return sizeof(A) * kDepth * (kGroups * kRows + 1 + kUnits * COUNT);
}

// What a thread works on: unit u of the rows j0 + group + i * kGroups.
struct Place {
  int64_t unit, row0;
  bool inside;  // the unit exists

  FASTRNN_DEVICE int64_t row(int i) const { return row0 + i * kGroups; }
};

FASTRNN_DEVICE inline Place place(int64_t H) {
  const int64_t unit = static_cast<int64_t>(block_index().x) * kUnits + thread_index() % kUnits;
  const int64_t row0 =
      static_cast<int64_t>(block_index().y) * kGroups * kRows + thread_index() / kUnits;
  return {unit, row0, unit < H};
}

// --- Forward
// --------------------------------------------------------------------------------------

// Step k of one direction in numbers: its first row in the chunk, its rows, the states before it.
template <class S>
struct StepRows {
  int64_t row, active;
  Previous<S> previous;
};

template <class S, class Direction>
FASTRNN_DEVICE StepRows<S> rows_of(const int64_t* first, int64_t k0, int64_t k, int64_t H,
                                   const S* state, const Direction& d) {
  const int64_t row = first[k] - first[k0];
  const S* const h = k == k0 ? state : d.h_rows + (first[k - 1] - first[k0]) * H;
  return {row, first[k + 1] - first[k], {h, d.reset == nullptr ? nullptr : d.reset + row}};
}

// Gates g0 ... g0 + COUNT - 1: their part of what each slot starts from, plus the product of
// `left` with their columns of W_hh.
template <class Cell, int kG0, int COUNT, class S, class Left>
FASTRNN_DEVICE void state_product(const ForwardRecurrence<S>& d, int64_t H, const Left& left,
                                  const Place& at, int64_t row, int64_t active,
                                  Accumulator<S> (&sum)[kRows][COUNT]) {
  using A = Accumulator<S>;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    for_constants<COUNT>([&](auto g) {
      constexpr int gate = kG0 + decltype(g)::value;
      constexpr int slot = Cell::kStateSlot[gate];
      // The slot starts from the input's product, or from the bias where no input gate goes to it.
      constexpr bool from_input = slot == Cell::kInputSlot[gate];
      sum[i][decltype(g)::value] = A(0);
      if (!at.inside || at.row(i) >= active) return;
      if constexpr (from_input) {
        sum[i][decltype(g)::value] = d.gx[((row + at.row(i)) * H + at.unit) * Cell::kGates + gate];
      } else {
        sum[i][decltype(g)::value] = d.bias[at.unit * Cell::kSlots + slot];
      }
    });
  }
  multiply<COUNT>(left, H, static_cast<const S*>(d.w) + kG0 * H * H, H * COUNT,
                  static_cast<int64_t>(block_index().x) * kUnits * COUNT, sum);
}

template <class Cell, class S>
FASTRNN_KERNEL void FASTRNN_LAUNCH_BOUNDS(kThreads, 1)
    forward_step(const ForwardArgs<S>* args, int offset) {
  using A = Accumulator<S>;
  using V = scalar::Scalar<A>;
  constexpr int G = Cell::kGates;
  const int64_t H = args->H, k = args->k + offset;
  if (k >= args->k1) return;
  const ForwardRecurrence<S> d = args->direction[block_index().z];
  const StepRows<S> now = rows_of<S>(args->first, args->k0, k, H, d.h, d);
  const Place at = place(H);
  const int64_t tile = static_cast<int64_t>(block_index().y) * kGroups * kRows;
  if (tile >= now.active) return;
  const auto left = [&](int row, int64_t unit) -> A {
    return tile + row < now.active ? static_cast<A>(widen(now.previous.at(tile + row, unit, H)))
                                   : A(0);
  };
  A sum[kRows][G];
  state_product<Cell, 0, G>(d, H, left, at, now.row, now.active, sum);
  if (!at.inside) return;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t j = at.row(i);
    if (j >= now.active) return;
    const int64_t out = (now.row + j) * H + at.unit;
    const bool dropped = now.previous.reset != nullptr && now.previous.reset[j] != 0;
    V slot[Cell::kSlots];
    for_constants<G>([&](auto g) {
      constexpr int gate = decltype(g)::value;
      constexpr int input_slot = Cell::kInputSlot[gate], state_slot = Cell::kStateSlot[gate];
      if constexpr (input_slot != state_slot) slot[input_slot] = lane_of<A>(d.gx[out * G + gate]);
    });
    for_constants<G>([&](auto g) {
      constexpr int state_slot = Cell::kStateSlot[decltype(g)::value];
      slot[state_slot] = lane_of<A>(sum[i][decltype(g)::value]);
    });
    V h, c = V::zero();
    if constexpr (Cell::kHasCell) {
      if (!dropped) c = lane_of<A>(d.c[j * H + at.unit]);
    }
    const V before = lane_of<A>(static_cast<A>(widen(now.previous.at(j, at.unit, H))));
    Cell::forward(slot, before, c, h);
    if constexpr (Cell::kHasCell) {
      d.c[j * H + at.unit] = c.v;
      if (d.c_rows != nullptr) d.c_rows[out] = c.v;
    }
    d.h_rows[out] = narrow<S>(h.v);
    if (d.gates != nullptr) {
      for_constants<Cell::kSlots>([&](auto s) {
        d.gates[out * Cell::kSlots + decltype(s)::value] = narrow<S>(slot[decltype(s)::value].v);
      });
    }
  }
}

// The GRU with the reset gate before its product, first phase: r, z and r * h. The second phase
// finds them in `gates` and `rh`.
template <class S>
FASTRNN_KERNEL void FASTRNN_LAUNCH_BOUNDS(kThreads, 1)
    forward_gates(const ForwardArgs<S>* args, int offset) {
  using A = Accumulator<S>;
  using V = scalar::Scalar<A>;
  using Cell = scalar::GruBefore;
  const int64_t H = args->H, k = args->k + offset;
  if (k >= args->k1) return;
  const ForwardRecurrence<S> d = args->direction[block_index().z];
  S* const rh_out = args->rh[block_index().z];
  const StepRows<S> now = rows_of<S>(args->first, args->k0, k, H, d.h, d);
  const Place at = place(H);
  const int64_t tile = static_cast<int64_t>(block_index().y) * kGroups * kRows;
  if (tile >= now.active) return;
  const auto left = [&](int row, int64_t unit) -> A {
    return tile + row < now.active ? static_cast<A>(widen(now.previous.at(tile + row, unit, H)))
                                   : A(0);
  };
  A sum[kRows][2];
  state_product<Cell, 0, 2>(d, H, left, at, now.row, now.active, sum);
  if (!at.inside) return;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t j = at.row(i);
    if (j >= now.active) return;
    const int64_t out = (now.row + j) * H + at.unit;
    V r = lane_of<A>(sum[i][0]), z = lane_of<A>(sum[i][1]), rh;
    Cell::forward_gates(r, z, lane_of<A>(static_cast<A>(widen(now.previous.at(j, at.unit, H)))),
                        rh);
    d.gates[out * 3] = narrow<S>(r.v);
    d.gates[out * 3 + 1] = narrow<S>(z.v);
    rh_out[j * H + at.unit] = narrow<S>(rh.v);
  }
}

template <class S>
FASTRNN_KERNEL void FASTRNN_LAUNCH_BOUNDS(kThreads, 1)
    forward_candidate(const ForwardArgs<S>* args, int offset) {
  using A = Accumulator<S>;
  using V = scalar::Scalar<A>;
  using Cell = scalar::GruBefore;
  const int64_t H = args->H, k = args->k + offset;
  if (k >= args->k1) return;
  const ForwardRecurrence<S> d = args->direction[block_index().z];
  const S* const rh = args->rh[block_index().z];
  const StepRows<S> now = rows_of<S>(args->first, args->k0, k, H, d.h, d);
  const Place at = place(H);
  const int64_t tile = static_cast<int64_t>(block_index().y) * kGroups * kRows;
  if (tile >= now.active) return;
  const auto left = [&](int row, int64_t unit) -> A {
    return tile + row < now.active ? static_cast<A>(widen(rh[(tile + row) * H + unit])) : A(0);
  };
  A sum[kRows][1];
  state_product<Cell, 2, 1>(d, H, left, at, now.row, now.active, sum);
  if (!at.inside) return;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t j = at.row(i);
    if (j >= now.active) return;
    const int64_t out = (now.row + j) * H + at.unit;
    V slot[3] = {lane_of<A>(static_cast<A>(widen(d.gates[out * 3]))),
                 lane_of<A>(static_cast<A>(widen(d.gates[out * 3 + 1]))), lane_of<A>(sum[i][0])};
    V h, c = V::zero();
    Cell::forward(slot, lane_of<A>(static_cast<A>(widen(now.previous.at(j, at.unit, H)))), c, h);
    d.h_rows[out] = narrow<S>(h.v);
    d.gates[out * 3 + 2] = narrow<S>(slot[2].v);
  }
}

// After the last step: the state of each row after its own last step, for the steps k0 ... k1 - 1.
template <class S>
struct CollectStates {
  const int64_t* first;
  int64_t k0, k1, H;
  const S* h_rows;
  S* h;

  FASTRNN_HD void operator()(int64_t i) const {
    const int64_t j = i / H, unit = i % H;
    if (j >= first[k0 + 1] - first[k0]) return;
    // The last step in which row j is at work; active falls with k.
    int64_t low = k0, high = k1;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (j < first[middle + 1] - first[middle]) {
        low = middle;
      } else {
        high = middle;
      }
    }
    h[i] = h_rows[(first[low] - first[k0] + j) * H + unit];
  }
};

// --- Backward
// -------------------------------------------------------------------------------------

// The gradient of the state before step k + 1 that comes through its gates g0 ... g0 + count - 1:
// rows of the slots' gradients times W_hh.
template <class Cell, int kG0, int COUNT, class S>
FASTRNN_DEVICE void gradient_product(const BackwardRecurrence<S>& d, int64_t H, int64_t row,
                                     int64_t active, const uint8_t* reset,
                                     Accumulator<S> (&sum)[kRows][1]) {
  using A = Accumulator<S>;
  const int64_t tile = static_cast<int64_t>(block_index().y) * kGroups * kRows;
  const auto left = [&](int r, int64_t k) -> A {
    const int64_t j = tile + r;
    if (j >= active || (reset != nullptr && reset[j] != 0)) return A(0);
    const int gate = kG0 + static_cast<int>(k % COUNT);
    int slot = 0;
    for_constants<Cell::kGates>([&](auto g) {
      constexpr int state_slot = Cell::kStateSlot[decltype(g)::value];
      if (decltype(g)::value == gate) slot = state_slot;
    });
    return static_cast<A>(widen(d.gates[((row + j) * H + k / COUNT) * Cell::kSlots + slot]));
  };
  multiply<1>(left, H * COUNT, static_cast<const S*>(d.w) + kG0 * H * H, H,
              static_cast<int64_t>(block_index().x) * kUnits, sum);
}

template <class Cell>
constexpr int kCarriedGates = Cell::kTwoPhase ? 2 : Cell::kGates;

// Step k backwards: gathers the gradient of the state after it, dy + what step k + 1 hands down,
// and turns what the cell kept into the slots' gradients. k = k0 - 1 stands for the state before
// the chunk: it only gathers.
template <class Cell, class S>
FASTRNN_KERNEL void FASTRNN_LAUNCH_BOUNDS(kThreads, 1)
    backward_step(const BackwardArgs<S>* args, int offset) {
  using A = Accumulator<S>;
  using V = scalar::Scalar<A>;
  const int64_t H = args->H, k = args->k - offset;
  if (k < args->k0 - 1) return;
  const BackwardRecurrence<S> d = args->direction[block_index().z];
  const int64_t* const first = args->first;
  const int64_t base = first[args->k0];
  const bool last = k + 1 == args->k1;  // nothing after it in this chunk
  const int64_t row = k < args->k0 ? 0 : first[k] - base;
  const int64_t next_row = last ? 0 : first[k + 1] - base;
  const int64_t next_active = last ? 0 : first[k + 2] - first[k + 1];
  const int64_t active = k < args->k0 ? next_active : first[k + 1] - first[k];
  const uint8_t* const next_reset = last || d.reset == nullptr ? nullptr : d.reset + next_row;
  const Place at = place(H);
  if (static_cast<int64_t>(block_index().y) * kGroups * kRows >= active) return;
  A sum[kRows][1];
#pragma unroll
  for (int i = 0; i < kRows; ++i) sum[i][0] = A(0);
  if (next_active > 0)
    gradient_product<Cell, 0, kCarriedGates<Cell>>(d, H, next_row, next_active, next_reset, sum);
  if (!at.inside) return;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t j = at.row(i);
    if (j >= active) return;
    const int64_t state = j * H + at.unit;
    A carried = d.dh[state];
    if (j < next_active) {
      const bool dropped = next_reset != nullptr && next_reset[j] != 0;
      carried = dropped ? A(0) : carried + sum[i][0];
      if constexpr (Cell::kHasCell) {
        if (dropped) d.dc[state] = A(0);
      }
    }
    if (k < args->k0) {
      d.dh[state] = carried;
      continue;
    }
    const int64_t out = (row + j) * H + at.unit;
    const bool dropped = d.reset != nullptr && d.reset[row + j] != 0;
    const int64_t before = k == args->k0 ? state : (first[k - 1] - base + j) * H + at.unit;
    V h_prev = V::zero(), c_prev = V::zero(), dc = V::zero();
    if (!dropped)
      h_prev = lane_of<A>(static_cast<A>(widen((k == args->k0 ? d.h0 : d.h_rows)[before])));
    if constexpr (Cell::kHasCell) {
      if (!dropped) c_prev = lane_of<A>((k == args->k0 ? d.c0 : d.c_rows)[before]);
      dc = lane_of<A>(d.dc[state]);
    }
    V slot[Cell::kSlots];
    for_constants<Cell::kSlots>([&](auto s) {
      slot[decltype(s)::value] =
          lane_of<A>(static_cast<A>(widen(d.gates[out * Cell::kSlots + decltype(s)::value])));
    });
    V dh = lane_of<A>(d.dy == nullptr ? carried : carried + d.dy[out]);
    Cell::backward(slot, h_prev, c_prev, dh, dc);
    for_constants<Cell::kSlots>([&](auto s) {
      d.gates[out * Cell::kSlots + decltype(s)::value] = narrow<S>(slot[decltype(s)::value].v);
    });
    d.dh[state] = dh.v;
    if constexpr (Cell::kHasCell) d.dc[state] = dc.v;
  }
}

// Second phase of the GRU with the reset gate before its product: through n's product to r.
template <class S>
FASTRNN_KERNEL void FASTRNN_LAUNCH_BOUNDS(kThreads, 1)
    backward_reset_gate(const BackwardArgs<S>* args, int offset) {
  using A = Accumulator<S>;
  using V = scalar::Scalar<A>;
  using Cell = scalar::GruBefore;
  const int64_t H = args->H, k = args->k - offset;
  if (k < args->k0) return;
  const BackwardRecurrence<S> d = args->direction[block_index().z];
  S* const rh_rows = args->rh_rows[block_index().z];
  const int64_t* const first = args->first;
  const int64_t base = first[args->k0], row = first[k] - base, active = first[k + 1] - first[k];
  const Place at = place(H);
  if (static_cast<int64_t>(block_index().y) * kGroups * kRows >= active) return;
  A sum[kRows][1];
#pragma unroll
  for (int i = 0; i < kRows; ++i) sum[i][0] = A(0);
  gradient_product<Cell, 2, 1>(d, H, row, active, nullptr, sum);
  if (!at.inside) return;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t j = at.row(i);
    if (j >= active) return;
    const int64_t state = j * H + at.unit, out = (row + j) * H + at.unit;
    const bool dropped = d.reset != nullptr && d.reset[row + j] != 0;
    const int64_t before = k == args->k0 ? state : (first[k - 1] - base + j) * H + at.unit;
    V h_prev = V::zero();
    if (!dropped)
      h_prev = lane_of<A>(static_cast<A>(widen((k == args->k0 ? d.h0 : d.h_rows)[before])));
    V r = lane_of<A>(static_cast<A>(widen(d.gates[out * 3])));
    V dh = lane_of<A>(d.dh[state]), rh;
    Cell::backward_reset(r, h_prev, lane_of<A>(sum[i][0]), dh, rh);
    d.gates[out * 3] = narrow<S>(r.v);
    d.dh[state] = dh.v;
    rh_rows[out] = narrow<S>(rh.v);
  }
}

// --- Launching
// ------------------------------------------------------------------------------------

// The group that was just replayed is over: the next one begins `by` steps further.
template <class Args>
struct Advance {
  Args* args;
  int64_t by;
  FASTRNN_HD void operator()(int64_t) const { args->k += by; }
};

// Recorded groups of steps, kept for the next call that has the same kernels and grid. One that is
// in use belongs to its call. A call on another stream that finds all of them still at work records
// one more, so that streams go on side by side; when there are enough, it waits for one on the
// device.
class Recordings {
 public:
  struct Recording {
    Memory args;
    Graph graph;
    const void* last_stream;  // to be compared; it may be gone
    Event used;               // after its last use
  };
  // Kernel, grid, and the size of its arguments.
  using Key = std::tuple<const void*, unsigned, unsigned, unsigned>;

  // One whose `args` may be overwritten on the stream, or null.
  std::unique_ptr<Recording> take(const Key& key, Stream stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto& free = free_[key];
    auto at = std::find_if(free.begin(), free.end(), [&](const auto& recording) {
      return recording->last_stream == stream.handle || recording->used.reached();
    });
    if (at == free.end()) {
      if (free.size() < kEnough) return nullptr;
      at = free.begin();
    }
    std::unique_ptr<Recording> recording = std::move(*at);
    free.erase(at);
    recording->used.wait(stream);
    recording->args.give_back_on(stream);  // should the call fail
    return recording;
  }
  void give_back(const Key& key, std::unique_ptr<Recording> recording) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_[key].push_back(std::move(recording));
  }

 private:
  static constexpr size_t kEnough = 4;
  std::mutex mutex_;
  std::map<Key, std::vector<std::unique_ptr<Recording>>> free_;
};

Recordings& recordings() {
  // Never destroyed: at the end of the process the device may be gone before it.
  static Recordings* const kept = new Recordings;
  return *kept;
}

// Runs `count` steps, `launch_step(stream, args, offset)` each, with args->k going by `sign` a
// step.
template <class Args, class LaunchStep>
void run_steps(Stream stream, const Args& args, int64_t count, int sign, const void* kernel,
               const Index3& grid, const LaunchStep& launch_step) {
  static_assert(sizeof(Args) <= kSmallCopy, "the host would wait");
  if (count < 2 * kRecorded) {  // not worth a recording
    const Memory device = allocate<Args>(1, stream);
    copy_to_device(device.data(), &args, sizeof(args), stream);
    for (int64_t i = 0; i < count; ++i)
      launch_step(stream, device.data<Args>(), static_cast<int>(i));
    return;
  }
  const Recordings::Key key(kernel, grid.x, grid.y, grid.z);
  std::unique_ptr<Recordings::Recording> recording = recordings().take(key, stream);
  if (recording == nullptr) {
    recording = std::make_unique<Recordings::Recording>();
    recording->args = allocate<Args>(1, stream);
    Args* const place = recording->args.template data<Args>();
    recording->graph = Graph::record([&](Stream recorded) {
      for (int i = 0; i < kRecorded; ++i) launch_step(recorded, place, i);
      for_each(recorded, 1, Advance<Args>{place, sign * kRecorded});
    });
  }
  copy_to_device(recording->args.data(), &args, sizeof(args), stream);
  for (int64_t i = 0; i < count; i += kRecorded) recording->graph.replay(stream);
  recording->last_stream = stream.handle;
  recording->used = Event(stream);
  recordings().give_back(key, std::move(recording));
}

Index3 step_grid(const RecurrenceShape& shape, int64_t rows) {
  const int64_t each = kGroups * kRows;
  return {static_cast<unsigned>((shape.H + kUnits - 1) / kUnits),
          static_cast<unsigned>((rows + each - 1) / each), static_cast<unsigned>(shape.directions)};
}

template <class... P, class... Q>
void launch_step_kernel(Stream stream, const Index3& grid, size_t shared, void (*kernel)(P...),
                        Q... args) {
  Launch how;
  how.grid = grid;
  how.block = kThreads;
  how.shared = shared;
  launch(stream, how, kernel, args...);
}

template <class Cell, class S>
void run_forward(const Index3& grid, const ForwardArgs<S>& args, Stream stream) {
  using A = Accumulator<S>;
  const int64_t count = args.k1 - args.k0;
  if constexpr (Cell::kTwoPhase) {
    const auto gates = &forward_gates<S>;
    const auto candidate = &forward_candidate<S>;
    run_steps(stream, args, count, 1, reinterpret_cast<const void*>(gates), grid,
              [&](Stream on, const ForwardArgs<S>* place, int offset) {
                launch_step_kernel(on, grid, shared_bytes<A, 2>(), gates, place, offset);
                launch_step_kernel(on, grid, shared_bytes<A, 1>(), candidate, place, offset);
              });
  } else {
    const auto kernel = &forward_step<Cell, S>;
    run_steps(stream, args, count, 1, reinterpret_cast<const void*>(kernel), grid,
              [&](Stream on, const ForwardArgs<S>* place, int offset) {
                launch_step_kernel(on, grid, shared_bytes<A, Cell::kGates>(), kernel, place,
                                   offset);
              });
  }
}

template <class Cell, class S>
void run_backward(const Index3& grid, const BackwardArgs<S>& args, Stream stream) {
  using A = Accumulator<S>;
  const int64_t count = args.k1 - args.k0 + 1;  // and the state before the chunk
  const auto kernel = &backward_step<Cell, S>;
  const auto reset_gate = &backward_reset_gate<S>;
  run_steps(stream, args, count, -1, reinterpret_cast<const void*>(kernel), grid,
            [&](Stream on, const BackwardArgs<S>* place, int offset) {
              const size_t shared = shared_bytes<A, 1>();
              launch_step_kernel(on, grid, shared, kernel, place, offset);
              if constexpr (Cell::kTwoPhase)
                launch_step_kernel(on, grid, shared, reset_gate, place, offset);
            });
}

template <class F>
void with_cell(CellKind kind, const F& f) {
  switch (kind) {
    case CellKind::kRnnTanh:
      return f(scalar::RnnTanh());
    case CellKind::kRnnRelu:
      return f(scalar::RnnRelu());
    case CellKind::kRnnSigmoid:
      return f(scalar::RnnSigmoid());
    case CellKind::kLstm:
      return f(scalar::Lstm());
    case CellKind::kGruAfter:
      return f(scalar::GruAfter());
    case CellKind::kGruBefore:
      return f(scalar::GruBefore());
  }
}

// w_hh (G*H, H) → the two packings of step.h. A two-phase cell's gates 0, 1 come first, as one
// matrix, then gate 2 as another.
template <class S>
struct Pack {
  const Accumulator<S>* w_hh;
  int64_t H;
  int gates;  // of this matrix
  int gate0;  // its first gate
  bool backward;
  S* out;

  FASTRNN_HD void operator()(int64_t i) const {
    const int64_t row = i / (backward ? H : H * gates), column = i % (backward ? H : H * gates);
    const int64_t unit = (backward ? row : column) / gates;
    const int64_t gate = gate0 + (backward ? row : column) % gates;
    const int64_t k = backward ? column : row;
    out[i] = narrow<S>(w_hh[(gate * H + unit) * H + k]);
  }
};

}  // namespace

template <class S>
void pack(const RecurrenceShape& shape, const Accumulator<S>* w_hh, bool backward, S* out,
          Stream stream) {
  const CellTraits traits = cell_traits(shape.kind);
  const int64_t square = shape.H * shape.H;
  const int together = traits.two_phase ? 2 : traits.gates;
  for_each(stream, together * square, Pack<S>{w_hh, shape.H, together, 0, backward, out});
  if (traits.two_phase)
    for_each(stream, square, Pack<S>{w_hh, shape.H, 1, 2, backward, out + 2 * square});
}

template <class S>
void forward(const RecurrenceShape& shape, const Steps& steps,
             const ForwardRecurrence<S>* directions, Stream stream) {
  const int64_t rows = steps.first_host[steps.k0 + 1] - steps.first_host[steps.k0];
  if (steps.k1 == steps.k0 || rows == 0) return;
  ForwardArgs<S> args = {};
  args.first = steps.first;
  args.H = shape.H;
  args.k0 = args.k = steps.k0;
  args.k1 = steps.k1;
  Memory rh[kMaxDirections];
  for (int d = 0; d < shape.directions; ++d) {
    args.direction[d] = directions[d];
    if (cell_traits(shape.kind).two_phase) {
      rh[d] = allocate<S>(rows * shape.H, stream);
      args.rh[d] = rh[d].data<S>();
    }
  }
  with_cell(shape.kind, [&](auto cell) {
    run_forward<decltype(cell), S>(step_grid(shape, rows), args, stream);
  });
  for (int d = 0; d < shape.directions; ++d)
    for_each(stream, rows * shape.H,
             CollectStates<S>{steps.first, steps.k0, steps.k1, shape.H, directions[d].h_rows,
                              directions[d].h});
}

template <class S>
void backward(const RecurrenceShape& shape, const Steps& steps,
              const BackwardRecurrence<S>* directions, S* const* rh_rows, Stream stream) {
  const int64_t rows = steps.first_host[steps.k0 + 1] - steps.first_host[steps.k0];
  if (steps.k1 == steps.k0 || rows == 0) return;
  BackwardArgs<S> args = {};
  args.first = steps.first;
  args.H = shape.H;
  args.k0 = steps.k0;
  args.k1 = steps.k1;
  args.k = steps.k1 - 1;
  for (int d = 0; d < shape.directions; ++d) {
    args.direction[d] = directions[d];
    args.rh_rows[d] = rh_rows == nullptr ? nullptr : rh_rows[d];
  }
  with_cell(shape.kind, [&](auto cell) {
    run_backward<decltype(cell), S>(step_grid(shape, rows), args, stream);
  });
}

#define FASTRNN_INSTANTIATE(S)                                                                  \
  template void pack<S>(const RecurrenceShape&, const Accumulator<S>*, bool, S*, Stream);       \
  template void forward<S>(const RecurrenceShape&, const Steps&, const ForwardRecurrence<S>*,   \
                           Stream);                                                             \
  template void backward<S>(const RecurrenceShape&, const Steps&, const BackwardRecurrence<S>*, \
                            S* const*, Stream);
FASTRNN_INSTANTIATE(float)
FASTRNN_INSTANTIATE(double)
FASTRNN_INSTANTIATE(Bfloat16)
FASTRNN_INSTANTIATE(Float16)

}  // namespace step
}  // namespace cuda
}  // namespace fastrnn
