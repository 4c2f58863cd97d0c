// F2. A launch runs all steps of a chunk. Each block owns 16 hidden units (8 in small batches) and
// keeps their rows of W_hh as A operands of tensor core products: as many as fit in registers, the
// rest in shared memory. A step is, for each group of up to 16 batch rows,
//
//   1. each of the 8 warps fetches its share of the previous states, every eighth 32 of the K
//      columns, straight from global memory into the B operands' registers (cuda/grid_packing.h
//      says why that needs no shuffling), and multiplies;
//   2. the 8 partial sums meet in shared memory: the one barrier of the step;
//   3. a thread for each (unit, row) adds them in a fixed order, runs the cell, and the states of 8
//      units leave as one 16-byte word.
//
// The exchange. States are exchanged through the very rows that they are to be written to. Before
// the launch all rows are filled with 0xFF. No conversion to 16 bits gives 0xFFFF (cuda/half.h:
// each NaN becomes 0x7FFF), so what is not 0xFFFF has been written, and the data is its own flag: a
// consumer loads a word again until it is there. Every word is written once, at an address that is
// new in each step; so there is nothing to reset, nothing that has to be ordered by a fence, and no
// counter. Loads and stores are relaxed, at the scope of the device: they meet in L2.
//
// Why it ends: a step waits only for words of the step before, for rows that are at work in both;
// blocks write the words of all their units, those that only pad H included; and all blocks run at
// once, because the launch is cooperative (where they cannot, it is an Error, which refuse()
// foresees). So by induction each block gets through each step. A row that has ended is neither
// written nor waited for.
//
// Rows are independent of each other, so where the device has room, several replicas of the blocks
// share the batch: group g is replica g % replicas's. The two directions are two such sets.
//
// The backward pass is the same with dG, the gradients of the slots, in place of h: K is gates * H,
// M is H. Their rows are memory of their own, since `gates` holds other values before.
#include "cuda/grid.h"

#include <algorithm>
#include <limits>
#include <string>
#include <type_traits>

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "cuda/constants.h"
#include "cuda/grid_packing.h"
#include "cuda/grid_product.h"
#include "cuda/lane.h"
#include "cuda/ptx.h"
#include "cuda/simt.h"

namespace fastrnn {
namespace cuda {
namespace grid {

namespace {

// --- What both passes have in common -------------------------------------------------------------

// Rows of this many steps ahead are brought into L2 by who will write them, so that nobody waits
// for memory to learn that they are not written yet.
constexpr int kPrefetchSteps = 3;

// The sizes of a launch.
struct Sizes {
  const int64_t* first;  // (steps + 1), on the device
  int64_t row0;          // *first
  int steps;             // of the chunk
  int H;
  CellKind kind;  // of Rnn, whose kernel serves all three
  int blocks;     // of one product
  int replicas;
  int group_rows;  // 8 or 16
  int state_rows;  // rows of the batch, in whole groups
  int stride;      // elements of an exchanged row
  int words;       // of an exchanged row
  int pairs;       // ceil(words / 4)
};

FASTRNN_HD constexpr int min_int(int a, int b) { return a < b ? a : b; }

FASTRNN_DEVICE FASTRNN_INLINE ThreadPlace this_place(const Sizes& s) {
  const int thread = static_cast<int>(thread_index()), block = static_cast<int>(block_index().x);
  return {thread % kLanes, thread / kLanes, block % s.blocks, block / s.blocks};
}

// The thread's cell: a warp has 8 units of 4 batch rows.
struct CellPlace {
  int row;      // in the group
  int m;        // unit in the block
  int unit;     // among all
  bool inside;  // the unit exists
};
template <int kUnits>
FASTRNN_DEVICE FASTRNN_INLINE CellPlace cell_place(const Sizes& s, const ThreadPlace& p) {
  constexpr int kAcross = kUnits / 8;
  const int m = p.warp % kAcross * 8 + p.lane % 8;
  const int unit = p.block * kUnits + m;
  return {p.warp / kAcross * 4 + p.lane / 8, m, unit, unit < s.H};
}
// Whether any cell of the warp is among the group's first `rows` rows.
template <int kUnits>
FASTRNN_DEVICE FASTRNN_INLINE bool warp_has_cells(const ThreadPlace& p, int rows) {
  return p.warp / (kUnits / 8) * 4 < rows;
}

// Where the cell's first partial sum stands.
template <class T>
FASTRNN_DEVICE FASTRNN_INLINE int cell_partial(const CellPlace& cell) {
  return cell.row / kTileRows * partial_rows<T>(0, 1, 0) +
         partial_place(cell.m, cell.row % kTileRows);
}

// Shared memory. What is the same for all threads, the direction's pointers and the groups of rows,
// stands there, too: in registers, where the compiler would keep it, there is no room.
template <class T, class D, class Group>
struct Shared {
  struct Same {
    D direction;
    Group groups[2];
  };
  static constexpr size_t kSameBytes = (sizeof(Same) + 127) / 128 * 128;

  Same* same;
  float* partials;  // [2][partial_floats]
  float* state;     // [state_rows][units of the block]: what the cells carry, each thread its own
  Word16* weights;  // [shared_words]

