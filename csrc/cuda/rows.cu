#include "cuda/rows.h"

#include "cells/dropout.h"
#include "core/schedule.h"
#include "cuda/simt.h"

namespace fastrnn {
namespace cuda {

namespace {

// i = quotient * divisor + rest. 64-bit division takes a GPU some hundred instructions, 32-bit
// division a tenth of that.
struct Division {
  int64_t quotient, rest;
};
FASTRNN_HD inline Division divide(int64_t i, int64_t divisor) {
  if (((static_cast<uint64_t>(i) | static_cast<uint64_t>(divisor)) >> 32) == 0) {
    const uint32_t n = static_cast<uint32_t>(i), d = static_cast<uint32_t>(divisor);
    return {n / d, n % d};
  }
  return {i / divisor, i % divisor};
}

template <class A>
FASTRNN_HD A load_as(const DeviceArrayRef& a, int64_t at) {
  switch (a.dtype) {
    case DType::kFloat64:
      return static_cast<A>(static_cast<const double*>(a.data)[at]);
    case DType::kBfloat16:
      return static_cast<A>(widen(static_cast<const Bfloat16*>(a.data)[at]));
    case DType::kFloat16:
      return static_cast<A>(widen(static_cast<const Float16*>(a.data)[at]));
    default:
      return static_cast<A>(static_cast<const float*>(a.data)[at]);
  }
}

template <class A>
FASTRNN_HD void store_as(const DeviceArrayRef& a, int64_t at, A value) {
  switch (a.dtype) {
    case DType::kFloat64:
      static_cast<double*>(a.data)[at] = static_cast<double>(value);
      return;
    case DType::kBfloat16:
      static_cast<Bfloat16*>(a.data)[at] = from_float<Bfloat16>(static_cast<float>(value));
      return;
    case DType::kFloat16:
      static_cast<Float16*>(a.data)[at] = from_float<Float16>(static_cast<float>(value));
      return;
    default:
      static_cast<float*>(a.data)[at] = static_cast<float>(value);
  }
}

// x where the mask keeps element e, scaled; else 0.
template <class A>
FASTRNN_HD A drop(const Dropout& dropout, int64_t e, A x) {
  if (dropout.threshold == 0) return x;
  return scalar::dropout_keeps(dropout.key, static_cast<uint64_t>(e), dropout.threshold)
             ? x * static_cast<A>(dropout.scale)
             : A(0);
}

struct StepOfRow {
  const int64_t* first;
  int64_t T, B;
  int32_t* step;
  FASTRNN_HD void operator()(int64_t i) const {
    const Division at = divide(i, B);  // step, row
    if (at.rest < first[at.quotient + 1] - first[at.quotient])
      step[first[at.quotient] + at.rest] = static_cast<int32_t>(at.quotient);
  }
};

template <class S>
struct GatherInput {
  RowMap map;
  bool reverse;
  int64_t r0, features;
  DeviceArrayRef x;
  S* out;
  FASTRNN_HD void operator()(int64_t i) const {
    using A = Accumulator<S>;
    const Division at = divide(i, features);
    const RowMap::Place p = map.place(r0 + at.quotient, reverse);
    out[i] = narrow<S>(load_as<A>(x, x.layout.at(p.t, p.b) + at.rest * x.stride_f));
  }
};

template <class S>
struct GatherBelow {
  RowMap map;
  bool reverse;
  int64_t r0, H, features;
  const S* h_rows[kMaxDirections];
  Dropout dropout;
  S* out;
  FASTRNN_HD void operator()(int64_t i) const {
    using A = Accumulator<S>;
    const Division at = divide(i, features);
    const RowMap::Place p = map.place(r0 + at.quotient, reverse);
    const bool second = at.rest >= H;
    const int64_t row = map.row(p.t, p.j, second);
    const A h = static_cast<A>(
        widen((second ? h_rows[1] : h_rows[0])[row * H + at.rest - (second ? H : 0)]));
    out[i] = narrow<S>(drop(dropout, (p.t * map.B + p.b) * features + at.rest, h));
  }
};

template <class S>
struct PickRows {
  RowMap map;
  bool reverse;
  int64_t r0, columns;
  const int64_t* ids;
  DeviceLayout layout;
  const S* table;
  const Accumulator<S>* bias;
  Accumulator<S>* gx;
  FASTRNN_HD void operator()(int64_t i) const {
    using A = Accumulator<S>;
    const Division at = divide(i, columns);
    const RowMap::Place p = map.place(r0 + at.quotient, reverse);
    const int64_t id = ids[layout.at(p.t, p.b)];
    gx[i] = bias[at.rest] + static_cast<A>(widen(table[id * columns + at.rest]));
  }
};

struct GatherResets {
  RowMap map;
  bool reverse;
  const uint8_t* mask;
  DeviceLayout layout;
  uint8_t* out;
  // reset[t] marks the boundary between t - 1 and t, which the reverse direction crosses before it
  // visits t - 1.
  FASTRNN_HD void operator()(int64_t row) const {
    const RowMap::Place p = map.place(row, reverse);
    if (reverse && map.step[row] == 0) {
      out[row] = 0;
      return;
    }
    out[row] = mask[layout.at(reverse ? p.t + 1 : p.t, p.b)] != 0;
  }
};

template <class S>
struct ScatterOutput {
  RowMap map;
  bool reverse;
  int64_t r0, H, column0;
  const S* h_rows;
  DeviceArrayRef y;
  FASTRNN_HD void operator()(int64_t i) const {
    using A = Accumulator<S>;
    const Division at = divide(i, H);
    const RowMap::Place p = map.place(r0 + at.quotient, reverse);
    store_as(y, y.layout.at(p.t, p.b) + (column0 + at.rest) * y.stride_f,
             static_cast<A>(widen(h_rows[i])));
  }
};

struct ZeroPadding {
  RowMap map;
  int64_t features;
  DeviceArrayRef a;
  FASTRNN_HD void operator()(int64_t i) const {
    const Division at = divide(i, features), step = divide(at.quotient, map.B);
    if (step.quotient < map.length[step.rest]) return;
    store_as(a, a.layout.at(step.quotient, map.order[step.rest]) + at.rest * a.stride_f, 0.0f);
  }
};

template <class S>
struct LoadState {
  RowMap map;
  int64_t H;
  const Accumulator<S>* from;
  S* state;
  FASTRNN_HD void operator()(int64_t i) const {
    const Division at = divide(i, H);
    state[i] = from == nullptr ? narrow<S>(Accumulator<S>(0))
                               : narrow<S>(from[map.order[at.quotient] * H + at.rest]);
  }
};

template <class S>
struct StoreState {
  RowMap map;
  int64_t H;
  const S* state;
  Accumulator<S>* to;
  FASTRNN_HD void operator()(int64_t i) const {
    const Division at = divide(i, H);
    to[map.order[at.quotient] * H + at.rest] = static_cast<Accumulator<S>>(widen(state[i]));
  }
};

template <class A>
struct GatherGradient {
  RowMap map;
  bool reverse;
  int64_t H, column0;
  DeviceArrayRef dy;
  A* out;
  FASTRNN_HD void operator()(int64_t i) const {
    const Division at = divide(i, H);
    const RowMap::Place p = map.place(at.quotient, reverse);
    out[i] = load_as<A>(dy, dy.layout.at(p.t, p.b) + (column0 + at.rest) * dy.stride_f);
  }
};

template <class A>
struct GatherGradientAbove {
  RowMap map;
  bool reverse;
  int64_t H, column0, features;
  int directions;
  const A* dx_rows[kMaxDirections];
  Dropout dropout;
  A* out;
  FASTRNN_HD void operator()(int64_t i) const {
    const Division at = divide(i, H);
    const RowMap::Place p = map.place(at.quotient, reverse);
    const int64_t column = column0 + at.rest;
    A sum = dx_rows[0][map.row(p.t, p.j, false) * features + column];
    if (directions == 2) sum += dx_rows[1][map.row(p.t, p.j, true) * features + column];
    out[i] = drop(dropout, (p.t * map.B + p.b) * features + column, sum);
  }
};

template <class A>
struct ScatterInputGradient {
  RowMap map;
  int64_t features;
  int directions;
  const A* dx_rows[kMaxDirections];
  DeviceArrayRef dx;
  FASTRNN_HD void operator()(int64_t i) const {
    const Division at = divide(i, features);
    const RowMap::Place p = map.place(at.quotient, false);
    A sum = dx_rows[0][i];
    if (directions == 2) sum += dx_rows[1][map.row(p.t, p.j, true) * features + at.rest];
    store_as(dx, dx.layout.at(p.t, p.b) + at.rest * dx.stride_f, sum);
  }
};

template <class S>
struct PreviousStates {
  RowMap map;
  int64_t k0, H;
  const S *h_rows, *h0;
  const uint8_t* reset;
  S* out;
  FASTRNN_HD void operator()(int64_t i) const {
    const Division at = divide(i, H);
    const int64_t base = map.first[k0], k = map.step[base + at.quotient];
    const int64_t j = base + at.quotient - map.first[k];
    if (reset != nullptr && reset[at.quotient] != 0) {
      out[i] = narrow<S>(Accumulator<S>(0));
    } else if (k == k0) {
      out[i] = h0[j * H + at.rest];
    } else {
      out[i] = h_rows[(map.first[k - 1] - base + j) * H + at.rest];
    }
  }
};

template <class S>
struct PackInput {
  GateSlots slots;
  int64_t H, I;
  const Accumulator<S>* w;
  S* out;
  FASTRNN_HD void operator()(int64_t i) const {  // [I][H*G]
    const Division at = divide(i, H * slots.gates), unit = divide(at.rest, slots.gates);
    out[i] = narrow<S>(w[(unit.rest * H + unit.quotient) * I + at.quotient]);
  }
};

template <class S>
struct PackInputTransposed {
  GateSlots slots;
  int64_t H, I;
  const Accumulator<S>* w;
  S* out;
  FASTRNN_HD void operator()(int64_t i) const {  // [H*slots][I]
    const Division at = divide(i, I), unit = divide(at.quotient, slots.slots);
    Accumulator<S> value = 0;
#pragma unroll
    for (int g = 0; g < kMostGates; ++g)
      if (g < slots.gates && slots.input[g] == unit.rest)
        value = w[(g * H + unit.quotient) * I + at.rest];
    out[i] = narrow<S>(value);
  }
};

// A slot that both an input gate and a state gate go to starts from both biases; GRU's n and q,
// where they are apart, from one each.
template <class A>
struct PackBias {
  GateSlots slots;
  int64_t H;
  const A *b_ih, *b_hh;
  A *gates, *states;
  FASTRNN_HD void operator()(int64_t unit) const {
#pragma unroll
    for (int g = 0; g < kMostGates; ++g) {
      if (g >= slots.gates) break;
      const A from_input = b_ih == nullptr ? A(0) : b_ih[g * H + unit];
      const A from_state = b_hh == nullptr ? A(0) : b_hh[g * H + unit];
      const bool together = slots.input[g] == slots.state[g];
      gates[unit * slots.gates + g] = together ? from_input + from_state : from_input;
      states[unit * slots.slots + slots.state[g]] = from_state;
    }
  }
};

template <class A>
struct AddGateRows {
  int slots, gate0;
  uint32_t slot_of_gate;  // 8 bits a gate: an array would be indexed in memory
  int64_t H, K;
  const A* sums;
  A* dw;
  FASTRNN_HD void operator()(int64_t i) const {
    const Division at = divide(i, K), row = divide(at.quotient, H);
    const uint32_t slot = (slot_of_gate >> (8 * (gate0 + row.quotient))) & 0xFFu;
    dw[gate0 * H * K + i] += sums[(row.rest * slots + slot) * K + at.rest];
  }
};

template <class S>
struct AddTokenGradients {
  GateSlots slots;
  int64_t H, V;
  const int32_t* rows;
  const int64_t *begin, *token;
  const S* gradients;
  Accumulator<S>* dw;
  FASTRNN_HD void operator()(int64_t i) const {
    using A = Accumulator<S>;
    const Division at = divide(i, H * slots.gates), unit = divide(at.rest, slots.gates);
    int slot = 0;
#pragma unroll
    for (int g = 0; g < kMostGates; ++g)
      if (g == unit.rest) slot = slots.input[g];
    A sum = 0;
    for (int64_t r = begin[at.quotient]; r < begin[at.quotient + 1]; ++r)
      sum += static_cast<A>(widen(gradients[(rows[r] * H + unit.quotient) * slots.slots + slot]));
    dw[(unit.rest * H + unit.quotient) * V + token[at.quotient]] += sum;
  }
};

}  // namespace

DeviceSchedule::DeviceSchedule(int64_t T, int64_t B, const int64_t* lengths, Stream stream) {
  const ScheduleBuilder builder(T, B, lengths, B);
  const Schedule& s = builder.get();
  first_.resize(static_cast<size_t>(s.steps) + 1, 0);
  for (int64_t k = 0; k < s.steps; ++k)
    first_[static_cast<size_t>(k) + 1] = first_[static_cast<size_t>(k)] + s.active[k];
  const int64_t N = first_.back();
  // [first (T + 1)] [length (B)] [order (B)] [step (N)], the wider ones first.
  order_.assign(s.order, s.order + B);
  lengths_.assign(s.length, s.length + B);
  const auto steps = static_cast<size_t>(s.steps) + 1, rows = static_cast<size_t>(B);
  const size_t wide = (steps + rows) * sizeof(int64_t);
  memory_ = Memory(wide + (rows + static_cast<size_t>(N)) * sizeof(int32_t), stream);
  int64_t* const first = memory_.data<int64_t>();
  int64_t* const length = first + steps;
  int32_t* const order = reinterpret_cast<int32_t*>(length + rows);
  int32_t* const step = order + rows;
  copy_to_device(first, first_.data(), steps * sizeof(int64_t), stream);
  if (B > 0) {
    copy_to_device(length, s.length, rows * sizeof(int64_t), stream);
    copy_to_device(order, s.order, rows * sizeof(int32_t), stream);
    for_each(stream, s.steps * B, StepOfRow{first, s.steps, B, step});
  }
  // T is the caller's, also where no row is that long: padding reaches to it.
  map_ = {T, B, N, first, step, order, length};
}

template <class S>
void gather_input(Stream stream, const RowMap& map, bool reverse, int64_t r0, int64_t r1,
                  int64_t features, const DeviceArrayRef& x, S* x_rows) {
  for_each(stream, (r1 - r0) * features, GatherInput<S>{map, reverse, r0, features, x, x_rows});
}

template <class S>
void gather_below(Stream stream, const RowMap& map, bool reverse, int64_t r0, int64_t r1, int64_t H,
                  int directions, const S* const* h_rows, const Dropout& dropout, S* x_rows) {
  GatherBelow<S> f = {map, reverse, r0, H, H * directions, {}, dropout, x_rows};
  for (int d = 0; d < directions; ++d) f.h_rows[d] = h_rows[d];
  for_each(stream, (r1 - r0) * f.features, f);
}

template <class S>
void pick_rows(Stream stream, const RowMap& map, bool reverse, int64_t r0, int64_t r1,
               int64_t columns, const int64_t* ids, const DeviceLayout& layout, const S* table,
               const Accumulator<S>* bias, Accumulator<S>* gx) {
  for_each(stream, (r1 - r0) * columns,
           PickRows<S>{map, reverse, r0, columns, ids, layout, table, bias, gx});
}

void gather_resets(Stream stream, const RowMap& map, bool reverse, const uint8_t* mask,
                   const DeviceLayout& layout, uint8_t* reset_rows) {
  for_each(stream, map.N, GatherResets{map, reverse, mask, layout, reset_rows});
}

template <class S>
void scatter_output(Stream stream, const RowMap& map, bool reverse, int64_t r0, int64_t r1,
                    int64_t H, int64_t column0, const S* h_rows, const DeviceArrayRef& y) {
  for_each(stream, (r1 - r0) * H, ScatterOutput<S>{map, reverse, r0, H, column0, h_rows, y});
}

void zero_padding(Stream stream, const RowMap& map, int64_t features, const DeviceArrayRef& a) {
  if (a.layout.starts != nullptr || map.N == map.T * map.B) return;
  for_each(stream, map.T * map.B * features, ZeroPadding{map, features, a});
}

template <class S>
void load_state(Stream stream, const RowMap& map, int64_t H, const Accumulator<S>* from, S* state) {
  for_each(stream, map.B * H, LoadState<S>{map, H, from, state});
}

template <class S>
void store_state(Stream stream, const RowMap& map, int64_t H, const S* state, Accumulator<S>* to) {
  for_each(stream, map.B * H, StoreState<S>{map, H, state, to});
}

template <class A>
void gather_gradient(Stream stream, const RowMap& map, bool reverse, int64_t H, int64_t column0,
                     const DeviceArrayRef& dy, A* dy_rows) {
  for_each(stream, map.N * H, GatherGradient<A>{map, reverse, H, column0, dy, dy_rows});
}

template <class A>
void gather_gradient_above(Stream stream, const RowMap& map, bool reverse, int64_t H,
                           int64_t column0, int64_t features, int directions,
                           const A* const* dx_rows, const Dropout& dropout, A* dy_rows) {
  GatherGradientAbove<A> f = {map, reverse, H, column0, features, directions, {}, dropout, dy_rows};
  for (int d = 0; d < directions; ++d) f.dx_rows[d] = dx_rows[d];
  for_each(stream, map.N * H, f);
}

template <class A>
void scatter_input_gradient(Stream stream, const RowMap& map, int64_t features, int directions,
                            const A* const* dx_rows, const DeviceArrayRef& dx) {
  ScatterInputGradient<A> f = {map, features, directions, {}, dx};
  for (int d = 0; d < directions; ++d) f.dx_rows[d] = dx_rows[d];
  for_each(stream, map.N * features, f);
  zero_padding(stream, map, features, dx);
}

template <class S>
void previous_states(Stream stream, const RowMap& map, const Steps& steps, int64_t H,
                     const S* h_rows, const S* h0, const uint8_t* reset, S* previous) {
  const int64_t rows = steps.first_host[steps.k1] - steps.first_host[steps.k0];
  for_each(stream, rows * H, PreviousStates<S>{map, steps.k0, H, h_rows, h0, reset, previous});
}

GateSlots gate_slots(CellKind kind) {
  const CellTraits traits = cell_traits(kind);
  GateSlots s = {traits.gates, traits.slots, {0, 1, 2, 3}, {0, 1, 2, 3}};
  if (kind == CellKind::kGruAfter) s.input[2] = 3;  // r, z, q, n: cells/gru.h
  return s;
}

template <class S>
void pack_input(Stream stream, const GateSlots& slots, int64_t H, int64_t I,
                const Accumulator<S>* w_ih, bool backward, S* out) {
  if (backward) {
    for_each(stream, H * slots.slots * I, PackInputTransposed<S>{slots, H, I, w_ih, out});
  } else {
    for_each(stream, H * slots.gates * I, PackInput<S>{slots, H, I, w_ih, out});
  }
}

template <class A>
void pack_bias(Stream stream, const GateSlots& slots, int64_t H, const A* b_ih, const A* b_hh,
               A* gates, A* states) {
  for_each(stream, H, PackBias<A>{slots, H, b_ih, b_hh, gates, states});
}

template <class A>
void add_gate_rows(Stream stream, const GateSlots& slots, const int* slot, int gate0, int gate1,
                   int64_t H, int64_t K, const A* sums, A* dw) {
  AddGateRows<A> f = {slots.slots, gate0, 0, H, K, sums, dw};
  for (int g = 0; g < slots.gates; ++g) f.slot_of_gate |= static_cast<uint32_t>(slot[g]) << 8 * g;
  for_each(stream, (gate1 - gate0) * H * K, f);
}

template <class S>
void add_token_gradients(Stream stream, const GateSlots& slots, int64_t H, int64_t V,
                         int64_t segments, const int32_t* rows, const int64_t* begin,
                         const int64_t* token, const S* gradients, Accumulator<S>* dw) {
  for_each(stream, segments * H * slots.gates,
           AddTokenGradients<S>{slots, H, V, rows, begin, token, gradients, dw});
}

#define FASTRNN_INSTANTIATE_STORED(S)                                                              \
  template void gather_input<S>(Stream, const RowMap&, bool, int64_t, int64_t, int64_t,            \
                                const DeviceArrayRef&, S*);                                        \
  template void gather_below<S>(Stream, const RowMap&, bool, int64_t, int64_t, int64_t, int,       \
                                const S* const*, const Dropout&, S*);                              \
  template void pick_rows<S>(Stream, const RowMap&, bool, int64_t, int64_t, int64_t,               \
                             const int64_t*, const DeviceLayout&, const S*, const Accumulator<S>*, \
                             Accumulator<S>*);                                                     \
  template void scatter_output<S>(Stream, const RowMap&, bool, int64_t, int64_t, int64_t, int64_t, \
                                  const S*, const DeviceArrayRef&);                                \
  template void load_state<S>(Stream, const RowMap&, int64_t, const Accumulator<S>*, S*);          \
  template void store_state<S>(Stream, const RowMap&, int64_t, const S*, Accumulator<S>*);         \
  template void previous_states<S>(Stream, const RowMap&, const Steps&, int64_t, const S*,         \
                                   const S*, const uint8_t*, S*);                                  \
  template void pack_input<S>(Stream, const GateSlots&, int64_t, int64_t, const Accumulator<S>*,   \
                              bool, S*);                                                           \
  template void add_token_gradients<S>(Stream, const GateSlots&, int64_t, int64_t, int64_t,        \
                                       const int32_t*, const int64_t*, const int64_t*, const S*,   \
                                       Accumulator<S>*);
FASTRNN_INSTANTIATE_STORED(float)
FASTRNN_INSTANTIATE_STORED(double)
FASTRNN_INSTANTIATE_STORED(Bfloat16)
FASTRNN_INSTANTIATE_STORED(Float16)

#define FASTRNN_INSTANTIATE_COMPUTED(A)                                                            \
  template void gather_gradient<A>(Stream, const RowMap&, bool, int64_t, int64_t,                  \
                                   const DeviceArrayRef&, A*);                                     \
  template void gather_gradient_above<A>(Stream, const RowMap&, bool, int64_t, int64_t, int64_t,   \
                                         int, const A* const*, const Dropout&, A*);                \
  template void scatter_input_gradient<A>(Stream, const RowMap&, int64_t, int, const A* const*,    \
                                          const DeviceArrayRef&);                                  \
  template void pack_bias<A>(Stream, const GateSlots&, int64_t, const A*, const A*, A*, A*);       \
  template void add_gate_rows<A>(Stream, const GateSlots&, const int*, int, int, int64_t, int64_t, \
                                 const A*, A*);
FASTRNN_INSTANTIATE_COMPUTED(float)
FASTRNN_INSTANTIATE_COMPUTED(double)

}  // namespace cuda
}  // namespace fastrnn
