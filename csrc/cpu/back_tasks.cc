#include "cpu/back_tasks.h"

#include <algorithm>

namespace fastrnn {

BackTasks::BackTasks(const Shape& shape)
    : shape_(shape),
      input_chunk_(shape.end_chunk - 1),
      unfinished_((shape.end_chunk - shape.first_chunk) * shape.directions *
                  (shape.steps + shape.weights + shape.inputs)) {
  for (int d = 0; d < shape.directions; ++d)
    directions_.push_back({line(shape.steps), line(shape.weights)});
}

BackTasks::Line BackTasks::line(int parts) const {
  Line fresh;
  fresh.chunk = shape_.end_chunk - 1;
  fresh.progress.assign(static_cast<size_t>(parts), shape_.end_chunk);
  fresh.left.assign(static_cast<size_t>(shape_.end_chunk - shape_.first_chunk), parts);
  return fresh;
}

int& BackTasks::left(Line& line, int64_t chunk) const {
  return line.left[static_cast<size_t>(chunk - shape_.first_chunk)];
}

void BackTasks::advance(Line& line, int parts) {
  if (++line.part < parts) return;
  line.part = 0;
  --line.chunk;
}

bool BackTasks::take_steps(int d, BackTask* task) {
  Direction& direction = directions_[static_cast<size_t>(d)];
  Line& steps = direction.steps;
  if (steps.chunk < shape_.first_chunk) return false;
  if (steps.progress[static_cast<size_t>(steps.part)] != steps.chunk + 1) return false;
  const int64_t before = steps.chunk + shape_.copies;  // had the scratch
  if (before < shape_.end_chunk && left(direction.weights, before) > 0) return false;
  *task = {BackTask::kSteps, d, steps.chunk, steps.part};
  advance(steps, shape_.steps);
  return true;
}

bool BackTasks::take_weights(int d, BackTask* task) {
  Direction& direction = directions_[static_cast<size_t>(d)];
  Line& weights = direction.weights;
  if (weights.chunk < shape_.first_chunk || left(direction.steps, weights.chunk) > 0) return false;
  if (weights.progress[static_cast<size_t>(weights.part)] != weights.chunk + 1) return false;
  *task = {BackTask::kWeights, d, weights.chunk, weights.part};
  advance(weights, shape_.weights);
  return true;
}

bool BackTasks::take_inputs(BackTask* task) {
  if (shape_.inputs == 0 || input_chunk_ < shape_.first_chunk) return false;
  if (input_part_ == 0 && inputs_in_hand_ > 0) return false;
  if (left(directions_[static_cast<size_t>(input_direction_)].steps, input_chunk_) > 0)
    return false;
  *task = {BackTask::kInputs, input_direction_, input_chunk_, input_part_};
  ++inputs_in_hand_;
  if (++input_part_ == shape_.inputs) {
    input_part_ = 0;
    if (++input_direction_ == shape_.directions) {
      input_direction_ = 0;
      --input_chunk_;
    }
  }
  return true;
}

bool BackTasks::take(BackTask* task) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (int d = 0; d < shape_.directions; ++d)
    if (take_weights(d, task)) return true;
  if (take_inputs(task)) return true;
  // The direction that is least advanced first.
  const bool second =
      shape_.directions > 1 && directions_[1].steps.chunk > directions_[0].steps.chunk;
  if (take_steps(second ? 1 : 0, task)) return true;
  return shape_.directions > 1 && take_steps(second ? 0 : 1, task);
}

void BackTasks::done(const BackTask& task) {
  const std::lock_guard<std::mutex> lock(mutex_);
  --unfinished_;
  if (task.kind == BackTask::kInputs) {
    --inputs_in_hand_;
    return;
  }
  Direction& direction = directions_[static_cast<size_t>(task.direction)];
  Line& line = task.kind == BackTask::kSteps ? direction.steps : direction.weights;
  line.progress[static_cast<size_t>(task.part)] = task.chunk;
  --left(line, task.chunk);
}

bool BackTasks::finished() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return unfinished_ == 0;
}

}  // namespace fastrnn
