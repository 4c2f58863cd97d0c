// Training: the forward pass that keeps what back-propagation needs, and back-propagation through
// time.
//
// Without checkpoints a tape holds, per layer and direction, the cell's slots, the state before
// each step and the input rows of every step. With checkpoint_every = k it holds the layers' inputs
// (of the first layer only a fingerprint: the caller's array is read again) and the states before
// steps 0, k, 2k, …, and the backward pass runs each segment forward again before it goes back
// through it: memory O(T/k + k), same bits.
#include <algorithm>
#include <stdexcept>

#include "cells/dropout.h"
#include "core/fpenv.h"
#include "cpu/back_tasks.h"
#include "cpu/layer.h"
#include "cpu/stack.h"

namespace fastrnn {

template <class T>
struct StackTape<T>::State {
  // Slabs of one layer and direction, for all chunks or for one segment.
  struct Slabs {
    Buffer gates, chunk_h, chunk_c, x_rows;

    // rows: of all slabs; state: of the blocked state of all rows.
    Slabs(const StackSpec& spec, int W, int64_t rows, int64_t chunks, int64_t state,
          int64_t input_size, bool one_hot) {
      const CellTraits traits = cell_traits(spec.kind);
      gates = make_buffer<T>(rows, ceil_div(spec.H, W) * traits.slots * W);
      chunk_h = make_buffer<T>(chunks, state);
      if (traits.has_cell) chunk_c = make_buffer<T>(chunks, state);
      if (!one_hot) x_rows = make_buffer<T>(rows, ceil_div(input_size, W) * W);
    }

    template <class Args>
    void attach(Args& a) {
      a.gates = gates.template data<T>();
      a.chunk_h = chunk_h.template data<T>();
      a.chunk_c = chunk_c.template data<T>();
      a.x_rows = x_rows.template data<T>();
    }
  };

  // What one layer and direction adds to the parameters' gradients, in the kernels' layout.
  struct Sums {
    Buffer memory;
    T *w_ih, *w_hh, *bias;
  };

  // A layer as the forward pass left it.
  struct Layer {
    LayerInput<T> input = {};
    Buffer input_memory;                // checkpoints, above the first layer: the input itself
    std::vector<Slabs> slabs;           // by direction; no checkpoints
    Buffer checkpoint_h, checkpoint_c;  // [segments][D][S][B][W]
  };

  std::shared_ptr<const PackedStack<T>> stack;
  int64_t steps, batch, checkpoint_every;
  std::vector<int64_t> lengths, starts_memory;
  const int64_t* starts;  // (B): rows stand one after the other in the caller's arrays; or null
  std::vector<int64_t> ids;
  std::vector<uint8_t> reset_memory;
  ResetMask reset = {};
  ScheduleBuilder schedule;
  std::vector<Layer> layers;
  uint64_t fingerprint = 0;  // checkpoints: of the caller's x, which is read again

  State(std::shared_ptr<const PackedStack<T>> s, const StackCall<T>& call)
      : stack(std::move(s)),
        steps(call.steps),
        batch(call.batch),
        checkpoint_every(call.checkpoint_every),
        lengths(call.lengths == nullptr
                    ? std::vector<int64_t>()
                    : std::vector<int64_t>(call.lengths, call.lengths + call.batch)),
        starts_memory(call.starts == nullptr
                          ? std::vector<int64_t>()
                          : std::vector<int64_t>(call.starts, call.starts + call.batch)),
        starts(call.starts == nullptr ? nullptr : starts_memory.data()),
        schedule(call.steps, call.batch, call.lengths, kTrainingChunkRows, call.checkpoint_every,
                 parts_for(*stack, call)) {}

  // The slabs are laid out for as many parts as the forward pass's threads take; the way back has
  // no more, whatever its own threads.
  static int parts_for(const PackedStack<T>& stack, const StackCall<T>& call) {
    const ScheduleBuilder whole(call.steps, call.batch, call.lengths, kTrainingChunkRows,
                                call.checkpoint_every);
    return training_parts(stack.kernels(), stack.spec(), whole, call.input.ids != nullptr,
                          call.threads);
  }

