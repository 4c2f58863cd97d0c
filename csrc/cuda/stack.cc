#include "cuda/stack.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cells/dropout.h"
#include "cuda/cluster.h"
#include "cuda/grid.h"
#include "cuda/products.h"
#include "cuda/step.h"

namespace fastrnn {
namespace cuda {

namespace {

template <class S>
constexpr bool kSixteenBit = sizeof(S) == 2;

// Rows whose input products are in memory at once: 128 MiB of float32.
constexpr int64_t kMostGateInputs = int64_t{1} << 25;

void poll(Interrupt* interrupt) {
  if (interrupt == nullptr) return;
  interrupt->poll();
  if (interrupt->stop()) throw Interrupted();
}

template <class S>
void run_forward(Family family, const RecurrenceShape& shape, const Steps& steps,
                 const ForwardRecurrence<S>* directions, Stream stream) {
  if constexpr (kSixteenBit<S>) {
    if (family == Family::kCluster) return cluster::forward<S>(shape, steps, directions, stream);
    if (family == Family::kGrid) return grid::forward<S>(shape, steps, directions, stream);
  }
  (void)family;
  step::forward<S>(shape, steps, directions, stream);
}

template <class S>
void run_backward(Family family, const RecurrenceShape& shape, const Steps& steps,
                  const BackwardRecurrence<S>* directions, S* const* rh_rows, Stream stream) {
  if constexpr (kSixteenBit<S>) {
    if (family == Family::kCluster) return cluster::backward<S>(shape, steps, directions, stream);
    if (family == Family::kGrid) return grid::backward<S>(shape, steps, directions, stream);
  }
  (void)family;
  step::backward<S>(shape, steps, directions, rh_rows, stream);
}

template <class T>
Memory zeros(int64_t n, Stream stream) {
  Memory memory = allocate<T>(n, stream);
  fill_bytes(memory.data(), 0, memory.bytes(), stream);
  return memory;
}

template <class T>
Memory copy_of(const T* from, int64_t n, Stream stream) {
  Memory memory = allocate<T>(n, stream);
  copy_on_device(memory.data(), from, memory.bytes(), stream);
  return memory;
}

// While a call uses memory that others share: however the call ends, the memory is not given back
// before its work is done.
class SharedUse {
 public:
  explicit SharedUse(Stream stream) : stream_(stream) {}
  ~SharedUse() {
    try {
      wait_for(keeper(), stream_);
    } catch (const std::exception&) {  // the device has failed: nothing runs on it any more
    }
  }
  SharedUse(const SharedUse&) = delete;
  SharedUse& operator=(const SharedUse&) = delete;

 private:
  const Stream stream_;
};

// Of the layer `layer`, which reads the outputs of the one below.
Dropout dropout_into(int layer, double p, uint64_t key) {
  if (layer == 0 || p == 0) return {0, 0, 1};
  // As on the CPU: p * 2^53 is exact, and rounding it up is that of the real number.
  return {scalar::splitmix64(key + static_cast<uint64_t>(layer)),
          static_cast<uint64_t>(std::ceil(std::ldexp(p, 53))), 1.0 / (1.0 - p)};
}

}  // namespace

// --- Weights
// --------------------------------------------------------------------------------------

template <class S>
DeviceStack<S>::DeviceStack(const StackSpec& spec, Precision precision,
                            const std::vector<DeviceWeights<A>>& weights, Stream stream)
    : spec_(spec), precision_(precision) {
  const GateSlots slots = gate_slots(spec.kind);
  const int64_t H = spec.H, rows = slots.gates * H;
  for (int l = 0; l < spec.layers; ++l) {
    for (int d = 0; d < spec.directions; ++d) {
      const DeviceWeights<A>& w = weights[static_cast<size_t>(spec.index(l, d))];
      const int64_t n_ih = rows * spec.input_size(l), n_hh = rows * H;
      Layer layer = {};
      layer.weights = allocate<A>(n_ih + n_hh + rows + H * slots.slots, stream);
      A* const w_ih = layer.weights.template data<A>();
      A* const w_hh = w_ih + n_ih;
      A* const gate_bias = w_hh + n_hh;
      A* const state_bias = gate_bias + rows;
      copy_on_device(w_ih, w.w_ih, static_cast<size_t>(n_ih) * sizeof(A), stream);
      copy_on_device(w_hh, w.w_hh, static_cast<size_t>(n_hh) * sizeof(A), stream);
      pack_bias<A>(stream, slots, H, w.b_ih, w.b_hh, gate_bias, state_bias);
      layer.w_ih = w_ih;
      layer.w_hh = w_hh;
      layer.gate_bias = gate_bias;
      layer.state_bias = state_bias;
      layers_.push_back(std::move(layer));
    }
  }
  made_ = Event(stream);
  made_.wait(keeper());
  for (Layer& layer : layers_) layer.weights.give_back_on(keeper());
}

template <class S>
size_t DeviceStack<S>::bytes() const {
  size_t total = 0;
  for (const Layer& layer : layers_) total += layer.weights.bytes();
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& form : packed_) total += form.second.memory.bytes();
  return total;
}

template <class S>
template <class Make>
const S* DeviceStack<S>::packed(int index, int form, int64_t elements, Stream stream,
                                const Make& make) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  made_.wait(stream);
  const auto key = std::make_pair(index, form);
  auto found = packed_.find(key);
  if (found == packed_.end()) {
    Memory memory = allocate<S>(elements, stream);
    make(memory.template data<S>());
    Event made(stream);
    found = packed_.emplace(key, Form{std::move(memory), std::move(made)}).first;
    found->second.memory.give_back_on(keeper());
  } else {
    found->second.made.wait(stream);
  }
  return found->second.memory.template data<S>();
}

