#pragma once

#include <torch/nn/module.h>
#include <torch/types.h>

#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace headroom::inline v0::audio {

/// Maps a batch of segments of a mixture [B,C,S] to stems [B,N,C,S].
using SegmentModel = std::function<torch::Tensor(const torch::Tensor&)>;

namespace detail {

/// Switches a module holder to evaluation for its lifetime and gives every submodule its mode back; does nothing to a
/// plain function.
template <class Model>
class EvaluationMode {
 public:
  explicit EvaluationMode(Model& model) {
    if constexpr (requires { model->modules(); }) {
      for (const auto& module : model->modules()) {  // parents come before their children
        modes_.emplace_back(module, module->is_training());
      }
      model->eval();
    }
  }
  EvaluationMode(const EvaluationMode&) = delete;
  EvaluationMode& operator=(const EvaluationMode&) = delete;
  ~EvaluationMode() {
    for (const auto& [module, training] : modes_) {
      module->train(training);
    }
  }

 private:
  std::vector<std::pair<std::shared_ptr<torch::nn::Module>, bool>> modes_;
};

}  // namespace detail

/// A function or module holder as SegmentModel. A module is in evaluation mode for as long as a copy of the result
/// lives; each submodule's own mode is restored after.
template <class Model>
SegmentModel segment_model(Model model) {
  const auto mode = std::make_shared<const detail::EvaluationMode<Model>>(model);
  return [model, mode](const torch::Tensor& segments) mutable -> torch::Tensor { return model(segments); };
}

}  // namespace headroom::inline v0::audio