  const StackSpec& spec() const { return stack->spec(); }
  int width() const { return stack->kernels().width; }
  int64_t state_size() const { return ceil_div(spec().H, width()) * batch * width(); }
  bool one_hot(int layer) const { return layer == 0 && !ids.empty(); }

  const int64_t* lengths_data() const { return lengths.empty() ? nullptr : lengths.data(); }
  int64_t positions() const { return fastrnn::positions(steps, batch, lengths_data(), starts); }
  Layout layout(int64_t cols) const { return dense_layout(cols, batch, starts); }

  // A private copy of the call's masks and ids, so that the caller may reuse the arrays.
  void keep_call(const StackCall<T>& call) {
    const auto copy = [&](const auto* src, const Layout& from, auto& dst) {
      dst.resize(static_cast<size_t>(positions()));
      for_positions(steps, batch, starts == nullptr ? nullptr : lengths_data(),
                    [&](int64_t t, int64_t b) {
                      dst[static_cast<size_t>(layout(1).at(t, b))] = src[from.at(t, b)];
                    });
    };
    if (call.input.ids != nullptr) copy(call.input.ids, call.input.layout, ids);
    if (call.reset.data != nullptr) {
      copy(call.reset.data, call.reset.layout, reset_memory);
      reset = {reset_memory.data(), layout(1)};
    }
  }

  // Differs, but for bad luck of one in 2^64 or so, when any value of the input does. A sign bit
  // alone would pass through the multiplication unmixed; the rotation brings it to where it
  // spreads.
  uint64_t input_fingerprint(const LayerInput<T>& input) const {
    const size_t bytes = sizeof(T) * static_cast<size_t>(spec().I);
    uint64_t hash = 0;
    for_positions(steps, batch, lengths_data(), [&](int64_t t, int64_t b) {
      const char* const row = reinterpret_cast<const char*>(input.x + input.layout.at(t, b));
      uint64_t words[4] = {hash, 1, 2, 3};  // four chains, so that the multiplier is kept busy
      const auto mix = [&](const uint64_t (&next)[4]) {
        for (int k = 0; k < 4; ++k) {
          const uint64_t product = (words[k] ^ next[k]) * 0x9E3779B97F4A7C15u;
          words[k] = (product << 29 | product >> 35) + 1;
        }
      };
      size_t i = 0;
      uint64_t next[4];
      for (; i + sizeof(next) <= bytes; i += sizeof(next)) {
        std::memcpy(next, row + i, sizeof(next));
        mix(next);
      }
      uint64_t rest[4] = {};
      std::memcpy(rest, row + i, bytes - i);
      mix(rest);
      for (uint64_t word : words) hash = scalar::splitmix64(hash ^ word) + hash;
    });
    return hash;
  }

  ForwardArgs<T> forward_args(int layer, int direction, const LayerInput<T>& input,
                              Interrupt* interrupt) const {
    ForwardArgs<T> a = {};
    a.I = spec().input_size(layer);
    a.H = spec().H;
    a.reverse = direction == 1;
    a.schedule = &schedule.get();
    a.input = input;
    a.reset = reset;
    a.weights = stack->layer(layer, direction);
    a.state_rows = batch;
    a.interrupt = interrupt;
    return a;
  }

