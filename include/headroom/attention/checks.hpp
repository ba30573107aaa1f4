#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ExpandUtils.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "headroom/attention/positions.hpp"
#include "headroom/attention/request.hpp"
#include "headroom/core/error.hpp"
#include "headroom/runtime/dry_run.hpp"

namespace headroom::inline v0::detail {

/// Fails unless the probability is in [0, 1); draws the seed if it is not 0 and the seed is not given.
inline core::Dropout checked_dropout(double probability, const std::optional<uint64_t>& seed,
                                     const std::optional<at::Generator>& from) {
  require(probability >= 0 && probability < 1, "headroom.attention.dropout", "dropout is ", probability,
          ", expected a probability in [0, 1)");
  core::Dropout dropout{.probability = probability};
  if (dropout.active() && seed.has_value()) dropout.seed = *seed;
  if (!dropout.active() || seed.has_value()) return dropout;
  at::Generator generator = from.value_or(at::detail::getDefaultCPUGenerator());
  require(generator.defined() && generator.device().is_cpu(), "headroom.attention.dropout",
          "the generator is undefined or not on the CPU; give a CPU generator, it only draws a seed");
  if (DryRun::device().has_value()) {
    DryRun::note_draw();
    return dropout;
  }
  const std::scoped_lock lock(generator.mutex());
  dropout.seed = at::check_generator<at::CPUGeneratorImpl>(generator)->random64();
  return dropout;
}

/// Collects what a check of one option prints: `require_option(holds, "mask", "has shape ", …)` fails with the id
/// headroom.attention.mask.
class AttentionChecks {
 public:
  AttentionChecks(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                  const AttentionOptions& options, AttentionRequest& request)
      : q_(q), k_(k), v_(v), options_(options), request_(request) {}

  void run() {
    tensors();
    numbers();
    key_lengths();
    sequences();
    masks();
    scores();
    functions();
    rotary(), polar();
    dropout();
  }

 private:
  void tensors() {
    for (const torch::Tensor* x : {&q_, &k_, &v_}) {
      require(x->defined(), "headroom.attention.shape", "q, k and v must be defined tensors");
      require(is_dense(*x) && x->dtype() == q_.dtype() && x->device() == q_.device(), "headroom.attention.dtype", "q ",
              described(q_), ", another input ", described(*x),
              "; expected three strided tensors of one dtype on one device");
    }
    require(q_.scalar_type() == torch::kFloat || q_.scalar_type() == torch::kDouble ||
                q_.scalar_type() == torch::kBFloat16 || q_.scalar_type() == torch::kHalf,
            "headroom.attention.dtype", "q is ", q_.dtype(),
            ", expected float, double, bfloat16 or half; convert with q.to(torch::kFloat)");
    const auto expect = [&](bool holds, const char* what) {
      require(holds, "headroom.attention.shape", "q ", q_.sizes(), ", k ", k_.sizes(), ", v ", v_.sizes(), ": ", what,
              "; expected q [...,H,Lq,D], k [...,Hk,Lk,D], v [...,Hk,Lk,Dv]");
    };
    expect(q_.dim() >= 3 && k_.dim() == q_.dim() && v_.dim() == q_.dim(), "ranks differ or are below 3");
    expect(all_but_last(k_.sizes(), 2) == all_but_last(v_.sizes(), 2), "k and v differ in batch or head dimensions");
    expect(at::is_expandable_to(all_but_last(k_.sizes(), 3), all_but_last(q_.sizes(), 3)),
           "the batch dimensions of k and v do not broadcast to those of q");
    const int64_t heads = q_.size(-3), kv_heads = k_.size(-3);
    expect(kv_heads == heads || (kv_heads > 0 && heads > 0 && heads % kv_heads == 0),
           "the heads of k and v do not divide those of q");
    expect(k_.size(-1) == q_.size(-1), "q and k differ in the last dimension");
    expect(v_.size(-2) == k_.size(-2), "k and v differ in length");
    request_.score_sizes = q_.sizes().vec();
    request_.score_sizes.back() = k_.size(-2);
    request_.kv_heads = kv_heads;
  }

