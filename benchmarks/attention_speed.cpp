// Speed of attention: LibTorch's fused kernel, stored scores, chunks and tiles on the same inputs with the same
// threads.

#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <utility>

#include "benchmark.hpp"
#include "fma_peak.hpp"
#include "headroom/attention/attention.hpp"
#include "headroom/attention/polar.hpp"
#include "headroom/nn/rotary.hpp"
#include "timing.hpp"

using namespace headroom;
using torch::Tensor;

namespace {

/// What is timed, but for the pass.
struct Subject {
  std::string shape;  ///< as given
  int64_t batch = 0, heads = 0, length = 0, dim = 0;
  std::string dtype, variant;

  int64_t scores() const { return batch * heads * length * length; }
  /// Share of the scores that the variant leaves to be computed.
  double computed_share() const {
    const auto l = static_cast<double>(length);
    if (variant == "causal") return (l + 1) / (2 * l);
    if (variant == "window") return std::min(1.0, (2 * 128 + 1) / l);
    if (variant == "causal_window") return std::min(1.0, 257 / l);
    if (variant == "global") return std::min(1.0, (2 * 256 + 1 + 2 * 16) / l);
    return 1;
  }
  /// Whether ways to ask for the same stand beside each other, or global keys beside a window alone.
  bool compares_forms() const { return std::ranges::count(kForms, variant) > 0; }
  static constexpr std::array<const char*, 6> kForms{"alibi",         "softcap", "relative",
                                                     "causal_window", "global",  "polar"};
  double flops(bool backward) const {
    return 4.0 * static_cast<double>(scores() * dim) * (backward ? 3.5 : 1.0) * computed_share();
  }
};

/// All that was asked for, in the order of the report.
std::vector<Subject> subjects(const std::vector<std::string>& shapes, const std::vector<std::string>& dtypes,
                              const std::vector<int64_t>& dims, const std::vector<std::string>& variants) {
  std::vector<Subject> all;
  for (const std::string& text : shapes) {
    Subject s;
    s.shape = text;
    require(std::sscanf(text.c_str(), "%ldx%ldx%ld", &s.batch, &s.heads, &s.length) == 3 && s.batch > 0 &&
                s.heads > 0 && s.length > 0,
            "headroom.benchmarks.shape", "shape is ", text, ", expected BxHxL, as 1x4x2049");
    for (const std::string& dtype : dtypes) {
      for (const int64_t dim : dims) {
        for (const std::string& variant : variants) {
          s.dtype = dtype, s.dim = dim, s.variant = variant;
          all.push_back(s);
        }
      }
    }
  }
  return all;
}

/// Query i sees keys i - 256 … i, asked pair by pair, with a test of blocks.
struct CausalWindow {
  template <class Scalar>
  core::LaneMask<Scalar> operator()(const core::ScorePlace<Scalar>& at) const {
    return at.distance >= 0 && at.distance <= 256;
  }
  core::Seen block(int64_t, int64_t, core::KeyRange queries, core::KeyRange keys) const {
    const int64_t nearest = queries.begin - (keys.end - 1), furthest = queries.end - 1 - keys.begin;
    if (furthest < 0 || nearest > 256) return core::Seen::none;
    return nearest >= 0 && furthest <= 256 ? core::Seen::all : core::Seen::some;
  }
};
/// The same as a range of keys.
struct CausalWindowOfRanges {
  core::KeyRange keys(int64_t, int64_t, int64_t query) const { return {query - 256, query + 1}; }
};

/// Polar positions by operators on tensors: q and k become twice as wide before attention.
Tensor attention_of_polar_tensors(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  const auto turned = [&](const Tensor& x, const Tensor& phase) {
    const Tensor rows = torch::arange(x.size(-2));
    return headroom::detail::polar_pairs(x,
                                         headroom::detail::polar_turns(*options.polar(), rows, phase, torch::kFloat));
  };
  return attention(turned(q, {}), turned(k, *options.polar_phase()), v,
                   AttentionOptions().scale(1 / std::sqrt(static_cast<double>(q.size(-1)))));
}

/// Two ways or more to ask for the same, the built-in one first; global keys after their window alone, and polar
/// positions after rotary ones, with the frequencies of their papers.
std::vector<std::pair<const char*, AttentionOptions>> forms(const Subject& s) {
  const auto learned = [](at::IntArrayRef sizes) { return (torch::rand(sizes) * 0.1).requires_grad_(); };
  using O = AttentionOptions;
  if (s.variant == "alibi") {
    const Tensor slopes = learned({s.heads, 1});
    return {{"built in", O().alibi_slopes(slopes)},
            {"function", O().score_function(ScoreFunction(
                             [](auto score, auto at, auto slope) { return score - slope(at.head) * abs(at.distance); },
                             slopes.flatten()))}};
  }
  if (s.variant == "softcap") {
    return {{"built in", O().softcap(20)},
            {"function", O().score_function([](auto score, auto) { return 20 * tanh(score / 20); })}};
  }
  if (s.variant == "relative") {
    const Tensor table = learned({s.heads, 2 * s.length - 1});
    return {{"built in", O().relative_bias(table)},
            {"function", O().score_function(ScoreFunction(
                             [last = s.length - 1](auto score, auto at, auto bias) {
                               return score + bias(at.head, at.distance + last);
                             },
                             table))}};
  }
  if (s.variant == "causal_window") {
    return {{"built in", O().causal(true).window(AttentionWindow{256, 0})},
            {"ranges", O().mask_function(CausalWindowOfRanges{})},
            {"function", O().mask_function(CausalWindow{})}};
  }
  if (s.variant == "polar") {
    return {
        {"rotary", O().rotary(nn::rotary_table(s.length, s.dim / 2 * 2))},
        {"polar",
         O().polar(nn::polar_table(s.length, s.dim)).polar_phase((-torch::rand({s.heads, s.dim})).requires_grad_())}};
  }
  const auto window = O().window(AttentionWindow{256, 256});
  return {{"window", window}, {"global", O(window).global_keys(16)}};
}

/// The inputs of a subject, and who computes with them.
class Inputs {
 public:
  explicit Inputs(const Subject& subject) : subject_(subject) {
    const auto type = subject.dtype == "float" ? torch::kFloat : torch::kBFloat16;
    const auto make = [&] {
      return torch::randn({subject.batch, subject.heads, subject.length, subject.dim}).to(type);
    };
    q_ = make().requires_grad_(), k_ = make().requires_grad_(), v_ = make().requires_grad_(), grad_ = make();
    options_.causal(subject.variant == "causal");
    if (subject.variant == "bias") {
      mask_ = torch::randn({subject.length, subject.length}).to(type);
      options_.bias(mask_);
    }
    if (subject.variant == "window") {
      const Tensor all = torch::ones({subject.length, subject.length}, torch::kBool);
      mask_ = all.tril(128).logical_and(all.triu(-128));
      options_.window(AttentionWindow{128, 128});
    }
  }

