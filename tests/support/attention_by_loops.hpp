#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "headroom/attention/options.hpp"
#include "headroom/core/dropout.hpp"

// Attention and its gradients by the definition, pair by pair in double, without a line of what it tests (but the hash
// of dropout). Beside each number it gives how far rounding may move it, and whether a row that is planted with NaN
// may reach it: only where one of its pairs is seen.

namespace headroom::testing {

/// Relative errors: of arithmetic, of weights and gradients of scores as factors, and of numbers in memory.
struct Rounding {
  double computed, factors, stored;
};

/// Rows that will hold NaN: bool [B,H,Lq], [B,Hk,Lk], [B,H,Lq].
struct PlantedRows {
  torch::Tensor q, keys, grad_output;
};

/// A tensor to compare with, in double, and beside each element how far rounding may move it and how many planted rows
/// reach it.
struct Expected {
  torch::Tensor value, error, reached;

  explicit Expected(at::IntArrayRef sizes)
      : value(torch::zeros(sizes, torch::kDouble)), error(value.clone()), reached(value.clone()) {}
  /// Over what is broadcast from `sizes`.
  void reduce(at::IntArrayRef sizes) {
    for (torch::Tensor* x : {&value, &error, &reached}) *x = x->sum_to_size(sizes);
  }
};

class AttentionByLoops {
 public:
  /// q [B,H,Lq,D], k [B,Hk,Lk,D], v [B,Hk,Lk,Dv] in double; tensors of the options likewise expanded to [B,H,Lq,Lk],
  /// [H,2R-1], [B,H,Lq], [H], block masks to [B,H,nq,nk], key lengths to [B].
  AttentionByLoops(torch::Tensor q, torch::Tensor k, torch::Tensor v, const AttentionOptions& options,
                   Rounding rounding)
      : q_(q.contiguous()), k_(k.contiguous()), v_(v.contiguous()), options_(options), rounding_(rounding) {
    batch_ = q_.size(0), heads_ = q_.size(1), queries_ = q_.size(2), keys_ = k_.size(2), dim_ = q_.size(3);
    value_dim_ = v_.size(3), group_ = k_.size(1) == 0 ? 1 : heads_ / k_.size(1);
    scale_ = options_.scale().value_or(1 / std::sqrt(std::max<double>(static_cast<double>(dim_), 1)));
    for (auto* x : {&options_.key_lengths(), &options_.mask(), &options_.hidden(), &options_.block_mask()}) {
      if (x->has_value()) *x = (*x)->to(torch::kDouble).contiguous();
    }
    if (options_.polar().has_value()) table_ = options_.polar()->to(torch::kDouble);
    if (options_.rotary().has_value()) {
      table_ = torch::view_as_real(options_.rotary()->to(torch::kComplexDouble).resolve_conj());
    }
    place();
    rotate(q_, query_row_), rotate(k_, key_row_);
    if (!options_.polar().has_value()) return;
    features_of_q_ = q_, features_of_k_ = k_;
    q_ = in_polar_form(q_, angles(query_row_, {})), k_ = in_polar_form(k_, angles(key_row_, options_.polar_phase()));
    dim_ = q_.size(3);
  }

  struct Row {
    int64_t b, h, i;
  };
  bool sees(const Row& row, int64_t j) const {
    const auto [b, h, i] = row;
    if (sequence_of_query_[i] != sequence_of_key_[j]) return false;
    const int64_t distance = position_[i] - j;
    if (options_.causal() && distance < 0) return false;
    const int64_t first = key_row_[j], global = options_.global_keys();  // place in the sequence
    const bool is_global = first < global || first + distance < global;
    if (const auto& window = options_.window(); window.has_value() && !is_global) {
      if (window->left >= 0 && distance > window->left) return false;
      if (window->right >= 0 && -distance > window->right) return false;
    }
    if (options_.key_lengths().has_value() && j >= element(options_.key_lengths(), {b})) return false;
    if (options_.mask().has_value() && element(options_.mask(), {b, h, i, j}) == 0) return false;
    if (options_.hidden().has_value() && element(options_.hidden(), {b, h, i, j}) != 0) return false;
    const int64_t size = options_.block_size();
    return !options_.block_mask().has_value() || element(options_.block_mask(), {b, h, i / size, j / size}) != 0;
  }

