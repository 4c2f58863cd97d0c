// The tasks of a layer's way back against the rules at the head of cpu/back_tasks.h. One thread
// first, that takes and finishes tasks in random order: every answer is compared with what the
// rules say, computed anew from the history of all tasks. Then four threads that do what the tasks
// are for on plain memory, so that one handed out too early shows in the values, and in
// ThreadSanitizer.
#include "cpu/back_tasks.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"

namespace {

using fastrnn::BackTask;
using fastrnn::BackTasks;

using Shape = BackTasks::Shape;

constexpr BackTask::Kind kKinds[] = {BackTask::kSteps, BackTask::kWeights, BackTask::kInputs};

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int below(int n) { return static_cast<int>(engine_() % static_cast<unsigned>(n)); }

  Shape shape(int most_chunks) {
    const int64_t first = below(4), end = first + below(most_chunks + 1);
    const int directions = 1 + below(2), steps = 1 + below(5), weights = 1 + below(9);
    const int inputs = below(10), copies = 1 + below(3);
    return {first, end, directions, steps, weights, inputs, copies};
  }

 private:
  std::mt19937 engine_;
};

int parts_of(const Shape& shape, BackTask::Kind kind) {
  return kind == BackTask::kSteps     ? shape.steps
         : kind == BackTask::kWeights ? shape.weights
                                      : shape.inputs;
}

bool same(const BackTask& a, const BackTask& b) {
  return a.kind == b.kind && a.direction == b.direction && a.chunk == b.chunk && a.part == b.part;
}

std::string text(const BackTask& task) {
  const char* const kinds[] = {"steps", "weights", "inputs"};
  return std::string(kinds[task.kind]) + " of direction " + std::to_string(task.direction) +
         ", chunk " + std::to_string(task.chunk) + ", part " + std::to_string(task.part);
}

// What became of every task, and what the rules make of it.
class History {
 public:
  enum State { kWaiting, kInHand, kDone };

  explicit History(const Shape& shape) : shape_(shape) {
    for (int64_t chunk = shape.end_chunk - 1; chunk >= shape.first_chunk; --chunk)
      for (int d = 0; d < shape.directions; ++d)
        for (BackTask::Kind kind : kKinds)
          for (int part = 0; part < parts_of(shape, kind); ++part)
            entries_.push_back({{kind, d, chunk, part}, kWaiting});
  }

  State& operator[](const BackTask& task) {
    for (Entry& entry : entries_)
      if (same(entry.task, task)) return entry.state;
    CHECK_EQ(text(task), "a task of this shape");
    static State nowhere;
    return nowhere;
  }

  bool finished() const {
    return all([](const BackTask&) { return true; });
  }

  // The rules: whether a task's predecessors are done.
  bool ready(const BackTask& t) const {
    const auto has_steps = [&](const BackTask& o) {
      return o.kind == BackTask::kSteps && o.direction == t.direction && o.chunk == t.chunk;
    };
    const auto above = [&](const BackTask& o) {
      return o.kind == t.kind && o.direction == t.direction && o.chunk == t.chunk + 1 &&
             o.part == t.part;
    };
    switch (t.kind) {
      case BackTask::kSteps:
        return all([&](const BackTask& o) {
          return above(o) || (o.kind == BackTask::kWeights && o.direction == t.direction &&
                              o.chunk == t.chunk + shape_.copies);
        });
      case BackTask::kWeights:
        return all([&](const BackTask& o) { return above(o) || has_steps(o); });
      case BackTask::kInputs:
        // Tasks of one chunk and direction have rows of their own; with all others they share some.
        return all(has_steps) && none_in_hand([&](const BackTask& o) {
                 return o.kind == BackTask::kInputs &&
                        (o.direction != t.direction || o.chunk != t.chunk);
               });
    }
    return false;
  }

  // The tasks that are to be handed out next and can be done now. Weights of a direction go from
  // the last chunk to the first and from part to part; all inputs are one such line, whatever their
  // direction, since the sums in dx must not depend on who was faster; and the steps of every part
  // are one, since a part that is ready need not wait for another.
  std::vector<BackTask> possible() const {
    std::vector<BackTask> result;
    for (BackTask::Kind kind : kKinds)
      for (int d = 0; d < (kind == BackTask::kInputs ? 1 : shape_.directions); ++d)
        for (int part = 0; part < (kind == BackTask::kSteps ? shape_.steps : 1); ++part) {
          const auto next = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& entry) {
            return entry.state == kWaiting && entry.task.kind == kind &&
                   (kind == BackTask::kInputs || entry.task.direction == d) &&
                   (kind != BackTask::kSteps || entry.task.part == part);
          });
          if (next != entries_.end() && ready(next->task)) result.push_back(next->task);
        }
    return result;
  }

 private:
  struct Entry {
    BackTask task;
    State state;
  };

  template <class F>
  bool all(const F& of) const {
    return std::all_of(entries_.begin(), entries_.end(),
                       [&](const Entry& entry) { return !of(entry.task) || entry.state == kDone; });
  }
  template <class F>
  bool none_in_hand(const F& of) const {
    return std::none_of(entries_.begin(), entries_.end(), [&](const Entry& entry) {
      return entry.state == kInHand && of(entry.task);
    });
  }

  const Shape shape_;
  std::vector<Entry> entries_;  // from the last chunk to the first
};