template <class S>
const S* DeviceStack<S>::input_weights(int index, bool backward, Stream stream) const {
  const GateSlots slots = gate_slots(spec_.kind);
  const int64_t I = spec_.input_size(index / spec_.directions);
  const int64_t rows = spec_.H * (backward ? slots.slots : slots.gates);
  return packed(index, backward ? 1 : 0, rows * I, stream, [&](S* out) {
    pack_input<S>(stream, slots, spec_.H, I, layers_[static_cast<size_t>(index)].w_ih, backward,
                  out);
  });
}

template <class S>
const S* DeviceStack<S>::state_weights(int index, const RecurrenceShape& shape, Family family,
                                       bool backward, Stream stream) const {
  const A* const w_hh = layers_[static_cast<size_t>(index)].w_hh;
  const int form = 2 + 2 * static_cast<int>(family) + (backward ? 1 : 0);
  if constexpr (kSixteenBit<S>) {
    if (family == Family::kCluster)
      return packed(index, form, cluster::packed_elements(shape, backward), stream,
                    [&](S* out) { cluster::pack<S>(shape, w_hh, backward, out, stream); });
    if (family == Family::kGrid)
      return packed(index, form, grid::packed_elements(shape, backward), stream,
                    [&](S* out) { grid::pack<S>(shape, w_hh, backward, out, stream); });
  }
  const int64_t elements = cell_traits(spec_.kind).gates * spec_.H * spec_.H;
  return packed(index, form, elements, stream,
                [&](S* out) { step::pack<S>(shape, w_hh, backward, out, stream); });
}

template <class S>
const Accumulator<S>* DeviceStack<S>::gate_bias(int index) const {
  return layers_[static_cast<size_t>(index)].gate_bias;
}
template <class S>
const Accumulator<S>* DeviceStack<S>::state_bias(int index) const {
  return layers_[static_cast<size_t>(index)].state_bias;
}
template <class S>
RecurrenceShape DeviceStack<S>::shape(int64_t B) const {
  return {spec_.kind, precision_, spec_.H, B, spec_.directions};
}

// --- A layer forward
// ------------------------------------------------------------------------------

namespace {

// One direction of one layer: what its recurrence reads and leaves.
template <class S>
struct Direction {
  Memory x_rows;                 // [N][I], of the first layer in training
  Memory h_rows;                 // [N][H]
  Memory gates, c_rows;          // [rows][H][slots], [rows][H] of what was run last, in training
  Memory h0, c0;                 // [B][H] the initial state, in processing order
  Memory h, c;                   // [B][H] the running state
  std::vector<Memory> c_before;  // [B][H] of each segment, with checkpoints
};

template <class S>
using Layer = std::vector<Direction<S>>;

// A call's view of the network: the same for all layers.
template <class S>
struct Pass {
  using A = Accumulator<S>;
  const DeviceStack<S>& stack;
  const DeviceCall<S>& call;
  const DeviceSchedule& schedule;
  RecurrenceShape shape;
  Family family;
  GateSlots slots;
  Memory reset_rows[kMaxDirections];

  Pass(const DeviceStack<S>& of_stack, const DeviceCall<S>& of_call,
       const DeviceSchedule& of_schedule)
      : stack(of_stack),
        call(of_call),
        schedule(of_schedule),
        shape(of_stack.shape(of_call.batch)),
        family(planned_family(shape)),
        slots(gate_slots(of_stack.spec().kind)) {
    if (call.reset == nullptr) return;
    for (int d = 0; d < stack.spec().directions; ++d) {
      reset_rows[d] = Memory(static_cast<size_t>(schedule.map().N), call.stream);
      gather_resets(call.stream, schedule.map(), d == 1, call.reset, call.reset_layout,
                    reset_rows[d].template data<uint8_t>());
    }
  }

