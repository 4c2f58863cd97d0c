// The cost model: its bounds, that more work never means fewer threads, and the choices for calls
// of known size, so that a change of a constant is a decision.
#include "cpu/plan.h"

#include <cstdint>

#include "check.h"

namespace {

using fastrnn::plan_chunk_rows;
using fastrnn::plan_row_parts;
using fastrnn::plan_threads;

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
  test_chunk_rows();
  return check_report();
}
