// The cost model: how a call is split. One place, no state, so that every choice can be tested and
// explained. No choice made here changes a bit of the result.
#ifndef FASTRNN_CPU_PLAN_H_
#define FASTRNN_CPU_PLAN_H_

#include <cstdint>

#include "core/dims.h"

namespace fastrnn {

// Threads that a region of `multiply_adds` is worth: waking one costs some microseconds, so a
// thread gets at least 2^17 of them (about 5 µs of arithmetic).
int plan_threads(int threads, double multiply_adds);

// How one layer's recurrence is shared: row_parts tasks per direction that each take some rows
// through all steps and wait for nobody, or (then row_parts is 1) a team of `team` threads that
// share the hidden units and meet after every step.
struct Division {
  int row_parts;
  int team;
};

// What plan_division weighs. w_hh_bytes: the packed recurrent weights of a direction; superblocks:
// what a team member's part is a whole number of; multiply_adds: of the whole call, all directions;
// l2_bytes: of one core's second-level cache.
struct LayerCost {
  int directions;
  int64_t steps, rows, w_hh_bytes, superblocks;
  double multiply_adds;
  int64_t l2_bytes;
};

// A part has at least 4 rows: with fewer, a row costs as much as the reading of the weights, which
// every part repeats. A team's members read only their share of the weights, and keep it in a cache
// that the whole would not fit; against that stand the meetings (some 0.4 µs) and that every step
// waits for the slowest. A team must also save more than it costs to gather (some 20 µs).
Division plan_division(int threads, const LayerCost& cost);

// Row parts for a forward pass of so many chunks of steps, of which `parts` would run at once: half
// as many again, where they keep at least 8 rows each and take turns often enough, so that a thread
// that is slower than the others can do less.
int plan_turns(int parts, int64_t rows, int64_t chunks);

// Whether several layers should run at once, each a chunk of steps behind the one below: when there
// are too few rows to split and both directions do not already keep two threads busy. recurrent:
// G*H*H.
bool plan_wavefront(int threads, int layers, int directions, int64_t steps, int64_t rows,
                    int64_t recurrent);

// Rows of a wavefront's chunk: some 16 chunks, so that the layers overlap most of the time.
int64_t plan_wave_rows(int64_t steps, int64_t rows);

// Rows of a chunk of steps. In inference the slab of pre-activations should stay in the
// second-level cache; in training two panels of a chunk should stay in the first.
int64_t plan_chunk_rows(int64_t slab_columns, int element_size, bool training);

}  // namespace fastrnn

#endif  // FASTRNN_CPU_PLAN_H_
