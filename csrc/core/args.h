// The arguments of the kernels: one plain struct per operation, nothing but sizes and pointers, so
// that the same declaration serves every instruction set and every device. Whoever fills one owns
// the memory.
//
// "Processing order": the kernels see the rows sorted by length, longest first, and the steps in
// the order in which the recurrence visits them. Row j of the processing order is the caller's row
// order[j]; step k of row j is the caller's step k, or length[j] - 1 - k in the reverse direction.
// Rows that have ended are a suffix, so step k works on the rows 0 … active[k] - 1 and a ragged
// batch costs the sum of its lengths.
#ifndef FASTRNN_CORE_ARGS_H_
#define FASTRNN_CORE_ARGS_H_

#include "core/dims.h"

namespace fastrnn {

struct Interrupt;
class Team;

// Called from the kernels every millisecond or so of work; true: stop and return. Never throws.
bool interrupt_tick(Interrupt* interrupt);

// Waits until every member of the team has arrived (core/team.h); true, for all of them: stop and
// return.
bool team_barrier(Team* team);

// What one call of a kernel works on: rows j0 … j1 - 1 of the processing order and, where a team
// shares few rows, the superblocks of hidden units that are member `rank`'s. Members meet once a
// step.
struct Share {
  int64_t j0, j1;
  int64_t part = 0;  // of the schedule's, where a slab is kept: then j0 and j1 are its bounds
  int rank = 0, size = 1;
  Team* team = nullptr;  // null: alone
};

// Some rows of a slab that lie one after the other.
struct Run {
  int64_t row, rows;
};

// Steps and rows in processing order, cut into chunks of steps. Rows of a chunk's slab are numbered
// part after part of the batch and in a part step after step, so that threads that take a part each
// write to lines far from each other's; chunk c has rows[c] of them, padded so that panels do not
// fall on the same cache sets.
struct Schedule {
  int64_t steps, batch;        // T (the longest length), B
  const int32_t* order;        // (B)   row j → the caller's row
  const int64_t* length;       // (B)   length of row j, descending
  const int32_t* active;       // (T+1) rows at work in step k; active[T] = 0
  int64_t chunks;              //
  const int64_t* chunk_begin;  // (chunks+1) first step of a chunk
  int64_t parts;               // of the batch
  const int64_t* part_begin;   // (parts+1) first row j of a part
  const int64_t* row_of_step;  // (T, parts) first row of step k, part p within its chunk
  const Run* runs;             // the rows of chunk c in runs, from the last step and row to the
  const int64_t* run_begin;    // (chunks+1) first: run_begin[c] … run_begin[c + 1] - 1
  const int64_t* rows;         // (chunks) rows of a chunk, padded
  const int64_t* rows_before;  // (chunks+1) padded rows of all chunks before
  int64_t max_steps;           // of the longest chunk
  int64_t max_rows;            // the largest of rows[]
};

// Where step t of row b lies in one of the caller's arrays, in elements from its start: at strides,
// or, where rows of different lengths stand one after the other, `starts[b] + t` strides on.
struct Layout {
  int64_t stride_t, stride_b;
  const int64_t* starts;  // (B), or null

