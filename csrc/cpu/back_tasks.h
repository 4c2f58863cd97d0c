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
// The tasks of a kind are handed out in order, and steps last: what is left to do of a chunk is
// done while its slab is in cache. A thread that finds nothing of a chunk to do goes on to the one
// below instead of waiting for the others.
#ifndef FASTRNN_CPU_BACK_TASKS_H_
#define FASTRNN_CPU_BACK_TASKS_H_

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
  void done(const BackTask& task);
  bool finished();

 private:
  // The tasks of one kind are handed out in order: parts of a chunk, then those of the one below.
  struct Line {
    int64_t chunk;                  // of the next task
    int part = 0;                   //
    std::vector<int64_t> progress;  // by part: the chunk that was done last
    std::vector<int> left;          // by chunk: tasks not done yet
  };
  struct Direction {
    Line steps, weights;
  };

  Line line(int parts) const;
  int& left(Line& line, int64_t chunk) const;
  bool take_steps(int d, BackTask* task);
  bool take_weights(int d, BackTask* task);
  bool take_inputs(BackTask* task);
  static void advance(Line& line, int parts);

  const Shape shape_;
  std::mutex mutex_;
  std::vector<Direction> directions_;
  int64_t input_chunk_;  // of the next task for dx
  int input_direction_ = 0, input_part_ = 0, inputs_in_hand_ = 0;
  int64_t unfinished_;
};

}  // namespace fastrnn

#endif  // FASTRNN_CPU_BACK_TASKS_H_
