// The schedule of a ragged batch against its definition (core/args.h, core/schedule.h), computed
// the slow way: who is at work when, where each row of each step lies and in which order gradients
// visit them, how steps are cut into chunks and segments, how rows are shared among threads. Edge
// cases first, then random lengths; slabs in one to four parts.
#include "core/schedule.h"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"

namespace {

using fastrnn::padded_rows;
using fastrnn::Run;
using fastrnn::Schedule;
using fastrnn::ScheduleBuilder;

using Ints = std::vector<int64_t>;

// Rows in processing order: a stable sort by length, longest first.
Ints expected_order(const Ints& lengths) {
  Ints order;
  for (int64_t length = *std::max_element(lengths.begin(), lengths.end()); length >= 0; --length)
    for (std::size_t b = 0; b < lengths.size(); ++b)
      if (lengths[b] == length) order.push_back(static_cast<int64_t>(b));
  return order;
}

void check_steps(const Schedule& s, const Ints& lengths) {
  const int64_t steps = lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
  CHECK_EQ(s.steps, steps);
  CHECK_EQ(s.batch, static_cast<int64_t>(lengths.size()));
  if (!lengths.empty()) {
    const Ints order = expected_order(lengths);
    for (std::size_t j = 0; j < order.size(); ++j) {
      CHECK_EQ(static_cast<int64_t>(s.order[j]), order[j]);
      CHECK_EQ(s.length[j], lengths[static_cast<std::size_t>(order[j])]);
    }
  }
  for (int64_t k = 0; k <= steps; ++k)
    CHECK_EQ(static_cast<int64_t>(s.active[k]),
             std::count_if(lengths.begin(), lengths.end(), [k](int64_t n) { return n > k; }));
}

// The rows of a chunk are numbered part after part, in a part step after step, without gaps: so
// every step of every row has a place, and no two have the same. Returns how many there are.
int64_t check_places(const Schedule& s, int64_t begin, int64_t end) {
  int64_t rows = 0;
  for (int64_t part = 0; part < s.parts; ++part)
    for (int64_t k = begin; k < end; ++k) {
      CHECK_EQ(s.row_of_step[k * s.parts + part], rows);
      for (int64_t j = s.part_begin[part]; j < s.part_begin[part + 1]; ++j) rows += s.length[j] > k;
    }
  return rows;
}

int64_t place_of(const Schedule& s, int64_t k, int64_t j) {
  int64_t part = 0;
  while (j >= s.part_begin[part + 1]) ++part;
  return s.row_of_step[k * s.parts + part] + j - s.part_begin[part];
}

// The runs of a chunk visit its places from the last step and row to the first, each run from its
// last row on, and are as few as that order allows.
void check_runs(const Schedule& s, int64_t chunk, int64_t begin, int64_t end) {
  Ints places;
  for (int64_t k = end - 1; k >= begin; --k)
    for (int64_t j = s.batch - 1; j >= 0; --j)
      if (s.length[j] > k) places.push_back(place_of(s, k, j));
  const Run* const first = s.runs + s.run_begin[chunk];
  const Run* const last = s.runs + s.run_begin[chunk + 1];
  CHECK(first < last);
  if (s.parts == 1) CHECK_EQ(last - first, 1);
  Ints visited;
  for (const Run* run = first; run < last; ++run) {
    CHECK(run->rows > 0);
    for (int64_t row = run->row + run->rows - 1; row >= run->row; --row) visited.push_back(row);
    CHECK(run == first || run->row + run->rows != run[-1].row);  // else they are one
  }
  CHECK(visited == places);
}

void check_parts(const ScheduleBuilder& builder, int parts) {
  const Schedule& s = builder.get();
  CHECK_EQ(s.parts, parts);
  CHECK(Ints(s.part_begin, s.part_begin + parts + 1) == builder.split_rows(parts));
}

void check_chunks(const ScheduleBuilder& builder, const Ints& lengths, int64_t chunk_rows,
                  int64_t segment) {
  const Schedule& s = builder.get();
  // A chunk ends after chunk_rows rows (at least one step, counted as if nothing had ended), at the
  // next multiple of `segment`, or with the last step.
  const int64_t batch = std::max<int64_t>(1, s.batch);
  const int64_t per_chunk = std::max<int64_t>(1, chunk_rows / batch);
  int64_t begin = 0, before = 0, most = 0, most_steps = 0, chunk = 0;
  Ints segments = {0};
  CHECK_EQ(s.run_begin[0], 0);
  while (begin < s.steps) {
    int64_t end = begin + 1;
    while (end < s.steps && end - begin < per_chunk && (segment == 0 || end % segment != 0)) ++end;
    CHECK(chunk < s.chunks);
    if (chunk >= s.chunks) return;
    CHECK_EQ(s.chunk_begin[chunk], begin);
    CHECK_EQ(s.chunk_begin[chunk + 1], end);

    const int64_t rows = check_places(s, begin, end);
    check_runs(s, chunk, begin, end);
    CHECK(rows > 0);
    CHECK_EQ(s.rows[chunk], padded_rows(rows));
    CHECK_EQ(s.rows_before[chunk], before);
    before += s.rows[chunk];
    CHECK_EQ(s.rows_before[chunk + 1], before);
    most = std::max(most, s.rows[chunk]);
    most_steps = std::max(most_steps, end - begin);
    ++chunk;
    if (end == s.steps || (segment > 0 && end % segment == 0)) segments.push_back(chunk);
    begin = end;
  }
  CHECK_EQ(s.chunks, chunk);
  CHECK_EQ(s.chunk_begin[s.chunks], s.steps);
  CHECK_EQ(s.rows_before[0], 0);
  CHECK_EQ(s.max_rows, most);
  CHECK_EQ(s.max_steps, most_steps);
  CHECK(builder.segments() == segments);
  if (segment > 0)  // segment i begins at step i * segment
    for (std::size_t i = 0; i + 1 < segments.size(); ++i)
      CHECK_EQ(s.chunk_begin[segments[i]], static_cast<int64_t>(i) * segment);
  // Every step of every row has a place.
  int64_t places = 0;
  for (int64_t k = 0; k < s.steps; ++k) places += s.active[k];
  CHECK_EQ(places, std::accumulate(lengths.begin(), lengths.end(), int64_t{0}));
}

void check_split(const ScheduleBuilder& builder) {
  const Schedule& s = builder.get();
  const int64_t total = std::accumulate(s.length, s.length + s.batch, int64_t{0});
  const int64_t longest = s.batch > 0 ? s.length[0] : 0;
  for (int parts = 1; parts <= 9; ++parts) {
    const Ints cut = builder.split_rows(parts);
    CHECK_EQ(cut.size(), static_cast<std::size_t>(parts) + 1);
    CHECK_EQ(cut.front(), 0);
    CHECK_EQ(cut.back(), s.batch);
    CHECK(std::is_sorted(cut.begin(), cut.end()));
    if (total == 0) continue;
    // No part is off its share by more than the half rows at both of its ends.
    for (std::size_t i = 0; i + 1 < cut.size(); ++i) {
      const int64_t sum = std::accumulate(s.length + cut[i], s.length + cut[i + 1], int64_t{0});
      CHECK(std::abs(sum * parts - total) <= longest * parts);
    }
  }
}

constexpr int kMostParts = 4;

void check_schedule(const Ints& lengths, int64_t T, int64_t chunk_rows, int64_t segment) {
  for (int parts = 1; parts <= kMostParts; ++parts) {
    const ScheduleBuilder builder(T, static_cast<int64_t>(lengths.size()), lengths.data(),
                                  chunk_rows, segment, parts);
    check_steps(builder.get(), lengths);
    check_parts(builder, parts);
    check_chunks(builder, lengths, chunk_rows, segment);
    check_split(builder);
  }
}

// Without lengths every row has T steps, and the order is the caller's.
void check_full(int64_t T, int64_t B, int64_t chunk_rows, int64_t segment) {
  for (int parts = 1; parts <= kMostParts; ++parts) {
    const ScheduleBuilder builder(T, B, nullptr, chunk_rows, segment, parts);
    const Ints lengths(static_cast<std::size_t>(B), T);
    check_steps(builder.get(), lengths);
    check_parts(builder, parts);
    check_chunks(builder, lengths, chunk_rows, segment);
    check_split(builder);
  }
}

void test_edges() {
  for (int64_t T : {0, 1, 5})
    for (int64_t B : {0, 1, 3})
      for (int64_t segment : {0, 1, 2, 7}) check_full(T, B, 4, segment);
  check_schedule({0, 0, 0}, 5, 256, 0);  // nobody works: no steps, no chunks
  check_schedule({0, 0, 0}, 5, 256, 2);
  check_schedule({0}, 0, 256, 0);
  check_schedule({3}, 10, 256, 0);  // T is the longest length, not the caller's
  check_schedule({0, 7, 0, 7, 1}, 7, 256, 3);
  check_schedule({1, 2, 3, 4, 5}, 5, 1, 0);  // a chunk has at least one step
  check_schedule({5, 4, 3, 2, 1}, 5, 0, 0);
}

void test_padding() {
  for (int64_t n = 0; n < 300; ++n) {
    CHECK(padded_rows(n) >= n && padded_rows(n) < n + 8);
    CHECK(n < 8 || padded_rows(n) % 8 == 7);
  }
}

void test_split_of_equal_rows() {
  const ScheduleBuilder full(10, 12, nullptr, 256);
  CHECK(full.split_rows(1) == Ints({0, 12}));
  CHECK(full.split_rows(2) == Ints({0, 6, 12}));
  CHECK(full.split_rows(3) == Ints({0, 4, 8, 12}));
  CHECK(full.split_rows(4) == Ints({0, 3, 6, 9, 12}));
  // One long row is as much work as ten short ones.
  const Ints lengths = {1, 1, 1, 1, 1, 10, 1, 1, 1, 1, 1};
  const ScheduleBuilder ragged(10, 11, lengths.data(), 256);
  CHECK(ragged.split_rows(2) == Ints({0, 1, 11}));
}

// Written out, for two rows of three steps and two of one in two parts of about the same work: the
// first row, and the three others.
void test_runs() {
  const Ints lengths = {3, 1, 3, 1};
  const ScheduleBuilder builder(3, 4, lengths.data(), 256, 0, 2);
  const Schedule& s = builder.get();
  CHECK(builder.split_rows(2) == Ints({0, 1, 4}));
  // Part 0: row 0 in steps 0, 1, 2. Part 1: rows 1 to 3 in step 0, then row 1 in steps 1 and 2.
  CHECK(Ints(s.row_of_step, s.row_of_step + 6) == Ints({0, 3, 1, 6, 2, 7}));
  CHECK_EQ(s.run_begin[1], 6);
  const Ints first_rows = {7, 2, 6, 1, 3, 0}, rows = {1, 1, 1, 1, 3, 1};
  for (std::size_t i = 0; i < 6; ++i) {
    CHECK_EQ(s.runs[i].row, first_rows[i]);
    CHECK_EQ(s.runs[i].rows, rows[i]);
  }
  // In chunks of one step its parts lie one after the other.
  const ScheduleBuilder steps(3, 4, lengths.data(), 1, 0, 2);
  CHECK_EQ(steps.get().chunks, 3);
  for (int64_t c = 0; c <= 3; ++c) CHECK_EQ(steps.get().run_begin[c], c);
}

void test_random() {
  std::mt19937 random(5);
  const auto below = [&random](int64_t n) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(n));
  };
  for (int trial = 0; trial < 2000; ++trial) {
    const int64_t T = below(40), B = 1 + below(30), longest = 1 + below(T + 1);
    Ints lengths(static_cast<std::size_t>(B));
    for (int64_t& n : lengths) n = std::min(T, below(longest + 1));
    check_schedule(lengths, T, below(2) == 0 ? 256 : below(100), below(2) == 0 ? 0 : 1 + below(12));
    check_full(T, B, below(100), below(12));
  }
}

}  // namespace

int main() {
  test_edges();
  test_padding();
  test_split_of_equal_rows();
  test_runs();
  test_random();
  return check_report();
}
