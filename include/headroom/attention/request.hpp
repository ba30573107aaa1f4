#pragma once

#include <ATen/ExpandUtils.h>

#include <cmath>

#include "headroom/attention/options.hpp"
#include "headroom/core/error.hpp"

namespace headroom::inline v0::detail {

/// A checked request: q [..., H, Lq, D], k [..., H, Lk, D], v [..., H, Lk, Dv] of one dtype on one device.
struct AttentionRequest {
  bool causal;
  double scale;
  torch::Tensor key_lengths;  // int64, batch dimensions of q; undefined: all keys are valid

  static AttentionRequest check(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                const AttentionOptions& options) {
    const auto shape_error = [&](const auto&... parts) {
      fail("headroom.attention.shape", "q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(), ": ", parts...,
           "; expected q [...,H,Lq,D], k [...,H,Lk,D], v [...,H,Lk,Dv]");
    };
    for (const torch::Tensor* x : {&q, &k, &v}) {
      require(x->defined(), "headroom.attention.shape", "q, k and v must be defined tensors");
      require(x->dtype() == q.dtype() && x->device() == q.device() && x->layout() == torch::kStrided,
              "headroom.attention.dtype", "q is ", q.dtype(), " on ", q.device(), " but another input is ", x->dtype(),
              " on ", x->device(), " with layout ", x->layout(),
              "; expected three strided tensors of one dtype on one device");
    }
    require(q.is_floating_point(), "headroom.attention.dtype", "q is ", q.dtype(),
            ", expected a floating-point dtype; convert with q.to(torch::kFloat)");
    if (q.dim() < 3 || k.dim() != q.dim() || v.dim() != q.dim()) shape_error("ranks differ or are below 3");
    const int64_t batch_dims = q.dim() - 2;  // with the heads
    if (k.sizes().slice(0, batch_dims) != q.sizes().slice(0, batch_dims) ||
        v.sizes().slice(0, batch_dims) != q.sizes().slice(0, batch_dims)) {
      shape_error("batch or head dimensions differ");
    }
    if (k.size(-1) != q.size(-1)) shape_error("q and k differ in the last dimension");
    if (v.size(-2) != k.size(-2)) shape_error("k and v differ in length");
    const double scale =
        options.scale().value_or(1.0 / std::sqrt(std::max<double>(static_cast<double>(q.size(-1)), 1.0)));
    require(std::isfinite(scale), "headroom.attention.scale", "scale is ", scale, ", expected a finite number");
    return {options.causal(), scale, check_key_lengths(q, k, options)};
  }

 private:
  static torch::Tensor check_key_lengths(const torch::Tensor& q, const torch::Tensor& k,
                                         const AttentionOptions& options) {
    if (!options.key_lengths().has_value()) return {};
    const torch::Tensor& lengths = *options.key_lengths();
    const auto batch = q.sizes().slice(0, q.dim() - 3);
    const auto expected = [&](bool holds, const auto&... parts) {
      require(holds, "headroom.attention.key_lengths", "key_lengths ", parts..., "; expected integers on the CPU, ",
              "broadcastable to the batch dimensions ", batch, ", each between 0 and the ", k.size(-2), " keys");
    };
    expected(lengths.defined() && c10::isIntegralType(lengths.scalar_type(), /*includeBool=*/false) &&
                 lengths.device().is_cpu(),
             lengths.defined() ? "of another dtype or device" : "is undefined");
    expected(at::is_expandable_to(lengths.sizes(), batch), "has shape ", lengths.sizes());
    const torch::Tensor checked = lengths.to(torch::kLong).expand(batch).contiguous();
    const auto* const begin = checked.const_data_ptr<int64_t>();
    for (const auto* length = begin; length != begin + checked.numel(); ++length) {
      expected(0 <= *length && *length <= k.size(-2), "contains ", *length);
    }
    return checked;
  }
};

struct AttentionForward {
  torch::Tensor output;  // [..., H, Lq, Dv]
  torch::Tensor lse;     // [..., H, Lq], double
};

struct AttentionGradients {
  torch::Tensor q, k, v;
};

}  // namespace headroom::inline v0::detail