  void numbers() {
    request_.scale = options_.scale().value_or(1.0 / std::sqrt(std::max<double>(static_cast<double>(q_.size(-1)), 1)));
    // Both are used in float
    using Limits = std::numeric_limits<float>;
    require(std::abs(request_.scale) <= Limits::max(), "headroom.attention.scale", "scale is ", request_.scale,
            ", expected a finite number");
    if (options_.softcap().has_value()) {
      request_.softcap = *options_.softcap();
      require(Limits::min() <= request_.softcap && request_.softcap <= Limits::max(), "headroom.attention.softcap",
              "softcap is ", request_.softcap, ", expected a finite number above 0; leave it out for no cap");
    }
    static constexpr int64_t kFar = AttentionRequest::kFar;
    request_.query_offset = options_.query_offset();
    require(std::abs(request_.query_offset / 2) < kFar / 2, "headroom.attention.query_offset", "query_offset is ",
            request_.query_offset, ", expected a number between -2^60 and 2^60");
    if (options_.alignment() == AttentionAlignment::bottom_right) {
      request_.sequences_end = options_.sequence_starts().has_value();
      if (!request_.sequences_end) request_.query_offset += request_.keys() - request_.queries();
    }
    request_.causal = options_.causal();
    if (options_.window().has_value()) {
      const auto side = [](int64_t size) { return size < 0 ? -1 : std::min(size, kFar); };
      request_.window_left = side(options_.window()->left);
      request_.window_right = side(options_.window()->right);
    }
    require(options_.global_keys() >= 0, "headroom.attention.global_keys", "global_keys is ", options_.global_keys(),
            ", expected how many of the first tokens see all and are seen by all, 0 or more");
    const bool has_window = request_.window_left >= 0 || request_.window_right >= 0;
    request_.global_keys = has_window ? std::min(options_.global_keys(), kFar) : 0;
  }

  /// Elements lie in memory at the strides: not sparse, nested or in a library's own layout.
  static bool is_dense(const torch::Tensor& x) {
    return x.defined() && x.layout() == torch::kStrided && !x.is_nested();
  }
  static bool are_integers(const torch::Tensor& x) {
    return is_dense(x) && c10::isIntegralType(x.scalar_type(), /*includeBool=*/false) && x.device().is_cpu();
  }
  static std::string described(const torch::Tensor& x) {
    if (!x.defined()) return "is undefined";
    std::ostringstream text;
    text << "is " << x.dtype() << " ";
    if (x.is_nested()) {
      text << "of a nested tensor";
    } else {
      text << x.sizes();
    }
    text << " on " << x.device();
    if (x.layout() != torch::kStrided) text << " with layout " << x.layout();
    return text.str();
  }

  void key_lengths() {
    if (!options_.key_lengths().has_value()) return;
    const HostTensors host;
    const torch::Tensor& lengths = *options_.key_lengths();
    const auto expect = [&](bool holds, const auto&... parts) {
      require(holds, "headroom.attention.key_lengths", "key_lengths ", parts..., "; expected integers on the CPU, ",
              "broadcastable to the batch dimensions ", request_.batch(), ", each between 0 and the ", request_.keys(),
              " keys");
    };
    expect(are_integers(lengths), described(lengths));
    expect(at::is_expandable_to(lengths.sizes(), request_.batch()), "has shape ", lengths.sizes());
    request_.key_lengths =
        lengths.to(torch::kLong, /*non_blocking=*/false, /*copy=*/true).expand(request_.batch()).contiguous();
    const auto* const begin = request_.key_lengths.const_data_ptr<int64_t>();
    for (const auto* length = begin; length != begin + request_.key_lengths.numel(); ++length) {
      expect(0 <= *length && *length <= request_.keys(), "contains ", *length);
    }
  }

