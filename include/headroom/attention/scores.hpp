#pragma once

#include "headroom/attention/dropout.hpp"
#include "headroom/attention/finite_rows.hpp"
#include "headroom/attention/heads.hpp"
#include "headroom/attention/positions.hpp"
#include "headroom/attention/request.hpp"

namespace headroom::inline v0::detail {

/// A rectangle of the scores.
struct ScoreChunk {
  int64_t first_query, end_query, first_key, end_key;
};

/// What a request does to scores, chunk by chunk. Tensors broadcast to [..., H], [..., H, Lq] or [..., H, Lq, Lk] and
/// lie on the device of q. Differentiable by LibTorch.
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
        key_(torch::arange(request.keys(), query_.options())),
        index_(torch::arange(request.queries(), query_.options())),
        mask_(unexpanded(request.mask)),
        block_mask_(unexpanded(request.block_mask)) {
    for (const auto& [begin, end] : positions_.ranges) ranges_.push_back({begin.to(device), end.to(device)});
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

  /// The terms of some heads, for scores [b, h, Lq, Lk].
  ScoreTerms of(const HeadRange& heads) const {
    ScoreTerms part = *this;
    part.bias = part_of(bias, heads, 2);
    part.relative_bias = part_of(relative_bias, heads, 1);
    part.alibi_slopes = part_of(alibi_slopes, heads, 1);
    part.sink = part_of(sink, heads, 0);
    part.mask_ = part_of(mask_, heads, 2);
    part.block_mask_ = part_of(block_mask_, heads, 2);
    part.host_lengths_ = part_of(host_lengths_, heads, 0);
    part.lengths_ = part_of(lengths_, heads, 0);
    part.head_ = part_of(head_, heads, 0);
    return part;
  }

  /// True if there may be keys that a query must not see, or none that it could.
  bool hides() const {
    return request_.causal || request_.window_left >= 0 || request_.window_right >= 0 || lengths_.defined() ||
           request_.sequence_starts.defined() || mask_.defined() || block_mask_.defined() || request_.keys() == 0;
  }

  /// Keys outside of these ranges, which share none, are hidden from all queries of [first, last).
  std::vector<core::KeyRange> keys(int64_t first, int64_t last) const {
    const bool by_length = lengths_.defined() && lengths_.numel() > 0;
    const int64_t most = by_length ? host_lengths_.max().item<int64_t>() : request_.keys();
    std::vector<core::KeyRange> hulls;
    for (const AttentionPositions::Ranges& ranges : positions_.ranges) {
      const core::RangeMask mask = ranges.mask();
      core::KeyRange hull{most, 0};
      for (int64_t i = first; i < last; ++i) {
        const core::KeyRange range = mask.keys(0, 0, i) & core::KeyRange{0, most};
        if (!range.empty()) hull = core::detail::hull(hull, range);
      }
      if (!hull.empty()) hulls.push_back(hull);
    }
    if (hulls.size() < 2 || (hulls[0] & hulls[1]).empty()) return hulls;
    return {core::detail::hull(hulls[0], hulls[1])};
  }

  /// False if the block mask hides all of a chunk.
  bool may_see(const ScoreChunk& chunk) const {
    if (!visible_blocks_.defined()) return true;
    const int64_t size = request_.block_size;
    return narrowed(narrowed(visible_blocks_, 0, chunk.first_query / size, (chunk.end_query - 1) / size + 1), 1,
                    chunk.first_key / size, (chunk.end_key - 1) / size + 1)
        .any()
        .item<bool>();
  }

  /// bool, broadcastable to the chunk, true where a key must not be seen; undefined if all may.
  torch::Tensor hidden(const ScoreChunk& chunk) const {
    torch::Tensor hidden;
    const auto hide = [&](const torch::Tensor& x) { hidden = either(hidden, x); };
    const torch::Tensor key = narrow_keys(key_, chunk);
    hide(outside_ranges(chunk));
    if (lengths_.defined() && lengths_.numel() > 0 && host_lengths_.min().item<int64_t>() < chunk.end_key) {
      hide(key >= lengths_.unsqueeze(-1).unsqueeze(-1));
    }
    if (mask_.defined()) {
      const torch::Tensor part = narrow_scores(mask_, chunk);
      hide(request_.mask_visible ? part.logical_not() : part);
    }
    if (block_mask_.defined()) {
      const auto blocks = [&](const torch::Tensor& x, int64_t dim, const torch::Tensor& index) {
        return x.size(dim) == 1 ? x : x.index_select(dim, index.floor_divide(request_.block_size));
      };
      hide(blocks(blocks(block_mask_, -2, narrow_queries(index_, chunk)), -1, key).logical_not());
    }
    return hidden;
  }

  /// scale·q·kᵀ -> scores within ±softcap
  torch::Tensor capped(const torch::Tensor& scores) const {
    return request_.softcap > 0 ? (scores / request_.softcap).tanh() * request_.softcap : scores;
  }

  /// Scores of a chunk with what is added to them.
  torch::Tensor added(torch::Tensor scores, const ScoreChunk& chunk) const {
    if (bias.defined()) scores = scores + narrow_scores(bias, chunk).to(scores.scalar_type());
    if (relative_bias.defined()) {
      const torch::Tensor index = relative_index(chunk);
      scores = scores +
               relative_bias.index_select(-1, index.flatten()).unflatten(-1, index.sizes()).to(scores.scalar_type());
    }
    if (alibi_slopes.defined()) {
      const torch::Tensor slopes = narrow_slopes(alibi_slopes, chunk);
      const auto type = torch::promote_types(scores.scalar_type(), torch::kFloat);
      scores = scores - (slopes.to(type).unsqueeze(-1) * distance(chunk).abs().to(type)).to(scores.scalar_type());
    }
    return scores;
  }

  /// Position of the query minus position of the key, int64 [queries, keys] of the chunk.
  torch::Tensor distance(const ScoreChunk& chunk) const {
    return narrow_queries(query_, chunk).unsqueeze(-1) - narrow_keys(key_, chunk);
  }
  /// Elements of relative_bias, int64 [queries, keys] of the chunk.
  torch::Tensor relative_index(const ScoreChunk& chunk) const {
    const int64_t reach = relative_bias.size(-1) / 2;
    return distance(chunk).clamp_(-reach, reach).add_(reach);
  }

  /// bool, true where a weight survives dropout.
  torch::Tensor kept(const ScoreChunk& chunk) const {
    return DropoutMask::kept(request_.dropout, head_, narrow_queries(index_, chunk), narrow_keys(key_, chunk));
  }

  // The part of a tensor that belongs to a chunk, a view
  static torch::Tensor narrow_scores(const torch::Tensor& x, const ScoreChunk& chunk) {
    torch::Tensor part = x;
    if (x.dim() >= 1) part = narrowed(part, -1, chunk.first_key, chunk.end_key);
    if (x.dim() >= 2) part = narrowed(part, -2, chunk.first_query, chunk.end_query);
    return part;
  }
  static torch::Tensor narrow_slopes(const torch::Tensor& x, const ScoreChunk& chunk) {
    return x.dim() == 0 ? x : narrowed(x, -1, chunk.first_query, chunk.end_query);
  }

  torch::Tensor bias, relative_bias, alibi_slopes, sink;

 private:
  /// Where a key is in no range of its query; undefined if there is no such pair.
  torch::Tensor outside_ranges(const ScoreChunk& chunk) const {
    const torch::Tensor key = narrow_keys(key_, chunk);
    torch::Tensor outside;
    for (size_t r = 0; r < ranges_.size(); ++r) {
      const core::RangeMask mask = positions_.ranges[r].mask();
      bool below = false, above = false;
      for (int64_t i = chunk.first_query; i < chunk.end_query; ++i) {
        const core::KeyRange range = mask.keys(0, 0, i);
        below |= range.begin > chunk.first_key, above |= range.end < chunk.end_key;
      }
      if (!below && !above) return {};
      torch::Tensor of_range;
      if (below) of_range = key < narrow_queries(ranges_[r].begin, chunk).unsqueeze(-1);
      if (above) of_range = either(of_range, key >= narrow_queries(ranges_[r].end, chunk).unsqueeze(-1));
      outside = outside.defined() ? outside.logical_and(of_range) : of_range;
    }
    return outside;
  }
  static torch::Tensor narrow_queries(const torch::Tensor& x, const ScoreChunk& chunk) {
    return x.slice(0, chunk.first_query, chunk.end_query);
  }
  static torch::Tensor narrow_keys(const torch::Tensor& x, const ScoreChunk& chunk) {
    return x.slice(0, chunk.first_key, chunk.end_key);
  }

  const AttentionRequest& request_;
  AttentionPositions positions_;
  torch::Tensor query_, key_, index_;               // positions on the device
  std::vector<AttentionPositions::Ranges> ranges_;  // there
  torch::Tensor mask_, block_mask_;
  torch::Tensor host_lengths_, lengths_;  // [..., 1]
  torch::Tensor head_;                    // flat index of each head, for dropout
  torch::Tensor visible_blocks_;          // [nq, nk] on the CPU: what any head may see
};

}  // namespace headroom::inline v0::detail