// A task that was handed out is among the possible ones, and the right one of these: the steps,
// which make new work, are the last choice, and of two directions the one that is behind.
void check_choice(const BackTask& task, const std::vector<BackTask>& possible) {
  const auto is = [&](const BackTask& other) { return same(task, other); };
  if (std::none_of(possible.begin(), possible.end(), is)) {
    CHECK_EQ(text(task), "a task that can be done now");
    return;
  }
  if (task.kind != BackTask::kSteps) return;
  for (const BackTask& other : possible) {
    CHECK(other.kind == BackTask::kSteps);
    CHECK(other.chunk <= task.chunk);
  }
}

// While tasks are in hand, one is finished in `hold` of 8 turns, in the others one more is asked
// for: 0 has as many in hand as can be, 8 one.
void simulate(const Shape& shape, int hold, Random* random) {
  BackTasks tasks(shape);
  History history(shape);
  std::vector<BackTask> in_hand;
  for (;;) {
    CHECK_EQ(tasks.finished(), history.finished());
    if (history.finished()) break;
    if (in_hand.empty() || random->below(8) >= hold) {
      const std::vector<BackTask> possible = history.possible();
      BackTask task;
      if (tasks.take(&task)) {
        CHECK(history[task] == History::kWaiting);
        check_choice(task, possible);
        history[task] = History::kInHand;
        in_hand.push_back(task);
        continue;
      }
      CHECK(possible.empty());
      CHECK(!in_hand.empty());  // nobody would ever do anything
      if (in_hand.empty()) return;
    }
    const auto i = in_hand.begin() + random->below(static_cast<int>(in_hand.size()));
    CHECK(history[*i] == History::kInHand);
    history[*i] = History::kDone;
    tasks.done(*i);
    in_hand.erase(i);
  }
  CHECK(in_hand.empty());
  BackTask task;
  CHECK(!tasks.take(&task));
}

void test_edges() {
  Random random(1);
  for (int64_t first : {0, 3})
    for (int64_t chunks : {0, 1, 2})
      for (int directions : {1, 2})
        for (int inputs : {0, 1, 2})
          for (int copies : {1, 2, 3})
            for (int hold : {0, 4, 8})
              simulate({first, first + chunks, directions, 1, 1, inputs, copies}, hold, &random);
}

void test_random() {
  Random random(2);
  for (int trial = 0; trial < 1000; ++trial) {
    const Shape shape = random.shape(7);
    simulate(shape, random.below(9), &random);
  }
}

// CHECK_EQ, but without the counting: an atomic counter that all threads add to would order their
// memory accesses, and hide from ThreadSanitizer that nothing else does.
void expect(int64_t got, int64_t expected) {
  if (got != expected) CHECK_EQ(got, expected);
}

// What the tasks read and write, in plain memory; but for the counters, which order nothing either.
class Work {
 public:
  explicit Work(const Shape& shape)
      : shape_(shape),
        chunks_(static_cast<std::size_t>(shape.end_chunk - shape.first_chunk)),
        directions_(static_cast<std::size_t>(shape.directions)),
        dx_(static_cast<std::size_t>(shape.inputs)) {
    // No push_back of a race may move the others' memory away: the checks shall tell.
    for (Parts& terms : dx_) terms.reserve(2 * chunks_ * directions_.size());
    for (Direction& d : directions_) {
      d.state.resize(static_cast<std::size_t>(shape.steps), shape.end_chunk);
      d.gradient.resize(static_cast<std::size_t>(shape.weights), shape.end_chunk);
      d.scratch.resize(static_cast<std::size_t>(shape.copies), Parts(d.state.size(), -1));
      d.slab.resize(chunks_, Parts(d.state.size(), -1));
      d.counts = std::vector<Counts>(chunks_);
    }
  }

