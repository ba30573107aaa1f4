#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <concepts>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headroom/checkpoint/result_cache.hpp"
#include "headroom/checkpoint/storage.hpp"
#include "headroom/core/error.hpp"

namespace headroom::inline v0 {

/// What of blocks one after the other is kept for backward, and where: a value for options and configuration files.
///
/// | text | held after forward | computed again |
/// | `none` | everything that autograd saves | nothing |
/// | `full` | the input of each block | each block |
/// | `every-K` | the input of every K-th block | each block, K at a time |
/// | `selective` | the inputs, output and log-sum-exp of attention | each block but for its attention |
/// | `tiled` | the input of each block | each block, slice by slice along an axis that it treats as batch |
/// | `nested`, `nested-L` | the inputs of groups of blocks (L levels, 2 unless given) | each block L times |
///
/// Parts are joined by `+`: `selective+every-2`, `tiled+nested`, and where inputs are kept: `full+bf16`,
/// `tiled+offload` (CheckpointStorage).
struct CheckpointPolicy {
  /// What of a block is computed again.
  enum class Recompute { none, full, selective, tiled };

  Recompute recompute = Recompute::none;
  static constexpr int64_t kMostLevels = 16;  ///< each is a call within a call; 2^16 blocks have no use for more

  int64_t every = 1;   ///< blocks that share a checkpoint
  int64_t levels = 1;  ///< of checkpoints around checkpoints; n blocks are grouped by the levels-th root of n
  CheckpointStorage storage = CheckpointStorage::memory;
  KeptOperators keep = {"headroom::attention"};  ///< whose results `selective` keeps

  CheckpointPolicy() = default;
  /// true: full, the "gradient checkpointing" of trainers; false: none.
  CheckpointPolicy(std::same_as<bool> auto all) : recompute(all ? Recompute::full : Recompute::none) {}  // NOLINT
  /// From text as above. Throws headroom.checkpoint.policy.
  CheckpointPolicy(const std::convertible_to<std::string_view> auto& text) { read(text); }  // NOLINT

  /// As text; what `keep` names is left out.
  std::string text() const;
  bool operator==(const CheckpointPolicy&) const = default;

  /// What text may be, for messages.
  static constexpr const char* kExpected =
      "none, full, every-K, selective, tiled or nested, parts joined by + as in tiled+offload, selective+every-2 or "
      "full+nested-3+bf16";

 private:
  void read(std::string_view text);
};

/// The checkpoint policies of a stack: one for all blocks, or others for the first ones of them.
///
/// As text, `6*full,none`: six blocks `full`, the rest `none`. Every part but the last says how many blocks it is for.
struct StackPolicy {
  /// So many blocks, one after the other, with one policy.
  struct Part {
    int64_t blocks;
    CheckpointPolicy policy;
    bool operator==(const Part&) const = default;
  };

  std::vector<Part> first;  ///< of the first blocks, in their order
  CheckpointPolicy rest;    ///< of all others

  StackPolicy() = default;
  /// One policy for all blocks; true and false as in CheckpointPolicy.
  StackPolicy(CheckpointPolicy all) : rest(std::move(all)) {}          // NOLINT
  StackPolicy(std::same_as<bool> auto recompute) : rest(recompute) {}  // NOLINT
  StackPolicy(std::vector<Part> first, CheckpointPolicy rest) : first(std::move(first)), rest(std::move(rest)) {}
  /// From text as above. Throws headroom.checkpoint.policy.
  StackPolicy(const std::convertible_to<std::string_view> auto& text) { read(text); }  // NOLINT

  /// How many blocks a stack has at least.
  int64_t named_blocks() const {
    int64_t blocks = 0;
    for (const Part& part : first) blocks += part.blocks;
    return blocks;
  }
  /// As text, from which a policy can be made again.
  std::string text() const {
    std::string text;
    for (const Part& part : first) text += std::to_string(part.blocks) + "*" + part.policy.text() + ",";
    return text + rest.text();
  }
  bool operator==(const StackPolicy&) const = default;

  /// What text may be, for messages.
  static inline const std::string kExpected =
      std::string(CheckpointPolicy::kExpected) + ", or others for the first blocks as in 6*full,none";