  void forward(const StackCall<T>& call);
  void forward_layer(int layer, const StackCall<T>& call, T* y, const Layout& y_layout);
  void backward(const BackwardCall<T>& call);
  void backward_layer(int layer, const BackwardCall<T>& call, const T* dy, const Layout& dy_layout,
                      T* dx, const Layout& dx_layout, std::vector<Sums>& sums);
};

template <class T>
void StackTape<T>::State::forward(const StackCall<T>& call) {
  keep_call(call);
  const int64_t DH = spec().H * spec().directions;
  layers.resize(static_cast<size_t>(spec().layers));
  Buffer previous;  // the output of the layer below
  for (int l = 0; l < spec().layers; ++l) {
    Layer& layer = layers[static_cast<size_t>(l)];
    if (one_hot(l)) {
      layer.input = {nullptr, ids.data(), layout(1), {}};
    } else if (l == 0) {
      layer.input = call.input;
      layer.input.layout.starts = starts;  // our own copy of it
      if (checkpoint_every > 0) fingerprint = input_fingerprint(layer.input);
    } else {
      const uint64_t key = scalar::splitmix64(call.dropout_key + static_cast<uint64_t>(l));
      layer.input = {previous.template data<T>(), nullptr, layout(DH),
                     dropout_mask(call.dropout, key)};
      if (checkpoint_every > 0) layer.input_memory = std::move(previous);
    }
    const bool last = l + 1 == spec().layers;
    Buffer output = last ? Buffer() : make_buffer<T>(positions(), DH);
    T* const y = last ? call.y : output.template data<T>();
    forward_layer(l, call, y, last ? call.y_layout : layout(DH));
    previous = std::move(output);
    if (checkpoint_every == 0 && !one_hot(l)) layer.input.x = nullptr;  // its rows are in the slabs
  }
  zero_padding(call.y, call.y_layout, steps, batch, lengths_data(), DH);
}

template <class T>
void StackTape<T>::State::forward_layer(int l, const StackCall<T>& call, T* y,
                                        const Layout& y_layout) {
  Layer& layer = layers[static_cast<size_t>(l)];
  const Schedule& s = schedule.get();
  const int D = spec().directions, W = width();
  const bool has_cell = cell_traits(spec().kind).has_cell;
  const int64_t size = state_size();
  Buffer state = make_buffer<T>(D * size, has_cell ? 2 : 1);
  std::vector<ForwardArgs<T>> directions;
  for (int d = 0; d < D; ++d) {
    ForwardArgs<T> a = forward_args(l, d, layer.input, call.interrupt);
    a.h = state.template data<T>() + d * size;
    a.c = has_cell ? a.h + D * size : nullptr;
    a.y = y + d * spec().H;
    a.y_layout = y_layout;
    if (checkpoint_every == 0) {
      layer.slabs.emplace_back(spec(), W, s.rows_before[s.chunks], s.chunks, size,
                               spec().input_size(l), one_hot(l));
      layer.slabs.back().attach(a);
    }
    load_state(call.h0, spec().index(l, d), s.order, batch, spec().H, W, a.h);
    if (has_cell) load_state(call.c0, spec().index(l, d), s.order, batch, spec().H, W, a.c);
    directions.push_back(a);
  }
  LayerForward<T> forward(stack->kernels(), spec().kind, directions, schedule, call.threads);
  if (checkpoint_every == 0) {
    forward.run(0, s.chunks, call.interrupt);
  } else {
    const std::vector<int64_t>& segments = schedule.segments();
    const int64_t count = static_cast<int64_t>(segments.size()) - 1;
    layer.checkpoint_h = make_buffer<T>(count * D, size);
    if (has_cell) layer.checkpoint_c = make_buffer<T>(count * D, size);
    const size_t bytes = sizeof(T) * static_cast<size_t>(D * size);
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(layer.checkpoint_h.template data<T>() + i * D * size, directions[0].h, bytes);
      if (has_cell)
        std::memcpy(layer.checkpoint_c.template data<T>() + i * D * size, directions[0].c, bytes);
      forward.run(segments[static_cast<size_t>(i)], segments[static_cast<size_t>(i) + 1],
                  call.interrupt);
    }
  }
  for (int d = 0; d < D; ++d) {
    const ForwardArgs<T>& a = directions[static_cast<size_t>(d)];
    store_state(a.h, spec().index(l, d), s.order, batch, spec().H, W, call.hn);
    if (has_cell) store_state(a.c, spec().index(l, d), s.order, batch, spec().H, W, call.cn);
  }
}

