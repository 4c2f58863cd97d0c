#include "cpu/plan.h"

#include <algorithm>

namespace fastrnn {

int plan_threads(int threads, double multiply_adds) {
  const double worth = multiply_adds / 131072.0;
  return worth < 2 ? 1 : static_cast<int>(std::min<double>(threads, worth));
}

namespace {

// A step of so many rows on one thread, in µs: reading the weights, at some 64 KB a µs from the
// second-level cache and 24 from beyond it, and for every row but the first, whose multiply-adds
// hide in the reading, some 160 KB worth of multiply-adds a µs.
double step_us(double rows, double bytes, int64_t l2_bytes) {
  const double reading =
      bytes / (beyond_cache(static_cast<int64_t>(bytes), l2_bytes) ? 24576.0 : 65536.0);
  return reading + std::max(0.0, rows - 1) * bytes / 163840.0;
}

}  // namespace

Division plan_division(int threads, const LayerCost& cost) {
  const int useful = plan_threads(threads, cost.multiply_adds);
  const int64_t per_direction = (useful + cost.directions - 1) / cost.directions;
  const int parts =
      static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(per_direction, cost.rows / 4)));
  if (cost.directions > 1) return {parts, 1};

  const double rows = static_cast<double>(cost.rows), bytes = static_cast<double>(cost.w_hh_bytes);
  const double split_us =
      step_us(static_cast<double>((cost.rows + parts - 1) / parts), bytes, cost.l2_bytes);
  double best_us = split_us;
  int team = 1;
  for (int members = 2; members <= threads && members <= cost.superblocks; ++members) {
    const double share = static_cast<double>((cost.superblocks + members - 1) / members) /
                         static_cast<double>(cost.superblocks);
    // Waiting for the slowest: 8 %, with which the choices agree with what was faster.
    const double us = 1.08 * step_us(rows, bytes * share, cost.l2_bytes) + 0.1 * members;
    if (us < (team == 1 ? 0.95 : 0.9) * best_us) {
      team = members;
      best_us = us;
    }
  }
  // Beside one thread, which is what is left where the members do not come.
  const double saves_us =
      (step_us(rows, bytes, cost.l2_bytes) - best_us) * static_cast<double>(cost.steps);
  if (team == 1 || (parts == 1 && saves_us <= 20.0)) return {parts, 1};
  return {1, team, std::min(saves_us, 100.0)};
}

int plan_turns(int parts, int64_t rows, int64_t chunks) {
  const int more = parts + (parts + 1) / 2;
  return parts > 1 && chunks >= 6 && rows >= int64_t{5} * more ? more : parts;
}

bool plan_wavefront(int threads, int layers, const LayerCost& cost) {
  if (threads < 2 || layers < 2 || cost.directions > 1 || cost.rows >= 8 || cost.steps < 16)
    return false;
  if (beyond_cache(2 * cost.w_hh_bytes, cost.l2_bytes)) return false;
  return plan_threads(threads, cost.multiply_adds) > 1;
}

int64_t plan_wave_rows(int64_t steps, int64_t rows, int64_t weight_bytes, int64_t l2_bytes) {
  const int64_t chunks = weight_bytes <= l2_bytes ? 16 : 8;
  return std::clamp<int64_t>(steps / chunks, 8, 1024 / chunks) * std::max<int64_t>(1, rows);
}

int64_t plan_chunk_rows(int64_t slab_row_bytes, int64_t w_ih_bytes, int64_t l2_bytes) {
  const int64_t fits = l2_bytes / 2 / std::max<int64_t>(1, slab_row_bytes);
  return std::max(std::clamp<int64_t>(fits, 64, 256), std::min<int64_t>(w_ih_bytes >> 15, 512));
}

}  // namespace fastrnn