  void perform(const BackTask& task) {
    if (task.direction < 0 || task.direction >= shape_.directions ||
        task.chunk < shape_.first_chunk || task.chunk >= shape_.end_chunk || task.part < 0 ||
        task.part >= parts_of(shape_, task.kind)) {
      CHECK_EQ(text(task), "a task of this shape");
      return;
    }
    Direction& d = directions_[static_cast<std::size_t>(task.direction)];
    const std::size_t part = static_cast<std::size_t>(task.part);
    Counts& counts = d.counts[index(task.chunk)];
    if (task.kind == BackTask::kSteps) {
      const int64_t before = task.chunk + shape_.copies;
      if (before < shape_.end_chunk) expect(read(d.counts[index(before)].weights), shape_.weights);
      expect(d.state[part], task.chunk + 1);
      d.state[part] = task.chunk;
      d.slab[index(task.chunk)][part] = task.chunk;
      d.scratch[copy_of(task.chunk)][part] = task.chunk;
      add_one(counts.steps);
    } else if (task.kind == BackTask::kWeights) {
      expect(read(counts.steps), shape_.steps);
      expect(d.gradient[part], task.chunk + 1);
      d.gradient[part] = task.chunk;
      for (int64_t chunk : d.scratch[copy_of(task.chunk)]) expect(chunk, task.chunk);
      for (int64_t chunk : d.slab[index(task.chunk)]) expect(chunk, task.chunk);
      add_one(counts.weights);
    } else {
      expect(read(counts.steps), shape_.steps);
      for (int64_t chunk : d.slab[index(task.chunk)]) expect(chunk, task.chunk);
      // The same rows as another part of the other direction.
      dx_[task.direction == 0 ? part : dx_.size() - 1 - part].push_back(task.direction +
                                                                        2 * task.chunk);
      add_one(counts.inputs);
    }
  }

  // Every task was done once, and every row of dx got its terms in the same order.
  void check_finished() const {
    for (const Direction& d : directions_)
      for (const Counts& counts : d.counts) {
        CHECK_EQ(read(counts.steps), shape_.steps);
        CHECK_EQ(read(counts.weights), shape_.weights);
        CHECK_EQ(read(counts.inputs), shape_.inputs);
      }
    for (const Parts& terms : dx_) {
      CHECK_EQ(terms.size(), chunks_ * directions_.size());
      CHECK(terms == dx_[0]);
    }
  }

 private:
  using Parts = std::vector<int64_t>;
  struct Counts {
    std::atomic<int> steps{0}, weights{0}, inputs{0};
  };
  struct Direction {
    Parts state, gradient;             // by part: the chunk it has got to
    std::vector<Parts> scratch, slab;  // by copy or chunk, and part: the chunk that wrote to it
    std::vector<Counts> counts;        // by chunk
  };

  static int read(const std::atomic<int>& counter) {
    return counter.load(std::memory_order_relaxed);
  }
  static void add_one(std::atomic<int>& counter) {
    counter.fetch_add(1, std::memory_order_relaxed);
  }

  std::size_t index(int64_t chunk) const {
    return static_cast<std::size_t>(chunk - shape_.first_chunk);
  }
  std::size_t copy_of(int64_t chunk) const {
    return static_cast<std::size_t>(chunk % shape_.copies);
  }

  const Shape shape_;
  const std::size_t chunks_;
  std::vector<Direction> directions_;
  std::vector<Parts> dx_;  // by rows: what was added to them
};

constexpr unsigned kThreads = 4;

// False: the threads had to give up.
bool run_on_threads(const Shape& shape, unsigned seed) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  BackTasks tasks(shape);
  Work work(shape);
  std::atomic<int> late{0}, started{0};
  const auto worker = [&](unsigned rank) {
    Random random(kThreads * seed + rank);
    BackTask task;
    for (++started; started < static_cast<int>(kThreads);) std::this_thread::yield();
    while (!tasks.finished()) {
      if (std::chrono::steady_clock::now() > deadline) {
        ++late;
        return;
      }
      // Half of the threads wait as training does, with few pauses, so that some fall asleep.
      if (rank % 2 == 0 ? !tasks.take(&task) : !tasks.take_or_wait(&task, 64)) {
        std::this_thread::yield();
        continue;
      }
      if (random.below(4) == 0) std::this_thread::yield();
      work.perform(task);
      if (random.below(4) == 0) std::this_thread::yield();
      tasks.done(task);
    }
  };
  std::vector<std::thread> threads;
  for (unsigned rank = 0; rank < kThreads; ++rank) threads.emplace_back(worker, rank);
  for (std::thread& thread : threads) thread.join();
  CHECK_EQ(late.load(), 0);
  if (late > 0) return false;
  work.check_finished();
  return true;
}

void test_threads() {
  Random random(3);
  for (unsigned trial = 0; trial < 300; ++trial)
    if (!run_on_threads(random.shape(20), trial)) return;
}

}  // namespace

int main() {
  test_edges();
  test_random();
  test_threads();
  return check_report();
}
