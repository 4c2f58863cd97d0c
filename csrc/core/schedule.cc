#include "core/schedule.h"

#include <algorithm>
#include <numeric>

namespace fastrnn {

ScheduleBuilder::ScheduleBuilder(int64_t T, int64_t B, const int64_t* lengths, int64_t chunk_rows,
                                 int64_t segment)
    : order_(static_cast<size_t>(B)), length_(static_cast<size_t>(B), T) {
  std::iota(order_.begin(), order_.end(), 0);
  if (lengths != nullptr) {
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int32_t a, int32_t b) { return lengths[a] > lengths[b]; });
    for (size_t j = 0; j < order_.size(); ++j) length_[j] = lengths[order_[j]];
  }
  const int64_t steps = B > 0 ? length_[0] : 0;

  active_.assign(static_cast<size_t>(steps) + 1, 0);
  row_of_step_.resize(static_cast<size_t>(steps));
  for (int64_t k = 0, n = B; k < steps; ++k) {
    while (length_[static_cast<size_t>(n - 1)] <= k) --n;
    active_[static_cast<size_t>(k)] = static_cast<int32_t>(n);
  }

  const int64_t per_chunk = std::max<int64_t>(1, chunk_rows / std::max<int64_t>(1, B));
  chunk_begin_.push_back(0);
  rows_before_.push_back(0);
  segments_.push_back(0);
  int64_t max_rows = 0, max_steps = 0;
  for (int64_t k = 0; k < steps;) {
    int64_t end = std::min(steps, k + per_chunk);
    if (segment > 0) end = std::min(end, (k / segment + 1) * segment);
    max_steps = std::max(max_steps, end - k);
    int64_t rows = 0;
    for (; k < end; ++k) {
      row_of_step_[static_cast<size_t>(k)] = rows;
      rows += active_[static_cast<size_t>(k)];
    }
    chunk_begin_.push_back(end);
    rows_.push_back(padded_rows(rows));
    rows_before_.push_back(rows_before_.back() + rows_.back());
    max_rows = std::max(max_rows, rows_.back());
    if (end == steps || (segment > 0 && end % segment == 0))
      segments_.push_back(static_cast<int64_t>(rows_.size()));
  }
  schedule_ = {steps,
               B,
               order_.data(),
               length_.data(),
               active_.data(),
               static_cast<int64_t>(rows_.size()),
               chunk_begin_.data(),
               row_of_step_.data(),
               rows_.data(),
               rows_before_.data(),
               max_steps,
               max_rows};
}

std::vector<int64_t> ScheduleBuilder::split_rows(int parts) const {
  const int64_t B = schedule_.batch;
  double total = 0;
  for (int64_t n : length_) total += static_cast<double>(n);
  std::vector<int64_t> cut = {0};
  double sum = 0;
  for (int64_t j = 0; j < B; ++j) {
    // Row j goes to the part in which the middle of its work lies.
    sum += static_cast<double>(length_[static_cast<size_t>(j)]);
    const double middle = sum - static_cast<double>(length_[static_cast<size_t>(j)]) / 2;
    while (static_cast<int>(cut.size()) < parts &&
           middle >= total * static_cast<double>(cut.size()) / parts)
      cut.push_back(j);
  }
  while (static_cast<int>(cut.size()) <= parts) cut.push_back(B);
  return cut;
}

}  // namespace fastrnn