// Adds the accumulated bias gradients [S*slots][W] to both biases: the same numbers, except for n
// of a GRU whose reset gate comes after the product.
template <class T>
void add_bias_gradients(CellKind kind, int64_t H, int W, const T* acc, bool fresh,
                        const LayerGradients<T>& g) {
  if (g.b_ih == nullptr) return;
  const CellTraits traits = cell_traits(kind);
  const auto add = [fresh](T value, T* sum) { *sum = (fresh ? T(0) : *sum) + value; };
  for (int gate = 0; gate < traits.gates; ++gate)
    for (int64_t u = 0; u < H; ++u) {
      const T* const lane = acc + u / W * traits.slots * W + u % W;
      const int in_slot = kind == CellKind::kGruAfter && gate == 2 ? 3 : gate;
      add(lane[in_slot * W], g.b_ih + gate * H + u);
      add(lane[gate * W], g.b_hh + gate * H + u);
    }
}

template <class T>
void StackTape<T>::State::backward(const BackwardCall<T>& call) {
  if (checkpoint_every > 0 && !one_hot(0) && input_fingerprint(layers[0].input) != fingerprint)
    throw std::runtime_error(
        "x: expected the values of the forward pass, which checkpoint_every reads again, got "
        "changed ones");
  const int64_t DH = spec().H * spec().directions;
  std::vector<Sums> sums(static_cast<size_t>(spec().count()));
  Buffer above;  // the gradient of this layer's output
  const T* dy = call.dy;
  Layout dy_layout = call.dy_layout;
  for (int l = spec().layers - 1; l >= 0; --l) {
    Buffer below;
    T* dx = call.dx;
    if (l > 0) {
      below = make_buffer<T>(positions(), DH);
      dx = below.template data<T>();
    }
    backward_layer(l, call, dy, dy_layout, dx, l > 0 ? layout(DH) : call.dx_layout, sums);
    layers[static_cast<size_t>(l)] = Layer();  // freed as soon as it is used
    above = std::move(below);
    dy = above.template data<T>();
    dy_layout = layout(DH);
  }
  if (call.dx != nullptr)
    zero_padding(call.dx, call.dx_layout, steps, batch, lengths_data(), spec().I);

  // All at once at the end: whoever accumulates gets the whole gradient or, on an error, nothing.
  const Kernels<T>& k = stack->kernels();
  const int gates = cell_traits(spec().kind).gates;
  const int64_t H = spec().H, S = ceil_div(H, width());
  for (int l = 0; l < spec().layers; ++l)
    for (int d = 0; d < spec().directions; ++d) {
      const Sums& sum = sums[static_cast<size_t>(spec().index(l, d))];
      const LayerGradients<T>& g = call.gradients[static_cast<size_t>(spec().index(l, d))];
      const int64_t I = spec().input_size(l);
      const auto add_ih = one_hot(l) ? k.add_table_gradient : k.add_gradient;
      const int parts = static_cast<int>(std::min<int64_t>(
          S, plan_threads(call.threads, static_cast<double>(gates * H * (I + H)))));
      run_parallel(parts, nullptr, [&](int part) {
        const int64_t s0 = cut(S, parts, part), s1 = cut(S, parts, part + 1);
        add_ih(sum.w_ih, gates, H, I, s0, s1, call.fresh, g.w_ih);
        k.add_gradient(sum.w_hh, gates, H, H, s0, s1, call.fresh, g.w_hh);
      });
      add_bias_gradients(spec().kind, H, width(), sum.bias, call.fresh, g);
    }
}