 private:
  void read(std::string_view text);
};

namespace detail {

inline constexpr std::array<std::pair<std::string_view, CheckpointPolicy::Recompute>, 4> kRecomputeNames = {{
    {"none", CheckpointPolicy::Recompute::none},
    {"full", CheckpointPolicy::Recompute::full},
    {"selective", CheckpointPolicy::Recompute::selective},
    {"tiled", CheckpointPolicy::Recompute::tiled},
}};
inline constexpr std::array<std::pair<std::string_view, CheckpointStorage>, 3> kStorageNames = {{
    {"memory", CheckpointStorage::memory},
    {"bf16", CheckpointStorage::bf16},
    {"offload", CheckpointStorage::offload},
}};

/// Throws headroom.checkpoint.policy.
inline void check_policy(const CheckpointPolicy& policy, std::string_view text) {
  using Recompute = CheckpointPolicy::Recompute;
  const auto rule = [&](bool holds, const char* why) {
    require(holds, "headroom.checkpoint.policy", "the checkpoint policy is \"", text, "\": ", why, "; expected ",
            CheckpointPolicy::kExpected);
  };
  rule(policy.every >= 1 && policy.levels >= 1, "K and levels are positive numbers");
  rule(policy.levels <= CheckpointPolicy::kMostLevels,
       "nested has at most 16 levels, which are enough for 2^16 blocks");
  rule(policy.recompute != Recompute::none || (policy.every == 1 && policy.levels == 1),
       "none has no checkpoints to arrange");
  rule(policy.recompute != Recompute::none || policy.storage == CheckpointStorage::memory,
       "none has no checkpoints to keep");
  rule(policy.every == 1 || policy.recompute != Recompute::tiled,
       "blocks that are tiled along their own axes share none");
  rule(policy.every == 1 || policy.levels == 1, "nested groups blocks by itself");
  rule(policy.levels == 1 || policy.recompute != Recompute::selective,
       "within another checkpoint attention is computed again, there is nothing to keep");
}

}  // namespace detail

inline void CheckpointPolicy::read(std::string_view given) {
  bool named_recompute = false;
  for (std::string_view rest = given;;) {
    const std::size_t end = std::min(rest.find('+'), rest.size());
    const std::string_view part = rest.substr(0, end);
    const auto number_after = [&](std::string_view prefix, int64_t& number) {
      if (!part.starts_with(prefix)) return false;
      const char* const last = part.data() + part.size();
      const auto [stop, error] = std::from_chars(part.data() + prefix.size(), last, number);
      return error == std::errc() && stop == last && number >= 1;
    };
    bool known = false;
    for (const auto& [name, value] : detail::kRecomputeNames) {
      if (part != name) continue;
      known = !named_recompute;
      named_recompute = true;
      recompute = value;
    }
    for (const auto& [name, value] : detail::kStorageNames) {
      if (part != name) continue;
      known = true;
      storage = value;
    }
    if (part == "nested") levels = 2, known = true;
    known = known || number_after("every-", every) || number_after("nested-", levels);
    require(known, "headroom.checkpoint.policy", "the checkpoint policy is \"", given, "\", of which \"", part,
            "\" is unknown or there already; expected ", kExpected);
    if (end == rest.size()) break;
    rest.remove_prefix(end + 1);
  }
  if (!named_recompute) recompute = Recompute::full;  // every-K, nested
  detail::check_policy(*this, given);
}

inline void StackPolicy::read(std::string_view given) {
  const auto rule = [&](bool holds, const auto&... why) {
    require(holds, "headroom.checkpoint.policy", "the checkpoint policy is \"", given, "\": ", why..., "; expected ",
            kExpected);
  };
  std::string_view left = given;
  for (size_t comma; (comma = left.find(',')) != std::string_view::npos; left.remove_prefix(comma + 1)) {
    const std::string_view part = left.substr(0, comma);
    const size_t star = std::min(part.find('*'), part.size());
    int64_t blocks = 0;
    const auto [stop, error] = std::from_chars(part.data(), part.data() + star, blocks);
    rule(star < part.size() && error == std::errc() && stop == part.data() + star && blocks >= 1 && blocks <= 1'000'000,
         "\"", part, "\" does not start with a number of blocks up to 1000000, as in 6*full");
    first.push_back({blocks, part.substr(star + 1)});
  }
  rule(left.find('*') == std::string_view::npos, "\"", left,
       "\" comes last and is for all blocks that are left, so it takes no number");
  rest = left;
}

inline std::string CheckpointPolicy::text() const {
  std::string text;
  const auto add = [&](const std::string& part) { text += (text.empty() ? "" : "+") + part; };
  const bool arranged = every > 1 || levels > 1;
  for (const auto& [name, value] : detail::kRecomputeNames) {
    if (value == recompute && !(value == Recompute::full && arranged)) add(std::string(name));
  }
  if (every > 1) add("every-" + std::to_string(every));
  if (levels > 1) add(levels == 2 ? "nested" : "nested-" + std::to_string(levels));
  for (const auto& [name, value] : detail::kStorageNames) {
    if (value == storage && value != CheckpointStorage::memory) add(std::string(name));
  }
  return text;
}

}  // namespace headroom::inline v0