  int64_t steps() const { return static_cast<int64_t>(schedule.first().size()) - 1; }
  int64_t row(int64_t k) const { return schedule.first()[static_cast<size_t>(k)]; }
  const uint8_t* resets(int d, int64_t k) const {
    const uint8_t* const rows = reset_rows[d].template data<uint8_t>();
    return rows == nullptr ? nullptr : rows + row(k);
  }
  bool two_phase() const { return cell_traits(stack.spec().kind).two_phase; }
  bool has_cell() const { return cell_traits(stack.spec().kind).has_cell; }
};

// The input rows r0 ... r1 - 1 of direction d: those that are kept, or gathered into `scratch`.
template <class S>
const S* input_rows(const Pass<S>& pass, int layer, const Layer<S>* below, const Direction<S>& of,
                    int d, int64_t r0, int64_t r1, Memory& scratch) {
  const StackSpec& spec = pass.stack.spec();
  const int64_t I = spec.input_size(layer);
  const Stream stream = pass.call.stream;
  if (of.x_rows.data() != nullptr) return of.x_rows.template data<S>() + r0 * I;
  scratch = allocate<S>((r1 - r0) * I, stream);
  if (below == nullptr) {
    gather_input<S>(stream, pass.schedule.map(), d == 1, r0, r1, I, pass.call.x,
                    scratch.template data<S>());
  } else {
    const S* h_rows[kMaxDirections] = {};
    for (int e = 0; e < spec.directions; ++e)
      h_rows[e] = (*below)[static_cast<size_t>(e)].h_rows.template data<S>();
    gather_below<S>(stream, pass.schedule.map(), d == 1, r0, r1, spec.H, spec.directions, h_rows,
                    dropout_into(layer, pass.call.dropout, pass.call.dropout_key),
                    scratch.template data<S>());
  }
  return scratch.template data<S>();
}

// gx [rows][H][G] = b + W_ih x of steps k0 ... k1 - 1.
template <class S>
Memory gate_inputs(const Pass<S>& pass, int layer, const Layer<S>* below, const Direction<S>& of,
                   int d, int64_t k0, int64_t k1) {
  using A = Accumulator<S>;
  const StackSpec& spec = pass.stack.spec();
  const Stream stream = pass.call.stream;
  const int index = spec.index(layer, d);
  const int64_t columns = spec.H * pass.slots.gates, r0 = pass.row(k0), r1 = pass.row(k1);
  Memory gx = allocate<A>((r1 - r0) * columns, stream);
  const S* const weights = pass.stack.input_weights(index, false, stream);
  const A* const bias = pass.stack.gate_bias(index);
  if (layer == 0 && pass.call.ids != nullptr) {
    pick_rows<S>(stream, pass.schedule.map(), d == 1, r0, r1, columns, pass.call.ids,
                 pass.call.ids_layout, weights, bias, gx.template data<A>());
    return gx;
  }
  Memory scratch;
  const S* const x = input_rows(pass, layer, below, of, d, r0, r1, scratch);
  product<S>(stream, pass.stack.precision(), r1 - r0, columns, spec.input_size(layer), x, weights,
             Start::kBias, bias, gx.template data<A>());
  return gx;
}

// Steps k0 ... k1 - 1 of a layer. What a tape needs goes to `gates` and `c_rows`, which hold these
// steps' rows; in inference they are empty.
template <class S>
void run_steps(const Pass<S>& pass, int layer, const Layer<S>* below, Layer<S>& at, int64_t k0,
               int64_t k1) {
  using A = Accumulator<S>;
  const StackSpec& spec = pass.stack.spec();
  const Stream stream = pass.call.stream;
  const int64_t H = spec.H, slots = pass.slots.slots, start = pass.row(k0);
  const int64_t most_rows = std::max<int64_t>(1, kMostGateInputs / (H * pass.slots.gates));
  for (int64_t k = k0; k < k1;) {
    int64_t end = k + 1;
    while (end < k1 && pass.row(end + 1) - pass.row(k) <= most_rows) ++end;
    const int64_t row = pass.row(k), rows = pass.row(end) - row;
    ForwardRecurrence<S> directions[kMaxDirections] = {};
    Memory gx[kMaxDirections], two_phase_gates[kMaxDirections];
    for (int d = 0; d < spec.directions; ++d) {
      Direction<S>& of = at[static_cast<size_t>(d)];
      gx[d] = gate_inputs(pass, layer, below, of, d, k, end);
      ForwardRecurrence<S>& r = directions[d];
      const int index = spec.index(layer, d);
      r.gx = gx[d].template data<A>();
      r.bias = pass.stack.state_bias(index);
      r.w = pass.stack.state_weights(index, pass.shape, pass.family, false, stream);
      r.reset = pass.resets(d, k);
      r.h = of.h.template data<S>();
      r.c = of.c.template data<A>();
      r.h_rows = of.h_rows.template data<S>() + row * H;
      if (of.gates.data() != nullptr)
        r.gates = of.gates.template data<S>() + (row - start) * H * slots;
      if (of.c_rows.data() != nullptr) r.c_rows = of.c_rows.template data<A>() + (row - start) * H;
      if (pass.two_phase() && r.gates == nullptr) {
        two_phase_gates[d] = allocate<S>(rows * H * slots, stream);
        r.gates = two_phase_gates[d].template data<S>();
      }
    }
    run_forward<S>(pass.family, pass.shape, pass.schedule.steps(k, end), directions, stream);
    poll(pass.call.interrupt);
    k = end;
  }
}

// Memory of a layer's directions, and the initial states.
template <class S>
Layer<S> make_layer(const Pass<S>& pass, int layer) {
  using A = Accumulator<S>;
  const StackSpec& spec = pass.stack.spec();
  const Stream stream = pass.call.stream;
  const int64_t states = pass.call.batch * spec.H;
  Layer<S> at(static_cast<size_t>(spec.directions));
  for (int d = 0; d < spec.directions; ++d) {
    Direction<S>& of = at[static_cast<size_t>(d)];
    const int64_t offset = spec.index(layer, d) * states;
    of.h_rows = allocate<S>(pass.schedule.map().N * spec.H, stream);
    of.h = allocate<S>(states, stream);
    load_state<S>(stream, pass.schedule.map(), spec.H,
                  pass.call.h0 == nullptr ? nullptr : pass.call.h0 + offset,
                  of.h.template data<S>());
    if (!pass.has_cell()) continue;
    of.c = allocate<A>(states, stream);
    load_state<A>(stream, pass.schedule.map(), spec.H,
                  pass.call.c0 == nullptr ? nullptr : pass.call.c0 + offset,
                  of.c.template data<A>());
  }
  return at;
}

template <class S>
void store_final_states(const Pass<S>& pass, int layer, const Layer<S>& at) {
  using A = Accumulator<S>;
  const StackSpec& spec = pass.stack.spec();
  for (int d = 0; d < spec.directions; ++d) {
    const Direction<S>& of = at[static_cast<size_t>(d)];
    const int64_t offset = spec.index(layer, d) * pass.call.batch * spec.H;
    store_state<S>(pass.call.stream, pass.schedule.map(), spec.H, of.h.template data<S>(),
                   pass.call.hn + offset);
    if (pass.has_cell())
      store_state<A>(pass.call.stream, pass.schedule.map(), spec.H, of.c.template data<A>(),
                     pass.call.cn + offset);
  }
}

template <class S>
void write_output(const Pass<S>& pass, const Layer<S>& at) {
  const StackSpec& spec = pass.stack.spec();
  const Stream stream = pass.call.stream;
  for (int d = 0; d < spec.directions; ++d)
    scatter_output<S>(stream, pass.schedule.map(), d == 1, 0, pass.schedule.map().N, spec.H,
                      d * spec.H, at[static_cast<size_t>(d)].h_rows.template data<S>(),
                      pass.call.y);
  zero_padding(stream, pass.schedule.map(), spec.H * spec.directions, pass.call.y);
}

}  // namespace