  FASTRNN_DEVICE FASTRNN_INLINE explicit Shared(int state_floats) {
    same = shared_memory<Same>();
    partials = shared_memory<float>() + kSameBytes / sizeof(float);
    state = partials + 2 * partial_floats<T>();
    weights = reinterpret_cast<Word16*>(state + state_floats);
  }
  static size_t bytes(int64_t pairs, int64_t state_floats) {
    return kSameBytes +
           sizeof(float) * (2 * partial_floats<T>() + static_cast<size_t>(state_floats)) +
           sizeof(Word16) * static_cast<size_t>(shared_words<T>(pairs));
  }
};

// What a lane multiplies of any group of rows: of the row lane / 4 of each tile, words `word`,
// `word` + 32, ...
struct LanePlace {
  int row;
  unsigned offset;  // of its first word in the row, in elements
  int words;
};
FASTRNN_DEVICE FASTRNN_INLINE LanePlace lane_place(const Sizes& s, const ThreadPlace& p) {
  const int word = p.warp * kPairWords + p.lane % 4;
  return {p.lane / 4, static_cast<unsigned>(word * kWordElements),
          s.words > word ? (s.words - word - 1) / (kWarps * kPairWords) + 1 : 0};
}

// The product with rows row0 ... row0 + rows - 1 of `from`.
template <class T, class S>
FASTRNN_DEVICE FASTRNN_INLINE void multiply_rows(const Weights<T>& weights, const Sizes& s,
                                                 const ThreadPlace& p, const LanePlace& mine,
                                                 const S* from, int row0, int rows,
                                                 float* partial) {
  from += static_cast<int64_t>(row0 + mine.row) * s.stride + mine.offset;
  const int first = mine.row < rows ? mine.words : 0;
  if (rows > kTileRows) {
    const int second = mine.row + kTileRows < rows ? mine.words : 0;
    multiply<T, S, 2>(weights, {{from, from + kTileRows * s.stride}, {first, second}}, p, partial);
  } else {
    multiply<T, S, 1>(weights, {{from}, {first}}, p, partial);
  }
}

// From 8 neighbouring lanes, each with two values in 16 bits: the low ones of all as a word in the
// first lane, the high ones in the second. All lanes of the warp call it.
FASTRNN_DEVICE FASTRNN_INLINE Word16 gather_words(uint32_t two, int lane) {
  const uint32_t other = shuffle_xor(two, 1);
  const uint32_t mine =
      lane % 2 == 0 ? (two & 0xFFFFu) | (other << 16) : (other >> 16) | (two & 0xFFFF0000u);
  return {{mine, shuffle_down(mine, 2), shuffle_down(mine, 4), shuffle_down(mine, 6)}};
}

// A row among the chunk's; that at which a step begins.
FASTRNN_DEVICE FASTRNN_INLINE int in_chunk(const Sizes& s, int64_t row) {
  return static_cast<int>(row - s.row0);
}
FASTRNN_DEVICE FASTRNN_INLINE int first_row(const Sizes& s, int step) {
  return in_chunk(s, s.first[step]);
}

// Brings row j of a step into L2, if there is one. `place`: the thread's in row 0 of the chunk.
template <class S>
FASTRNN_DEVICE FASTRNN_INLINE void prefetch_row(const Sizes& s, int step, int j, const S* place) {
  if (step < 0 || step >= s.steps) return;
  const int row = first_row(s, step) + j;
  if (row >= first_row(s, step + 1)) return;
#if defined(__CUDACC__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(
      __cvta_generic_to_global(place + static_cast<int64_t>(row) * s.stride)));
#else
  (void)place;
#endif
}

template <class S>
FASTRNN_DEVICE FASTRNN_INLINE S low_half(uint32_t two) {
  return {static_cast<uint16_t>(two & 0xFFFFu)};
}
template <class S>
FASTRNN_DEVICE FASTRNN_INLINE S high_half(uint32_t two) {
  return {static_cast<uint16_t>(two >> 16)};
}

using V = DeviceLane;

template <class Cell>
FASTRNN_DEVICE FASTRNN_INLINE void cell_forward(CellKind kind, V (&s)[Cell::kSlots], V h_prev, V& c,
                                                V& h) {
  if constexpr (Cell::kSlots > 1) {
    Cell::forward(s, h_prev, c, h);
  } else if (kind == CellKind::kRnnTanh) {
    scalar::RnnTanh::forward(s, h_prev, c, h);
  } else if (kind == CellKind::kRnnRelu) {
    scalar::RnnRelu::forward(s, h_prev, c, h);
  } else {
    scalar::RnnSigmoid::forward(s, h_prev, c, h);
  }
}
template <class Cell>
FASTRNN_DEVICE FASTRNN_INLINE void cell_backward(CellKind kind, V (&s)[Cell::kSlots], V h_prev,
                                                 V c_prev, V& dh, V& dc) {
  if constexpr (Cell::kSlots > 1) {
    Cell::backward(s, h_prev, c_prev, dh, dc);
  } else if (kind == CellKind::kRnnTanh) {
    scalar::RnnTanh::backward(s, h_prev, c_prev, dh, dc);
  } else if (kind == CellKind::kRnnRelu) {
    scalar::RnnRelu::backward(s, h_prev, c_prev, dh, dc);
  } else {
    scalar::RnnSigmoid::backward(s, h_prev, c_prev, dh, dc);
  }
}

// What goes from one step to the next past the product, and so stays with the cell's thread: h of
// the GRU (its dh), c of the LSTM (its dc).
template <class Cell>
constexpr bool carries_h() {
  return !Cell::kHasCell && Cell::kSlots > 1;
}
template <class Cell>
constexpr bool carries_state() {
  return Cell::kSlots > 1;
}

// The slots of one cell, kSlots numbers in 16 bits.
template <class S, int kSlots>
struct Slots {
  static_assert(kSlots == 1 || kSlots == 4, "the slots are one half or a whole Word8");
  uint32_t w[kSlots == 1 ? 1 : 2];

