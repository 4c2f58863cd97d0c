// Who does what next in a layer's way back through its chunks. Three kinds of tasks for every chunk
// and direction, from the last chunk to the first:
//
//   steps     the recurrence of a part of the rows. After: the same part in the chunk above, and
//             the weights of the chunk whose scratch it takes over.
//   weights   some panels of the weights' gradients. After: all steps of the chunk, and the same
//             panels of the chunk above, since a gradient is one chain over all steps.
//   inputs    some rows of dx. After: all steps of the chunk, and all inputs of the chunk and
//             direction before: two directions add to the same rows.
//
// Steps are handed out last, so that what is left to do of a chunk is done while its slab is in
// cache, and of those that can be done the least advanced part's; weights and inputs in order. A
// thread that finds nothing of a chunk to do goes on to the one below instead of waiting for the
// others.
#ifndef FASTRNN_CPU_BACK_TASKS_H_
#define FASTRNN_CPU_BACK_TASKS_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

namespace fastrnn {

struct BackTask {
  enum Kind { kSteps, kWeights, kInputs };
  Kind kind;
  int direction;
  int64_t chunk;
  int part;
};

class BackTasks {
 public:
  // The chunks first_chunk … end_chunk - 1; inputs may be 0 (dx is not wanted). copies: chunks that
  // the steps' scratch has room for.
  struct Shape {
    int64_t first_chunk, end_chunk;
    int directions, steps, weights, inputs, copies;
  };
  explicit BackTasks(const Shape& shape);

  // Whether there is a task that can be done now, and which. Whoever takes it says when it is done.
  bool take(BackTask* task);
  // The same, or after a wait: until another task is done, and some milliseconds at most. It spins,
  // with so many pauses before it offers its processor to others (core/spin.h), and then sleeps.
  bool take_or_wait(BackTask* task, int pauses);
  void done(const BackTask& task);
  bool finished() const { return unfinished_.load(std::memory_order_acquire) == 0; }

 private:
  struct Line {
    std::vector<int64_t> next;  // by part: the chunk of its next task
    std::vector<char> in_hand;  // by part
    std::vector<int> left;      // by chunk: tasks not done yet
  };
  struct Direction {
    Line steps, weights;
    int64_t weight_chunk;  // of the next task of that kind
    int weight_part = 0;
  };

  Line line(int parts) const;
  int& left(Line& line, int64_t chunk) const;
  bool find(BackTask* task);
  bool take_steps(BackTask* task);
  bool take_weights(int d, BackTask* task);
  bool take_inputs(BackTask* task);

  const Shape shape_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int waiting_ = 0;
  std::vector<Direction> directions_;
  int64_t input_chunk_;  // of the next task for dx
  int input_direction_ = 0, input_part_ = 0, inputs_in_hand_ = 0;
  std::atomic<int64_t> unfinished_;  // changes with every task that is done
};

}  // namespace fastrnn

#endif  // FASTRNN_CPU_BACK_TASKS_H_
