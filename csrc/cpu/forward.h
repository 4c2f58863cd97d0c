// One layer and direction forward over time, a chunk of steps at a time: gather the chunk's input
// rows, multiply them all with W_ih into the slab `gates`, then step by step add h W_hhᵀ in place
// and let the cell turn pre-activations into what it keeps. In training the slab lives on the tape,
// so nothing is copied; in inference it is scratch and stays in cache.
#ifndef FASTRNN_CPU_FORWARD_H_
#define FASTRNN_CPU_FORWARD_H_

#include <string.h>

#include "cells/dropout.h"
#include "core/args.h"
#include "cpu/gemm.h"
#include "cpu/pack.h"
#include "cpu/steps.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class Cell, class T>
class Forward {
  using V = Vec<T>;
  static constexpr int W = kWidth<T>;
  static constexpr int G = Cell::kGates;

 public:
  Forward(const ForwardArgs<T>& args, const Share& share)
      : a_(args),
        s_(*args.schedule),
        S_(blocks(args.H, W)),
        X_(blocks(args.I, W)),
        j0_(share.j0),
        j1_(share.j1),
        share_(share),
        mine_(blocks_of(share, S_)) {}

  // Scratch in elements: the second half of the double buffer for h, r∘h, and in inference the
  // slabs.
  int64_t scratch() const {
    int64_t n = (Cell::kTwoPhase ? 2 : 1) * S_ * spread_rows(j1_ - j0_);
    if (a_.gates == nullptr) n += (S_ * Cell::kSlots + X_) * spread_rows(most_rows());
    return n * W;
  }

  void run(int64_t chunk0, int64_t chunk1, T* scratch) {
    const int64_t nb = spread_rows(j1_ - j0_);
    const Panels<T> home = {a_.h + j0_ * W, a_.state_rows * W};
    Panels<T> cur = home, next = {scratch, nb * W};  // swapped after every step
    scratch += S_ * nb * W;
    rh_ = {scratch, nb * W};
    if (Cell::kTwoPhase) scratch += S_ * nb * W;
    c_ = {Cell::kHasCell ? a_.c + j0_ * W : nullptr, a_.state_rows * W};
    const int64_t scratch_rows = a_.gates == nullptr ? spread_rows(most_rows()) : 0;
    Ticker ticker(a_.interrupt);
    int64_t k = s_.chunk_begin[chunk0];
    for (int64_t chunk = chunk0; chunk < chunk1; ++chunk) {
      const int64_t end = s_.chunk_begin[chunk + 1];
      if (a_.gates != nullptr) {
        const int64_t before = (s_.rows_before[chunk] - s_.rows_before[a_.first_chunk]) * W;
        const int64_t stride = s_.rows[chunk] * W;
        gates_ = {a_.gates + before * S_ * Cell::kSlots, stride};
        if (a_.x_rows != nullptr) x_ = {a_.x_rows + before * X_, stride};
      } else {
        gates_ = {scratch, scratch_rows * W};
        x_ = {scratch + S_ * Cell::kSlots * scratch_rows * W, scratch_rows * W};
      }
      if (rows_at(s_, k, j0_, j1_) == 0) break;
      if (a_.gates != nullptr) save_state(chunk, k, cur);
      gather_inputs(k, end);
      if (share_.team != nullptr && team_barrier(share_.team)) return;
      project_inputs(k, end);
      for (int64_t row = 0; k < end; ++k) {
        const int64_t n = rows_at(s_, k, j0_, j1_);
        if (n == 0) break;
        if (a_.gates != nullptr) row = slab_row(s_, k, share_.part);
        if (a_.reset.data != nullptr) {
          apply_resets(k, n, cur);
          if (share_.team != nullptr && team_barrier(share_.team)) return;
        }
        if (a_.gates != nullptr) {
          step<true>(k, row, n, cur, next);
        } else {
          step<false>(k, row, n, cur, next);
        }
        if (ticker.stop(n * G * a_.H * (a_.H + a_.I), share_.team)) return;
        const int64_t go_on =
            rows_at(s_, k + 1, j0_, j1_);  // rows that end here leave their state in a_.h
        if (next.base != home.base) copy_rows(next, go_on, home, go_on, n - go_on, mine_);
        const Panels<T> swap = cur;
        cur = next;
        next = swap;
        row += n;
      }
    }
    if (cur.base != home.base) copy_rows(cur, 0, home, 0, rows_at(s_, k, j0_, j1_), mine_);
  }

