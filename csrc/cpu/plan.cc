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

int64_t plan_chunk_rows(int64_t slab_columns, int element_size, bool training) {
  if (training) return 256;
  const int64_t fits = (int64_t{1} << 20) / std::max<int64_t>(1, slab_columns * element_size);
  return std::clamp<int64_t>(fits, 64, 256);
}

}  // namespace fastrnn