  FASTRNN_DEVICE FASTRNN_INLINE static Slots load(const S* from) {
    if constexpr (kSlots == 1) {
      return {{from->bits}};
    } else {
      const Word8 v = *reinterpret_cast<const Word8*>(from);
      return {{v.w[0], v.w[1]}};
    }
  }
  FASTRNN_DEVICE FASTRNN_INLINE static Slots of(const V (&s)[kSlots]) {
    if constexpr (kSlots == 1) {
      return {{cuda::pack<S>(s[0].v, 0.0f)}};
    } else {
      return {{cuda::pack<S>(s[0].v, s[1].v), cuda::pack<S>(s[2].v, s[3].v)}};
    }
  }
  FASTRNN_DEVICE FASTRNN_INLINE void store(S* to) const {
    if constexpr (kSlots == 1) {
      *to = low_half<S>(w[0]);
    } else {
      *reinterpret_cast<Word8*>(to) = {{w[0], w[1]}};
    }
  }
  FASTRNN_DEVICE FASTRNN_INLINE void widen_to(V (&s)[kSlots]) const {
    s[0] = V::set(widen(low_half<S>(w[0])));
    if constexpr (kSlots == 4) {
      s[1] = V::set(widen(high_half<S>(w[0])));
      s[2] = V::set(widen(low_half<S>(w[1])));
      s[3] = V::set(widen(high_half<S>(w[1])));
    }
  }
};

// --- Forward -------------------------------------------------------------------------------------

// m tiles of a block: a gate each where it has 16 units, two gates each where it has 8. Registers
// for weights: 128, with 3 m tiles 120, with 1, where no more can come, 64.
template <int kM>
struct ForwardTilingOf : Tiling<kM, 16 / kM, 4, 4> {};
template <>
struct ForwardTilingOf<3> : Tiling<3, 5, 5, 5> {};
template <>
struct ForwardTilingOf<1> : Tiling<1, 8, 4, 4> {};
template <class Cell, int kUnits>
using ForwardTiling = ForwardTilingOf<(Cell::kGates * kUnits + kTileM - 1) / kTileM>;

template <class S>
struct ForwardDirection : ForwardRecurrence<S> {
  S* exchange;       // [rows][stride]: h_rows, or where its rows are not made of words, memory of
                     // its own
  const S* initial;  // [active[k0]][stride]: the state before k0
};
template <class S>
struct ForwardLaunch {
  ForwardDirection<S> direction[kMaxDirections];
  Sizes sizes;
};

// What a block works on at a time: some rows of a step. The chunk's rows are counted from those of
// k0, a step's from its own first one.
struct ForwardGroup {
  int step, first, active;
  int next;      // active rows of the next step; 0: the chunk ends here
  int j0, rows;  // rows j0 ... j0 + rows - 1 of the step; none: all is done
  int from;      // of j0's state before the step: among those before k0 in step 0, else the chunk's
};
FASTRNN_DEVICE FASTRNN_INLINE ForwardGroup forward_start(const Sizes& s, int j_first) {
  const int active = first_row(s, 1), next = s.steps > 1 ? first_row(s, 2) - active : 0;
  return {0, 0, active, next, j_first, min_int(active - j_first, s.group_rows), j_first};
}
// What forward_next has to know beyond `at`, if there is such a step. As it is loaded: whoever asks
// for more waits for it.
FASTRNN_DEVICE FASTRNN_INLINE int64_t forward_look_ahead(const Sizes& s, const ForwardGroup& at) {
  return at.step + 2 < s.steps ? s.first[at.step + 3] : 0;
}
// Rows only become fewer from one step to the next: a replica that has none has ended.
FASTRNN_DEVICE FASTRNN_INLINE ForwardGroup forward_next(const Sizes& s, int j_first, int64_t ahead,
                                                        const ForwardGroup& at) {
  ForwardGroup to = at;
  to.j0 += s.replicas * s.group_rows;
  to.from += s.replicas * s.group_rows;
  if (to.j0 >= at.active) {
    const int first = at.first + at.active;
    const int next = at.step + 2 < s.steps ? in_chunk(s, ahead) - first - at.next : 0;
    to = {at.step + 1, first, at.next, next, j_first, 0, at.first + j_first};
  }
  to.rows = min_int(to.active - to.j0, s.group_rows);
  return to;
}

template <class T, class S>
using ForwardShared = Shared<T, ForwardDirection<S>, ForwardGroup>;

// What a cell reads from memory in a step; fetched when the step before is done.
template <class Cell>
struct ForwardInput {
  float gx[Cell::kGates];
  uint32_t reset;  // as it is loaded, too
};
template <class Cell, class S>
FASTRNN_DEVICE FASTRNN_INLINE ForwardInput<Cell> forward_input(const ForwardRecurrence<S>& d,
                                                               const Sizes& s,
                                                               const ForwardGroup& at,
                                                               const CellPlace& cell) {
  ForwardInput<Cell> in = {};
  if (!cell.inside || cell.row >= at.rows) return in;
  const int64_t row = at.first + at.j0 + cell.row;
  const float* const gx = d.gx + (row * s.H + cell.unit) * Cell::kGates;
  if constexpr (Cell::kGates == 4) {
    struct alignas(16) Four {
      float v[4];
    };
    const Four v = *reinterpret_cast<const Four*>(gx);
#pragma unroll
    for (int g = 0; g < 4; ++g) in.gx[g] = v.v[g];
  } else {
#pragma unroll
    for (int g = 0; g < Cell::kGates; ++g) in.gx[g] = gx[g];
  }
  if (d.reset != nullptr) in.reset = d.reset[row];
  return in;
}

// The gates' products of the cell, if any cell of the warp is among `rows` rows. Read first thing
// after the barrier, from an address that is known before.
template <class Cell, class T, int kUnits>
FASTRNN_DEVICE FASTRNN_INLINE void forward_products(const float* partial, const ThreadPlace& p,
                                                    const CellPlace& cell, int rows,
                                                    float (&product)[Cell::kGates]) {
  const float* const mine = partial + cell_partial<T>(cell);
#pragma unroll
  for (int g = 0; g < Cell::kGates; ++g) {
    product[g] = 0;
    if (warp_has_cells<kUnits>(p, rows))
      product[g] = add_partials<T>(mine + partial_rows<T>(0, 0, g * kUnits));
  }
}

// The pre-activations: gate g's input in its slot, plus W_hh h unless the state was dropped.
template <class Cell>
FASTRNN_DEVICE FASTRNN_INLINE void pre_activations(const ForwardInput<Cell>& in, float q_bias,
                                                   const float (&product)[Cell::kGates],
                                                   V (&slot)[Cell::kSlots]) {
  if constexpr (carries_h<Cell>()) slot[2] = V::set(q_bias);
  for_constants<Cell::kGates>([&](auto g) { slot[Cell::kInputSlot[g]] = V::set(in.gx[g]); });
  for_constants<Cell::kGates>([&](auto g) {
    V& s = slot[Cell::kStateSlot[g]];
    s = s + V::set(in.reset != 0 ? 0.0f : product[g]);
  });
}

// The cell, and where its results go. The warp's cells are in the group, some of them beyond its
// last row or the last unit: they take part in gather_words only.
template <class Cell, class S>
FASTRNN_DEVICE FASTRNN_INLINE void forward_cell(const ForwardDirection<S>& d, const Sizes& s,
                                                const ForwardGroup& at, const CellPlace& cell,
                                                int lane, const ForwardInput<Cell>& in,
                                                float q_bias, const float (&product)[Cell::kGates],
                                                float* kept) {
  const bool real = cell.inside && cell.row < at.rows;
  const int j = at.j0 + cell.row;
  const int64_t row = at.first + j;
  const int64_t of_state = static_cast<int64_t>(j) * s.H + cell.unit, e = row * s.H + cell.unit;
  S* const place = d.exchange + cell.unit;
  S* const to = place + row * s.stride;
  V slot[Cell::kSlots], c = V::zero(), h_prev = V::zero(), h;
  V& carried = Cell::kHasCell ? c : h_prev;
  if constexpr (carries_state<Cell>()) {
    if (at.step > 0) {
      carried = V::set(*kept);
    } else if (real) {
      if constexpr (Cell::kHasCell) carried = V::set(d.c[of_state]);
      if constexpr (carries_h<Cell>()) carried = V::set(widen(d.h[of_state]));
    }
    if (in.reset != 0) carried = V::zero();
  }
  pre_activations<Cell>(in, q_bias, product, slot);
  cell_forward<Cell>(s.kind, slot, h_prev, c, h);
  const uint32_t out = cuda::pack<S>(cell.inside ? h.v : 0.0f, 0.0f);
  const Word16 word = gather_words(out, lane);
  const bool stores = lane % 8 == 0 && cell.row < at.rows && cell.unit < s.words * kWordElements;
  if (stores) store_relaxed(to, word);
  if constexpr (carries_state<Cell>()) *kept = Cell::kHasCell ? c.v : widen(low_half<S>(out));
  if (real) {
    if (d.exchange != d.h_rows) d.h_rows[e] = low_half<S>(out);
    if (d.gates != nullptr) Slots<S, Cell::kSlots>::of(slot).store(d.gates + e * Cell::kSlots);
    if constexpr (Cell::kHasCell) {
      if (d.c_rows != nullptr) d.c_rows[e] = c.v;
    }
    if (j >= at.next) {  // the row's last step in this chunk
      d.h[of_state] = low_half<S>(out);
      if constexpr (Cell::kHasCell) d.c[of_state] = c.v;
    }
  }
  if (stores) prefetch_row(s, at.step + kPrefetchSteps, j, place);
}

template <class Cell, class S, int kUnits>
FASTRNN_KERNEL void FASTRNN_LAUNCH_BOUNDS(kThreads, 1) forward_steps(ForwardLaunch<S> args) {
  using T = ForwardTiling<Cell, kUnits>;
  const Sizes& s = args.sizes;
  const ThreadPlace p = this_place(s);
  const CellPlace cell = cell_place<kUnits>(s, p);
  const LanePlace mine = lane_place(s, p);
  const int j_first = p.replica * s.group_rows;
  const ForwardShared<T, S> shared(s.state_rows * kUnits);
  if (thread_index() == 0) {
    shared.same->direction = args.direction[block_index().y];
    shared.same->groups[0] = forward_start(s, j_first);
  }
  sync_threads();
  const ForwardDirection<S>& d = shared.same->direction;
  Weights<T> weights;
  load_weights<T, kUnits>(static_cast<const Word16*>(d.w), p, s.pairs, Cell::kGates, shared.weights,
                          weights);
  const float q_bias =
      carries_h<Cell>() && cell.inside ? d.bias[cell.unit * Cell::kSlots + 2] : 0.0f;

  ForwardGroup at = shared.same->groups[0];
  ForwardInput<Cell> in = forward_input<Cell>(d, s, at, cell);
  int buffer = 0;  // of the two of each kind: while some still read one, others write the other
  while (at.rows > 0) {
    float* const partial = shared.partials + buffer * partial_floats<T>();
    multiply_rows<T>(weights, s, p, mine, at.step == 0 ? d.initial : d.exchange, at.from, at.rows,
                     partial);
    sync_threads();
    float product[Cell::kGates];
    forward_products<Cell, T, kUnits>(partial, p, cell, at.rows, product);
    at = shared.same->groups[buffer];
    const int64_t ahead = forward_look_ahead(s, at);
    if (warp_has_cells<kUnits>(p, at.rows)) {
      forward_cell<Cell, S>(d, s, at, cell, p.lane, in, q_bias, product,
                            shared.state + at.j0 * kUnits + thread_index());
    }
    // What follows is done while others have not sent what the next product waits for.
    buffer ^= 1;
    at = forward_next(s, j_first, ahead, at);
    if (thread_index() == 0) shared.same->groups[buffer] = at;
    in = forward_input<Cell>(d, s, at, cell);
  }
}

// --- Backward ------------------------------------------------------------------------------------

// One m tile, 16 units; K = gates * H. Registers for weights: 128 (LSTM), 96 (GRU), 64.
template <int kGates>
struct BackwardTilingOf : Tiling<1, 4 * kGates, 4 * kGates, 4> {};
template <>
struct BackwardTilingOf<4> : Tiling<1, 16, 8, 4> {};
template <>
struct BackwardTilingOf<1> : Tiling<1, 8, 4, 4> {};
template <class Cell>
using BackwardTiling = BackwardTilingOf<Cell::kGates>;

template <class S>
struct BackwardDirection : BackwardRecurrence<S> {
  S* exchange;  // [rows][stride]: [units / 16][slot][16], the slots' gradients
};
template <class S>
struct BackwardLaunch {
  BackwardDirection<S> direction[kMaxDirections];
  Sizes sizes;
};

// What a block works on at a time. Before the step of k0 comes step -1, which has the same rows: it
// only brings their gradients to the state before. Gradients of some rows arrive from the step
// after (the others' come from outside): of `coming` rows of the step, `arriving` of the group.
struct BackwardGroup {
  int step;
  int before, first, after;  // first row of the step before, of this one, of the one after
  int coming;
  int j0, rows, arriving;  // as in ForwardGroup; after step -1 all is done
};
FASTRNN_DEVICE FASTRNN_INLINE int active_rows(const BackwardGroup& at) {
  return at.step >= 0 ? at.after - at.first : at.coming;
}
FASTRNN_DEVICE FASTRNN_INLINE BackwardGroup with_rows(const Sizes& s, BackwardGroup at) {
  at.rows = min_int(active_rows(at) - at.j0, s.group_rows);
  at.arriving = min_int(at.coming - at.j0, s.group_rows);
  return at;
}
// What backward_next has to know beyond `at`, if there is such a step.
FASTRNN_DEVICE FASTRNN_INLINE int64_t backward_look_ahead(const Sizes& s, const BackwardGroup& at) {
  return at.step > 1 ? s.first[at.step - 2] : s.row0;
}
FASTRNN_DEVICE FASTRNN_INLINE BackwardGroup backward_next(const Sizes& s, int j_first,
                                                          int64_t ahead, const BackwardGroup& at) {
  BackwardGroup to = at;
  to.j0 += s.replicas * s.group_rows;
  if (to.j0 >= active_rows(at))
    to = {at.step - 1, in_chunk(s, ahead), at.before, at.first, active_rows(at), j_first, 0, 0};
  return with_rows(s, to);
}
// The last step in which the replica has rows. Rows only become more from a step to the one before
// it.
FASTRNN_DEVICE FASTRNN_INLINE BackwardGroup backward_start(const Sizes& s, int j_first) {
  int step = s.steps - 1;
  while (step >= 0 && j_first >= first_row(s, step + 1) - first_row(s, step)) --step;
  if (step < 0) return {-2, 0, 0, 0, 0, 0, 0, 0};
  const int after = first_row(s, step + 1);
  return with_rows(s, {step, step > 0 ? first_row(s, step - 1) : 0, first_row(s, step), after,
                       step + 1 < s.steps ? first_row(s, step + 2) - after : 0, j_first, 0, 0});
}

template <class T, class S>
using BackwardShared = Shared<T, BackwardDirection<S>, BackwardGroup>;

// What a cell reads from memory in a step; fetched when the step after is done.
template <class Cell, class S>
struct BackwardInput {
  Slots<S, Cell::kSlots> slots;
  float dy;
  float prev;  // LSTM: c, GRU: h before the step
  uint32_t reset;
};
template <class Cell, class S>
FASTRNN_DEVICE FASTRNN_INLINE BackwardInput<Cell, S> backward_input(const BackwardRecurrence<S>& d,
                                                                    const Sizes& s,
                                                                    const BackwardGroup& at,
                                                                    const CellPlace& cell) {
  BackwardInput<Cell, S> in = {};
  if (at.step < 0 || !cell.inside || cell.row >= at.rows) return in;
  const int j = at.j0 + cell.row;
  const int64_t row = at.first + j, e = row * s.H + cell.unit;
  const int64_t before = static_cast<int64_t>(at.step > 0 ? at.before + j : j) * s.H + cell.unit;
  in.slots = Slots<S, Cell::kSlots>::load(d.gates + e * Cell::kSlots);
  if (d.dy != nullptr) in.dy = d.dy[e];
  if constexpr (Cell::kHasCell) in.prev = (at.step > 0 ? d.c_rows : d.c0)[before];
  if constexpr (carries_h<Cell>()) in.prev = widen((at.step > 0 ? d.h_rows : d.h0)[before]);
  if (d.reset != nullptr) in.reset = d.reset[row];
  return in;
}

// The gradients of the cell's state after the step: through the gates of the step after, unless
// that dropped the state, and past them; or, after a row's last step, from outside.
template <class Cell, class S>
FASTRNN_DEVICE FASTRNN_INLINE void arriving_gradients(const BackwardRecurrence<S>& d, int H,
                                                      const BackwardGroup& at,
                                                      const CellPlace& cell, float product,
                                                      const float* kept, V& dh, V& dc) {
  const int j = at.j0 + cell.row;
  if (cell.row < at.arriving) {
    const bool dropped = d.reset != nullptr && d.reset[at.after + j] != 0;
    dh = V::set(dropped ? 0.0f : product);
    if constexpr (carries_h<Cell>()) dh = dh + V::set(*kept);
    if constexpr (Cell::kHasCell) dc = V::set(*kept);
  } else {
    const int64_t of_state = static_cast<int64_t>(j) * H + cell.unit;
    dh = V::set(d.dh[of_state]);
    if constexpr (Cell::kHasCell) dc = V::set(d.dc[of_state]);
  }
}

// The cell of any step but -1, and where its results go.
template <class Cell, class S>
FASTRNN_DEVICE FASTRNN_INLINE void backward_cell(const BackwardDirection<S>& d, const Sizes& s,
                                                 const BackwardGroup& at, const CellPlace& cell,
                                                 const ThreadPlace& p,
                                                 const BackwardInput<Cell, S>& in, V dh, V dc,
                                                 float* kept) {
  using Out = Slots<S, Cell::kSlots>;
  const int j = at.j0 + cell.row;
  const int64_t row = at.first + j;
  V slot[Cell::kSlots];
  in.slots.widen_to(slot);
  const V prev = in.reset != 0 ? V::zero() : V::set(in.prev);
  dh = dh + V::set(in.dy);
  cell_backward<Cell>(s.kind, slot, prev, prev, dh, dc);
  if constexpr (carries_state<Cell>()) *kept = in.reset != 0 ? 0.0f : Cell::kHasCell ? dc.v : dh.v;
  const Out out = Out::of(slot);
  // The words of two slots at a time, in the first two of 8 lanes.
  S* const place =
      d.exchange + static_cast<unsigned>((p.block * Cell::kGates + p.lane % 8) * kBlockUnits +
                                         p.warp % 2 * kWordElements);
  S* const to = place + row * s.stride;
  for_constants<(Cell::kGates + 1) / 2>([&](auto i) {
    const Word16 word = gather_words(cell.inside ? out.w[i] : 0u, p.lane);
    if (p.lane % 8 < min_int(2, Cell::kGates - 2 * i) && cell.row < at.rows)
      store_relaxed(to + 2 * i * kBlockUnits, word);
  });
  if (cell.inside && cell.row < at.rows)
    out.store(d.gates + (row * s.H + cell.unit) * Cell::kSlots);
  if (p.lane % 8 < Cell::kGates && cell.row < at.rows)
    prefetch_row(s, at.step - kPrefetchSteps, j, place);
}

template <class Cell, class S>
FASTRNN_KERNEL void FASTRNN_LAUNCH_BOUNDS(kThreads, 1) backward_steps(BackwardLaunch<S> args) {
  using T = BackwardTiling<Cell>;
  const Sizes& s = args.sizes;
  const ThreadPlace p = this_place(s);
  const CellPlace cell = cell_place<kBlockUnits>(s, p);
  const LanePlace mine = lane_place(s, p);
  const int j_first = p.replica * s.group_rows;
  const BackwardShared<T, S> shared(s.state_rows * kBlockUnits);
  if (thread_index() == 0) {
    shared.same->direction = args.direction[block_index().y];
    shared.same->groups[0] = backward_start(s, j_first);
  }
  sync_threads();
  const BackwardDirection<S>& d = shared.same->direction;
  Weights<T> weights;
  load_weights<T, kBlockUnits>(static_cast<const Word16*>(d.w), p, s.pairs, 1, shared.weights,
                               weights);

  BackwardGroup at = shared.same->groups[0];
  BackwardInput<Cell, S> in = backward_input<Cell>(d, s, at, cell);
  int buffer = 0;  // as in the forward pass
  while (at.step >= -1) {
    float* const partial = shared.partials + buffer * partial_floats<T>();
    if (at.arriving > 0)
      multiply_rows<T>(weights, s, p, mine, d.exchange, at.after + at.j0, at.arriving, partial);
    sync_threads();
    float product = 0;  // first thing after the barrier, as in the forward pass
    if (warp_has_cells<kBlockUnits>(p, at.arriving))
      product = add_partials<T>(partial + cell_partial<T>(cell));
    at = shared.same->groups[buffer];
    const int64_t ahead = backward_look_ahead(s, at);
    if (warp_has_cells<kBlockUnits>(p, at.rows)) {
      V dh = V::zero(), dc = V::zero();
      float* const kept = shared.state + at.j0 * kBlockUnits + thread_index();
      const bool real = cell.inside && cell.row < at.rows;
      if (real) arriving_gradients<Cell>(d, s.H, at, cell, product, kept, dh, dc);
      if (at.step >= 0) {
        backward_cell<Cell, S>(d, s, at, cell, p, in, dh, dc, kept);
      } else if (real) {
        const int64_t of_state = static_cast<int64_t>(at.j0 + cell.row) * s.H + cell.unit;
        d.dh[of_state] = dh.v;
        if constexpr (Cell::kHasCell) d.dc[of_state] = dc.v;
      }
    }
    buffer ^= 1;
    at = backward_next(s, j_first, ahead, at);
    if (thread_index() == 0) shared.same->groups[buffer] = at;
    in = backward_input<Cell>(d, s, at, cell);
  }
}

// --- On the host ---------------------------------------------------------------------------------

// The kernels. Registers by ptxas 13.0, of 255, with 0 bytes spilled; both formats take the same:
//
//                    units   m tiles   weights   sm_80   sm_86   sm_90a   sm_100
//   forward   LSTM      16         4       128     250     252      252      254
//             LSTM       8         2       128     231     232      232      232
//             GRU       16         3       120     242     244      244      242
//             GRU        8         2       128     232     232      234      228
//             RNN       16         1        64     180     181      181      174
//   backward  LSTM      16         1       128     245     245      242      242
//             GRU       16         1        96     212     213      211      213
//             RNN       16         1        64     183     183      184      174
//
// One kernel serves the three RNNs, and each serves groups of 8 and of 16 batch rows.

// A kernel with what it takes to launch it.
template <class L>
struct Variant {
  void (*kernel)(L);
  int units;  // of a block
  size_t (*shared_bytes)(int64_t pairs, int64_t state_floats);
};

template <class Cell, class S, int kUnits>
Variant<ForwardLaunch<S>> forward_variant() {
  return {forward_steps<Cell, S, kUnits>, kUnits,
          ForwardShared<ForwardTiling<Cell, kUnits>, S>::bytes};
}
template <class Cell, class S>
Variant<BackwardLaunch<S>> backward_variant() {
  return {backward_steps<Cell, S>, kBlockUnits, BackwardShared<BackwardTiling<Cell>, S>::bytes};
}

// The kernels that could run the shape; the second with 8 units a block, or none.
template <class L>
struct Variants {
  Variant<L> of[2];
  int count;
};
template <class S>
Variants<ForwardLaunch<S>> variants(const RecurrenceShape& shape, const ForwardLaunch<S>*) {
  switch (shape.kind) {
    case CellKind::kLstm:
      return {{forward_variant<scalar::Lstm, S, 16>(), forward_variant<scalar::Lstm, S, 8>()}, 2};
    case CellKind::kGruAfter:
      return {
          {forward_variant<scalar::GruAfter, S, 16>(), forward_variant<scalar::GruAfter, S, 8>()},
          2};
    default:
      return {{forward_variant<scalar::RnnTanh, S, 16>(), {}}, 1};
  }
}
template <class S>
Variants<BackwardLaunch<S>> variants(const RecurrenceShape& shape, const BackwardLaunch<S>*) {
  switch (shape.kind) {
    case CellKind::kLstm:
      return {{backward_variant<scalar::Lstm, S>(), {}}, 1};
    case CellKind::kGruAfter:
      return {{backward_variant<scalar::GruAfter, S>(), {}}, 1};
    default:
      return {{backward_variant<scalar::RnnTanh, S>(), {}}, 1};
  }
}

// Elements of an exchanged row, in whole words: h, or the slots' gradients of whole blocks.
int64_t exchanged_elements(const RecurrenceShape& shape, bool backward) {
  return backward ? ceil_div(shape.H, kBlockUnits) * kBlockUnits * cell_traits(shape.kind).gates
                  : ceil_div(shape.H, kWordElements) * kWordElements;
}
// Pairs of k tiles.
int64_t pairs_of(const RecurrenceShape& shape, bool backward) {
  return ceil_div(exchanged_elements(shape, backward), kPairElements);
}

// How a shape is spread over the device.
template <class L>
struct Spread {
  Variant<L> variant;
  int blocks, replicas, group_rows, state_rows;
  int together;  // directions in one launch
  size_t shared;
  std::string refusal;  // not empty: it cannot be
};

// With all replicas that there are rows and multiprocessors for. One block a multiprocessor: it has
// the register file to itself, and the latency of a step would not gain by another.
template <class L>
Spread<L> spread(const RecurrenceShape& shape, const DeviceInfo& device, bool backward,
                 const Variant<L>& variant) {
  const int64_t blocks = ceil_div(shape.H, variant.units), room = device.multiprocessors;
  if (blocks > room) {
    Spread<L> out = {};
    out.refusal = std::to_string(shape.H) + " hidden units need " + std::to_string(blocks) +
                  " multiprocessors; the device has " + std::to_string(room);
    return out;
  }
  const int together = shape.directions * blocks <= room ? shape.directions : 1;
  const int64_t B = std::max<int64_t>(shape.B, 1), tiles = ceil_div(B, kTileRows);
  int64_t replicas = std::min(tiles, room / (blocks * together));
  const int group_rows = tiles > replicas ? kMaxTiles * kTileRows : kTileRows;
  const int64_t groups = ceil_div(B, group_rows);
  replicas = std::min(replicas, groups);
  const int64_t pairs = pairs_of(shape, backward);
  const size_t shared = variant.shared_bytes(pairs, groups * group_rows * variant.units);
  Spread<L> out = {variant,
                   static_cast<int>(blocks),
                   static_cast<int>(replicas),
                   group_rows,
                   static_cast<int>(groups) * group_rows,
                   together,
                   shared,
                   ""};
  if (shared > device.shared_per_block) {
    out.refusal = std::to_string(shape.H) + " hidden units and " + std::to_string(B) +
                  " rows need " + std::to_string(shared) +
                  " bytes of shared memory a block; the device has " +
                  std::to_string(device.shared_per_block);
  } else if (resident_blocks(variant.kernel, kThreads, shared) < 1) {
    out.refusal = "not one block of its kernel fits on a multiprocessor";
  }
  return out;
}

// Blocks of 8 units have shorter products, but twice as many blocks fetch every state through L2.
// By the bandwidths of an H100 that pays up to this many state elements of a replica: the LSTM
// saves 2 of 4 m tiles, the GRU 1 of 3.
int64_t most_elements_of_small_blocks(const RecurrenceShape& shape) {
  return 2048 * (cell_traits(shape.kind).gates - 2);
}

// The spread in blocks of 16 units or 8: the one with fewer launches, then that with fewer rows a
// replica, then the better size of blocks.
template <class L>
Spread<L> best_spread(const RecurrenceShape& shape, const DeviceInfo& device, bool backward) {
  const Variants<L> choice = variants(shape, static_cast<const L*>(nullptr));
  const Spread<L> large = spread(shape, device, backward, choice.of[0]);
  if (choice.count < 2 || !large.refusal.empty()) return large;
  const Spread<L> small = spread(shape, device, backward, choice.of[1]);
  if (!small.refusal.empty() || small.together < large.together) return large;
  const auto rows = [&](const Spread<L>& a) {
    return std::min(shape.B, ceil_div(ceil_div(shape.B, a.group_rows), a.replicas) * a.group_rows);
  };
  const bool pays =
      rows(small) <= rows(large) && rows(small) * shape.H <= most_elements_of_small_blocks(shape);
  return pays ? small : large;
}

template <class S>
std::string refuse_stored(const RecurrenceShape& shape, const DeviceInfo& device) {
  const std::string forward = best_spread<ForwardLaunch<S>>(shape, device, false).refusal;
  return !forward.empty() ? forward : best_spread<BackwardLaunch<S>>(shape, device, true).refusal;
}

// Sets up and launches all directions. `direction(d)` is the kernel's argument for direction d.
template <class L, class F>
void launch_spread(const RecurrenceShape& shape, const Steps& steps, bool backward, Stream stream,
                   const F& direction) {
  const Spread<L> plan = best_spread<L>(shape, device_info(), backward);
  if (!plan.refusal.empty()) throw Error("grid kernels: " + plan.refusal);
  const int64_t elements = exchanged_elements(shape, backward);
  L args = {};
  args.sizes = {steps.first + steps.k0,
                steps.first_host[steps.k0],
                static_cast<int>(steps.k1 - steps.k0),
                static_cast<int>(shape.H),
                shape.kind,
                plan.blocks,
                plan.replicas,
                plan.group_rows,
                plan.state_rows,
                static_cast<int>(elements),
                static_cast<int>(elements / kWordElements),
                static_cast<int>(pairs_of(shape, backward))};
  Launch how;
  how.grid = {static_cast<unsigned>(plan.blocks * plan.replicas),
              static_cast<unsigned>(plan.together), 1};
  how.block = kThreads;
  how.shared = plan.shared;
  how.cooperative = true;
  for (int d = 0; d < shape.directions; d += plan.together) {
    for (int i = 0; i < plan.together; ++i) args.direction[i] = direction(d + i);
    launch(stream, how, plan.variant.kernel, args);
  }
}

// Rows of the chunk, which kernels count in int.
int64_t rows_of(const RecurrenceShape& shape, const Steps& steps) {
  const int64_t* const first = steps.first_host;
  const int64_t rows = first[steps.k1] - first[steps.k0];
  if (rows > std::numeric_limits<int>::max()) throw Error("grid kernels: too many rows in a chunk");
  if (rows > 0 && first[steps.k0 + 1] - first[steps.k0] > shape.B)
    throw Error("grid kernels: more rows in a step than the shape says");
  return rows;
}

// The state before the first step as exchanged rows: in whole words, and each NaN the one that is
// not taken for an unwritten word.
template <class S>
struct CopyInitial {
  const S* h;  // in [rows][H]
  int64_t H, stride;
  S* out;  // out [rows][stride]
  FASTRNN_DEVICE void operator()(int64_t i) const {
    const int64_t unit = i % stride;
    out[i] = from_float<S>(unit < H ? to_float(h[i / stride * H + unit]) : 0.0f);
  }
};

// The packed element from W_hh.
template <class S>
struct Pack {
  const float* w;  // in (gates * H, H)
  int64_t H, pairs;
  int gates;
  bool backward;
  S* out;
  FASTRNN_DEVICE void operator()(int64_t i) const {
    const PackedPlace at = packed_place(i, backward ? 1 : gates, pairs);
    const WeightPlace in = backward ? backward_place(at, gates) : forward_place(at);
    out[i] =
        from_float<S>(in.unit < H && in.from < H ? w[(in.gate * H + in.unit) * H + in.from] : 0.0f);
  }
};

}  // namespace

std::string refuse(const RecurrenceShape& shape, const DeviceInfo& device) {
  if (shape.kind == CellKind::kGruBefore)
    return "no kernel for the GRU with the reset gate before the product";
  if (shape.precision != Precision::kBfloat16 && shape.precision != Precision::kFloat16)
    return "it computes in 16 bits";
  if (device.major < 8) return "it needs compute capability 8.0";
  return shape.precision == Precision::kBfloat16 ? refuse_stored<Bfloat16>(shape, device)
                                                 : refuse_stored<Float16>(shape, device);
}

int64_t packed_elements(const RecurrenceShape& shape, bool backward) {
  const int64_t m_tiles = backward ? 1 : cell_traits(shape.kind).gates;
  return ceil_div(shape.H, kBlockUnits) * pairs_of(shape, backward) * m_tiles * 2 * kTileElements;
}

template <class S>
void pack(const RecurrenceShape& shape, const float* w_hh, bool backward, S* out, Stream stream) {
  for_each(stream, packed_elements(shape, backward),
           Pack<S>{w_hh, shape.H, pairs_of(shape, backward), cell_traits(shape.kind).gates,
                   backward, out});
}

template <class S>
void forward(const RecurrenceShape& shape, const Steps& steps,
             const ForwardRecurrence<S>* directions, Stream stream) {
  const int64_t rows = rows_of(shape, steps), stride = exchanged_elements(shape, false);
  if (rows == 0) return;
  const int64_t active = steps.first_host[steps.k0 + 1] - steps.first_host[steps.k0];
  Memory initial[kMaxDirections], exchange[kMaxDirections];
  launch_spread<ForwardLaunch<S>>(shape, steps, false, stream, [&](int d) {
    ForwardDirection<S> out = {};
    static_cast<ForwardRecurrence<S>&>(out) = directions[d];
    initial[d] = allocate<S>(active * stride, stream);
    for_each(stream, active * stride,
             CopyInitial<S>{out.h, shape.H, stride, initial[d].template data<S>()});
    out.initial = initial[d].template data<S>();
    out.exchange = out.h_rows;
    if (stride != shape.H || reinterpret_cast<uintptr_t>(out.h_rows) % sizeof(Word16) != 0) {
      exchange[d] = allocate<S>(rows * stride, stream);
      out.exchange = exchange[d].template data<S>();
    }
    fill_bytes(out.exchange, 0xFF, static_cast<size_t>(rows * stride) * sizeof(S), stream);
    return out;
  });
}

template <class S>
void backward(const RecurrenceShape& shape, const Steps& steps,
              const BackwardRecurrence<S>* directions, Stream stream) {
  const int64_t rows = rows_of(shape, steps), stride = exchanged_elements(shape, true);
  if (rows == 0) return;
  Memory exchange[kMaxDirections];
  launch_spread<BackwardLaunch<S>>(shape, steps, true, stream, [&](int d) {
    BackwardDirection<S> out = {};
    static_cast<BackwardRecurrence<S>&>(out) = directions[d];
    exchange[d] = allocate<S>(rows * stride, stream);
    out.exchange = exchange[d].template data<S>();
    fill_bytes(out.exchange, 0xFF, exchange[d].bytes(), stream);
    return out;
  });
}

#define FASTRNN_INSTANCES(S)                                                                    \
  template void pack<S>(const RecurrenceShape&, const float*, bool, S*, Stream);                \
  template void forward<S>(const RecurrenceShape&, const Steps&, const ForwardRecurrence<S>*,   \
                           Stream);                                                             \
  template void backward<S>(const RecurrenceShape&, const Steps&, const BackwardRecurrence<S>*, \
                            Stream);
FASTRNN_INSTANCES(Bfloat16)
FASTRNN_INSTANCES(Float16)
#undef FASTRNN_INSTANCES

}  // namespace grid
}  // namespace cuda
}  // namespace fastrnn