 private:
  // The most rows that this block can have in a chunk.
  int64_t most_rows() const { return s_.max_steps * (j1_ - j0_); }

  // The first row of step k in the slab; in inference the slab is the share's own.
  FASTRNN_INLINE int64_t first_slab_row(int64_t k) const {
    return a_.gates == nullptr ? 0 : slab_row(s_, k, share_.part);
  }

  // Rows of the steps k … end - 1, which lie in the slab one after the other.
  FASTRNN_INLINE int64_t rows_between(int64_t k, int64_t end) const {
    int64_t n = 0;
    for (; k < end; ++k) n += rows_at(s_, k, j0_, j1_);
    return n;
  }

  // A team's members gather a part of the steps each.
  void gather_inputs(int64_t k, int64_t chunk_end) const {
    if (a_.input.ids != nullptr) return;
    const LayerInput<T>& in = a_.input;
    const int64_t steps = chunk_end - k;
    const int64_t first = k + steps * share_.rank / share_.size,
                  end = k + steps * (share_.rank + 1) / share_.size;
    for (int64_t row = first_slab_row(k); k < end; ++k) {
      const int64_t n = rows_at(s_, k, j0_, j1_);
      if (k < first) {
        row += n;
        continue;
      }
      for (int64_t j = 0; j < n; ++j, ++row) {
        const Place at = place(s_, a_.reverse, k, j0_ + j);
        put_row(in.x + in.layout.at(at.t, at.b), a_.I, x_.stride, x_.at(0, row));
        if (in.dropout.threshold != 0)
          drop(in.dropout, static_cast<uint64_t>((at.t * s_.batch + at.b) * a_.I), row);
      }
    }
  }

  void drop(const DropoutMask& mask, uint64_t element, int64_t row) const {
    for (int64_t i = 0; i < a_.I; ++i) {
      T* const x = x_.at(i / W, row) + i % W;
      *x = dropout_keeps(mask.key, element + static_cast<uint64_t>(i), mask.threshold)
               ? *x * static_cast<T>(mask.scale)
               : T(0);
    }
  }

  // gates = bias + x W_ihᵀ for all rows of the chunk; a one-hot row picks a row of the packed
  // panel.
  void project_inputs(int64_t k0, int64_t end) const {
    const int64_t row = first_slab_row(k0), n = rows_between(k0, end);
    for (int slot = 0; slot < Cell::kSlots; ++slot) {
      if (has_input(slot)) continue;
      for (int64_t s = mine_.first; s < mine_.end; ++s) {
        const T* const b = bias(s * Cell::kSlots + slot);
        const V b0 = V::load(b), b1 = V::load(b + V::N);
        T* out = gates_.at(s * Cell::kSlots + slot, row);
        for (int64_t r = 0; r < n; ++r, out += W) {
          b0.store(out);
          b1.store(out + V::N);
        }
      }
    }
    if (a_.input.ids != nullptr) return pick_inputs(k0, end);
    multiply_inputs(row, n);
  }

  // Whether a gate's input product goes to the slot: not to the part of a GRU's n that the reset
  // gate will multiply.
  static constexpr bool has_input(int slot) {
    for (int g = 0; g < G; ++g)
      if (Cell::kInputSlot[g] == slot) return true;
    return false;
  }

  // What the slab's panel starts from.
  FASTRNN_INLINE const T* bias(int64_t panel) const { return a_.weights.bias + panel * W; }

