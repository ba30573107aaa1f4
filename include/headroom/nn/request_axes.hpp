#pragma once

#include <torch/types.h>

#include <cstdint>
#include <optional>

#include "headroom/attention/checks.hpp"
#include "headroom/attention/options.hpp"

// What may be done with a request of attention when the tokens are cut into slices, or computed twice.
namespace headroom::inline v0::nn::detail {

/// Whether slices of tokens along a batch dimension, attended one by one, give the slices of the result: whether
/// nothing in the request differs along it. Batch dimensions are counted from the last, 0.
inline bool is_alike_along(const AttentionOptions& request, int64_t batch_dim) {
  // `own`: the dimensions behind the batch dimensions
  const auto alike = [&](const std::optional<torch::Tensor>& x, int64_t own) {
    if (!x.has_value() || !x->defined()) return true;
    const int64_t dim = x->dim() - own - 1 - batch_dim;
    return dim < 0 || x->size(dim) == 1;
  };
  const bool drops_by_place = request.dropout() > 0 && request.seed().has_value();  // heads are counted over the batch
  const bool asks_by_place = request.score_function().has_value() || request.mask_function().has_value();
  return alike(request.key_lengths(), 0) && alike(request.alibi_slopes(), 2) && alike(request.mask(), 3) &&
         alike(request.hidden(), 3) && alike(request.block_mask(), 3) && alike(request.bias(), 3) && !drops_by_place &&
         !asks_by_place;
}

/// The request with the seed that its own generator draws, so that it asks for the same when it is computed again.
inline AttentionOptions repeatable(AttentionOptions request) {
  if (request.dropout() > 0 && request.generator().has_value()) {
    request.seed(headroom::detail::checked_dropout(request.dropout(), request.seed(), request.generator()).seed);
  }
  return request;
}

}  // namespace headroom::inline v0::nn::detail