template <class T>
void StackTape<T>::State::backward_layer(int l, const BackwardCall<T>& call, const T* dy,
                                         const Layout& dy_layout, T* dx, const Layout& dx_layout,
                                         std::vector<Sums>& sums) {
  Layer& layer = layers[static_cast<size_t>(l)];
  const Kernels<T>& k = stack->kernels();
  const Schedule& s = schedule.get();
  const int D = spec().directions, W = width(), kind = static_cast<int>(spec().kind);
  const CellTraits traits = cell_traits(spec().kind);
  const int64_t I = spec().input_size(l), H = spec().H;
  const int64_t S = ceil_div(H, W), P = S * traits.gates, X = ceil_div(I, W), size = state_size();
  const bool want_dx = dx != nullptr;

  const double work = D * layer_work(s, spec().kind, 0, H);
  const int threads = plan_threads(call.threads, work);
  const int step_parts = static_cast<int>(s.parts);
  const Division team =
      step_parts > 1 ? Division{1, 1} : divide(k, spec().kind, s, H, D, work, call.threads);
  // What does not depend on the recurrence is cut finer than there are threads, so that one that is
  // slower than the others does less.
  const int shares = threads > 1 ? 4 * threads : 1;
  const int panel_parts = static_cast<int>(std::min<int64_t>(P, ceil_div(shares, D)));

  // Work memory, per direction: transposed weights, the running gradient of the state, the states
  // of a chunk, or of two so that threads need not wait for each other at its end.
  const int copies = threads > 1 && team.team == 1 ? 2 : 1;
  const int64_t n_hh = S * P * W * W, n_ih = one_hot(l) ? P * I * W : X * P * W * W,
                n_b = S * traits.slots * W;
  const int64_t n_wide = X * P * W * W, n_rows = copies * s.max_rows * S * W;
  const size_t per_direction = checked_add(
      static_cast<size_t>(n_hh), static_cast<size_t>(want_dx ? n_wide : 0),
      checked_mul(2, static_cast<size_t>(size)),
      checked_mul(traits.has_cell || traits.two_phase ? 2 : 1, static_cast<size_t>(n_rows)));
  Buffer memory(checked_mul(per_direction, static_cast<size_t>(D), sizeof(T)));
  std::vector<BackwardArgs<T>> args;
  T* at = memory.template data<T>();
  const auto take = [&](int64_t n) {
    T* const p = at;
    at += n;
    return p;
  };
  for (int d = 0; d < D; ++d) {
    BackwardArgs<T> a = {};
    a.I = I;
    a.H = H;
    a.reverse = d == 1;
    a.schedule = &s;
    a.input = layer.input;
    a.reset = reset;
    a.dy = dy == nullptr ? nullptr : dy + d * H;
    a.dy_layout = dy_layout;
    a.state_rows = batch;
    a.dx = dx;
    a.dx_layout = dx_layout;
    a.add_dx = D > 1;
    a.fetch_w_hh = fetches_ahead<T>(spec().kind, H, H, team.team);
    a.fetch_w_ih = fetches_ahead<T>(spec().kind, I, H, 1);
    a.w_hh = take(n_hh);
    a.w_ih = want_dx ? take(n_wide) : nullptr;
    Sums& sum = sums[static_cast<size_t>(spec().index(l, d))];
    sum.memory = make_buffer<T>(n_hh + n_ih + n_b, 1);
    a.dw_hh = sum.w_hh = sum.memory.template data<T>();
    a.dw_ih = sum.w_ih = sum.w_hh + n_hh;
    a.dbias = sum.bias = sum.w_ih + n_ih;
    a.dh = take(size);
    a.dc = take(size);
    a.copies = copies;
    a.h_prev = take(n_rows);
    if (traits.has_cell) a.c_prev = take(n_rows);
    if (traits.two_phase) a.rh = take(n_rows);
    load_state(call.dhn, spec().index(l, d), s.order, batch, H, W, a.dh);
    load_state(call.dcn, spec().index(l, d), s.order, batch, H, W, a.dc);
    a.interrupt = call.interrupt;
    if (checkpoint_every == 0) layer.slabs[static_cast<size_t>(d)].attach(a);
    args.push_back(a);
  }

  const auto run = [&](int tasks, const auto& f) {
    if (call.interrupt != nullptr) call.interrupt->poll();
    if (threads > 1) return run_parallel(tasks, call.interrupt, f);
    for (int i = 0; i < tasks; ++i) f(i);
    if (call.interrupt != nullptr && call.interrupt->stop()) throw Interrupted();
  };

  // What is added to before it is written: the sums only where no chunk writes them, dx where two
  // directions meet.
  const int64_t n_zeroed = s.chunks == 0 ? n_hh + n_ih + n_b : (one_hot(l) ? n_ih : 0) + n_b;
  const int64_t n_dx = want_dx && D > 1 ? positions() * I : 0;
  run(D * panel_parts, [&](int task) {
    const int d = task / panel_parts, part = task % panel_parts;
    const PackedLayer<T> w = stack->layer(l, d);
    const BackwardArgs<T>& a = args[static_cast<size_t>(d)];
    const auto clear = [](T* all, int64_t n, int parts, int mine) {
      const int64_t from = cut(n, parts, mine), end = cut(n, parts, mine + 1);
      std::memset(all + from, 0, sizeof(T) * static_cast<size_t>(end - from));
    };
    clear(a.dw_hh + n_hh + n_ih + n_b - n_zeroed, n_zeroed, panel_parts, part);
    if (n_dx > 0) clear(dx, n_dx, D * panel_parts, task);
    k.pack_transposed(w.w_hh, P, H, cut(S, panel_parts, part), cut(S, panel_parts, part + 1),
                      const_cast<T*>(a.w_hh));
    if (want_dx)
      k.pack_transposed(w.w_ih, P, I, cut(X, panel_parts, part), cut(X, panel_parts, part + 1),
                        const_cast<T*>(a.w_ih));
  });

  Buffer reset_scratch;  // a two-phase cell's gradient of r∘h
  if (traits.two_phase) reset_scratch = make_buffer<T>(D * size, 1);
  // At least four: so a part's rows of dG stay in the cache while they go through the weights.
  const int dx_parts = static_cast<int>(
      std::max<int64_t>(threads, std::min<int64_t>(4 * threads, s.max_rows / (4 * k.rows))));
  const int64_t dx_rows = ceil_div(s.max_rows, dx_parts);
  Buffer dx_scratch;  // of a thread each
  if (want_dx) dx_scratch = make_buffer<T>(threads * dx_rows, X * W);

  const auto perform = [&](const BackTask& task, int worker) {
    const BackwardArgs<T>& a = args[static_cast<size_t>(task.direction)];
    if (task.kind == BackTask::kSteps) {
      const int64_t j0 = s.part_begin[task.part], j1 = s.part_begin[task.part + 1];
      T* const scratch = traits.two_phase
                             ? reset_scratch.template data<T>() + task.direction * size + j0 * S * W
                             : nullptr;
      k.backward[kind](a, task.chunk, {j0, j1, task.part}, scratch);
    } else if (task.kind == BackTask::kWeights) {
      k.weight_gradients[kind](a, task.chunk, cut(P, panel_parts, task.part),
                               cut(P, panel_parts, task.part + 1));
    } else {
      int64_t rows = 0;
      for (int64_t i = s.chunk_begin[task.chunk]; i < s.chunk_begin[task.chunk + 1]; ++i)
        rows += s.active[i];
      const int64_t r0 = cut(rows, dx_parts, task.part), r1 = cut(rows, dx_parts, task.part + 1);
      if (r0 < r1)
        k.input_gradients[kind](a, task.chunk, r0, r1,
                                dx_scratch.template data<T>() + worker * dx_rows * X * W);
    }
  };
  // The members of a team do not take tasks: they meet in every step.
  const auto back_as_team = [&](int64_t c) {
    run_as_team(team, 1, call.interrupt, [&](int64_t, int rank, Team& here) {
      const Share share = {0, batch, 0, rank, here.size(), here.size() > 1 ? &here : nullptr};
      k.backward[kind](args[0], c, share, reset_scratch.template data<T>());
    });
    const int inputs = want_dx ? dx_parts : 0;
    std::atomic<int> next{0};
    run(threads, [&](int worker) {
      for (int i = next++; i < panel_parts + inputs; i = next++) {
        if (call.interrupt != nullptr && interrupt_tick(call.interrupt)) return;
        if (i < panel_parts) {
          perform({BackTask::kWeights, 0, c, i}, worker);
        } else {
          perform({BackTask::kInputs, 0, c, i - panel_parts}, worker);
        }
      }
    });
  };
  const auto back_through_chunks = [&](int64_t first, int64_t end) {
    if (team.team > 1) {
      for (int64_t c = end - 1; c >= first; --c) back_as_team(c);
      return;
    }
    BackTasks tasks({first, end, D, step_parts, panel_parts, want_dx ? dx_parts : 0, copies});
    const unsigned forks = fork_count();
    const int pauses = pauses_among(threads);
    run(threads, [&](int worker) {
      BackTask task;
      while (!tasks.finished()) {
        if (call.interrupt != nullptr && interrupt_tick(call.interrupt)) return;
        if (fork_count() != forks) return;
        if (!tasks.take_or_wait(&task, pauses)) continue;
        perform(task, worker);
        tasks.done(task);
      }
    });
  };

  if (checkpoint_every == 0) {
    back_through_chunks(0, s.chunks);
  } else {
    const std::vector<int64_t>& segments = schedule.segments();
    int64_t most = 0, most_chunks = 0;
    for (size_t i = 0; i + 1 < segments.size(); ++i) {
      most = std::max(most, s.rows_before[segments[i + 1]] - s.rows_before[segments[i]]);
      most_chunks = std::max(most_chunks, segments[i + 1] - segments[i]);
    }
    Buffer state = make_buffer<T>(D * size, 2);
    std::vector<Slabs> slabs;
    std::vector<ForwardArgs<T>> forward_directions;
    for (int d = 0; d < D; ++d) {
      slabs.emplace_back(spec(), W, most, most_chunks, size, I, one_hot(l));
      ForwardArgs<T> f = forward_args(l, d, layer.input, call.interrupt);
      f.h = state.template data<T>() + d * size;
      f.c = traits.has_cell ? f.h + D * size : nullptr;
      slabs.back().attach(f);
      slabs.back().attach(args[static_cast<size_t>(d)]);
      forward_directions.push_back(f);
    }
    LayerForward<T> forward(k, spec().kind, forward_directions, schedule, call.threads);
    const size_t bytes = sizeof(T) * static_cast<size_t>(D * size);
    for (int64_t i = static_cast<int64_t>(segments.size()) - 2; i >= 0; --i) {
      const int64_t first = segments[static_cast<size_t>(i)],
                    end = segments[static_cast<size_t>(i) + 1];
      std::memcpy(forward_directions[0].h, layer.checkpoint_h.template data<T>() + i * D * size,
                  bytes);
      if (traits.has_cell)
        std::memcpy(forward_directions[0].c, layer.checkpoint_c.template data<T>() + i * D * size,
                    bytes);
      for (int d = 0; d < D; ++d) {
        forward.directions()[static_cast<size_t>(d)].first_chunk = first;
        args[static_cast<size_t>(d)].first_chunk = first;
      }
      forward.run(first, end, call.interrupt);
      back_through_chunks(first, end);
    }
  }

  for (int d = 0; d < D; ++d) {
    const BackwardArgs<T>& a = args[static_cast<size_t>(d)];
    store_state(a.dh, spec().index(l, d), s.order, batch, H, W, call.dh0);
    if (traits.has_cell) store_state(a.dc, spec().index(l, d), s.order, batch, H, W, call.dc0);
  }
}