  // Forced inline: no copy of it may be compiled with one instruction set and called from another.
  __attribute__((always_inline)) inline int64_t at(int64_t t, int64_t b) const {
    return starts != nullptr ? (starts[b] + t) * stride_t : t * stride_t + b * stride_b;
  }
};

// Inverted dropout on a layer's input: element e = (t*B + b)*features + j is kept when its hash
// says so.
struct DropoutMask {
  uint64_t key;        // hash key of this layer
  uint64_t threshold;  // kept if (splitmix64(key + e) >> 11) >= threshold; 0: no dropout
  double scale;        // 1 / (1 - p)
};

// One layer and direction, packed for the forward pass (csrc/cpu/pack.h).
template <class T>
struct PackedLayer {
  const T* w_ih;  // [S*G][I][W]
  const T* w_hh;  // [S*G][H][W]
  const T* bias;  // [S*slots][W] what a slot starts from: b_ih + b_hh, GRU's n apart
};

// The input of one layer: rows of features, or token ids that stand for one-hot rows. Strides in
// elements.
template <class T>
struct LayerInput {
  const T* x;          // (T, B, I), features contiguous; null if ids are given
  const int64_t* ids;  // (T, B); null if x is given
  Layout layout;
  DropoutMask dropout;
};

// One boolean per step and row: a new sequence begins here. Null data: none.
struct ResetMask {
  const uint8_t* data;
  Layout layout;
};

template <class T>
struct ForwardArgs {
  int64_t I, H;
  bool reverse;
  const Schedule* schedule;
  LayerInput<T> input;
  ResetMask reset;
  PackedLayer<T> weights;
  // W_hh, or a team member's part of it, is more than the second-level cache holds.
  bool fetch_w_hh;
  T* h;  // in: initial state, out: final state; blocked [S][state_rows][W], rows in processing
         // order
  T* c;  // the same for LSTM's c, else null
  int64_t state_rows;
  T* y;  // out, or null: this direction's columns of (T, B, D*H); written up to each row's length
  Layout y_layout;
  // Tape, all or none null. Chunk c of gates and x_rows starts at rows_before[c] (less that of
  // first_chunk) * panels * W; of the states at (c - first_chunk) * S * state_rows * W.
  T* gates;    // out [S*slots][rows][W]: pre-activations, then what the cell keeps
  T* chunk_h;  // out [S][state_rows][W]: the state before a chunk; those inside follow from the
               // gates
  T* chunk_c;  // the same for c
  T* x_rows;  // out [ceil(I/W)][rows][W]: the input rows in processing order, dropout applied; null
              // with ids
  int64_t first_chunk;
  Interrupt* interrupt;
};

template <class T>
struct BackwardArgs {
  int64_t I, H;
  bool reverse;
  const Schedule* schedule;
  LayerInput<T> input;  // ids and dropout only: the rows themselves are on the tape
  ResetMask reset;
  bool fetch_w_hh, fetch_w_ih;  // as in ForwardArgs
  const T* w_hh;  // [S][S*G*W][W]: row k of the product with dG, in dG's order of columns
  const T* w_ih;  // [ceil(I/W)][S*G*W][W], or null
  const T* dy;    // (T, B, D*H), this direction's columns, or null
  Layout dy_layout;
  T* dh;  // in: gradient of the final state, out: of the initial one; [S][state_rows][W]
  T* dc;
  int64_t state_rows;
  T* gates;          // in: the tape; out: gradients of the pre-activations
  const T* chunk_h;  // in, as the forward pass wrote them
  const T* chunk_c;
  T* x_rows;
  // Scratch [copies][S][max_rows][W], of which chunk c uses copy c % copies: the state that each
  // step of the chunk started from; the same for c; for a two-phase cell r * h_prev, what its n
  // gate multiplied.
  int64_t copies;
  T* h_prev;
  T* c_prev;
  T* rh;
  int64_t first_chunk;
  T* dx;  // (T, B, I), null if not wanted: out up to each row's length, or with add_dx in/out
  Layout dx_layout;
  bool add_dx;  // accumulated: there is another direction
  T* dw_ih;  // in/out, accumulated: [ceil(I/W)][S*G*W][W]; with ids [S*G][I][W]. Without ids, and
  T* dw_hh;  // dw_hh [S][S*G*W][W]: only out for the last chunk, the first that is worked on
  T* dbias;  // in/out, accumulated: [S*slots][W]
  Interrupt* interrupt;
};

// y = x Wᵀ + b over rows, the product alone (nn.Linear, the projection of a frozen head).
template <class T>
struct LinearArgs {
  int64_t rows, in, out;
  const T* x;  // (rows, in), stride_x between rows
  int64_t stride_x;
  const T* w;     // forward: [ceil(out/W)][in][W]; backward of x: [ceil(in/W)][out padded to W][W]
  const T* bias;  // [ceil(out/W)][W], or null
  T* y;           // out: (rows, out), stride_y between rows
  int64_t stride_y;
};

}  // namespace fastrnn

#endif  // FASTRNN_CORE_ARGS_H_
