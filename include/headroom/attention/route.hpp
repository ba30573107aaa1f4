#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/types.h>

#include <string>
#include <string_view>
#include <vector>

#include "headroom/attention/fused.hpp"
#include "headroom/attention/request.hpp"
#include "headroom/core/word_list.hpp"
#include "headroom/runtime/dry_run.hpp"

namespace headroom::inline v0::detail {

/// What a backend can't serve of a request, by the names of the options.
inline std::vector<std::string> refusals(AttentionBackend backend, const torch::Tensor& q,
                                         const AttentionRequest& request) {
  std::vector<std::string> names;
  const auto refuse = [&](bool asked, const std::string& name) {
    if (asked) names.push_back(name);
  };
  if (backend == AttentionBackend::tiled) {
    refuse(!compute_device(q).is_cpu(), "tensors on " + compute_device(q).str());
    const auto dtype = q.scalar_type();
    refuse(dtype != torch::kFloat && dtype != torch::kDouble && dtype != torch::kBFloat16 && dtype != torch::kHalf,
           "tensors of " + std::string(q.dtype().name()));
  }
  if (backend != AttentionBackend::tiled) {
    refuse(request.score_function.has_value(), "score_function");
    refuse(request.mask_function.has_value(), "mask_function");
  }
  if (backend == AttentionBackend::fused) {
    const auto device = compute_device(q);
    refuse(!device.is_cpu() && !device.is_cuda(), "tensors on " + device.str());
    refuse(device.is_cuda() && q.scalar_type() == torch::kDouble, "double on " + device.str());
    // Seen on an H200: NaN; and gradients of q and k that are off by 0.2, from memory-efficient attention in 16 bits. A
    // likely cause of those is mended in FusedAttention, which has not met a GPU since
    const bool narrow_on_cuda = device.is_cuda() && q.scalar_type() != torch::kFloat;
    refuse(device.is_cuda() && request.scale <= 0, "a scale of 0 or less on " + device.str());
    refuse(narrow_on_cuda && request.causal && request.queries() != request.keys(),
           "causal with more or fewer keys than queries in 16 bits on " + device.str());
    refuse(narrow_on_cuda && request.bias.defined(), "bias in 16 bits on " + device.str());
    refuse(q.size(-1) == 0 || c10::multiply_integers(request.score_sizes) == 0, "empty tensors");
    refuse(request.heads_per_kv_head() > 1, "fewer heads of k and v than of q");
    refuse(request.causal && request.query_offset != 0, "query_offset with causal");
    refuse(request.causal && request.scale <= 0 && device.is_cpu(), "causal with a scale of 0 or less");  // NaN
    refuse(request.window_left >= 0 || request.window_right >= 0, "window");
    refuse(request.key_lengths.defined(), "key_lengths");
    refuse(request.sequence_starts.defined(), "sequence_starts");
    refuse(request.mask.defined(), request.mask_visible ? "mask" : "hidden");
    refuse(request.block_mask.defined(), "block_mask");
    if (request.bias.defined()) {
      refuse(request.bias.requires_grad() && torch::GradMode::is_enabled(), "bias with a gradient");
      refuse(!takes_bias(q, request), "a bias of this dtype or layout");
    }
    refuse(request.relative_bias.defined(), "relative_bias");
    refuse(request.alibi_slopes.defined(), "alibi_slopes");
    refuse(request.sink.defined(), "sink");
    refuse(request.softcap > 0, "softcap");
    refuse(request.rotary.defined(), "rotary");
    refuse(request.dropout.active(), "dropout");
  }
  return names;
}

/// The backend that `automatic` stands for; fails when the named one can't serve the request.
inline AttentionBackend resolve_backend(const torch::Tensor& q, const AttentionRequest& request,
                                        AttentionBackend wanted) {
  if (wanted == AttentionBackend::automatic) {
    const auto best = compute_device(q).is_cpu() ? AttentionBackend::tiled : AttentionBackend::fused;
    wanted = refusals(best, q, request).empty() ? best : AttentionBackend::chunked;
  }
  const auto refused = refusals(wanted, q, request);
  if (refused.empty()) return wanted;
  std::vector<std::string_view> able;
  for (const auto backend :
       {AttentionBackend::tiled, AttentionBackend::fused, AttentionBackend::chunked, AttentionBackend::reference}) {
    if (refusals(backend, q, request).empty()) able.push_back(kAttentionBackendNames[static_cast<size_t>(backend)]);
  }
  fail("headroom.attention.backend", "the backend ", wanted, " does not serve ", core::word_list(refused),
       able.empty() ? "; no backend serves all of the request: leave something out"
                    : "; leave that out or ask for one of the backends ",
       core::word_list(able));
}

}  // namespace headroom::inline v0::detail