  // As many panels at once as a tile takes, for all n rows from `row` on.
  void multiply_inputs(int64_t row, int64_t n) const {
    const Right<T> w = {a_.weights.w_ih, W * W, a_.I * W};
    Ticker ticker(a_.interrupt);
    const int most = panels_at_once(n < kTileRows ? static_cast<int>(n) : kTileRows);
    const int64_t end_panel = mine_.end * G;
    for (int64_t p = mine_.first * G; p < end_panel; p += most) {
      const int together = static_cast<int>(end_panel - p < most ? end_panel - p : most);
      const Right<T> right = {w.base + p * w.panel_stride, w.group_stride, w.panel_stride};
      T* out[4];
      Start<T> start = {{}, 0};
      for (int i = 0; i < together; ++i) {
        out[i] = gates_.at(slot_panel(p + i), row);
        start.panel[i] = bias(slot_panel(p + i));
      }
      for (int64_t r = 0; r < n;) {
        const int64_t m = group_rows(n - r);
        multiply_rows<T>(m, together, state_rows(x_, row + r, a_.I), right, start, out, nullptr);
        r += m;
        for (int i = 0; i < together; ++i) out[i] += m * W;
      }
      if (ticker.stop(n * together * W * a_.I)) return;  // the steps will notice it, too
    }
  }

  // The slab's panel that gate panel p = s*G + g of the input product goes to.
  FASTRNN_INLINE int64_t slot_panel(int64_t p) const {
    return p / G * Cell::kSlots + Cell::kInputSlot[p % G];
  }

  void pick_inputs(int64_t k0, int64_t end) const {
    for (int64_t p = mine_.first * G; p < mine_.end * G; ++p) {
      const T* const w = a_.weights.w_ih + p * a_.I * W;
      const T* const b = bias(slot_panel(p));
      const V b0 = V::load(b), b1 = V::load(b + V::N);
      int64_t row = first_slab_row(k0);
      for (int64_t k = k0; k < end; ++k) {
        const int64_t n = rows_at(s_, k, j0_, j1_);
        for (int64_t j = 0; j < n; ++j, ++row) {
          const Place at = place(s_, a_.reverse, k, j0_ + j);
          const int64_t id = a_.input.ids[a_.input.layout.at(at.t, at.b)];
          T* const out = gates_.at(slot_panel(p), row);
          (b0 + V::load(w + id * W)).store(out);
          (b1 + V::load(w + id * W + V::N)).store(out + V::N);
        }
      }
    }
  }

  // The tape keeps the state before each chunk; the states inside it follow from the slots.
  void save_state(int64_t chunk, int64_t k, const Panels<T>& cur) const {
    const int64_t n = rows_at(s_, k, j0_, j1_), stride = a_.state_rows * W;
    const int64_t start = (chunk - a_.first_chunk) * S_ * stride + j0_ * W;
    copy_rows(cur, 0, Panels<T>{a_.chunk_h + start, stride}, 0, n, mine_);
    if (Cell::kHasCell) copy_rows(c_, 0, Panels<T>{a_.chunk_c + start, stride}, 0, n, mine_);
  }

  void apply_resets(int64_t k, int64_t n, const Panels<T>& h) const {
    for (int64_t j = 0; j < n; ++j) {
      if (!starts_afresh(a_, k, j0_ + j)) continue;
      zero_row(h, mine_, j);
      if (Cell::kHasCell) zero_row(c_, mine_, j);
    }
  }