template <class T>
StackTape<T>::StackTape(std::shared_ptr<const PackedStack<T>> stack, const StackCall<T>& call)
    : state_(new State(std::move(stack), call)) {
  const FpEnv env;
  state_->forward(call);
}

template <class T>
StackTape<T>::~StackTape() = default;

template <class T>
void StackTape<T>::backward(const BackwardCall<T>& call) {
  const FpEnv env;
  state_->backward(call);
}

template <class T>
const StackSpec& StackTape<T>::spec() const {
  return state_->spec();
}

template <class T>
int64_t StackTape<T>::steps() const {
  return state_->steps;
}

template <class T>
int64_t StackTape<T>::batch() const {
  return state_->batch;
}

template <class T>
bool StackTape<T>::one_hot() const {
  return state_->one_hot(0);
}

template <class T>
size_t StackTape<T>::bytes() const {
  size_t total = 0;
  for (const auto& layer : state_->layers) {
    total += layer.input_memory.size() + layer.checkpoint_h.size() + layer.checkpoint_c.size();
    for (const auto& slabs : layer.slabs)
      total +=
          slabs.gates.size() + slabs.chunk_h.size() + slabs.chunk_c.size() + slabs.x_rows.size();
  }
  return total;
}

template class StackTape<float>;
template class StackTape<double>;

}  // namespace fastrnn
