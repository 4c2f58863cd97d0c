// Builds a Schedule (core/args.h): who is at work in which step, and where its row lies in the
// chunk's slab.
#ifndef FASTRNN_CORE_SCHEDULE_H_
#define FASTRNN_CORE_SCHEDULE_H_

#include <cstdint>
#include <vector>

#include "core/args.h"

namespace fastrnn {

// Rows of a slab for n rows of data: a count that is no multiple of 8 keeps a slab's panels off
// each other's cache sets.
inline int64_t padded_rows(int64_t n) { return n < 8 ? n : n + (7 - n % 8); }

class ScheduleBuilder {
 public:
  // T steps of B rows; `lengths` (B) or null for T everywhere; chunks of about `chunk_rows` rows;
  // with segment > 0 no chunk crosses a multiple of `segment` steps; slabs in `parts` parts of the
  // batch, cut as split_rows does. Throws std::bad_alloc.
  ScheduleBuilder(int64_t T, int64_t B, const int64_t* lengths, int64_t chunk_rows,
                  int64_t segment = 0, int parts = 1);
  ScheduleBuilder(const ScheduleBuilder&) = delete;
  ScheduleBuilder& operator=(const ScheduleBuilder&) = delete;

  const Schedule& get() const { return schedule_; }

  // Row boundaries that give each of `parts` about the same sum of lengths: parts + 1 values from 0
  // to B.
  std::vector<int64_t> split_rows(int parts) const;

  // First chunk of each segment, and chunks: segments + 1 values.
  const std::vector<int64_t>& segments() const { return segments_; }

 private:
  int64_t number_rows(int64_t begin, int64_t end);

  std::vector<int32_t> order_, active_;
  std::vector<int64_t> length_, chunk_begin_, part_begin_, row_of_step_, run_begin_, rows_,
      rows_before_, segments_;
  std::vector<Run> runs_;
  Schedule schedule_;
};

}  // namespace fastrnn

#endif  // FASTRNN_CORE_SCHEDULE_H_
