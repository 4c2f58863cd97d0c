#include "cpu/plan.h"

#include <algorithm>

namespace fastrnn {

int plan_threads(int threads, double multiply_adds) {
  const double worth = multiply_adds / 131072.0;
  return worth < 2 ? 1 : static_cast<int>(std::min<double>(threads, worth));
}

int plan_row_parts(int threads, int directions, int64_t B, double multiply_adds) {
  const int useful = plan_threads(threads, multiply_adds);
  const int64_t per_direction = (useful + directions - 1) / directions;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(per_direction, B / 4)));
}

int plan_team(int threads, int64_t steps, int64_t rows, int64_t w_hh_bytes, int64_t superblocks) {
  // A step alone: the weights come from the second-level cache at some 64 KB a µs, and are used
  // `rows` times.
  const double step_us =
      static_cast<double>(w_hh_bytes) / 65536.0 * std::max(1.0, static_cast<double>(rows) / 3.0);
  int best = 1;
  double best_us = step_us;
  for (int members = 2; members <= threads && members <= superblocks; ++members) {
    const double largest = static_cast<double>((superblocks + members - 1) / members) /
                           static_cast<double>(superblocks);
    const double us = step_us * largest + 0.3 + 0.1 * members;
    if (us < 0.9 * best_us) {
      best = members;
      best_us = us;
    }
  }
  return (step_us - best_us) * static_cast<double>(steps) > 20.0 ? best : 1;
}

bool plan_wavefront(int threads, int layers, int directions, int64_t steps, int64_t rows,
                    int64_t recurrent) {
  if (threads < 2 || layers < 2 || directions > 1 || rows >= 8 || steps < 16) return false;
  const double work = static_cast<double>(steps * rows) * static_cast<double>(recurrent) * layers;
  return plan_threads(threads, work) > 1;
}

int64_t plan_wave_rows(int64_t steps, int64_t rows) {
  return std::clamp<int64_t>(steps / 16, 8, 64) * std::max<int64_t>(1, rows);
}

int64_t plan_chunk_rows(int64_t slab_columns, int element_size, bool training) {
  if (training) return 256;
  const int64_t fits = (int64_t{1} << 20) / std::max<int64_t>(1, slab_columns * element_size);
  return std::clamp<int64_t>(fits, 64, 256);
}

}  // namespace fastrnn