  // Step k of n rows: the slab's rows from `row` on, state cur → next.
  template <bool kSave>
  FASTRNN_INLINE void step(int64_t k, int64_t row, int64_t n, const Panels<T>& cur,
                           const Panels<T>& next) const {
    if constexpr (Cell::kTwoPhase) {
      for_tiles<2>(k, row, n, 0, cur,
                   [&](int64_t s, int64_t, int64_t r, int64_t m)
                       FASTRNN_INLINE_LAMBDA { gate_phase(s, row + r, r, m, cur); });
      if (share_.team != nullptr)
        team_barrier(share_.team);  // a stop is noticed at the end of the step
      for_tiles<1>(k, row, n, 2, rh_,
                   [&](int64_t s, int64_t ahead, int64_t r, int64_t m) FASTRNN_INLINE_LAMBDA {
                     cell_phase<kSave>(k, s, ahead, row + r, r, m, cur, next);
                   });
    } else {
      for_tiles<G>(k, row, n, 0, cur,
                   [&](int64_t s, int64_t ahead, int64_t r, int64_t m) FASTRNN_INLINE_LAMBDA {
                     cell_phase<kSave>(k, s, ahead, row + r, r, m, cur, next);
                   });
    }
  }

  // For every superblock s and a few rows: add left · W_hhᵀ to COUNT gates from g0 on, then f(s,
  // how far on the one is that has s's place in what comes next, or 0, first row, rows). An odd
  // COUNT takes several superblocks together where the tile has room for more panels.
  template <int COUNT, class F>
  FASTRNN_INLINE void for_tiles(int64_t k, int64_t row, int64_t n, int g0, const Panels<T>& left,
                                const F& f) const {
    static_assert(COUNT == G || COUNT == 1 || COUNT % 2 == 0, "evenly spaced panels of weights");
    constexpr int kMost = COUNT % 2 == 1 ? 4 : 1;  // superblocks together
    const int most = panels_at_once(n < kTileRows ? static_cast<int>(n) : kTileRows);
    const int group = most < kMost ? most : kMost;
    const int64_t panel = a_.H * W, stride = COUNT == 1 ? G * panel : panel;
    const int64_t groups = (mine_.end - mine_.first + group - 1) / group;
    const auto superblock = [&](int64_t turn) FASTRNN_INLINE_LAMBDA {
      return mine_.first + in_turn(k, turn, groups) * group;
    };
    const auto weights = [&](int64_t s) FASTRNN_INLINE_LAMBDA {
      return a_.weights.w_hh + (s * G + g0) * panel;
    };
    const auto together = [&](int64_t s) FASTRNN_INLINE_LAMBDA {
      return static_cast<int>(mine_.end - s < group ? mine_.end - s : group);
    };
    const auto calls = [&](int64_t s) FASTRNN_INLINE_LAMBDA {
      return (COUNT * together(s) + most - 1) / most;
    };
    for (int64_t turn = 0; turn < groups; ++turn) {
      const int64_t s = superblock(turn);
      const int count = COUNT * together(s);
      for (int64_t r = 0; r < n;) {
        const int64_t m = group_rows(n - r);
        T* out[COUNT * kMost];
        for (int i = 0; i < count; ++i)
          out[i] =
              gates_.at((s + i / COUNT) * Cell::kSlots + Cell::kStateSlot[g0 + i % COUNT], row + r);
        const Left<T> a = state_rows(left, r, a_.H);
        // What comes next: the same units for more rows, or the next ones'.
        const int64_t s_next = r + m < n ? s : superblock(turn + 1 < groups ? turn + 1 : turn);
        const T* const after = weights(s_next) + in_turn(k, 0, calls(s_next)) * most * stride;
        for (int64_t call = 0; call < calls(s); ++call) {
          const int i = static_cast<int>(in_turn(k, call, calls(s))) * most;
          const Right<T> w = {weights(s) + i * stride, W * W, stride};
          const T* const next = call + 1 == calls(s) ? after
                                : k % 2 == 0         ? w.base + most * stride
                                                     : w.base - most * stride;
          const int panels = count - i < most ? count - i : most;
          multiply_rows<T>(m, panels, a, w, go_on<T>(panels, out + i), out + i,
                           a_.fetch_w_hh ? next : nullptr);
        }
        const int64_t ahead = turn + 1 < groups ? superblock(turn + 1) - s : 0;
        for (int i = 0; i < together(s); ++i) f(s + i, s + i + ahead < mine_.end ? ahead : 0, r, m);
        r += m;
      }
    }
  }