  /// bool [B,H,Lq,Lk]
  const torch::Tensor& seen() {
    if (!seen_.defined()) {
      seen_ = torch::zeros({batch_, heads_, queries_, keys_}, torch::kBool);
      auto seen = seen_.accessor<bool, 4>();
      for_each_row([&](int64_t b, int64_t h, int64_t i) {
        for (int64_t j = 0; j < keys_; ++j) seen[b][h][i][j] = sees({b, h, i}, j);
      });
    }
    return seen_;
  }

  /// By name: output, lse, and the gradients of q, k, v, bias, relative_bias, alibi_slopes, sink and polar_phase for
  /// these of output [B,H,Lq,Dv] and log-sum-exp [B,H,Lq].
  std::map<std::string, Expected> run(const torch::Tensor& grad_output, const torch::Tensor& grad_lse,
                                      const PlantedRows& planted) {
    seen();
    const int64_t reach = options_.relative_bias().has_value() ? options_.relative_bias()->size(1) : 0;
    const std::pair<const char*, std::vector<int64_t>> shapes[] = {{"output", {batch_, heads_, queries_, value_dim_}},
                                                                   {"lse", {batch_, heads_, queries_}},
                                                                   {"q", q_.sizes().vec()},
                                                                   {"k", k_.sizes().vec()},
                                                                   {"v", v_.sizes().vec()},
                                                                   {"bias", {batch_, heads_, queries_, keys_}},
                                                                   {"relative_bias", {heads_, reach}},
                                                                   {"alibi_slopes", {batch_, heads_, queries_}},
                                                                   {"sink", {heads_}},
                                                                   {"polar_phase", {k_.size(1), dim_ / 2}}};
    results_.clear();
    for (const auto& [name, sizes] : shapes) results_.emplace(name, Expected(sizes));
    for_each_row([&](int64_t b, int64_t h, int64_t i) { row({b, h, i}, grad_output, grad_lse, planted); });
    rotate_back("q", query_row_), rotate_back("k", key_row_);
    if (options_.polar().has_value()) {
      from_polar_form("q", features_of_q_, angles(query_row_, {}), nullptr);
      from_polar_form("k", features_of_k_, angles(key_row_, options_.polar_phase()), &results_.at("polar_phase"));
    }
    return std::move(results_);
  }

 private:
  /// What a query makes of a key.
  struct Pair {
    int64_t j;
    double score, error;          // after all that is added
    double slope = 1;             // derivative of the softcap
    double weight = 0, gain = 1;  // gain: of dropout
  };

  template <class F>
  void for_each_row(F&& f) const {
    for (int64_t b = 0; b < batch_; ++b)
      for (int64_t h = 0; h < heads_; ++h)
        for (int64_t i = 0; i < queries_; ++i) f(b, h, i);
  }

  /// An element of a tensor of double.
  static double& element(const torch::Tensor& x, std::initializer_list<int64_t> at) {
    int64_t offset = 0, d = 0;
    for (const int64_t index : at) offset += index * x.stride(d++);
    return x.data_ptr<double>()[offset];
  }
  static double& element(const std::optional<torch::Tensor>& x, std::initializer_list<int64_t> at) {
    return element(*x, at);
  }

  static bool is_planted(const torch::Tensor& rows, const std::array<int64_t, 3>& at) {
    return rows.data_ptr<bool>()[(at[0] * rows.size(1) + at[1]) * rows.size(2) + at[2]];
  }