template <class S>
void device_forward(const DeviceStack<S>& stack, const DeviceCall<S>& call) {
  const SharedUse use(call.stream);
  const DeviceSchedule schedule(call.steps, call.batch, call.lengths, call.stream);
  const Pass<S> pass(stack, call, schedule);
  Layer<S> below, at;
  for (int l = 0; l < stack.spec().layers; ++l) {
    at = make_layer(pass, l);
    run_steps(pass, l, l == 0 ? nullptr : &below, at, 0, pass.steps());
    store_final_states(pass, l, at);
    below = std::move(at);
  }
  write_output(pass, below);
}

// --- Training
// -------------------------------------------------------------------------------------

template <class S>
struct DeviceTape<S>::State {
  std::shared_ptr<const DeviceStack<S>> stack;
  DeviceCall<S> call;
  std::unique_ptr<DeviceSchedule> schedule;
  std::unique_ptr<Pass<S>> pass;
  std::vector<Layer<S>> layers;
  std::vector<int64_t> segments;  // their first steps, and the number of steps
  Event made;                     // by the forward pass

  bool checkpoints() const { return call.checkpoint_every > 0; }

  // From here on the memory is used, and given back, in the order of this stream.
  void hand_over(Stream stream) {
    made.wait(stream);
    call.stream = stream;
    schedule->give_back_on(stream);
    for (Memory& rows : pass->reset_rows) rows.give_back_on(stream);
    for (Layer<S>& layer : layers) {
      for (Direction<S>& of : layer) {
        for (Memory* memory :
             {&of.x_rows, &of.h_rows, &of.gates, &of.c_rows, &of.h0, &of.c0, &of.h, &of.c})
          memory->give_back_on(stream);
        for (Memory& c : of.c_before) c.give_back_on(stream);
      }
    }
  }
};

