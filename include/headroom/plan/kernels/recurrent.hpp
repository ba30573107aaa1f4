#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/ops/gru_native.h>
#include <ATen/ops/lstm_native.h>
#include <ATen/ops/rnn_relu_native.h>
#include <ATen/ops/rnn_tanh_native.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "headroom/plan/kernels/probe.hpp"
#include "headroom/runtime/dry_run.hpp"

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
    const AllocationScript script = rehearse(c10::str("lstm", at::GradMode::is_enabled(), has_biases, reverse, train),
                                             input, w0, w1, input.strides(), run);
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
        rehearse(c10::str("lstm backward", has_biases, reverse, train, given(grad_hy), given(grad_cy), grad_strides),
                 input, w0, w1, output.strides(), run);
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

  /// `run(steps, zeros)` makes inputs of that length and returns what computes them.
  template <class Run>
  static AllocationScript rehearse(const std::string& what, const Tensor& input, const Tensor& w0, const Tensor& w1,
                                   at::IntArrayRef strides, const Run& run) {
    const std::string key = c10::str(what, input.sizes(), strides, w0.sizes(), w1.sizes(), at::get_num_threads());
    const auto make = [&]() -> std::optional<AllocationScript> {
      Rehearsal rehearsal;
      const int64_t steps = input.size(0);
      AllocationScript script = rehearsal.record(run(std::min(kShort, steps), true));
      const size_t ahead = script.before_release();
      const auto asked_for = [&](int64_t length) {
        return rehearsal.record(run(length, false), [&](size_t i, int64_t) { return i + 1 == ahead; }).bytes;
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
    AllocationScript script = *known_script(key, make);
    if (script.is_estimate) estimated.insert("aten::lstm");
    return script;
  }
};

/// Recurrent layers of a dry run that stands for the CPU, where LibTorch multiplies the inputs of all time steps at
/// once; on any other device, so also on the meta device, it does so one by one. Source: aten/src/ATen/native/RNN.cpp.
class RecurrentLayers {
 public:
  /// One step: the input times its weights, the hidden state, weights and bias of the hidden state -> next hidden
  /// state.
  using Cell = at::Tensor (*)(const at::Tensor& input, const at::Tensor& hidden, const at::Tensor& weight,
                              const at::Tensor& bias);

  static at::Tensor gru_cell(const at::Tensor& input, const at::Tensor& hidden, const at::Tensor& weight,
                             const at::Tensor& bias) {
    const auto from_input = input.unsafe_chunk(3, 1), from_hidden = at::linear(hidden, weight, bias).unsafe_chunk(3, 1);
    const at::Tensor reset = at::Tensor(from_hidden[0]).add_(from_input[0]).sigmoid_();
    const at::Tensor keep = at::Tensor(from_hidden[1]).add_(from_input[1]).sigmoid_();
    const at::Tensor fresh = from_input[2].add(at::Tensor(from_hidden[2]).mul_(reset)).tanh_();
    return (hidden - fresh).mul_(keep).add_(fresh);
  }
  template <at::Tensor (*Nonlinearity)(const at::Tensor&)>
  static at::Tensor simple_cell(const at::Tensor& input, const at::Tensor& hidden, const at::Tensor& weight,
                                const at::Tensor& bias) {
    return Nonlinearity(at::linear(hidden, weight, bias).add_(input));
  }

  using Result = std::tuple<at::Tensor, at::Tensor>;
  /// Of gru.input, rnn_tanh.input and rnn_relu.input.
  template <Cell cell, Result (*elsewhere)(const at::Tensor&, const at::Tensor&, at::TensorList, bool, int64_t, double,
                                           bool, bool, bool)>
  static Result run(const at::Tensor& input, const at::Tensor& hidden, at::TensorList parameters, bool has_biases,
                    int64_t layers, double dropout, bool train, bool bidirectional, bool batch_first) {
    if (!compute_device(input).is_cpu()) {
      return elsewhere(input, hidden, parameters, has_biases, layers, dropout, train, bidirectional, batch_first);
    }
    at::Tensor x = batch_first ? input.transpose(0, 1) : input;
    const std::vector<at::Tensor> first_hidden = hidden.unbind(0);
    const size_t directions = bidirectional ? 2 : 1, tensors = has_biases ? 4 : 2;
    std::vector<at::Tensor> last_hidden;
    for (int64_t layer = 0; layer < layers; ++layer) {
      std::vector<at::Tensor> outputs;
      for (size_t direction = 0; direction < directions; ++direction) {
        const size_t index = static_cast<size_t>(layer) * directions + direction;
        const at::TensorList own = parameters.slice(index * tensors, tensors);
        const at::Tensor no_bias;
        const at::Tensor products = at::linear(x, own[0], has_biases ? own[2] : no_bias);
        std::vector<at::Tensor> steps = products.unbind(0);
        if (direction == 1) std::reverse(steps.begin(), steps.end());
        at::Tensor state = first_hidden[index];
        for (at::Tensor& step : steps) step = state = cell(step, state, own[1], has_biases ? own[3] : no_bias);
        if (direction == 1) std::reverse(steps.begin(), steps.end());
        outputs.push_back(at::stack(steps, 0));
        last_hidden.push_back(state);
      }
      x = bidirectional ? at::cat(outputs, -1) : outputs[0];
      if (dropout != 0 && train && layer + 1 < layers) x = at::dropout(x, dropout, true);
    }
    return {batch_first ? x.transpose(0, 1) : x, at::stack(last_hidden, 0)};
  }

  using LstmResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
  /// lstm.input: layers of oneDNN. Source: aten/src/ATen/native/mkldnn/RNN.cpp.
  static LstmResult lstm(const at::Tensor& input, at::TensorList hidden, at::TensorList parameters, bool has_biases,
                         int64_t layers, double dropout, bool train, bool bidirectional, bool batch_first) {
    const bool on_cpu = compute_device(input).is_cpu(), projects = hidden[0].size(2) != hidden[1].size(2);
    if (!on_cpu || projects || input.scalar_type() != at::kFloat || !at::globalContext().userEnabledMkldnn()) {
      if (on_cpu) estimated.insert("aten::lstm");
      return at::native::lstm(input, hidden, parameters, has_biases, layers, dropout, train, bidirectional,
                              batch_first);
    }
    constexpr int64_t kLstm = 2;  // ideep::rnn_kind
    const at::Tensor first = (batch_first ? input.transpose(0, 1) : input).contiguous();
    at::Tensor x = first;
    const at::Tensor hx = hidden[0].contiguous(), cx = hidden[1].contiguous();
    const size_t directions = bidirectional ? 2 : 1, tensors = has_biases ? 4 : 2;
    std::vector<at::Tensor> outputs(directions), last_hx, last_cx;
    for (int64_t layer = 0; layer < layers; ++layer) {
      for (size_t direction = 0; direction < directions; ++direction) {
        const size_t index = static_cast<size_t>(layer) * directions + direction;
        const at::TensorList own = parameters.slice(index * tensors, tensors);
        const auto bias = [&](size_t i) {
          return has_biases ? own[2 + i] : at::zeros(own[i].sizes(), own[i].options().requires_grad(false));
        };
        const auto state = static_cast<int64_t>(index);
        auto [y, hy, cy, workspace] =
            at::mkldnn_rnn_layer(x, own[0], own[1], bias(0), bias(1), hx[state], cx[state], direction == 1, {}, kLstm,
                                 hx.size(2), layers, has_biases, bidirectional, batch_first, train);
        outputs[direction] = y;
        last_hx.push_back(hy);
        last_cx.push_back(cy);
      }
      x = bidirectional ? at::cat(outputs, -1) : outputs[0];
      if (dropout != 0 && train && layer + 1 < layers) x = at::dropout(x, dropout, true);
    }
    const at::Tensor hy = at::stack(last_hx, 0), cy = at::stack(last_cx, 0);
    return {batch_first ? x.transpose(0, 1) : x, hy, cy};
  }

  /// For the key of autograd on the meta device: the layers are made of operators that know their gradients.
  static void register_in(torch::Library& library) {
    library.impl("lstm.input", &lstm);
    library.impl("gru.input", &run<&gru_cell, &at::native::gru>);
    library.impl("rnn_tanh.input", &run<&simple_cell<&at::tanh>, &at::native::rnn_tanh>);
    library.impl("rnn_relu.input", &run<&simple_cell<&at::relu>, &at::native::rnn_relu>);
  }
};

}  // namespace headroom::inline v0::detail::meta
