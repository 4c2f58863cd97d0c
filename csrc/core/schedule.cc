#include "core/schedule.h"

#include <algorithm>
#include <numeric>

namespace fastrnn {

ScheduleBuilder::ScheduleBuilder(int64_t T, int64_t B, const int64_t* lengths, int64_t chunk_rows,
                                 int64_t segment, int parts)
    : order_(static_cast<size_t>(B)), length_(static_cast<size_t>(B), T) {
  std::iota(order_.begin(), order_.end(), 0);
  if (lengths != nullptr) {
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int32_t a, int32_t b) { return lengths[a] > lengths[b]; });
    for (size_t j = 0; j < order_.size(); ++j) length_[j] = lengths[order_[j]];
  }
  const int64_t steps = B > 0 ? length_[0] : 0;

  active_.assign(static_cast<size_t>(steps) + 1, 0);
  for (int64_t k = 0, n = B; k < steps; ++k) {
    while (length_[static_cast<size_t>(n - 1)] <= k) --n;
    active_[static_cast<size_t>(k)] = static_cast<int32_t>(n);
  }

  schedule_.batch = B;
  part_begin_ = split_rows(parts);
  row_of_step_.reserve(static_cast<size_t>(steps * parts));
  run_begin_.push_back(0);

  const int64_t per_chunk = std::max<int64_t>(1, chunk_rows / std::max<int64_t>(1, B));
  chunk_begin_.push_back(0);
  rows_before_.push_back(0);
  segments_.push_back(0);
  int64_t max_rows = 0, max_steps = 0;
  for (int64_t k = 0; k < steps;) {
    int64_t end = std::min(steps, k + per_chunk);
    if (segment > 0) end = std::min(end, (k / segment + 1) * segment);
    max_steps = std::max(max_steps, end - k);
    k = end;
    const int64_t rows = number_rows(chunk_begin_.back(), end);
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
               parts,
               part_begin_.data(),
               row_of_step_.data(),
               runs_.data(),
               run_begin_.data(),
               rows_.data(),
               rows_before_.data(),
               max_steps,
               max_rows};
}

// The rows of the chunk of the steps begin … end - 1; returns how many.
int64_t ScheduleBuilder::number_rows(int64_t begin, int64_t end) {
  const size_t parts = part_begin_.size() - 1;
  row_of_step_.resize(static_cast<size_t>(end) * parts);
  const auto rows_at = [&](int64_t k, size_t part) {
    const int64_t last = std::min<int64_t>(active_[static_cast<size_t>(k)], part_begin_[part + 1]);
    return std::max<int64_t>(0, last - part_begin_[part]);
  };
  int64_t rows = 0;
  for (size_t part = 0; part < parts; ++part)
    for (int64_t k = begin; k < end; ++k) {
      row_of_step_[static_cast<size_t>(k) * parts + part] = rows;
      rows += rows_at(k, part);
    }
  for (int64_t k = end - 1; k >= begin; --k)
    for (size_t part = parts; part-- > 0;) {
      const Run run = {row_of_step_[static_cast<size_t>(k) * parts + part], rows_at(k, part)};
      if (run.rows == 0) continue;
      // Never with the chunk's before: that ends with its row 0.
      if (!runs_.empty() && run.row + run.rows == runs_.back().row) {
        runs_.back() = {run.row, run.rows + runs_.back().rows};
      } else {
        runs_.push_back(run);
      }
    }
  run_begin_.push_back(static_cast<int64_t>(runs_.size()));
  return rows;
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
