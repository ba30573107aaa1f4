#pragma once

#include <torch/types.h>

#include <algorithm>
#include <cstdint>

#include "headroom/attention/request.hpp"
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
  // int64 [Lq] on the CPU, contiguous. `query`: position among the keys, where the distance to key j is query - j;
  // `begin`, `end`: the keys [begin, end) that causality, window and sequences allow, 0 <= begin <= end <= Lk.
  torch::Tensor query, begin, end;

  explicit AttentionPositions(const AttentionRequest& request);
};

/// Rows of the rotary table: int64 [Lq] and [Lk] on the CPU, counted from the start of the sequence.
struct RotaryRows {
  torch::Tensor query, key;

  explicit RotaryRows(const AttentionRequest& request);
};

inline AttentionPositions::AttentionPositions(const AttentionRequest& request)
    : query(host_integers(request.queries())),
      begin(host_integers(request.queries())),
      end(host_integers(request.queries())) {
  auto* const position = query.mutable_data_ptr<int64_t>();
  auto* const from = begin.mutable_data_ptr<int64_t>();
  auto* const to = end.mutable_data_ptr<int64_t>();
  for_each_sequence(request, [&](int64_t first, int64_t last, int64_t first_key, int64_t end_key) {
    const int64_t start = request.first_position(last - first, end_key - first_key);
    for (int64_t i = first; i < last; ++i) {
      const int64_t p = position[i] = first_key + start + (i - first);
      int64_t low = first_key, high = end_key;
      if (request.causal) high = std::min(high, p + 1);
      if (request.window_left >= 0) low = std::max(low, p - request.window_left);
      if (request.window_right >= 0) high = std::min(high, p + request.window_right + 1);
      from[i] = std::clamp(low, first_key, end_key);
      to[i] = std::max(from[i], high);
    }
  });
}

inline RotaryRows::RotaryRows(const AttentionRequest& request)
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