  /// LibTorch first; who stores scores is left out where they would take too much.
  std::vector<benchmarks::Contender> contenders(bool backward, double naive_bytes) const {
    if (subject_.compares_forms()) {
      std::vector<benchmarks::Contender> all;
      const auto asked = forms(subject_);
      for (const auto& [name, options] : asked) {
        all.push_back({name, timed(backward, [this, options = options] { return attention(q_, k_, v_, options); })});
      }
      if (subject_.variant == "polar") {
        const AttentionOptions& polar = asked.back().second;
        all.push_back(
            {"tensors", timed(backward, [this, polar] { return attention_of_polar_tensors(q_, k_, v_, polar); })});
      }
      return all;
    }
    std::vector<benchmarks::Contender> all{{"torch", timed(backward, [this] { return by_torch(); })}};
    const auto add = [&](const char* name, AttentionBackend backend) {
      const auto options = AttentionOptions(options_).backend(backend);
      all.push_back({name, timed(backward, [this, options] { return attention(q_, k_, v_, options); })});
    };
    if (12.0 * static_cast<double>(subject_.scores()) <= naive_bytes) add("naive", AttentionBackend::reference);
    add("chunked", AttentionBackend::chunked);
    add("tiled", AttentionBackend::tiled);
    return all;
  }

 private:
  Tensor by_torch() const {
    const auto mask = mask_.defined() ? std::optional(mask_) : std::nullopt;
    return torch::scaled_dot_product_attention(q_, k_, v_, mask, 0.0, subject_.variant == "causal");
  }
  std::function<double()> timed(bool backward, const std::function<Tensor()>& forward) const {
    return [this, backward, forward] {
      const torch::AutoGradMode mode(backward);
      const double seconds = benchmarks::seconds_of([&] {
        const Tensor output = forward();
        if (backward) output.backward(grad_);
      });
      for (const Tensor& x : {q_, k_, v_}) x.mutable_grad() = Tensor();
      return seconds;
    };
  }

