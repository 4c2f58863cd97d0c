// The cost model: its bounds, that more work never means fewer threads, and the choices for calls
// of known size, so that a change of a constant is a decision.
#include "cpu/plan.h"

#include <cstdint>

#include "check.h"

namespace {

using fastrnn::plan_chunk_rows;
using fastrnn::plan_row_parts;
using fastrnn::plan_team;
using fastrnn::plan_threads;
using fastrnn::plan_wave_rows;
using fastrnn::plan_wavefront;

void test_threads() {
  for (int threads = 1; threads <= 64; ++threads) {
    int last = 0;
    for (double work = 0; work < 1e12; work = work * 1.5 + 1) {
      const int n = plan_threads(threads, work);
      CHECK(n >= 1 && n <= threads);
      CHECK(n >= last);                     // more work, no fewer threads
      CHECK(n == 1 || work / n >= 131072);  // each is worth waking
      CHECK(threads == 1 || n <= plan_threads(threads + 1, work));
      last = n;
    }
    CHECK_EQ(last, threads);
  }
  CHECK_EQ(plan_threads(8, 0), 1);
  CHECK_EQ(plan_threads(8, 2 * 131072.0 - 1), 1);
  CHECK_EQ(plan_threads(8, 2 * 131072.0), 2);
  CHECK_EQ(plan_threads(8, 1e300), 8);
}

void test_row_parts() {
  for (int threads : {1, 2, 3, 4, 8, 64})
    for (int directions : {1, 2})
      for (int64_t B = 0; B <= 300; ++B) {
        int last = 0;
        for (double work = 1; work < 1e12; work *= 4) {
          const int parts = plan_row_parts(threads, directions, B, work);
          CHECK(parts >= 1);
          CHECK(parts == 1 || B / parts >= 4);  // a part's rows share the reading of the weights
          CHECK(parts * directions < threads + directions);  // never more tasks than it takes
          CHECK(parts >= last);
          last = parts;
        }
        if (B >= 4 * threads) CHECK_EQ(last * directions >= threads, true);
      }
  const double large = 1e12;
  CHECK_EQ(plan_row_parts(8, 1, 64, large), 8);
  CHECK_EQ(plan_row_parts(8, 2, 64, large), 4);
  CHECK_EQ(plan_row_parts(8, 1, 16, large), 4);
  CHECK_EQ(plan_row_parts(8, 1, 3, large), 1);
  CHECK_EQ(plan_row_parts(8, 1, 0, large), 1);
  CHECK_EQ(plan_row_parts(8, 1, 64, 1000), 1);
  CHECK_EQ(plan_row_parts(3, 2, 64, large), 2);
}

void test_team() {
  for (int64_t superblocks : {1, 2, 5, 32})
    for (int64_t rows : {0, 1, 3, 7})
      for (int64_t bytes = 256; bytes < int64_t{1} << 26; bytes *= 4) {
        int last = 0;
        for (int64_t steps : {0, 1, 10, 1000}) {
          for (int threads = 1; threads <= 16; ++threads) {
            const int members = plan_team(threads, steps, rows, bytes, superblocks);
            CHECK(members >= 1 && members <= threads && members <= superblocks);
          }
          const int members = plan_team(16, steps, rows, bytes, superblocks);
          CHECK(members >= last);  // a longer call, no fewer members
          last = members;
        }
      }
  const int64_t lstm_512 = 4 * 512 * 512 * 4, lstm_32 = 4 * 32 * 32 * 4;
  CHECK_EQ(plan_team(2, 100, 1, lstm_512, 16), 2);
  CHECK_EQ(plan_team(1, 100, 1, lstm_512, 16), 1);
  CHECK_EQ(plan_team(8, 100, 1, lstm_512, 1), 1);  // one superblock cannot be shared
  CHECK_EQ(plan_team(8, 0, 1, lstm_512, 16), 1);
  CHECK_EQ(plan_team(8, 100, 1, lstm_32, 4), 1);  // a meeting costs more than a step
}

void test_wavefront() {
  const int64_t recurrent = 4 * 256 * 256;
  CHECK(plan_wavefront(2, 2, 1, 100, 1, recurrent));
  CHECK(!plan_wavefront(1, 2, 1, 100, 1, recurrent));  // nobody to share with
  CHECK(!plan_wavefront(2, 1, 1, 100, 1, recurrent));  // nothing to overlap
  CHECK(!plan_wavefront(2, 2, 2, 100, 1, recurrent));  // the layer above needs the reverse's end
  CHECK(!plan_wavefront(2, 2, 1, 1, 1, recurrent));
  CHECK(!plan_wavefront(2, 2, 1, 100, 64, recurrent));  // rows enough to split
  CHECK(!plan_wavefront(2, 2, 1, 100, 1, 4));
  CHECK(!plan_wavefront(2, 2, 1, 100, 0, recurrent));
  for (int64_t steps = 1; steps < 3000; ++steps)
    for (int64_t rows : {0, 1, 7}) {
      const int64_t chunk = plan_wave_rows(steps, rows), batch = rows > 0 ? rows : 1;
      CHECK(chunk >= batch && chunk % batch == 0);  // whole steps, at least one
      CHECK(chunk <= 64 * batch);
      CHECK(chunk <= plan_wave_rows(steps + 1, rows));
    }
  CHECK_EQ(plan_wave_rows(512, 3), 32 * 3);  // 16 chunks
}

void test_chunk_rows() {
  for (int element_size : {4, 8}) {
    int64_t last = 256;
    for (int64_t columns = 0; columns < 100000; columns += 7) {
      const int64_t rows = plan_chunk_rows(columns, element_size, false);
      CHECK(rows >= 64 && rows <= 256);
      CHECK(rows <= last);  // wider slabs, no more rows
      // A megabyte, unless even the fewest rows are more.
      CHECK(rows == 64 || rows * columns * element_size <= 1 << 20);
      last = rows;
      CHECK_EQ(plan_chunk_rows(columns, element_size, true), 256);
    }
    CHECK_EQ(last, 64);
  }
  CHECK_EQ(plan_chunk_rows(512, 4, false), 256);
  CHECK_EQ(plan_chunk_rows(2048, 4, false), 128);
  CHECK_EQ(plan_chunk_rows(2048, 8, false), 64);
}

}  // namespace

int main() {
  test_threads();
  test_row_parts();
  test_team();
  test_wavefront();
  test_chunk_rows();
  return check_report();
}
