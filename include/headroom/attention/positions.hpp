#pragma once

#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "headroom/attention/request.hpp"
#include "headroom/core/mask.hpp"
#include "headroom/runtime/dry_run.hpp"

namespace headroom::inline v0::detail {

/// Calls f(first, end, first key, end of keys) for each sequence, one for all if they are not packed.
template <class F>
void for_each_sequence(const AttentionRequest& request, F&& f) {
  if (!request.sequence_starts.defined()) return f(int64_t{0}, request.queries(), int64_t{0}, request.keys());
  const auto* const query = request.sequence_starts.const_data_ptr<int64_t>();
  const auto* const key = request.key_sequence_starts.const_data_ptr<int64_t>();
  for (int64_t s = 0; s + 1 < request.sequence_starts.size(0); ++s) f(query[s], query[s + 1], key[s], key[s + 1]);
}

/// `count` integers for the CPU to read, uninitialised.
inline torch::Tensor host_integers(int64_t count) {
  const HostTensors host;
  return torch::empty({count}, torch::kLong);
}

/// What a request says about positions, O(L) in size.
struct AttentionPositions {
  /// Keys [begin, end), int64 [Lq] on the CPU, contiguous, 0 <= begin <= end <= Lk.
  struct Ranges {
    torch::Tensor begin, end;

    core::RangeMask mask() const { return {begin.const_data_ptr<int64_t>(), end.const_data_ptr<int64_t>()}; }
  };

  torch::Tensor query;         // likewise: position among the keys; the distance to key j is query - j
  std::vector<Ranges> ranges;  // which keys causality, window and sequences allow: one, or two with global keys

  explicit AttentionPositions(const AttentionRequest& request);
};

/// Rows of the table of a position embedding: int64 [Lq] and [Lk] on the CPU, counted from the start of the sequence.
struct TableRows {
  torch::Tensor query, key;

  explicit TableRows(const AttentionRequest& request);
};

inline AttentionPositions::AttentionPositions(const AttentionRequest& request)
    : query(host_integers(request.queries())) {
  const int64_t count = request.queries();
  for (int passes = request.global_keys > 0 ? 2 : 1; passes > 0; --passes) {
    ranges.push_back({host_integers(count), host_integers(count)});
  }
  auto* const position = query.mutable_data_ptr<int64_t>();
  for_each_sequence(request, [&](int64_t first, int64_t last, int64_t first_key, int64_t end_key) {
    const int64_t start = request.first_position(last - first, end_key - first_key), keys = end_key - first_key;
    const auto mask = request.position_mask(start);
    for (int64_t i = first; i < last; ++i) position[i] = first_key + start + (i - first);
    for (size_t r = 0; r < ranges.size(); ++r) {
      auto* const begin = ranges[r].begin.mutable_data_ptr<int64_t>();
      auto* const end = ranges[r].end.mutable_data_ptr<int64_t>();
      for (int64_t i = first; i < last; ++i) {
        const core::KeyRange range = r == 0 ? mask.keys(0, 0, i - first) : mask.other_keys(0, 0, i - first);
        const int64_t from = std::clamp<int64_t>(range.begin, 0, keys);
        begin[i] = first_key + from;
        end[i] = first_key + std::clamp<int64_t>(range.end, from, keys);
      }
    }
  });
}

inline TableRows::TableRows(const AttentionRequest& request)
    : query(host_integers(request.queries())), key(host_integers(request.keys())) {
  auto* const of_query = query.mutable_data_ptr<int64_t>();
  auto* const of_key = key.mutable_data_ptr<int64_t>();
  for_each_sequence(request, [&](int64_t first, int64_t last, int64_t first_key, int64_t end_key) {
    const int64_t start = request.first_position(last - first, end_key - first_key);
    for (int64_t i = first; i < last; ++i) of_query[i] = start + (i - first);
    for (int64_t j = first_key; j < end_key; ++j) of_key[j] = j - first_key;
  });
}

}  // namespace headroom::inline v0::detail
