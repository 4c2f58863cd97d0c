// Streaming: the recurrence one step at a time. Everything is laid out at construction, so that a
// step is the kernels' own time and little else; the bits are those of the whole sequence in one
// call.
#include <algorithm>

#include "core/fpenv.h"
#include "cpu/layer.h"
#include "cpu/stack.h"

namespace fastrnn {

template <class T>
struct StackStream<T>::State {
  std::shared_ptr<const PackedStack<T>> stack;
  int64_t batch;
  Buffer
      memory;  // h, then c, of all layers; then the outputs between layers. First: it fails early
  ScheduleBuilder schedule;  // one step of all rows
  std::vector<LayerForward<T>> layers;

  const StackSpec& spec() const { return stack->spec(); }
  int width() const { return stack->kernels().width; }
  int64_t state_size() const { return ceil_div(spec().H, width()) * batch * width(); }
  T* h(int index) { return memory.template data<T>() + index * state_size(); }
  T* c(int index) { return h(spec().count() + index); }

  size_t states() const {
    return checked_mul(2, static_cast<size_t>(spec().count()),
                       static_cast<size_t>(ceil_div(spec().H, width()) * width()),
                       static_cast<size_t>(batch));
  }

  State(std::shared_ptr<const PackedStack<T>> s, int64_t B)
      : stack(std::move(s)),
        batch(B),
        memory(checked_mul(checked_add(states(), checked_mul(2, static_cast<size_t>(B),
                                                             static_cast<size_t>(stack->spec().H))),
                           sizeof(T))),
        schedule(1, B, nullptr, B) {
    const int64_t H = spec().H;
    std::memset(memory.data(), 0, memory.size());
    T* const y = memory.template data<T>() + states();
    for (int l = 0; l < spec().layers; ++l) {
      ForwardArgs<T> a = {};
      a.I = spec().input_size(l);
      a.H = H;
      a.schedule = &schedule.get();
      a.input = {l == 0 ? nullptr : y + (l - 1) % 2 * B * H, nullptr, {0, H, nullptr}, {}};
      a.weights = stack->layer(l, 0);
      a.h = h(l);
      a.c = cell_traits(spec().kind).has_cell ? c(l) : nullptr;
      a.state_rows = B;
      a.y = y + l % 2 * B * H;
      a.y_layout = {0, H, nullptr};
      layers.emplace_back(stack->kernels(), spec().kind, std::vector<ForwardArgs<T>>{a}, schedule,
                          get_num_threads());
    }
  }
};

template <class T>
StackStream<T>::StackStream(std::shared_ptr<const PackedStack<T>> stack, int64_t batch)
    : state_(new State(std::move(stack), batch)) {}

template <class T>
StackStream<T>::~StackStream() = default;

template <class T>
void StackStream<T>::step(const T* x, const int64_t* ids, int64_t stride_b, T* y,
                          Interrupt* interrupt) {
  const FpEnv env;
  ForwardArgs<T>& first = state_->layers.front().directions()[0];
  first.input.x = x;
  first.input.ids = ids;
  first.input.layout.stride_b = stride_b;
  state_->layers.back().directions()[0].y = y;
  for (LayerForward<T>& layer : state_->layers) {
    layer.directions()[0].interrupt = interrupt;
    layer.run(0, 1, interrupt);
  }
}

template <class T>
void StackStream<T>::get_state(T* h, T* c) const {
  State& s = *state_;
  for (int i = 0; i < s.spec().count(); ++i) {
    store_state(s.h(i), i, s.schedule.get().order, s.batch, s.spec().H, s.width(), h);
    if (c != nullptr)
      store_state(s.c(i), i, s.schedule.get().order, s.batch, s.spec().H, s.width(), c);
  }
}

template <class T>
void StackStream<T>::set_state(const T* h, const T* c) {
  State& s = *state_;
  for (int i = 0; i < s.spec().count(); ++i) {
    load_state(h, i, s.schedule.get().order, s.batch, s.spec().H, s.width(), s.h(i));
    load_state(c, i, s.schedule.get().order, s.batch, s.spec().H, s.width(), s.c(i));
  }
}

template <class T>
void StackStream<T>::reset_row(int64_t row) {
  State& s = *state_;
  const int W = s.width();
  const int64_t panels = s.spec().count() * 2 * ceil_div(s.spec().H, W);
  T* const base = s.memory.template data<T>();
  for (int64_t p = 0; p < panels; ++p)
    std::memset(base + (p * s.batch + row) * W, 0, sizeof(T) * static_cast<size_t>(W));
}

template <class T>
const StackSpec& StackStream<T>::spec() const {
  return state_->spec();
}

template <class T>
int64_t StackStream<T>::batch() const {
  return state_->batch;
}

template class StackStream<float>;
template class StackStream<double>;

}  // namespace fastrnn
