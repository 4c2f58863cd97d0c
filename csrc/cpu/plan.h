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

// Parts that a batch of B rows is cut into. A part has at least 4 rows: with fewer, a row costs as
// much as the reading of the weights, which every part repeats.
int plan_row_parts(int threads, int directions, int64_t B, double multiply_adds);

// Members of a team that shares the hidden units of one layer and direction when there are too few
// rows to split: each keeps its part of W_hh in its own cache. A step must take long enough that a
// meeting (some 0.4 µs) pays, and the whole call long enough that gathering the team (some 20 µs)
// does. superblocks: what a member's part is a whole number of.
int plan_team(int threads, int64_t steps, int64_t rows, int64_t w_hh_bytes, int64_t superblocks);

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