  /// Sequences, positions and rows of the rotary table.
  void place() {
    std::vector<int64_t> starts{0, queries_}, key_starts{0, keys_};
    const auto numbers = [](const torch::Tensor& x) {
      const torch::Tensor whole = x.to(torch::kLong).contiguous();
      return std::vector<int64_t>(whole.data_ptr<int64_t>(), whole.data_ptr<int64_t>() + whole.numel());
    };
    if (options_.sequence_starts().has_value()) {
      starts = numbers(*options_.sequence_starts());
      key_starts = numbers(options_.key_sequence_starts().value_or(*options_.sequence_starts()));
    }
    sequence_of_query_.resize(queries_), position_.resize(queries_), query_row_.resize(queries_);
    sequence_of_key_.resize(keys_), key_row_.resize(keys_);
    for (size_t s = 0; s + 1 < starts.size(); ++s) {
      const int64_t length = starts[s + 1] - starts[s], key_length = key_starts[s + 1] - key_starts[s];
      const bool bottom_right = options_.alignment() == AttentionAlignment::bottom_right;
      for (int64_t i = 0; i < length; ++i) {
        sequence_of_query_[starts[s] + i] = s;
        query_row_[starts[s] + i] = i + options_.query_offset() + (bottom_right ? key_length - length : 0);
        position_[starts[s] + i] = query_row_[starts[s] + i] + key_starts[s];
      }
      for (int64_t j = 0; j < key_length; ++j) sequence_of_key_[key_starts[s] + j] = s, key_row_[key_starts[s] + j] = j;
    }
  }

  void turn(double* row, int64_t table_row, double sign) const {
    for (int64_t pair = 0; pair < table_.size(1); ++pair) {
      const double c = element(table_, {table_row, pair, 0}), s = sign * element(table_, {table_row, pair, 1});
      const double re = row[2 * pair], im = row[2 * pair + 1];
      row[2 * pair] = re * c - im * s, row[2 * pair + 1] = re * s + im * c;
    }
  }
  void rotate(torch::Tensor& x, const std::vector<int64_t>& rows, double sign = 1) const {
    if (!options_.rotary().has_value() || x.numel() == 0) return;
    x = x.clone();
    for (int64_t n = 0; n < x.numel() / dim_; ++n) turn(x.data_ptr<double>() + n * dim_, rows[n % x.size(2)], sign);
  }
  /// Of gradients; errors of a pair of features mix.
  void rotate_back(const char* name, const std::vector<int64_t>& rows) {
    Expected& x = results_.at(name);
    rotate(x.value, rows, -1);
    if (!options_.rotary().has_value() || x.error.numel() == 0) return;
    x.error = (x.error + rounding_.computed * x.value.abs().amax(-1, true)).sum(-1, true).expand_as(x.value).clone();
  }

  /// Of rows of the table, for keys with their phases: [L,D] or [Hk,L,D].
  torch::Tensor angles(const std::vector<int64_t>& rows, const std::optional<torch::Tensor>& phase) const {
    const auto turns = table_.index_select(0, torch::tensor(rows, torch::kLong)).chunk(2, -1);
    const torch::Tensor of_rows = torch::atan2(turns[1], turns[0]);
    return phase.has_value() ? of_rows + phase->unsqueeze(-2) : of_rows;
  }
  static torch::Tensor in_polar_form(const torch::Tensor& x, const torch::Tensor& angles) {
    const torch::Tensor magnitude = torch::softplus(x);
    return torch::cat({magnitude * angles.cos(), magnitude * angles.sin()}, -1).contiguous();
  }
  /// Of gradients; and those of angles, summed over rows and batches.
  void from_polar_form(const char* name, const torch::Tensor& x, const torch::Tensor& angles, Expected* phase) {
    Expected& result = results_.at(name);
    const auto value = result.value.chunk(2, -1), error = result.error.chunk(2, -1);
    const torch::Tensor sizes = value[0].abs() + value[1].abs(), magnitude = torch::softplus(x);
    const torch::Tensor errors = error[0] + error[1] + 16 * rounding_.computed * sizes;
    result.reached = result.reached.narrow(-1, 0, x.size(-1)).contiguous();
    if (phase != nullptr) {
      phase->value = (magnitude * (value[1] * angles.cos() - value[0] * angles.sin())).sum(2).sum(0);
      phase->error = (magnitude * errors).sum(2).sum(0);
      phase->reached = result.reached.sum(2).sum(0);
    }
    const torch::Tensor along = value[0] * angles.cos() + value[1] * angles.sin();
    result.value = (along * x.sigmoid()).contiguous(), result.error = (errors * x.sigmoid()).contiguous();
  }

