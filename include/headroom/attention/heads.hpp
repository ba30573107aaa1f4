#pragma once

#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "headroom/attention/request.hpp"

// Parts of tensors that belong to some of the heads.
namespace headroom::inline v0::detail {

/// Some heads: one index for each batch dimension but the last, and ranges of the last one and of the heads.
struct HeadRange {
  std::vector<int64_t> outer;
  int64_t first_batch = 0, end_batch = 1, first_head = 0, end_head = 1;
};

/// x[begin, end) along `dim`, or x itself where it broadcasts.
inline torch::Tensor narrowed(const torch::Tensor& x, int64_t dim, int64_t begin, int64_t end) {
  return x.size(dim) == 1 ? x : x.narrow(dim, begin, end - begin);
}

/// x, broadcastable to [..., H, `trailing` dimensions more], for these heads: [b, h, …], a view.
inline torch::Tensor part_of(torch::Tensor x, const HeadRange& heads, int64_t trailing) {
  if (!x.defined()) return x;
  while (x.dim() < static_cast<int64_t>(heads.outer.size()) + 2 + trailing) x = x.unsqueeze(0);
  for (const int64_t index : heads.outer) x = x.select(0, x.size(0) == 1 ? 0 : index);
  return narrowed(narrowed(x, 0, heads.first_batch, heads.end_batch), 1, heads.first_head, heads.end_head);
}

/// f(query heads, the same in heads of k and v): all heads, `batches` of the last batch dimension and
/// `kv_heads` heads of k and v at a time.
template <class F>
void for_each_head_range(const AttentionRequest& request, int64_t batches, int64_t kv_heads, F&& f) {
  const at::IntArrayRef batch = request.batch();
  if (c10::multiply_integers(batch) == 0) return;
  const int64_t last_batch = batch.empty() ? 1 : batch.back();
  HeadRange heads;
  heads.outer.assign(batch.size() > 1 ? batch.size() - 1 : 0, 0);
  const auto next_outer = [&] {
    for (size_t d = heads.outer.size(); d-- > 0; heads.outer[d] = 0) {
      if (++heads.outer[d] < batch[d]) return true;
    }
    return false;
  };
  do {
    for (int64_t b = 0; b < last_batch; b += batches) {
      for (int64_t h = 0; h < request.kv_heads; h += kv_heads) {
        heads.first_batch = b, heads.end_batch = std::min(b + batches, last_batch);
        HeadRange of_kv = heads;
        of_kv.first_head = h, of_kv.end_head = std::min(h + kv_heads, request.kv_heads);
        heads.first_head = of_kv.first_head * request.heads_per_kv_head();
        heads.end_head = of_kv.end_head * request.heads_per_kv_head();
        f(std::as_const(heads), std::as_const(of_kv));
      }
    }
  } while (next_outer());
}

/// A view in which dimensions that were expanded have size 1 again.
inline torch::Tensor unexpanded(torch::Tensor x) {
  for (int64_t d = 0; x.defined() && d < x.dim(); ++d) {
    if (x.stride(d) == 0 && x.size(d) > 1) x = x.narrow(d, 0, 1);
  }
  return x;
}

}  // namespace headroom::inline v0::detail