  torch::Tensor checked_starts(const char* name, const torch::Tensor& starts, int64_t end) const {
    const auto expect = [&](bool holds, const auto&... parts) {
      require(holds, "headroom.attention.sequences", name, " ", parts...,
              "; expected [S+1] integers on the CPU from 0 to ", end, " that do not decrease");
    };
    expect(are_integers(starts) && starts.dim() == 1 && starts.size(0) >= 1, described(starts));
    const torch::Tensor checked = starts.to(torch::kLong, /*non_blocking=*/false, /*copy=*/true).contiguous();
    const auto* const first = checked.const_data_ptr<int64_t>();
    const auto* const last = first + checked.size(0) - 1;
    expect(*first == 0, "starts with ", *first);
    for (const auto* start = first; start != last; ++start) expect(start[0] <= start[1], "falls to ", start[1]);
    expect(*last == end, "ends with ", *last);
    return checked;
  }
  void sequences() {
    const HostTensors host;
    const auto& starts = options_.sequence_starts();
    const auto& key_starts = options_.key_sequence_starts();
    if (!starts.has_value()) {
      require(!key_starts.has_value(), "headroom.attention.sequences",
              "key_sequence_starts is given without sequence_starts; give both, or sequence_starts alone for both");
      return;
    }
    request_.sequence_starts = checked_starts("sequence_starts", *starts, request_.queries());
    request_.key_sequence_starts = checked_starts(key_starts.has_value() ? "key_sequence_starts" : "sequence_starts",
                                                  key_starts.value_or(*starts), request_.keys());
    require(request_.sequence_starts.size(0) == request_.key_sequence_starts.size(0), "headroom.attention.sequences",
            "sequence_starts has ", request_.sequence_starts.size(0), " elements, key_sequence_starts ",
            request_.key_sequence_starts.size(0), "; expected as many sequences of keys as of queries");
  }

  torch::Tensor expanded_bool(const char* id, const char* name, const torch::Tensor& x, at::IntArrayRef sizes) const {
    require(is_dense(x) && x.scalar_type() == torch::kBool && x.device() == q_.device() &&
                at::is_expandable_to(x.sizes(), sizes),
            id, name, " ", described(x), "; expected bool on ", q_.device(), ", broadcastable to ", sizes);
    return x.expand(sizes);
  }
  void masks() {
    const bool hidden = options_.hidden().has_value();
    require(!options_.mask().has_value() || !hidden, "headroom.attention.mask",
            "mask and hidden are both given; combine them: mask & hidden.logical_not()");
    request_.mask_visible = !hidden;
    if (const auto& mask = hidden ? options_.hidden() : options_.mask(); mask.has_value()) {
      request_.mask = expanded_bool("headroom.attention.mask", hidden ? "hidden" : "mask", *mask, request_.score_sizes);
    }
    request_.block_size = options_.block_size();
    if (!options_.block_mask().has_value()) return;
    const int64_t size = request_.block_size;
    require(size > 0, "headroom.attention.block_mask", "block_size is ", size, ", expected a number above 0");
    std::vector<int64_t> sizes = request_.score_sizes;
    for (const int dim : {-2, -1}) sizes.end()[dim] = sizes.end()[dim] / size + (sizes.end()[dim] % size != 0);
    request_.block_mask = expanded_bool("headroom.attention.block_mask", "block_mask", *options_.block_mask(), sizes);
  }

  /// Floating point of q's dtype (or float for narrower q) on q's device.
  bool adds_to_scores(const torch::Tensor& x) const {
    const auto dtype = q_.scalar_type();
    const bool narrow = dtype != torch::kFloat && dtype != torch::kDouble;
    return is_dense(x) && x.device() == q_.device() &&
           (x.scalar_type() == dtype || (narrow && x.scalar_type() == torch::kFloat));
  }
  void scores() {
    const auto accept = [&](const char* id, const char* name, const std::optional<torch::Tensor>& x,
                            torch::Tensor& target, auto&& shape_fits, const auto&... shape) {
      if (!x.has_value()) return;
      require(adds_to_scores(*x) && shape_fits(x->sizes()), id, name, " ", described(*x), "; expected ", q_.dtype(),
              " on ", q_.device(), ", ", shape...);
      target = x->resolve_neg();
    };
    const at::IntArrayRef sizes = request_.score_sizes;
    const int64_t heads = request_.heads();
    accept(
        "headroom.attention.bias", "bias", options_.bias(), request_.bias,
        [&](at::IntArrayRef x) { return at::is_expandable_to(x, sizes); }, "broadcastable to ", sizes);
    accept(
        "headroom.attention.relative_bias", "relative_bias", options_.relative_bias(), request_.relative_bias,
        [&](at::IntArrayRef x) { return x.size() == 2 && (x[0] == heads || x[0] == 1) && x[1] % 2 == 1; }, "shape [",
        heads, " or 1, 2R-1]");
    accept(
        "headroom.attention.alibi_slopes", "alibi_slopes", options_.alibi_slopes(), request_.alibi_slopes,
        [&](at::IntArrayRef x) { return at::is_expandable_to(x, all_but_last(sizes, 1)); }, "broadcastable to ",
        all_but_last(sizes, 1));
    accept(
        "headroom.attention.sink", "sink", options_.sink(), request_.sink,
        [&](at::IntArrayRef x) { return x.size() == 1 && x[0] == heads; }, "shape [", heads, "]");
  }

