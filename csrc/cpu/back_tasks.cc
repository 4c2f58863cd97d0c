#include "cpu/back_tasks.h"

#include <chrono>

#include "core/spin.h"

namespace fastrnn {
namespace {

// A waiting thread spins for as long as most tasks take: asleep, it would come late, since a thread
// takes that long to wake.
constexpr std::chrono::microseconds kSpin{2000}, kSleep{2000};

}  // namespace

BackTasks::BackTasks(const Shape& shape)
    : shape_(shape),
      input_chunk_(shape.end_chunk - 1),
      unfinished_((shape.end_chunk - shape.first_chunk) * shape.directions *
                  (shape.steps + shape.weights + shape.inputs)) {
  for (int d = 0; d < shape.directions; ++d)
    directions_.push_back({line(shape.steps), line(shape.weights), shape.end_chunk - 1});
}

BackTasks::Line BackTasks::line(int parts) const {
  return {std::vector<int64_t>(static_cast<size_t>(parts), shape_.end_chunk - 1),
          std::vector<char>(static_cast<size_t>(parts), 0),
          std::vector<int>(static_cast<size_t>(shape_.end_chunk - shape_.first_chunk), parts)};
}

int& BackTasks::left(Line& line, int64_t chunk) const {
  return line.left[static_cast<size_t>(chunk - shape_.first_chunk)];
}

// Of all directions the part that is least advanced.
bool BackTasks::take_steps(BackTask* task) {
  BackTask best = {BackTask::kSteps, 0, shape_.first_chunk - 1, 0};
  for (int d = 0; d < shape_.directions; ++d) {
    Direction& direction = directions_[static_cast<size_t>(d)];
    for (int part = 0; part < shape_.steps; ++part) {
      const int64_t chunk = direction.steps.next[static_cast<size_t>(part)];
      if (chunk <= best.chunk || direction.steps.in_hand[static_cast<size_t>(part)] != 0) continue;
      const int64_t before = chunk + shape_.copies;  // had the scratch
      if (before < shape_.end_chunk && left(direction.weights, before) > 0) continue;
      best = {BackTask::kSteps, d, chunk, part};
    }
  }
  if (best.chunk < shape_.first_chunk) return false;
  *task = best;
  Line& steps = directions_[static_cast<size_t>(best.direction)].steps;
  steps.in_hand[static_cast<size_t>(best.part)] = 1;
  return true;
}

bool BackTasks::take_weights(int d, BackTask* task) {
  Direction& direction = directions_[static_cast<size_t>(d)];
  const int64_t chunk = direction.weight_chunk;
  const int part = direction.weight_part;
  if (chunk < shape_.first_chunk || left(direction.steps, chunk) > 0) return false;
  if (direction.weights.in_hand[static_cast<size_t>(part)] != 0) return false;
  *task = {BackTask::kWeights, d, chunk, part};
  direction.weights.in_hand[static_cast<size_t>(part)] = 1;
  if (++direction.weight_part == shape_.weights) {
    direction.weight_part = 0;
    --direction.weight_chunk;
  }
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

bool BackTasks::find(BackTask* task) {
  for (int d = 0; d < shape_.directions; ++d)
    if (take_weights(d, task)) return true;
  return take_inputs(task) || take_steps(task);
}

bool BackTasks::take(BackTask* task) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return find(task);
}

bool BackTasks::take_or_wait(BackTask* task, int pauses) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (find(task)) return true;
  const int64_t unfinished = unfinished_.load(std::memory_order_relaxed);
  if (unfinished == 0) return false;
  lock.unlock();
  const auto same = [&] { return unfinished_.load(std::memory_order_acquire) == unfinished; };
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  for (Spin spin(pauses); same() && std::chrono::steady_clock::now() < deadline;) spin.wait();
  lock.lock();
  if (same()) {
    ++waiting_;
    changed_.wait_for(lock, kSleep);
    --waiting_;
  }
  return find(task);
}

void BackTasks::done(const BackTask& task) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (task.kind == BackTask::kInputs) {
    --inputs_in_hand_;
  } else {
    Direction& direction = directions_[static_cast<size_t>(task.direction)];
    Line& line = task.kind == BackTask::kSteps ? direction.steps : direction.weights;
    line.next[static_cast<size_t>(task.part)] = task.chunk - 1;
    line.in_hand[static_cast<size_t>(task.part)] = 0;
    --left(line, task.chunk);
  }
  unfinished_.fetch_sub(1, std::memory_order_release);
  if (waiting_ > 0) changed_.notify_all();
}

}  // namespace fastrnn