namespace {

// The state before step k0, in processing order: the initial one, or rows of the step before.
template <class S>
const S* h_before(const Pass<S>& pass, const Direction<S>& of, int64_t k0) {
  if (k0 == 0) return of.h0.template data<S>();
  return of.h_rows.template data<S>() + pass.row(k0 - 1) * pass.stack.spec().H;
}

// Room for what the cell keeps in the steps k0 ... k1 - 1.
template <class S>
void make_room(const Pass<S>& pass, Layer<S>& at, int64_t k0, int64_t k1) {
  using A = Accumulator<S>;
  const int64_t elements = (pass.row(k1) - pass.row(k0)) * pass.stack.spec().H;
  for (Direction<S>& of : at) {
    of.gates = Memory();  // first, so that the same memory can be taken again
    of.c_rows = Memory();
    of.gates = allocate<S>(elements * pass.slots.slots, pass.call.stream);
    if (pass.has_cell()) of.c_rows = allocate<A>(elements, pass.call.stream);
  }
}

// Runs segment k0 ... k1 - 1 of a layer again, from its checkpoint.
template <class S>
void rerun(const Pass<S>& pass, int layer, const Layer<S>* below, Layer<S>& at, size_t segment,
           int64_t k0, int64_t k1) {
  using A = Accumulator<S>;
  const int64_t H = pass.stack.spec().H, rows = pass.row(k0 + 1) - pass.row(k0);
  make_room(pass, at, k0, k1);
  for (Direction<S>& of : at) {
    copy_on_device(of.h.data(), h_before(pass, of, k0), static_cast<size_t>(rows * H) * sizeof(S),
                   pass.call.stream);
    if (pass.has_cell())
      copy_on_device(of.c.data(), of.c_before[segment].data(),
                     static_cast<size_t>(rows * H) * sizeof(A), pass.call.stream);
  }
  run_steps(pass, layer, below, at, k0, k1);
}

// The tokens of rows r0 ... r1 - 1, sorted: rows with equal tokens next to each other, in order.
struct TokenRows {
  std::vector<int32_t> rows;
  std::vector<int64_t> begin, token;
};

TokenRows sort_tokens(const DeviceSchedule& schedule, bool reverse, int64_t k0, int64_t k1,
                      const std::vector<int64_t>& ids, const DeviceLayout& host_layout) {
  std::vector<std::pair<int64_t, int32_t>> tokens;
  int32_t row = 0;
  for (int64_t k = k0; k < k1; ++k) {
    const auto step = static_cast<size_t>(k);
    const int64_t active = schedule.first()[step + 1] - schedule.first()[step];
    for (int64_t j = 0; j < active; ++j) {
      const auto at = static_cast<size_t>(j);
      const int64_t t = reverse ? schedule.lengths()[at] - 1 - k : k;
      const int64_t place = host_layout.at(t, schedule.order()[at]);
      tokens.emplace_back(ids[static_cast<size_t>(place)], row++);
    }
  }
  std::sort(tokens.begin(), tokens.end());
  TokenRows sorted;
  for (const auto& [token, at] : tokens) {
    if (sorted.token.empty() || sorted.token.back() != token) {
      sorted.begin.push_back(static_cast<int64_t>(sorted.rows.size()));
      sorted.token.push_back(token);
    }
    sorted.rows.push_back(at);
  }
  sorted.begin.push_back(static_cast<int64_t>(sorted.rows.size()));
  return sorted;
}

template <class T>
Memory uploaded(const std::vector<T>& values, Stream stream) {
  Memory memory(values.size() * sizeof(T), stream);
  if (!values.empty()) copy_to_device(memory.data(), values.data(), memory.bytes(), stream);
  return memory;
}

// The gradients of one direction's parameters, summed over the segments as the products leave them:
// by slots, not yet by gates.
template <class S>
struct SlotSums {
  using A = Accumulator<S>;
  Memory w_ih, w_hh, w_rh;  // [H*slots][I], [H*slots][H], the same for r * h
  Memory bias;              // [H*slots]

  SlotSums(const Pass<S>& pass, int layer) {
    const StackSpec& spec = pass.stack.spec();
    const Stream stream = pass.call.stream;
    const int64_t columns = spec.H * pass.slots.slots;
    if (layer > 0 || pass.call.ids == nullptr)
      w_ih = zeros<A>(columns * spec.input_size(layer), stream);
    w_hh = zeros<A>(columns * spec.H, stream);
    if (pass.two_phase()) w_rh = zeros<A>(columns * spec.H, stream);
    bias = zeros<A>(columns, stream);
  }

  void add_to(const Pass<S>& pass, int layer, const DeviceGradients<A>& g) const {
    const GateSlots& slots = pass.slots;
    const StackSpec& spec = pass.stack.spec();
    const Stream stream = pass.call.stream;
    const int64_t H = spec.H;
    const int of_h = pass.two_phase() ? 2 : slots.gates;  // gates whose product is with h itself
    if (w_ih.data() != nullptr)
      add_gate_rows<A>(stream, slots, slots.input, 0, slots.gates, H, spec.input_size(layer),
                       w_ih.template data<A>(), g.w_ih);
    add_gate_rows<A>(stream, slots, slots.state, 0, of_h, H, H, w_hh.template data<A>(), g.w_hh);
    if (pass.two_phase())
      add_gate_rows<A>(stream, slots, slots.state, 2, 3, H, H, w_rh.template data<A>(), g.w_hh);
    if (g.b_ih == nullptr) return;
    add_gate_rows<A>(stream, slots, slots.input, 0, slots.gates, H, 1, bias.template data<A>(),
                     g.b_ih);
    add_gate_rows<A>(stream, slots, slots.state, 0, slots.gates, H, 1, bias.template data<A>(),
                     g.b_hh);
  }
};

}  // namespace