  Pair pair(const Row& row, int64_t j) const {
    const auto [b, h, i] = row;
    double dot = 0, size = 0;
    for (int64_t d = 0; d < dim_; ++d) {
      const double product = element(q_, {b, h, i, d}) * element(k_, {b, h / group_, j, d});
      dot += product, size += std::abs(product);
    }
    // Of magnitudes and turns, too
    const double rounding =
        options_.polar().has_value() ? 24 * rounding_.computed + rounding_.factors : 4 * rounding_.computed;
    Pair pair{j, scale_ * dot, rounding * std::abs(scale_) * size};
    if (const double cap = options_.softcap().value_or(0); cap > 0) {
      const double t = std::tanh(pair.score / cap);
      pair.slope = 1 - t * t, pair.score = cap * t;
      pair.error = std::min(pair.error, 2 * cap) + 4 * rounding_.computed * cap;
    }
    const auto add = [&](double term) {
      pair.score += term;
      // Of a term as large as finfo.min nothing else is left, in double as in float
      if (std::abs(term) < 1e30) pair.error += 2 * rounding_.computed * (std::abs(term) + std::abs(pair.score));
    };
    const int64_t distance = position_[i] - j;
    if (options_.bias().has_value()) add(element(options_.bias(), {b, h, i, j}));
    if (options_.relative_bias().has_value()) add(element(options_.relative_bias(), {h, relative(distance)}));
    if (options_.alibi_slopes().has_value()) {
      const double term = element(options_.alibi_slopes(), {b, h, i}) * static_cast<double>(std::abs(distance));
      pair.error += 2 * rounding_.computed * std::abs(term), add(-term);
    }
    if (options_.dropout() > 0) {
      const core::Dropout dropout{options_.dropout(), *options_.seed()};
      const auto key = dropout.row_key(static_cast<uint32_t>(b * heads_ + h), static_cast<uint32_t>(i));
      pair.gain = core::Dropout::bits(key, static_cast<uint32_t>(j)) < dropout.threshold() ? 0 : dropout.gain();
    }
    return pair;
  }
  int64_t relative(int64_t distance) const {
    const int64_t reach = options_.relative_bias()->size(1) / 2;
    return std::clamp<int64_t>(distance, -reach, reach) + reach;
  }

  void put(const char* name, std::initializer_list<int64_t> at, double value, double error, bool reached) {
    Expected& x = results_.at(name);
    element(x.value, at) += value, element(x.error, at) += std::abs(error), element(x.reached, at) += reached;
  }

  void row(const Row& at, const torch::Tensor& grad_output, const torch::Tensor& grad_lse, const PlantedRows& planted) {
    const auto [b, h, i] = at;
    std::vector<Pair> pairs;
    bool reached = false, reached_back = false;
    for (int64_t j = 0; j < keys_; ++j) {
      if (!seen_.data_ptr<bool>()[((b * heads_ + h) * queries_ + i) * keys_ + j]) continue;
      pairs.push_back(pair(at, j));
      reached |= is_planted(planted.keys, {b, h / group_, j});
    }
    if (!pairs.empty()) {
      reached |= is_planted(planted.q, {b, h, i});
      reached_back = reached || is_planted(planted.grad_output, {b, h, i});
    }
    // Softmax; the sink's score is one without a value
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    const double sink = options_.sink().has_value() ? element(options_.sink(), {h}) : -kInfinity;
    double maximum = sink, sum = 0;
    for (const Pair& p : pairs) maximum = std::max(maximum, p.score);
    const bool empty = maximum == -kInfinity;
    for (Pair& p : pairs) sum += p.weight = empty ? 0 : std::exp(p.score - maximum);
    double sink_weight = empty ? 0 : std::exp(sink - maximum), error = 0;
    sum += sink_weight;
    if (!empty) sink_weight /= sum;
    for (Pair& p : pairs) {
      if (!empty) p.weight /= sum;
      if (p.weight > 0) error += p.weight * p.error;
    }
    const double lse = empty ? -kInfinity : maximum + std::log(sum);
    put("lse", {b, h, i}, lse, empty ? 0 : error + 8 * rounding_.computed * (1 + std::abs(lse)), reached);

    double delta = 0, delta_error = 0;
    for (int64_t d = 0; d < value_dim_; ++d) {
      double value = 0, spread = 0;
      for (const Pair& p : pairs) {
        const double term = p.weight * p.gain * element(v_, {b, h / group_, p.j, d});
        value += term;
        if (term != 0) spread += std::abs(term) * (p.error + error + rounding_.factors + 8 * rounding_.computed);
      }
      spread += rounding_.stored * std::abs(value);
      put("output", {b, h, i, d}, value, spread, reached);
      const double grad = element(grad_output, {b, h, i, d});
      delta += grad * value;
      delta_error += std::abs(grad) * (spread + 8 * rounding_.computed * std::abs(value));
    }
    const double by_lse = empty ? 0 : element(grad_lse, {b, h, i});
    delta -= by_lse, delta_error += rounding_.computed * std::abs(by_lse);
    if (options_.sink().has_value() && !empty) {
      put("sink", {h}, -sink_weight * delta,
          sink_weight * (delta_error + std::abs(delta) * (error + 8 * rounding_.computed)), reached_back);
    }
    for (const Pair& p : pairs) gradients(at, p, {delta, delta_error, error, reached_back}, grad_output);
  }

