#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "headroom/plan/kernels/probe.hpp"
#include "headroom/plan/kernels/registry.hpp"

namespace headroom::inline v0::detail::meta {

/// One direction of one layer of an LSTM by oneDNN, in a dry run that stands for the CPU. oneDNN chooses a layout for
/// the weights and takes workspace. It is asked as for a convolution: a short sequence is computed, the real one stops
/// before it would be.
class LstmLayerOnCpu {
 public:
  using Tensor = at::Tensor;
  using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;
  using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

  /// Of mkldnn_rnn_layer: input [steps, batch, features], hidden states [batch, hidden] -> output, hidden states,
  /// workspace for backward.
  static Results forward(const Tensor& input, const Tensor& w0, const Tensor& w1, const Tensor& w2, const Tensor& w3,
                         const Tensor& hx, const Tensor& cx, bool reverse, at::IntArrayRef batch_sizes, int64_t mode,
                         int64_t hidden, int64_t layers, bool has_biases, bool bidirectional, bool batch_first,
                         bool train) {
    const auto run = [&](int64_t steps, bool zeros) {
      const auto real = [&](const Tensor& x) { return stand_in(x, x.sizes(), zeros); };
      return [&, x = of_length(input, steps, zeros), weights = std::array{real(w0), real(w1), real(w2), real(w3)},
              h = real(hx), c = real(cx)] {
        const auto [y, hy, cy, workspace] =
            at::mkldnn_rnn_layer(x, weights[0], weights[1], weights[2], weights[3], h, c, reverse, batch_sizes, mode,
                                 hidden, layers, has_biases, bidirectional, batch_first, train);
        return std::vector{y, hy, cy, workspace};
      };
    };
    const AllocationScript script = probe(
        {c10::str("lstm", at::GradMode::is_enabled(), has_biases, reverse, train), input.strides(), input, w0, w1},
        run);
    const std::vector<int64_t> y{input.size(0), input.size(1), hidden};
    const auto made = script.replay([&](size_t i, at::MemoryFormat) {
      if (i == 3) return at::empty({script.bytes[*script.results[i].block]}, input.options().dtype(at::kByte));
      return at::empty(i == 0 ? at::IntArrayRef(y) : hx.sizes(), input.options().requires_grad(false));
    });
    return {made[0], made[1], made[2], made[3]};
  }

  static Gradients backward(const Tensor& input, const Tensor& w0, const Tensor& w1, const Tensor& w2, const Tensor& w3,
                            const Tensor& hx, const Tensor& cx, const Tensor& output, const Tensor& hy,
                            const Tensor& cy, const std::optional<Tensor>& grad_y, const std::optional<Tensor>& grad_hy,
                            const std::optional<Tensor>& grad_cy, bool reverse, int64_t mode, int64_t hidden,
                            int64_t layers, bool has_biases, bool train, bool bidirectional,
                            at::IntArrayRef batch_sizes, bool batch_first, const Tensor& workspace) {
    const auto given = [](const std::optional<Tensor>& grad) { return grad.has_value() && grad->defined(); };
    if (!given(grad_y) && !given(grad_hy) && !given(grad_cy)) return {};
    const auto run = [&](int64_t steps, bool zeros) {
      const auto real = [&](const Tensor& x) { return stand_in(x, x.sizes(), zeros); };
      const auto maybe = [&](const std::optional<Tensor>& x) { return given(x) ? real(*x) : Tensor(); };
      // Enough for that length, with the padding of its parts
      const int64_t bytes = workspace.numel() / input.size(0) * (steps + 2) + (1 << 18);
      const Tensor space = at::empty({bytes}, at::TensorOptions(at::kByte).device(at::kCPU));
      return [&, x = of_length(input, steps, zeros), weights = std::array{real(w0), real(w1), real(w2), real(w3)},
              states = std::array{real(hx), real(cx), real(hy), real(cy)}, y = of_length(output, steps, zeros),
              grads = std::array{given(grad_y) ? of_length(*grad_y, steps, zeros) : Tensor(), maybe(grad_hy),
                                 maybe(grad_cy)},
              space] {
        const auto [dx, dw0, dw1, db0, db1, dh, dc] =
            at::mkldnn_rnn_layer_backward(x, weights[0], weights[1], weights[2], weights[3], states[0], states[1], y,
                                          states[2], states[3], grads[0], grads[1], grads[2], reverse, mode, hidden,
                                          layers, has_biases, train, bidirectional, batch_sizes, batch_first, space);
        return std::vector{dx, dw0, dw1, db0, db1, dh, dc};
      };
    };
    const auto grad_strides = given(grad_y) ? grad_y->strides() : at::IntArrayRef();
    const AllocationScript script =
        probe({c10::str("lstm backward", has_biases, reverse, train, given(grad_hy), given(grad_cy), grad_strides),
               output.strides(), input, w0, w1},
              run);
    const Tensor like[] = {input, w0, w1, w2, w3, hx, cx};
    const auto made = script.replay([&](size_t i, at::MemoryFormat) {
      const std::vector<int64_t> bias{w0.size(0)};
      return at::empty(i == 3 || i == 4 ? at::IntArrayRef(bias) : like[i].sizes(),
                       input.options().requires_grad(false));
    });
    return {made[0], made[1], made[2], made[3], made[4], made[5], made[6]};
  }

 private:
  static constexpr int64_t kShort = 2;                // steps that are computed
  static constexpr int64_t kRoom = int64_t{1} << 28;  // bytes of a sequence with its workspace; few are touched

  static Tensor of_length(const Tensor& x, int64_t steps, bool zeros) {
    return stand_in(x, {steps, x.size(1), x.size(2)}, zeros);
  }

  struct Problem {
    std::string what;
    at::IntArrayRef strides;
    const Tensor &input, &w0, &w1;
  };

  /// `run(steps, zeros)` makes inputs of that length and returns what computes them.
  template <class Run>
  static AllocationScript probe(const Problem& problem, const Run& run) {
    const auto& [what, strides, input, w0, w1] = problem;
    const std::string key = c10::str(what, input.sizes(), strides, w0.sizes(), w1.sizes(), at::get_num_threads());
    const auto make = [&]() -> std::optional<AllocationScript> {
      KernelProbe probe;
      const int64_t steps = input.size(0);
      AllocationScript script = probe.record(run(std::min(kShort, steps), true));
      const size_t ahead = script.before_release();
      const auto asked_for = [&](int64_t length) {
        return probe.record(run(length, false), [&](size_t i, int64_t) { return i + 1 == ahead; }).bytes;
      };
      if (steps <= kShort) return script;
      const int64_t a_step = input.size(1) * (input.size(2) + 16 * w1.size(1)) * 4,
                    part = std::clamp(kRoom / a_step, kShort, steps);
      std::vector<int64_t> bytes = asked_for(part);
      if (part < steps) {
        const std::vector<int64_t> less = asked_for(part / 2);
        for (size_t i = 0; i < ahead; ++i) bytes[i] += (bytes[i] - less[i]) * (steps - part) / (part - part / 2);
      }
      std::copy(bytes.begin(), bytes.end(), script.bytes.begin());
      script.is_estimate = part < steps;
      return script;
    };
    AllocationScript script = *probed_script(key, make);
    if (script.is_estimate) estimated.insert("aten::lstm");
    return script;
  }
};

inline void register_lstm(KernelRegistry& add) {
  add("mkldnn_rnn_layer", &LstmLayerOnCpu::forward);
  add("mkldnn_rnn_layer_backward", &LstmLayerOnCpu::backward);
}

}  // namespace headroom::inline v0::detail::meta
