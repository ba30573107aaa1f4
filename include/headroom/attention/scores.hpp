#pragma once

#include "headroom/attention/dropout.hpp"
#include "headroom/attention/positions.hpp"
#include "headroom/attention/request.hpp"
#include "headroom/core/finite.hpp"

namespace headroom::inline v0::detail {

/// A rectangle of the scores.
struct ScoreTile {
  int64_t first_query, end_query, first_key, end_key;
};

/// A block of heads: one index for each batch dimension but the last, and ranges of the last one and of the heads.
struct HeadBlock {
  std::vector<int64_t> outer;
  int64_t first_batch = 0, end_batch = 1, first_head = 0, end_head = 1;
};

/// x[begin, end) along `dim`, or x itself where it broadcasts.
inline torch::Tensor narrowed(const torch::Tensor& x, int64_t dim, int64_t begin, int64_t end) {
  return x.size(dim) == 1 ? x : x.narrow(dim, begin, end - begin);
}

/// x, broadcastable to [..., H, `trailing` dimensions more], for a block of heads: [b, h, …], a view.
inline torch::Tensor block_of(torch::Tensor x, const HeadBlock& block, int64_t trailing) {
  if (!x.defined()) return x;
  while (x.dim() < static_cast<int64_t>(block.outer.size()) + 2 + trailing) x = x.unsqueeze(0);
  for (const int64_t index : block.outer) x = x.select(0, x.size(0) == 1 ? 0 : index);
  return narrowed(narrowed(x, 0, block.first_batch, block.end_batch), 1, block.first_head, block.end_head);
}

/// f(block of query heads, the same in heads of k and v): all heads, `batches` of the last batch dimension and
/// `kv_heads` heads of k and v at a time.
template <class F>
void for_each_head_block(const AttentionRequest& request, int64_t batches, int64_t kv_heads, F&& f) {
  const at::IntArrayRef batch = request.batch();
  if (c10::multiply_integers(batch) == 0) return;
  const int64_t last_batch = batch.empty() ? 1 : batch.back();
  HeadBlock block;
  block.outer.assign(batch.size() > 1 ? batch.size() - 1 : 0, 0);
  const auto next_outer = [&] {
    for (size_t d = block.outer.size(); d-- > 0; block.outer[d] = 0) {
      if (++block.outer[d] < batch[d]) return true;
    }
    return false;
  };
  do {
    for (int64_t b = 0; b < last_batch; b += batches) {
      for (int64_t h = 0; h < request.kv_heads; h += kv_heads) {
        block.first_batch = b, block.end_batch = std::min(b + batches, last_batch);
        HeadBlock kv_block = block;
        kv_block.first_head = h, kv_block.end_head = std::min(h + kv_heads, request.kv_heads);
        block.first_head = kv_block.first_head * request.group();
        block.end_head = kv_block.end_head * request.group();
        f(std::as_const(block), std::as_const(kv_block));
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

/// Rows [..., L] of x [..., L, D] that hold a NaN or an infinity; undefined if none does.
inline torch::Tensor rows_not_finite(const torch::Tensor& x) {
  const torch::Tensor values = x.detach();
  if (values.is_meta() || values.numel() == 0) return {};
  // The sum of finite numbers may overflow, which costs time and nothing else
  const double sum = values.sum(values.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat).item<double>();
  if (core::detail::is_finite(sum)) return {};
  return values.isfinite().all(-1).logical_not();
}
inline torch::Tensor either(const torch::Tensor& a, const torch::Tensor& b) {
  return a.defined() && b.defined() ? a.logical_or(b) : a.defined() ? a : b;
}
/// x with zeros for the rows that `bad` names.
inline torch::Tensor without_rows(const torch::Tensor& x, const torch::Tensor& bad) {
  return bad.defined() ? x.masked_fill(bad.unsqueeze(-1), 0) : x;
}

/// What a request does to scores, tile by tile. Tensors broadcast to [..., H], [..., H, Lq] or [..., H, Lq, Lk] and lie
/// on the device of q. Differentiable by LibTorch.
class ScoreTerms {
 public:
  ScoreTerms(const AttentionRequest& request, torch::Device device)
      : bias(request.bias),
        relative_bias(request.relative_bias),
        alibi_slopes(request.alibi_slopes),
        sink(request.sink),
        request_(request),
        positions_(request),
        query_(positions_.query.to(device)),
        begin_(positions_.begin.to(device)),
        end_(positions_.end.to(device)),
        key_(torch::arange(request.keys(), query_.options())),
        index_(torch::arange(request.queries(), query_.options())),
        mask_(unexpanded(request.mask)),
        block_mask_(unexpanded(request.block_mask)) {
    if (request.key_lengths.defined()) {
      host_lengths_ = request.key_lengths.unsqueeze(-1);
      lengths_ = host_lengths_.to(device);
    }
    if (request.dropout.active()) {
      const at::IntArrayRef sizes = all_but_last(request.score_sizes, 2);
      head_ = torch::arange(c10::multiply_integers(sizes), query_.options()).view(sizes);
    }
    if (block_mask_.defined() && !block_mask_.is_meta()) {
      visible_blocks_ = block_mask_;
      while (visible_blocks_.dim() > 2) visible_blocks_ = visible_blocks_.any(0);
      while (visible_blocks_.dim() < 2) visible_blocks_ = visible_blocks_.unsqueeze(0);
      visible_blocks_ = visible_blocks_.cpu();
    }
  }

  /// The terms of a block of heads, for scores [b, h, Lq, Lk].
  ScoreTerms of(const HeadBlock& block) const {
    ScoreTerms part = *this;
    part.bias = block_of(bias, block, 2);
    part.relative_bias = block_of(relative_bias, block, 1);
    part.alibi_slopes = block_of(alibi_slopes, block, 1);
    part.sink = block_of(sink, block, 0);
    part.mask_ = block_of(mask_, block, 2);
    part.block_mask_ = block_of(block_mask_, block, 2);
    part.host_lengths_ = block_of(host_lengths_, block, 0);
    part.lengths_ = block_of(lengths_, block, 0);
    part.head_ = block_of(head_, block, 0);
    return part;
  }

  /// True if there may be keys that a query must not see, or none that it could.
  bool hides() const {
    return request_.causal || request_.window_left >= 0 || request_.window_right >= 0 || lengths_.defined() ||
           request_.sequence_starts.defined() || mask_.defined() || block_mask_.defined() || request_.keys() == 0;
  }

  /// Keys outside of [begin, end) are hidden from all queries of [first, last).
  std::pair<int64_t, int64_t> keys(int64_t first, int64_t last) const {
    if (first == last) return {0, 0};
    const auto* const begin = positions_.begin.const_data_ptr<int64_t>();
    const auto* const end = positions_.end.const_data_ptr<int64_t>();
    int64_t high = *std::max_element(end + first, end + last);
    if (lengths_.defined() && lengths_.numel() > 0) high = std::min(high, host_lengths_.max().item<int64_t>());
    return {*std::min_element(begin + first, begin + last), high};
  }

  /// False if the block mask hides all of a tile.
  bool may_see(const ScoreTile& tile) const {
    if (!visible_blocks_.defined()) return true;
    const int64_t size = request_.block_size;
    return narrowed(narrowed(visible_blocks_, 0, tile.first_query / size, (tile.end_query - 1) / size + 1), 1,
                    tile.first_key / size, (tile.end_key - 1) / size + 1)
        .any()
        .item<bool>();
  }

  /// bool, broadcastable to the tile, true where a key must not be seen; undefined if all may.
  torch::Tensor hidden(const ScoreTile& tile) const {
    torch::Tensor hidden;
    const auto hide = [&](const torch::Tensor& x) { hidden = either(hidden, x); };
    const auto [first, last, first_key, end_key] = tile;
    const torch::Tensor key = narrow_keys(key_, tile);
    const auto* const begin = positions_.begin.const_data_ptr<int64_t>();
    const auto* const end = positions_.end.const_data_ptr<int64_t>();
    if (std::any_of(begin + first, begin + last, [j = first_key](int64_t b) { return b > j; })) {
      hide(key < narrow_queries(begin_, tile).unsqueeze(-1));
    }
    if (std::any_of(end + first, end + last, [j = end_key](int64_t e) { return e < j; })) {
      hide(key >= narrow_queries(end_, tile).unsqueeze(-1));
    }
    if (lengths_.defined() && lengths_.numel() > 0 && host_lengths_.min().item<int64_t>() < end_key) {
      hide(key >= lengths_.unsqueeze(-1).unsqueeze(-1));
    }
    if (mask_.defined()) {
      const torch::Tensor part = narrow_scores(mask_, tile);
      hide(request_.mask_visible ? part.logical_not() : part);
    }
    if (block_mask_.defined()) {
      const auto blocks = [&](const torch::Tensor& x, int64_t dim, const torch::Tensor& index) {
        return x.size(dim) == 1 ? x : x.index_select(dim, index.floor_divide(request_.block_size));
      };
      hide(blocks(blocks(block_mask_, -2, narrow_queries(index_, tile)), -1, key).logical_not());
    }
    return hidden;
  }

  /// scale·q·kᵀ -> scores within ±softcap
  torch::Tensor capped(const torch::Tensor& scores) const {
    return request_.softcap > 0 ? (scores / request_.softcap).tanh() * request_.softcap : scores;
  }

  /// Scores of a tile with what is added to them.
  torch::Tensor added(torch::Tensor scores, const ScoreTile& tile) const {
    if (bias.defined()) scores = scores + narrow_scores(bias, tile).to(scores.scalar_type());
    if (relative_bias.defined()) {
      const torch::Tensor index = relative_index(tile);
      scores = scores +
               relative_bias.index_select(-1, index.flatten()).unflatten(-1, index.sizes()).to(scores.scalar_type());
    }
    if (alibi_slopes.defined()) {
      const torch::Tensor slopes = narrow_slopes(alibi_slopes, tile);
      const auto type = torch::promote_types(scores.scalar_type(), torch::kFloat);
      scores = scores - (slopes.to(type).unsqueeze(-1) * distance(tile).abs().to(type)).to(scores.scalar_type());
    }
    return scores;
  }

  /// Position of the query minus position of the key, int64 [queries, keys] of the tile.
  torch::Tensor distance(const ScoreTile& tile) const {
    return narrow_queries(query_, tile).unsqueeze(-1) - narrow_keys(key_, tile);
  }
  /// Elements of relative_bias, int64 [queries, keys] of the tile.
  torch::Tensor relative_index(const ScoreTile& tile) const {
    const int64_t reach = relative_bias.size(-1) / 2;
    return distance(tile).clamp_(-reach, reach).add_(reach);
  }

  /// bool, true where a weight survives dropout.
  torch::Tensor kept(const ScoreTile& tile) const {
    return DropoutMask::kept(request_.dropout, head_, narrow_queries(index_, tile), narrow_keys(key_, tile));
  }

  // The part of a tensor that belongs to a tile, a view
  static torch::Tensor narrow_scores(const torch::Tensor& x, const ScoreTile& tile) {
    torch::Tensor part = x;
    if (x.dim() >= 1) part = narrowed(part, -1, tile.first_key, tile.end_key);
    if (x.dim() >= 2) part = narrowed(part, -2, tile.first_query, tile.end_query);
    return part;
  }
  static torch::Tensor narrow_slopes(const torch::Tensor& x, const ScoreTile& tile) {
    return x.dim() == 0 ? x : narrowed(x, -1, tile.first_query, tile.end_query);
  }

  torch::Tensor bias, relative_bias, alibi_slopes, sink;

 private:
  static torch::Tensor narrow_queries(const torch::Tensor& x, const ScoreTile& tile) {
    return x.slice(0, tile.first_query, tile.end_query);
  }
  static torch::Tensor narrow_keys(const torch::Tensor& x, const ScoreTile& tile) {
    return x.slice(0, tile.first_key, tile.end_key);
  }

  const AttentionRequest& request_;
  AttentionPositions positions_;
  torch::Tensor query_, begin_, end_, key_, index_;  // positions on the device
  torch::Tensor mask_, block_mask_;
  torch::Tensor host_lengths_, lengths_;  // [..., 1]
  torch::Tensor head_;                    // flat index of each head, for dropout
  torch::Tensor visible_blocks_;          // [nq, nk] on the CPU: what any head may see
};

}  // namespace headroom::inline v0::detail