  struct RowGradient {
    double delta, delta_error, error;
    bool reached;
  };
  void gradients(const Row& at, const Pair& p, const RowGradient& row, const torch::Tensor& grad_output) {
    const auto [b, h, i] = at;
    const int64_t hk = h / group_, j = p.j;
    const double rest = 8 * rounding_.computed + rounding_.factors;
    const double relative_error = p.weight > 0 ? p.error + row.error + rest : 0;
    double of_weight = 0, size = 0;
    for (int64_t d = 0; d < value_dim_; ++d) {
      const double grad = element(grad_output, {b, h, i, d}), product = grad * element(v_, {b, hk, j, d}) * p.gain;
      of_weight += product, size += std::abs(product);
      const double term = p.weight * p.gain * grad;
      put("v", {b, hk, j, d}, term, std::abs(term) * relative_error, row.reached);
    }
    const double grad = p.weight * (of_weight - row.delta);
    const double error = p.weight * (relative_error * (std::abs(of_weight) + std::abs(row.delta)) +
                                     8 * rounding_.computed * size + row.delta_error) +
                         rest * std::abs(grad);
    if (options_.bias().has_value()) put("bias", {b, h, i, j}, grad, error, row.reached);
    const int64_t distance = position_[i] - j;
    if (options_.relative_bias().has_value()) {
      put("relative_bias", {h, relative(distance)}, grad, error, row.reached);
    }
    if (options_.alibi_slopes().has_value()) {
      const auto steps = static_cast<double>(std::abs(distance));
      put("alibi_slopes", {b, h, i}, -grad * steps, error * steps, row.reached);
    }
    const double cap = options_.softcap().value_or(0);
    const double slope_error = cap > 0 ? std::min(1.0, 2 * p.error / cap + 8 * rounding_.computed) : 0;
    const double inner = scale_ * grad * p.slope,
                 inner_error = std::abs(scale_) * (error * p.slope + std::abs(grad) * slope_error);
    for (int64_t d = 0; d < dim_; ++d) {
      const double of_q = element(k_, {b, hk, j, d}), of_k = element(q_, {b, h, i, d});
      const double extra = rest * std::abs(inner) + inner_error;
      put("q", {b, h, i, d}, inner * of_q, extra * std::abs(of_q), row.reached);
      put("k", {b, hk, j, d}, inner * of_k, extra * std::abs(of_k), row.reached);
    }
  }

  torch::Tensor q_, k_, v_, table_, seen_;
  torch::Tensor features_of_q_, features_of_k_;  // before they are in polar form
  AttentionOptions options_;
  Rounding rounding_;
  int64_t batch_, heads_, queries_, keys_, dim_, value_dim_, group_;
  double scale_;
  std::vector<int64_t> sequence_of_query_, sequence_of_key_, position_, query_row_, key_row_;
  std::map<std::string, Expected> results_;
};

}  // namespace headroom::testing
