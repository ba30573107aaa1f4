#pragma once

#include <ATen/ATen.h>
#include <ATen/ops/gru_native.h>
#include <ATen/ops/lstm_native.h>
#include <ATen/ops/rnn_relu_native.h>
#include <ATen/ops/rnn_tanh_native.h>
#include <torch/library.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "headroom/plan/kernels/probe.hpp"
#include "headroom/runtime/dry_run.hpp"
#include "headroom/runtime/torch_version.hpp"

namespace headroom::inline v0::detail::meta {

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