template <class S>
DeviceTape<S>::DeviceTape(std::shared_ptr<const DeviceStack<S>> stack, const DeviceCall<S>& call)
    : state_(std::make_unique<State>()) {
  State& s = *state_;
  s.stack = std::move(stack);
  s.call = call;
  const Stream stream = call.stream;
  const SharedUse use(stream);
  s.schedule = std::make_unique<DeviceSchedule>(call.steps, call.batch, call.lengths, stream);
  s.pass = std::make_unique<Pass<S>>(*s.stack, s.call, *s.schedule);
  const Pass<S>& pass = *s.pass;
  const int64_t T = pass.steps(), every = s.checkpoints() ? call.checkpoint_every : T;
  for (int64_t k = 0; k < T; k += every) s.segments.push_back(k);
  s.segments.push_back(T);

  const StackSpec& spec = s.stack->spec();
  const int64_t states = call.batch * spec.H;
  for (int l = 0; l < spec.layers; ++l) {
    s.layers.push_back(make_layer(pass, l));
    Layer<S>& at = s.layers.back();
    const Layer<S>* const below = l == 0 ? nullptr : &s.layers[static_cast<size_t>(l) - 1];
    for (int d = 0; d < spec.directions; ++d) {
      Direction<S>& of = at[static_cast<size_t>(d)];
      of.h0 = copy_of(of.h.template data<S>(), states, stream);
      if (pass.has_cell()) of.c0 = copy_of(of.c.template data<A>(), states, stream);
      if (l == 0 && call.ids == nullptr) {
        const int64_t N = s.schedule->map().N;
        of.x_rows = allocate<S>(N * spec.I, stream);
        gather_input<S>(stream, s.schedule->map(), d == 1, 0, N, spec.I, call.x,
                        of.x_rows.template data<S>());
      }
    }
    if (!s.checkpoints()) make_room(pass, at, 0, T);
    for (size_t i = 0; i + 1 < s.segments.size(); ++i) {
      if (s.checkpoints() && pass.has_cell())
        for (Direction<S>& of : at)
          of.c_before.push_back(copy_of(of.c.template data<A>(), states, stream));
      run_steps(pass, l, below, at, s.segments[i], s.segments[i + 1]);
    }
    store_final_states(pass, l, at);
  }
  write_output(pass, s.layers.back());
  s.made = Event(stream);
}

// The stream of a tape whose backward pass never came may be gone.
template <class S>
DeviceTape<S>::~DeviceTape() {
  if (state_ == nullptr) return;
  try {
    state_->hand_over(keeper());
  } catch (const std::exception&) {  // the device has failed, or the process ends
  }
}

template <class S>
size_t DeviceTape<S>::bytes() const {
  if (state_ == nullptr) return 0;
  size_t total = state_->stack->bytes() + state_->schedule->bytes();
  for (const Layer<S>& layer : state_->layers) {
    for (const Direction<S>& of : layer) {
      total += of.x_rows.bytes() + of.h_rows.bytes() + of.gates.bytes() + of.c_rows.bytes() +
               of.h0.bytes() + of.c0.bytes() + of.h.bytes() + of.c.bytes();
      for (const Memory& c : of.c_before) total += c.bytes();
    }
  }
  return total;
}

namespace {

// One layer backward.
template <class S>
class LayerBackward {
  using A = Accumulator<S>;

 public:
  LayerBackward(const Pass<S>& pass, int layer, const Layer<S>* below, Layer<S>& at,
                const std::vector<int64_t>& segments, bool checkpoints, bool want_dx)
      : pass_(pass),
        spec_(pass.stack.spec()),
        stream_(pass.call.stream),
        layer_(layer),
        below_(below),
        at_(at),
        segments_(segments),
        checkpoints_(checkpoints) {
    const int64_t N = pass.schedule.map().N, states = pass.call.batch * spec_.H;
    for (int d = 0; d < spec_.directions; ++d) {
      dy_rows[d] = allocate<A>(N * spec_.H, stream_);
      dh[d] = allocate<A>(states, stream_);
      if (pass.has_cell()) dc[d] = allocate<A>(states, stream_);
      if (want_dx) dx_rows[d] = allocate<A>(N * spec_.input_size(layer), stream_);
      sums_.emplace_back(pass, layer);
    }
  }

