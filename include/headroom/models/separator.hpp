#pragma once

#include <torch/nn/module.h>
#include <torch/types.h>

#include <concepts>
#include <functional>
#include <memory>
#include <utility>

namespace headroom::inline v0::models {

/// A separator whose class is no longer known: a module, and how it turns mixtures [B,C,S] into stems [B,N,C,S]. Like a
/// module holder it is a handle: copies share the module.
class Separator {
 public:
  using Forward = std::function<torch::Tensor(const torch::Tensor& mixture)>;

  /// Of a module holder whose forward takes mixtures to stems.
  template <class Holder>
  requires(!std::same_as<Holder, Separator>) && requires(Holder& model, const torch::Tensor& mixture) {
    { model.ptr() } -> std::convertible_to<std::shared_ptr<torch::nn::Module>>;
    { model->forward(mixture) } -> std::convertible_to<torch::Tensor>;
  }
  Separator(Holder model)  // NOLINT: a holder is a separator
      : Separator(model.ptr(), [model](const torch::Tensor& mixture) mutable { return model->forward(mixture); }) {}

  /// Of any module, with a function that makes stems by it.
  Separator(std::shared_ptr<torch::nn::Module> module, Forward forward)
      : module_(std::move(module)), forward_(std::move(forward)) {}

  /// mixture [B,C,S] -> stems [B,N,C,S]
  torch::Tensor operator()(const torch::Tensor& mixture) const { return forward_(mixture); }

  torch::nn::Module& operator*() const { return *module_; }
  torch::nn::Module* operator->() const { return module_.get(); }

 private:
  std::shared_ptr<torch::nn::Module> module_;
  Forward forward_;
};

}  // namespace headroom::inline v0::models