  FASTRNN_INLINE void gate_phase(int64_t s, int64_t row, int64_t r0, int64_t m,
                                 const Panels<T>& cur) const {
    for (int64_t r = 0; r < m; ++r)
      for (int v = 0; v < W; v += V::N) {
        T* const r_gate = gates_.at(s * Cell::kSlots, row + r) + v;
        T* const z_gate = gates_.at(s * Cell::kSlots + 1, row + r) + v;
        V rg = V::load(r_gate), zg = V::load(z_gate), rh;
        Cell::forward_gates(rg, zg, V::load(cur.at(s, r0 + r) + v), rh);
        rg.store(r_gate);
        zg.store(z_gate);
        rh.store(rh_.at(s, r0 + r) + v);
      }
  }

  // The cell on m rows of superblock s, `row` in the slab and r0 in the block. What it will write
  // next of the output is brought near: of the units `ahead` superblocks on, or where there are
  // none, of the same ones in the next step.
  template <bool kSave>
  FASTRNN_INLINE void cell_phase(int64_t k, int64_t s, int64_t ahead, int64_t row, int64_t r0,
                                 int64_t m, const Panels<T>& cur, const Panels<T>& next) const {
    const int lanes = valid_lanes(a_.H, s, W);
    const int64_t next_y = a_.reverse ? -a_.y_layout.stride_t : a_.y_layout.stride_t;
    for (int64_t r = 0; r < m; ++r) {
      T* y = nullptr;
      if (a_.y != nullptr) {
        const Place at = place(s_, a_.reverse, k, j0_ + r0 + r);
        y = a_.y + a_.y_layout.at(at.t, at.b) + s * W;
        const T* const coming = y + (ahead != 0 ? ahead * W : next_y);
        for (int i = 0; i < W; i += kLine<T>) __builtin_prefetch(coming + i, 1);
      }
      for (int v = 0; v < W; v += V::N) {
        V slot[Cell::kSlots];
#pragma GCC unroll 4
        for (int i = 0; i < Cell::kSlots; ++i)
          slot[i] = V::load(gates_.at(s * Cell::kSlots + i, row + r) + v);
        V c = Cell::kHasCell ? V::load(c_.at(s, r0 + r) + v) : V::zero();
        V h;
        Cell::forward(slot, V::load(cur.at(s, r0 + r) + v), c, h);
        if (Cell::kHasCell) c.store(c_.at(s, r0 + r) + v);
        h.store(next.at(s, r0 + r) + v);
        if (y != nullptr) {
          if (lanes - v >= V::N) {
            h.store(y + v);
          } else if (lanes > v) {
            h.store_n(y + v, lanes - v);
          }
        }
        if (kSave) {
#pragma GCC unroll 4
          for (int i = 0; i < Cell::kSlots; ++i)
            slot[i].store(gates_.at(s * Cell::kSlots + i, row + r) + v);
        }
      }
    }
  }

  const ForwardArgs<T>& a_;
  const Schedule& s_;
  const int64_t S_, X_;  // panels of hidden units and of input features
  const int64_t j0_, j1_;
  const Share share_;
  const Blocks mine_;
  Panels<T> gates_ = {}, x_ = {}, c_ = {}, rh_ = {};
};

template <class Cell, class T>
int64_t forward_scratch(const ForwardArgs<T>& a, int64_t j0, int64_t j1) {
  return Forward<Cell, T>(a, {j0, j1}).scratch();
}

template <class Cell, class T>
void forward(const ForwardArgs<T>& a, int64_t chunk0, int64_t chunk1, const Share& share,
             T* scratch) {
  Forward<Cell, T>(a, share).run(chunk0, chunk1, scratch);
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn

#endif  // FASTRNN_CPU_FORWARD_H_
