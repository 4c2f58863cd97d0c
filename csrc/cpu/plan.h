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
// through the steps of a chunk and wait for nobody, or (then row_parts is 1) a team of `team`
// threads that share the hidden units and meet after every step.
struct Division {
  int row_parts;
  int team;
  double patience_us = 0;  // how long a team is waited for: what it saves beside one thread, or 100
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

// Whether so many bytes of weights are more than stays in a core's second-level cache, beside
// whatever else a step touches.
constexpr bool beyond_cache(int64_t bytes, int64_t l2_bytes) { return 4 * bytes > 3 * l2_bytes; }

// A part has at least 4 rows: with fewer, a row costs as much as the reading of the weights, which
// every part repeats. A team's members read only their share of the weights, and keep it in a cache
// that the whole would not fit; against that stand the meetings (0.1 µs a member) and
// that every step waits for the slowest. Where the rows cannot be split, a team must also save more
// than it costs to gather (some 20 µs).
Division plan_division(int threads, const LayerCost& cost);

// Row parts for passes over at least so many chunks of steps, of which `parts` would run at
// once: half as many again, where they keep at least 5 rows each, which is nearly a tile, and there
// are chunks enough that uneven turns at the end cost little (6: 5 %), so that a thread that is
// slower than the others does less.
int plan_turns(int parts, int64_t rows, int64_t chunks);

// Whether several layers should run at once, each a chunk of steps behind the one below: when there
// are too few rows to split, both directions do not already keep two threads busy, and the weights
// of one layer, W_ih and W_hh, stay in a core's cache: a thread that goes from layer to layer reads
// them anew for every chunk, where a team would read them once a call. `cost`: of a layer above the
// first; multiply_adds those of all layers.
bool plan_wavefront(int threads, int layers, const LayerCost& cost);

// Rows of a wavefront's chunk: in general 16 chunks, so that the layers overlap most of the time,
// and 8 where the weights of all layers (weight_bytes) are more than one core's cache holds, since
// a thread that goes from layer to layer then reads them anew for every chunk. A chunk has at least
// 8 steps.
int64_t plan_wave_rows(int64_t steps, int64_t rows, int64_t weight_bytes, int64_t l2_bytes);

// Rows of a chunk of steps in training: two panels of it should stay near the first-level cache.
constexpr int64_t kTrainingChunkRows = 256;

// The same in inference, where the slab of pre-activations should take no more than half of the
// second-level cache, and yet W_ih, which is read once a chunk, should not cost more than the slab:
// 32 KB of it a row.
int64_t plan_chunk_rows(int64_t slab_row_bytes, int64_t w_ih_bytes, int64_t l2_bytes);

}  // namespace fastrnn

#endif  // FASTRNN_CPU_PLAN_H_
