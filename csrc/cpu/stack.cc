// Packing and inference; training is in tape.cc, single steps in stream.cc.
#include "cpu/stack.h"

#include "core/fpenv.h"
#include "cpu/layer.h"

namespace fastrnn {

bool interrupt_tick(Interrupt* interrupt) {
  interrupt->poll();
  return interrupt->stop();
}

namespace {

// What slot `slot` of superblock s starts from: b_ih + b_hh, except that GRU's n keeps its hidden
// part apart when the reset gate comes after the product (slots r, z, hidden n, input n).
template <class T>
void pack_bias(CellKind kind, const LayerWeights<T>& w, int64_t H, int W, T* out) {
  const CellTraits traits = cell_traits(kind);
  std::memset(out, 0, sizeof(T) * static_cast<size_t>(ceil_div(H, W) * traits.slots * W));
  if (w.b_ih == nullptr) return;
  for (int slot = 0; slot < traits.slots; ++slot) {
    const bool apart = kind == CellKind::kGruAfter && slot >= 2;
    const int64_t gate = std::min(slot, traits.gates - 1);
    for (int64_t u = 0; u < H; ++u) {
      const T in = w.b_ih[gate * H + u], hidden = w.b_hh[gate * H + u];
      out[(u / W * traits.slots + slot) * W + u % W] = !apart      ? in + hidden
                                                       : slot == 2 ? hidden
                                                                   : in;
    }
  }
}

}  // namespace

template <class T>
PackedStack<T>::PackedStack(const StackSpec& spec, const std::vector<LayerWeights<T>>& weights,
                            int threads)
    : spec_(spec), kernels_(typed_kernels<T>()) {
  const FpEnv env;
  const int W = kernels_.width;
  const CellTraits traits = cell_traits(spec.kind);
  const int64_t S = ceil_div(spec.H, W), P = S * traits.gates;
  std::vector<size_t> offset = {0};
  for (int l = 0; l < spec.layers; ++l)
    for (int d = 0; d < spec.directions; ++d)
      for (int64_t rows : {spec.input_size(l) * P, spec.H * P, S * traits.slots})
        offset.push_back(checked_add(
            offset.back(), checked_mul(static_cast<size_t>(rows), static_cast<size_t>(W))));
  memory_ = Buffer(checked_mul(offset.back(), sizeof(T)));
  T* const base = memory_.template data<T>();
  for (int i = 0; i < spec.count(); ++i) {
    const size_t at = static_cast<size_t>(i) * 3;
    layers_.push_back({base + offset[at], base + offset[at + 1], base + offset[at + 2]});
    pack_bias(spec.kind, weights[static_cast<size_t>(i)], spec.H, W, base + offset[at + 2]);
  }
  // Copying is memory-bound; a thread is worth waking for a megabyte or so.
  const int parts = plan_threads(threads, static_cast<double>(offset.back()) / 2);
  run_parallel(parts, nullptr, [&](int part) {
    for (int l = 0; l < spec.layers; ++l)
      for (int d = 0; d < spec.directions; ++d) {
        const size_t i = static_cast<size_t>(spec.index(l, d));
        const int64_t p0 = cut(P, parts, part), p1 = cut(P, parts, part + 1);
        kernels_.pack(weights[i].w_ih, traits.gates, spec.H, spec.input_size(l), p0, p1,
                      base + offset[i * 3]);
        kernels_.pack(weights[i].w_hh, traits.gates, spec.H, spec.H, p0, p1,
                      base + offset[i * 3 + 1]);
      }
  });
}

template <class T>
void stack_forward(const PackedStack<T>& stack, const StackCall<T>& call) {
  const FpEnv env;
  const StackSpec& spec = stack.spec();
  const Kernels<T>& kernels = stack.kernels();
  const int W = kernels.width;
  const int64_t B = call.batch, DH = spec.H * spec.directions, S = ceil_div(spec.H, W);
  const CellTraits traits = cell_traits(spec.kind);
  const int64_t chunk_rows = plan_chunk_rows(S * traits.slots * W, sizeof(T), false);
  const ScheduleBuilder schedule(call.steps, B, call.lengths, chunk_rows);
  Buffer state = make_buffer<T>(spec.directions * S * B * W, traits.has_cell ? 2 : 1);
  // Outputs between layers, alternating.
  Buffer between[2];
  for (int i = 0; i < std::min(2, spec.layers - 1); ++i)
    between[i] = make_buffer<T>(call.steps * B, DH);

  for (int l = 0; l < spec.layers; ++l) {
    const bool last = l + 1 == spec.layers;
    T* const y = last ? call.y : between[l % 2].template data<T>();
    std::vector<ForwardArgs<T>> directions;
    for (int d = 0; d < spec.directions; ++d) {
      ForwardArgs<T> a = {};
      a.I = spec.input_size(l);
      a.H = spec.H;
      a.reverse = d == 1;
      a.schedule = &schedule.get();
      a.input = call.input;
      if (l > 0) a.input = {between[(l - 1) % 2].template data<T>(), nullptr, B * DH, DH, {}};
      a.reset = call.reset;
      a.weights = stack.layer(l, d);
      a.h = state.template data<T>() + d * S * B * W;
      a.c = traits.has_cell ? a.h + spec.directions * S * B * W : nullptr;
      a.state_rows = B;
      a.y = y + d * spec.H;
      a.y_stride_t = last ? call.y_stride_t : B * DH;
      a.y_stride_b = last ? call.y_stride_b : DH;
      a.interrupt = call.interrupt;
      load_state(call.h0, spec.index(l, d), schedule.get().order, B, spec.H, W, a.h);
      if (a.c != nullptr)
        load_state(call.c0, spec.index(l, d), schedule.get().order, B, spec.H, W, a.c);
      directions.push_back(a);
    }
    LayerForward<T> layer(kernels, spec.kind, directions, schedule, call.threads);
    layer.run(0, schedule.get().chunks, call.interrupt);
    for (int d = 0; d < spec.directions; ++d) {
      const ForwardArgs<T>& a = directions[static_cast<size_t>(d)];
      store_state(a.h, spec.index(l, d), schedule.get().order, B, spec.H, W, call.hn);
      if (a.c != nullptr)
        store_state(a.c, spec.index(l, d), schedule.get().order, B, spec.H, W, call.cn);
    }
  }
  if (call.lengths != nullptr) {
    for (int64_t b = 0; b < B; ++b)
      for (int64_t t = call.lengths[b]; t < call.steps; ++t)
        std::memset(call.y + t * call.y_stride_t + b * call.y_stride_b, 0,
                    sizeof(T) * static_cast<size_t>(DH));
  }
}

template class PackedStack<float>;
template class PackedStack<double>;
template void stack_forward(const PackedStack<float>&, const StackCall<float>&);
template void stack_forward(const PackedStack<double>&, const StackCall<double>&);

}  // namespace fastrnn