  // With dy_rows, dh and dc filled: from the last segment to the first. `token_layout` finds a
  // step's id in call.host_ids.
  void run(const DeviceLayout& token_layout, const DeviceGradients<A>* gradients) {
    for (size_t i = segments_.size() - 1; i-- > 0;) {
      const int64_t k0 = segments_[i], k1 = segments_[i + 1];
      if (checkpoints_) rerun(pass_, layer_, below_, at_, i, k0, k1);
      recurrence(i, k0, k1);
      for (int d = 0; d < spec_.directions; ++d) {
        state_products(d, k0, k1);
        if (layer_ == 0 && pass_.call.ids != nullptr) {
          token_products(d, k0, k1, token_layout, gradients[d].w_ih);
        } else {
          input_products(d, k0, k1);
        }
      }
      poll(pass_.call.interrupt);
    }
    for (int d = 0; d < spec_.directions; ++d)
      sums_[static_cast<size_t>(d)].add_to(pass_, layer_, gradients[d]);
  }

  Memory dy_rows[kMaxDirections];                 // in [N][H]
  Memory dh[kMaxDirections], dc[kMaxDirections];  // in/out [B][H], processing order
  Memory dx_rows[kMaxDirections];                 // out [N][I], if wanted

 private:
  Direction<S>& of(int d) { return at_[static_cast<size_t>(d)]; }

  void recurrence(size_t segment, int64_t k0, int64_t k1) {
    const int64_t H = spec_.H, row = pass_.row(k0);
    BackwardRecurrence<S> directions[kMaxDirections] = {};
    S* rh_rows[kMaxDirections] = {};
    for (int d = 0; d < spec_.directions; ++d) {
      BackwardRecurrence<S>& r = directions[d];
      r.dy = dy_rows[d].template data<A>() + row * H;
      r.w = pass_.stack.state_weights(spec_.index(layer_, d), pass_.shape, pass_.family, true,
                                      stream_);
      r.reset = pass_.resets(d, k0);
      r.h_rows = of(d).h_rows.template data<S>() + row * H;
      r.c_rows = of(d).c_rows.template data<A>();
      r.h0 = h_before(pass_, of(d), k0);
      if (pass_.has_cell())
        r.c0 = (checkpoints_ ? of(d).c_before[segment] : of(d).c0).template data<A>();
      r.gates = of(d).gates.template data<S>();
      r.dh = dh[d].template data<A>();
      r.dc = dc[d].template data<A>();
      if (pass_.two_phase()) {
        rh_rows_[d] = allocate<S>((pass_.row(k1) - row) * H, stream_);
        rh_rows[d] = rh_rows_[d].template data<S>();
      }
    }
    run_backward<S>(pass_.family, pass_.shape, pass_.schedule.steps(k0, k1), directions, rh_rows,
                    stream_);
  }

  void state_products(int d, int64_t k0, int64_t k1) {
    const int64_t H = spec_.H, row = pass_.row(k0), rows = pass_.row(k1) - row;
    const int64_t columns = H * pass_.slots.slots;
    const S* const gates = of(d).gates.template data<S>();
    SlotSums<S>& sums = sums_[static_cast<size_t>(d)];
    const Memory previous = allocate<S>(rows * H, stream_);
    previous_states<S>(stream_, pass_.schedule.map(), pass_.schedule.steps(k0, k1), H,
                       of(d).h_rows.template data<S>() + row * H, h_before(pass_, of(d), k0),
                       pass_.resets(d, k0), previous.template data<S>());
    const Precision precision = pass_.stack.precision();
    outer_product<S>(stream_, precision, rows, columns, H, gates, previous.template data<S>(),
                     sums.w_hh.template data<A>());
    if (pass_.two_phase())
      outer_product<S>(stream_, precision, rows, columns, H, gates, rh_rows_[d].template data<S>(),
                       sums.w_rh.template data<A>());
    if (spec_.bias)
      add_column_sums<S, A>(stream_, rows, columns, gates, sums.bias.template data<A>());
  }

  void input_products(int d, int64_t k0, int64_t k1) {
    const int64_t I = spec_.input_size(layer_), r0 = pass_.row(k0), r1 = pass_.row(k1);
    const int64_t columns = spec_.H * pass_.slots.slots;
    const S* const gates = of(d).gates.template data<S>();
    const Precision precision = pass_.stack.precision();
    Memory scratch;
    const S* const x = input_rows(pass_, layer_, below_, of(d), d, r0, r1, scratch);
    outer_product<S>(stream_, precision, r1 - r0, columns, I, gates, x,
                     sums_[static_cast<size_t>(d)].w_ih.template data<A>());
    if (dx_rows[d].data() == nullptr) return;
    const S* const weights = pass_.stack.input_weights(spec_.index(layer_, d), true, stream_);
    product<S>(stream_, precision, r1 - r0, I, columns, gates, weights, Start::kZero, nullptr,
               dx_rows[d].template data<A>() + r0 * I);
  }