  /// Tables become one tensor, by operators that autograd knows; one that is dense is not copied.
  void functions() {
    request_.mask_function = options_.mask_function();
    if (!options_.score_function().has_value()) return;
    request_.score_function = options_.score_function()->without_tables();
    const auto computed_in = q_.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
    std::vector<torch::Tensor> flat;
    for (const torch::Tensor& table : options_.score_function()->tables()) {
      require(is_dense(table) && table.is_floating_point() && table.device() == q_.device() &&
                  (table.dim() == 1 || table.dim() == 2) && table.numel() > 0,
              "headroom.attention.score_function", "table ", flat.size(), " of the score function ", described(table),
              "; expected floating point [columns] or [rows, columns] on ", q_.device(), ", with at least one element");
      request_.score_table_shapes.push_back({table.dim() == 2 ? table.size(0) : 1, table.size(-1)});
      flat.push_back(table.to(computed_in).flatten());
    }
    if (!flat.empty()) request_.score_tables = (flat.size() == 1 ? flat.front() : torch::cat(flat)).resolve_neg();
  }

  void rotary() {
    if (!options_.rotary().has_value()) return;
    const torch::Tensor& table = *options_.rotary();
    const bool fits = is_dense(table) && table.is_complex() && table.scalar_type() != torch::kComplexHalf &&
                      table.device() == q_.device() && table.dim() == 2;
    require(fits && 2 * table.size(1) <= q_.size(-1), "headroom.attention.rotary", "rotary ", described(table),
            "; expected complex numbers [positions, pairs] on ", q_.device(), " with at most ", q_.size(-1) / 2,
            " pairs, as nn::rotary_table makes them");
    request_.rotary = table;
    table_rows("headroom.attention.rotary", "rotary", table);
  }

  void polar() {
    const auto expect = [](bool holds, const auto&... parts) { require(holds, "headroom.attention.polar", parts...); };
    const auto& phase = options_.polar_phase();
    if (!options_.polar().has_value()) {
      return expect(!phase.has_value(), "polar_phase is given without polar; give both, or leave both out");
    }
    const torch::Tensor& table = *options_.polar();
    const bool fits = is_dense(table) &&
                      (table.scalar_type() == torch::kFloat || table.scalar_type() == torch::kDouble) &&
                      table.device() == q_.device() && table.dim() == 2;
    expect(fits && table.size(1) == 2 * q_.size(-1), "polar ", described(table),
           "; expected float or double [positions, ", 2 * q_.size(-1), "] on ", q_.device(),
           ", cosines and sines as nn::polar_table makes them");
    expect(!options_.rotary().has_value(), "rotary and polar are both given; leave one of them out");
    request_.polar = table.resolve_neg();
    table_rows("headroom.attention.polar", "polar", table);
    if (!phase.has_value()) return;
    const int64_t heads = request_.kv_heads, dim = q_.size(-1);
    expect(adds_to_scores(*phase) && phase->sizes() == at::IntArrayRef({heads, dim}), "polar_phase ", described(*phase),
           "; expected ", q_.dtype(), " on ", q_.device(), ", shape [", heads, ", ", dim, "]");
    request_.polar_phase = phase->resolve_neg();
  }

  /// Fails unless a table of positions has a row for each query and key.
  void table_rows(const char* id, const char* name, const torch::Tensor& table) {
    const HostTensors host;
    const TableRows rows(request_);
    for (const torch::Tensor* x : {&rows.query, &rows.key}) {
      if (x->numel() == 0) continue;
      const int64_t first = x->min().item<int64_t>(), last = x->max().item<int64_t>();
      require(0 <= first && last < table.size(0), id, name, " has ", table.size(0), " rows and positions go from ",
              first, " to ", last, "; expected a row for each position, and no position below 0");
    }
  }

  void dropout() { request_.dropout = checked_dropout(options_.dropout(), options_.seed(), options_.generator()); }

  const torch::Tensor &q_, &k_, &v_;
  const AttentionOptions& options_;
  AttentionRequest& request_;
};

inline AttentionRequest AttentionRequest::check(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                                const AttentionOptions& options) {
  AttentionRequest request;
  AttentionChecks(q, k, v, options, request).run();
  return request;
}

}  // namespace headroom::inline v0::detail
