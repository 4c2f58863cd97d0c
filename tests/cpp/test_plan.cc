// The cost model: its bounds, that more work never means fewer threads, and the choices for calls
// of known size, so that a change of a constant is a decision.
#include "cpu/plan.h"

#include <cstdint>

#include "check.h"

namespace {

using fastrnn::Division;
using fastrnn::LayerCost;
using fastrnn::plan_chunk_rows;
using fastrnn::plan_division;
using fastrnn::plan_threads;
using fastrnn::plan_turns;
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

constexpr int64_t kL2 = 1 << 20;

LayerCost cost(int directions, int64_t steps, int64_t rows, int64_t bytes, int64_t superblocks,
               double work) {
  return {directions, steps, rows, bytes, superblocks, work, kL2};
}

void test_row_parts() {
  for (int threads : {1, 2, 3, 4, 8, 64})
    for (int directions : {1, 2})
      for (int64_t B = 0; B <= 300; ++B) {
        int last = 0;
        for (double work = 1; work < 1e12; work *= 4) {
          // One superblock: nothing that a team could share.
          const Division division =
              plan_division(threads, cost(directions, 100, B, 1 << 14, 1, work));
          CHECK_EQ(division.team, 1);
          const int parts = division.row_parts;
          CHECK(parts >= 1);
          CHECK(parts == 1 || B / parts >= 4);  // a part's rows share the reading of the weights
          CHECK(parts * directions < threads + directions);  // never more tasks than it takes
          CHECK(parts >= last);
          last = parts;
        }
        if (B >= 4 * threads) CHECK_EQ(last * directions >= threads, true);
      }
  const auto parts = [](int threads, int directions, int64_t B, double work) {
    return plan_division(threads, cost(directions, 100, B, 1 << 14, 1, work)).row_parts;
  };
  const double large = 1e12;
  CHECK_EQ(parts(8, 1, 64, large), 8);
  CHECK_EQ(parts(8, 2, 64, large), 4);
  CHECK_EQ(parts(8, 1, 16, large), 4);
  CHECK_EQ(parts(8, 1, 3, large), 1);
  CHECK_EQ(parts(8, 1, 0, large), 1);
  CHECK_EQ(parts(8, 1, 64, 1000), 1);
  CHECK_EQ(parts(3, 2, 64, large), 2);
}

void test_team() {
  for (int64_t superblocks : {1, 2, 5, 32})
    for (int64_t rows : {0, 1, 3, 7, 16, 64})
      for (int64_t bytes = 256; bytes < int64_t{1} << 26; bytes *= 4) {
        int last = 0;
        for (int64_t steps : {0, 1, 10, 1000}) {
          const auto plan = [&](int threads) {
            return plan_division(threads, cost(1, steps, rows, bytes, superblocks,
                                               static_cast<double>(steps * rows * bytes)));
          };
          for (int threads = 1; threads <= 16; ++threads) {
            const Division division = plan(threads);
            CHECK(division.team >= 1 && division.team <= threads && division.team <= superblocks);
            CHECK(division.team == 1 || division.row_parts == 1);  // one way or the other
            CHECK(division.team == 1 ? division.patience_us == 0
                                     : division.patience_us > 0 && division.patience_us <= 100);
          }
          const int members = plan(16).team;
          if (rows < 8) {
            CHECK(members >= last);  // a longer call, no fewer members
            last = members;
          }
        }
      }
  const auto lstm = [](int threads, int directions, int64_t steps, int64_t rows, int64_t H,
                       int64_t superblocks) {
    return plan_division(threads, {directions, steps, rows, 4 * H * H * 4, superblocks,
                                   static_cast<double>(steps * rows * 8 * H * H), 2 * kL2});
  };
  CHECK_EQ(lstm(2, 1, 100, 1, 512, 16).team, 2);
  CHECK_EQ(lstm(1, 1, 100, 1, 512, 16).team, 1);
  CHECK_EQ(lstm(8, 1, 100, 1, 512, 1).team, 1);  // one superblock cannot be shared
  CHECK_EQ(lstm(8, 1, 0, 1, 512, 16).team, 1);
  CHECK_EQ(lstm(2, 1, 100, 1, 64, 2).team, 2);
  CHECK_EQ(lstm(2, 1, 20, 1, 64, 2).team, 1);     // over before the members are there
  CHECK_EQ(lstm(8, 1, 100, 1, 32, 4).team, 1);    // a meeting costs more than a step
  CHECK_EQ(lstm(2, 2, 100, 1, 512, 16).team, 1);  // a thread for each direction
  // Many rows: to wait for nobody is better, unless each part would read the weights from far away.
  CHECK_EQ(lstm(2, 1, 100, 32, 256, 8).row_parts, 2);
  CHECK_EQ(lstm(2, 1, 100, 64, 512, 16).row_parts, 2);
  CHECK_EQ(lstm(2, 1, 100, 16, 512, 16).team, 2);
  CHECK_EQ(lstm(2, 1, 100, 8, 256, 8).team, 2);
  CHECK_EQ(lstm(2, 1, 100, 8, 128, 4).row_parts, 2);
  // Little better than a split of the rows, and yet far better than one thread: worth waiting for.
  CHECK_EQ(lstm(2, 1, 100, 8, 256, 8).patience_us, 100.0);
  CHECK(lstm(2, 1, 100, 1, 64, 2).patience_us < 100);
}

void test_turns() {
  for (int parts = 1; parts <= 64; ++parts)
    for (int64_t rows = 0; rows <= 600; ++rows)
      for (int64_t chunks : {0, 1, 5, 6, 100}) {
        const int turns = plan_turns(parts, rows, chunks);
        CHECK(turns == parts || (turns > parts && turns <= 2 * parts && rows / turns >= 5));
        CHECK(turns == parts || chunks >= 6);
      }
  CHECK_EQ(plan_turns(1, 1000, 100), 1);  // nobody to take turns with
  CHECK_EQ(plan_turns(2, 32, 8), 3);
  CHECK_EQ(plan_turns(2, 15, 8), 3);
  CHECK_EQ(plan_turns(2, 14, 8), 2);
  CHECK_EQ(plan_turns(2, 32, 5), 2);
}

void test_wavefront() {
  const int64_t recurrent = 4 * 128 * 128;
  const auto layer = [&](int directions, int64_t steps, int64_t rows, int64_t gh_h) {
    return LayerCost{
        directions, steps, rows, 4 * gh_h, 16, 2.0 * static_cast<double>(steps * rows * gh_h), kL2};
  };
  CHECK(plan_wavefront(2, 2, layer(1, 100, 1, recurrent)));
  CHECK(!plan_wavefront(1, 2, layer(1, 100, 1, recurrent)));  // nobody to share with
  CHECK(!plan_wavefront(2, 1, layer(1, 100, 1, recurrent)));  // nothing to overlap
  CHECK(!plan_wavefront(2, 2,
                        layer(2, 100, 1, recurrent)));  // the layer above needs the reverse's end
  CHECK(!plan_wavefront(2, 2, layer(1, 1, 1, recurrent)));
  CHECK(!plan_wavefront(2, 2, layer(1, 100, 64, recurrent)));  // rows enough to split
  CHECK(!plan_wavefront(2, 2, layer(1, 100, 1, 4)));           // too little to do
  CHECK(!plan_wavefront(2, 2, layer(1, 100, 0, recurrent)));
  // W_ih and W_hh beside what else there is in the cache, and not any more.
  CHECK(plan_wavefront(2, 2, layer(1, 100, 1, kL2 * 3 / 32)));
  CHECK(!plan_wavefront(2, 2, layer(1, 100, 1, kL2 * 3 / 32 + 1)));
  for (int64_t steps = 1; steps < 3000; ++steps)
    for (int64_t rows : {0, 1, 7})
      for (int64_t bytes : {kL2, 2 * kL2}) {
        const int64_t chunk = plan_wave_rows(steps, rows, bytes, kL2), batch = rows > 0 ? rows : 1;
        CHECK(chunk >= batch && chunk % batch == 0);  // whole steps, at least one
        CHECK(chunk <= 128 * batch);
        CHECK(steps < 16 || 2 * chunk <= steps * batch);  // layers can overlap
        CHECK(chunk <= plan_wave_rows(steps + 1, rows, bytes, kL2));
      }
  CHECK_EQ(plan_wave_rows(512, 3, kL2, kL2), 32 * 3);          // 16 chunks
  CHECK_EQ(plan_wave_rows(512, 3, kL2 + 1, kL2), 2 * 32 * 3);  // 8
}

void test_chunk_rows() {
  int64_t last = 256;
  for (int64_t bytes = 0; bytes < 400000; bytes += 28) {
    const int64_t rows = plan_chunk_rows(bytes, 0, kL2);
    CHECK(rows >= 64 && rows <= 256);
    CHECK(rows <= last);  // wider slabs, no more rows
    CHECK(plan_chunk_rows(bytes, 0, kL2 / 2) <= rows);
    // Half of the cache, unless even the fewest rows are more.
    CHECK(rows == 64 || rows * bytes <= kL2 / 2);
    last = rows;
    for (int64_t w_ih : {int64_t{1} << 10, int64_t{1} << 22, int64_t{1} << 24, int64_t{1} << 40}) {
      const int64_t more = plan_chunk_rows(bytes, w_ih, kL2);
      CHECK(more >= rows && more <= 512);
      CHECK(more == rows || more * 32768 <= w_ih);  // no more than spreads the reading of W_ih
    }
  }
  CHECK_EQ(last, 64);
  // LSTM, I = H = 128, 512, 1024 in float32.
  const int64_t two_mib = int64_t{1} << 21, one_mib = int64_t{1} << 20;
  CHECK_EQ(plan_chunk_rows(512 * 4, 512 * 128 * 4, two_mib), 256);
  CHECK_EQ(plan_chunk_rows(1024 * 4, 1024 * 256 * 4, two_mib), 256);
  CHECK_EQ(plan_chunk_rows(1024 * 4, 1024 * 256 * 4, one_mib), 128);
  CHECK_EQ(plan_chunk_rows(2048 * 4, 2048 * 512 * 4, two_mib), 128);
  CHECK_EQ(plan_chunk_rows(2048 * 4, 2048 * 512 * 4, one_mib), 128);  // for W_ih's sake
  CHECK_EQ(plan_chunk_rows(4096 * 4, 4096 * 1024 * 4, two_mib), 512);
}

}  // namespace

int main() {
  test_threads();
  test_row_parts();
  test_team();
  test_turns();
  test_wavefront();
  test_chunk_rows();
  return check_report();
}