  const Subject& subject_;
  Tensor q_, k_, v_, grad_, mask_;
  AttentionOptions options_;
};

/// Prints and keeps what the contenders of a pass took.
void report_pass(benchmarks::Benchmark& benchmark, const Subject& s, bool backward,
                 const std::vector<benchmarks::Contender>& contenders, double peak) {
  const char* const pass = backward ? "forward_backward" : "forward";
  for (const auto& [name, run, seconds] : contenders) {
    const double gflops = s.flops(backward) / seconds / 1e9, ratio = contenders[0].best / seconds;
    std::printf("%-9s %-17s %-9s %-7s %-11s %4ld %10.2f %7.0f %8.2f %6.0f\n", name.c_str(), pass, s.dtype.c_str(),
                s.variant.c_str(), s.shape.c_str(), s.dim, seconds * 1e3, gflops, ratio, 100 * gflops / peak);
    std::fflush(stdout);
    benchmark.add_row({{"implementation", name},
                       {"pass", pass},
                       {"dtype", s.dtype},
                       {"variant", s.variant},
                       {"batch", s.batch},
                       {"heads", s.heads},
                       {"length", s.length},
                       {"head_dim", s.dim},
                       {"milliseconds", seconds * 1e3},
                       {"gflops", gflops},
                       {s.compares_forms() ? "ratio_to_first" : "ratio_to_torch", ratio},
                       {"fraction_of_peak", gflops / peak}});
  }
}

}  // namespace

int main(int argc, char** argv) {
  benchmarks::Benchmark benchmark("attention_speed", "Speed of attention beside LibTorch's fused CPU kernel");
  std::vector<int64_t> dims{16, 24, 32, 64, 128};
  std::vector<std::string> shapes{"1x4x2049", "8x12x431", "1x1x8192", "32x12x2049"}, dtypes{"float", "bfloat16"},
      variants{"plain", "causal", "window", "bias"}, all_variants = variants;
  all_variants.insert(all_variants.end(), Subject::kForms.begin(), Subject::kForms.end());
  double seconds = 1, naive_gib = 2;
  benchmark.add({.name = "--head-dim", .help = "Head dims", .target = &dims, .least = 1});
  benchmark.add({.name = "--shape", .help = "Shapes as BxHxL", .target = &shapes});
  benchmark.add({.name = "--dtype", .help = "float, bfloat16", .target = &dtypes, .choices = dtypes});
  benchmark.add({.name = "--variant",
                 .help =
                     "plain, causal, window (128 to each side), bias; built-in options beside functions of one's own: "
                     "alibi, softcap, relative, causal_window (256); global: a window of 256 to each side and 16 "
                     "global tokens beside the window alone; polar: polar positions beside rotary ones, and by "
                     "operators on tensors",
                 .target = &variants,
                 .choices = all_variants});
  benchmark.add({.name = "--seconds",
                 .help = "Repeat each measurement at least 2 times and at least this long",
                 .target = &seconds});
  benchmark.add({.name = "--naive-limit",
                 .help = "Leave stored scores out where they would need more GiB than this",
                 .target = &naive_gib});
  return benchmark.run(argc, argv, [&] {
    const double peak = benchmarks::fma_peak();
    std::printf("FMA peak of %d threads: %.0f GF/s\n", torch::get_num_threads(), peak);
    std::printf("%-9s %-17s %-9s %-7s %-11s %4s %10s %7s %8s %6s\n", "", "pass", "dtype", "variant", "BxHxL", "D", "ms",
                "GF/s", "x first", "% peak");
    benchmark.note("machine", benchmarks::Row{{"cpu", benchmarks::processor()},
                                              {"threads", torch::get_num_threads()},
                                              {"fma_peak_gflops", peak}});
    for (const Subject& subject : subjects(shapes, dtypes, dims, variants)) {
      const Inputs inputs(subject);
      for (const bool backward : {false, true}) {
        auto contenders = inputs.contenders(backward, naive_gib * (1 << 30));
        benchmarks::race(contenders, {.seconds = seconds});
        report_pass(benchmark, subject, backward, contenders, peak);
      }
    }
  });
}
