// Packing and inference; training is in tape.cc, single steps in stream.cc.
#include "cpu/stack.h"

#include <atomic>

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

// Layers at once: layer l works on a chunk of steps while layer l + 1 works on one before it. Every
// thread takes whatever chunk is ready, the uppermost first; nobody waits for a thread that does
// not run, since a chunk that is in hand is in the hands of a running one.
template <class T>
void run_wavefront(std::vector<LayerForward<T>>& layers, int64_t chunks, int threads,
                   Interrupt* interrupt) {
  const size_t L = layers.size();
  std::vector<std::atomic<int64_t>> done(L);
  std::vector<std::atomic<bool>> taken(L);
  for (size_t l = 0; l < L; ++l) {
    done[l] = 0;
    taken[l] = false;
  }
  const unsigned forks = fork_count();
  run_parallel(threads, interrupt, [&](int) {
    for (Spin spin(pauses_among(threads)); done[L - 1].load(std::memory_order_acquire) < chunks;) {
      bool worked = false;
      for (size_t l = L; l-- > 0 && !worked;) {
        const auto ready = [&] {
          const int64_t next = done[l].load(std::memory_order_acquire);
          return next < chunks && (l == 0 || done[l - 1].load(std::memory_order_acquire) > next);
        };
        if (!ready() || taken[l].exchange(true, std::memory_order_acquire)) continue;
        if (ready()) {  // still, now that the layer is ours
          const int64_t chunk = done[l].load(std::memory_order_relaxed);
          layers[l].run_here(chunk, chunk + 1);
          done[l].store(chunk + 1, std::memory_order_release);
          worked = true;
        }
        taken[l].store(false, std::memory_order_release);
      }
      if (interrupt != nullptr && interrupt_tick(interrupt)) return;
      if (fork_count() != forks) return;
      if (worked) {
        spin.reset();
      } else {
        spin.wait();
      }
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
  const int64_t gate_bytes = static_cast<int64_t>(sizeof(T)) * traits.gates * spec.H;
  const int64_t l2_bytes = static_cast<int64_t>(second_level_cache_bytes());
  const double multiply_adds = static_cast<double>(call.steps * B * spec.layers) *
                               static_cast<double>(traits.gates * spec.H * spec.H);
  const bool waves = plan_wavefront(
      call.threads, spec.layers,
      {spec.directions, call.steps, B, gate_bytes * spec.H, S, multiply_adds, l2_bytes});
  int64_t weight_bytes = 0, w_ih_bytes = 0;  // of all layers; of the layer with the largest W_ih
  for (int l = 0; l < spec.layers; ++l) {
    const int64_t inputs = l == 0 && call.input.ids != nullptr ? 1 : spec.input_size(l);
    weight_bytes += gate_bytes * (inputs + spec.H);
    w_ih_bytes = std::max(w_ih_bytes, gate_bytes * inputs);
  }
  const int64_t chunk_rows =
      waves ? plan_wave_rows(call.steps, B, weight_bytes, l2_bytes)
            : plan_chunk_rows(S * traits.slots * W * static_cast<int64_t>(sizeof(T)), w_ih_bytes,
                              l2_bytes);
  const ScheduleBuilder schedule(call.steps, B, call.lengths, chunk_rows);
  const int32_t* const order = schedule.get().order;
  const int64_t state_size = S * B * W, count = positions(call.steps, B, call.lengths, call.starts);
  // States of all layers, and the outputs between layers: one each for a wavefront, else two in
  // turn.
  Buffer state = make_buffer<T>(spec.count() * state_size, traits.has_cell ? 2 : 1);
  std::vector<Buffer> between;
  for (int l = 0; l + 1 < spec.layers && (waves || l < 2); ++l)
    between.push_back(make_buffer<T>(count, DH));
  const auto output_of = [&](int l) {
    return between[static_cast<size_t>(l) % between.size()].template data<T>();
  };

  std::vector<LayerForward<T>> layers;
  for (int l = 0; l < spec.layers; ++l) {
    const bool last = l + 1 == spec.layers;
    std::vector<ForwardArgs<T>> directions;
    for (int d = 0; d < spec.directions; ++d) {
      ForwardArgs<T> a = {};
      a.I = spec.input_size(l);
      a.H = spec.H;
      a.reverse = d == 1;
      a.schedule = &schedule.get();
      a.input = call.input;
      if (l > 0) a.input = {output_of(l - 1), nullptr, dense_layout(DH, B, call.starts), {}};
      a.reset = call.reset;
      a.weights = stack.layer(l, d);
      a.h = state.template data<T>() + spec.index(l, d) * state_size;
      a.c = traits.has_cell ? a.h + spec.count() * state_size : nullptr;
      a.state_rows = B;
      a.y = (last ? call.y : output_of(l)) + d * spec.H;
      a.y_layout = last ? call.y_layout : dense_layout(DH, B, call.starts);
      a.interrupt = call.interrupt;
      load_state(call.h0, spec.index(l, d), order, B, spec.H, W, a.h);
      if (a.c != nullptr) load_state(call.c0, spec.index(l, d), order, B, spec.H, W, a.c);
      directions.push_back(a);
    }
    layers.emplace_back(kernels, spec.kind, directions, schedule, waves ? 1 : call.threads);
    if (!waves) {
      layers.back().run(0, schedule.get().chunks, call.interrupt);
      if (!last) layers.pop_back();
    }
  }
  if (waves)
    run_wavefront(layers, schedule.get().chunks, std::min(call.threads, spec.layers),
                  call.interrupt);
  for (int i = 0; i < spec.count(); ++i) {
    const T* const h = state.template data<T>() + i * state_size;
    store_state(h, i, order, B, spec.H, W, call.hn);
    if (traits.has_cell)
      store_state(h + spec.count() * state_size, i, order, B, spec.H, W, call.cn);
  }
  zero_padding(call.y, call.y_layout, call.steps, B, call.lengths, DH);
}

template class PackedStack<float>;
template class PackedStack<double>;
template void stack_forward(const PackedStack<float>&, const StackCall<float>&);
template void stack_forward(const PackedStack<double>&, const StackCall<double>&);

}  // namespace fastrnn