  void token_products(int d, int64_t k0, int64_t k1, const DeviceLayout& layout, A* dw) {
    const TokenRows sorted =
        sort_tokens(pass_.schedule, d == 1, k0, k1, pass_.call.host_ids, layout);
    const Memory rows = uploaded(sorted.rows, stream_), begin = uploaded(sorted.begin, stream_),
                 token = uploaded(sorted.token, stream_);
    add_token_gradients<S>(stream_, pass_.slots, spec_.H, spec_.I,
                           static_cast<int64_t>(sorted.token.size()), rows.template data<int32_t>(),
                           begin.template data<int64_t>(), token.template data<int64_t>(),
                           of(d).gates.template data<S>(), dw);
  }

  const Pass<S>& pass_;
  const StackSpec& spec_;
  const Stream stream_;
  const int layer_;
  const Layer<S>* const below_;
  Layer<S>& at_;
  const std::vector<int64_t>& segments_;
  const bool checkpoints_;
  std::vector<SlotSums<S>> sums_;
  Memory rh_rows_[kMaxDirections];
};

}  // namespace

template <class S>
void DeviceTape<S>::backward(const DeviceBackwardCall<S>& call) {
  const std::unique_ptr<State> used_up = std::move(state_);
  State& s = *used_up;
  const SharedUse use(call.stream);
  s.hand_over(call.stream);
  s.call.interrupt = call.interrupt;
  const Pass<S>& pass = *s.pass;
  const StackSpec& spec = s.stack->spec();
  const RowMap& map = s.schedule->map();
  const int64_t H = spec.H, states = s.call.batch * H;
  const DeviceLayout token_layout = {
      s.call.ids_layout.stride_t, s.call.ids_layout.stride_b,
      s.call.host_starts.empty() ? nullptr : s.call.host_starts.data()};
  std::unique_ptr<LayerBackward<S>> above;
  for (int l = spec.layers - 1; l >= 0; --l) {
    const bool want_dx = l > 0 || call.dx.data != nullptr;
    Layer<S>* const below = l == 0 ? nullptr : &s.layers[static_cast<size_t>(l) - 1];
    auto here = std::make_unique<LayerBackward<S>>(pass, l, below, s.layers[static_cast<size_t>(l)],
                                                   s.segments, s.checkpoints(), want_dx);
    const A* dx_above[kMaxDirections] = {};
    for (int d = 0; above != nullptr && d < spec.directions; ++d)
      dx_above[d] = above->dx_rows[d].template data<A>();
    for (int d = 0; d < spec.directions; ++d) {
      A* const dy_rows = here->dy_rows[d].template data<A>();
      const int64_t offset = spec.index(l, d) * states;
      if (above != nullptr) {
        gather_gradient_above<A>(call.stream, map, d == 1, H, d * H, H * spec.directions,
                                 spec.directions, dx_above,
                                 dropout_into(l + 1, s.call.dropout, s.call.dropout_key), dy_rows);
      } else if (call.dy.data != nullptr) {
        gather_gradient<A>(call.stream, map, d == 1, H, d * H, call.dy, dy_rows);
      } else {
        fill_bytes(dy_rows, 0, here->dy_rows[d].bytes(), call.stream);
      }
      load_state<A>(call.stream, map, H, call.dhn == nullptr ? nullptr : call.dhn + offset,
                    here->dh[d].template data<A>());
      if (pass.has_cell())
        load_state<A>(call.stream, map, H, call.dcn == nullptr ? nullptr : call.dcn + offset,
                      here->dc[d].template data<A>());
    }
    here->run(token_layout, call.gradients.data() + spec.index(l, 0));
    for (int d = 0; d < spec.directions; ++d) {
      const int64_t offset = spec.index(l, d) * states;
      store_state<A>(call.stream, map, H, here->dh[d].template data<A>(), call.dh0 + offset);
      if (pass.has_cell())
        store_state<A>(call.stream, map, H, here->dc[d].template data<A>(), call.dc0 + offset);
    }
    s.layers[static_cast<size_t>(l)].clear();  // its memory serves the layers below
    above = std::move(here);
  }
  if (call.dx.data != nullptr) {
    const A* dx_rows[kMaxDirections] = {};
    for (int d = 0; d < spec.directions; ++d) dx_rows[d] = above->dx_rows[d].template data<A>();
    scatter_input_gradient<A>(call.stream, map, spec.I, spec.directions, dx_rows, call.dx);
  }
}

#define FASTRNN_INSTANTIATE(S)                                                  \
  template class DeviceStack<S>;                                                \
  template void device_forward<S>(const DeviceStack<S>&, const DeviceCall<S>&); \
  template class DeviceTape<S>;
FASTRNN_INSTANTIATE(float)
FASTRNN_INSTANTIATE(double)
FASTRNN_INSTANTIATE(Bfloat16)
FASTRNN_INSTANTIATE(Float16)

}  // namespace cuda
}  // namespace fastrnn
