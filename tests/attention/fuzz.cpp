// Random requests against the definition by loops in double: every backend that takes the request, forward and
// backward. HEADROOM_FUZZ_SEED=n replays a seed, HEADROOM_FUZZ_COUNT=n runs as many from there on instead of a few
// seconds' worth.

#include <chrono>
#include <cstdlib>
#include <random>

#include "support/attention_by_loops.hpp"
#include "support/attention_requests.hpp"

using namespace headroom;
using namespace headroom::testing;
using headroom::detail::AttentionRequest;

namespace {

/// A request and what is differentiated. Tensors of any layout, in the dtype of the request.
struct RandomRequest {
  Tensor q, k, v, grad_output, grad_lse;
  AttentionOptions options;
  bool bias_has_gradient = true;
  PlantedRows planted;  // with the shapes of q, k and grad_output, without the last dimension
  headroom::detail::ChunkSizes chunks{1, 1, 1};
  int threads = 1;
};

class Draw {
 public:
  explicit Draw(uint64_t seed) : bits_(seed), noise_(at::make_generator<at::CPUGeneratorImpl>(seed)) {
    dtype_ = pick({torch::kFloat, torch::kFloat, torch::kDouble, torch::kBFloat16, torch::kHalf});
  }

  RandomRequest request() {
    shapes();
    const std::vector<int64_t> kv_batch = broadcast(batch_, 0.2);
    const double size = pick({1.0, 1.0, 1.0, 4.0, 0.01});
    request_.q = chance(0.1) ? overlapping(sizes(batch_, {heads_, queries_, dim_}))
                             : normal(batch_, {heads_, queries_, dim_}, size);
    request_.k = normal(kv_batch, {kv_heads_, keys_, dim_}, chance(0.05) ? 0 : size);
    request_.v = normal(kv_batch, {kv_heads_, keys_, value_dim_}, 1);
    request_.grad_output = normal(batch_, {heads_, queries_, value_dim_}, 1);
    request_.grad_lse = noise(sizes(batch_, {heads_, queries_})) * pick({0.0, 1.0});
    keys_seen(), scores();
    request_.chunks = {between(1, 4), between(1, 40), between(1, 40)};
    request_.threads = static_cast<int>(between(1, 4));
    return request_;
  }

  bool chance(double p) { return std::uniform_real_distribution<double>(0, 1)(bits_) < p; }
  int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(bits_); }
  template <class T>
  T pick(std::initializer_list<T> from) {
    return from.begin()[between(0, static_cast<int64_t>(from.size()) - 1)];
  }

  /// The same values in memory of another layout; what lies between them is NaN.
  Tensor laid_out(const Tensor& x) {
    if (x.dim() == 0) return x.clone();
    switch (between(0, 4)) {
      case 0: {
        std::vector<int64_t> order(x.dim()), back(x.dim());
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), bits_);
        for (size_t d = 0; d < order.size(); ++d) back[order[d]] = static_cast<int64_t>(d);
        return x.permute(order).clone(at::MemoryFormat::Contiguous).permute(back);
      }
      case 1: {  // part of a larger tensor, at any offset
        std::vector<int64_t> before, larger;
        for (const int64_t size : x.sizes())
          before.push_back(between(0, 1)), larger.push_back(size + before.back() + between(0, 1));
        Tensor part = filled(larger, x);
        for (int64_t d = 0; d < x.dim(); ++d) part = part.narrow(d, before[d], x.size(d));
        return part.copy_(x);
      }
      case 2: {
        std::vector<int64_t> larger = x.sizes().vec();
        larger.back() *= 2;
        return filled(larger, x).slice(-1, between(0, 1), larger.back(), 2).copy_(x);
      }
      case 3:
        return x.is_floating_point() ? torch::_neg_view(x.neg()) : x.clone();
      default:
        return x.clone(at::MemoryFormat::Contiguous);
    }
  }

 private:
  static Tensor filled(at::IntArrayRef sizes, const Tensor& like) {
    Tensor x = torch::empty(sizes, like.options());
    return like.is_floating_point() ? x.fill_(std::numeric_limits<double>::quiet_NaN()) : x.fill_(1);
  }
  static std::vector<int64_t> sizes(const std::vector<int64_t>& batch, std::initializer_list<int64_t> rest) {
    std::vector<int64_t> all = batch;
    all.insert(all.end(), rest);
    return all;
  }
  Tensor noise(at::IntArrayRef sizes) { return torch::randn(sizes, noise_, torch::kDouble); }
  Tensor normal(const std::vector<int64_t>& batch, std::initializer_list<int64_t> rest, double size) {
    return laid_out((noise(sizes(batch, rest)) * size).to(dtype_));
  }
  /// Rows that share elements with the rows before.
  Tensor overlapping(const std::vector<int64_t>& sizes) {
    std::vector<int64_t> strides(sizes.size(), 1);
    int64_t step = between(0, 2), last = 0;
    for (size_t d = sizes.size() - 1; d-- > 0; step = std::max<int64_t>(step, 1) * sizes[d]) strides[d] = step;
    for (size_t d = 0; d < sizes.size(); ++d) last += std::max<int64_t>(sizes[d] - 1, 0) * strides[d];
    return noise({last + 1}).to(dtype_).as_strided(sizes, strides);
  }
  /// Sizes that broadcast to these.
  std::vector<int64_t> broadcast(std::vector<int64_t> sizes, double p) {
    for (int64_t& size : sizes) size = chance(p) ? 1 : size;
    return sizes;
  }
  /// Broadcastable to [..., H, Lq, Lk], at times with fewer dimensions.
  std::vector<int64_t> score_shape() {
    std::vector<int64_t> shape = broadcast(sizes(batch_, {heads_, queries_, keys_}), 0.35);
    while (!shape.empty() && chance(0.15)) shape.erase(shape.begin());
    return shape;
  }

  void shapes() {
    batch_.clear();
    for (int64_t n = pick<int64_t>({0, 1, 1, 1, 2}); n > 0; --n) batch_.push_back(pick<int64_t>({1, 2, 2, 3}));
    kv_heads_ = between(1, 2), heads_ = kv_heads_ * pick<int64_t>({1, 1, 2, 3});
    const auto length = [&] {
      return chance(0.05) ? int64_t{0} : chance(0.15) ? between(90, 210) : chance(0.1) ? int64_t{1} : between(2, 40);
    };
    queries_ = length(), keys_ = chance(0.3) ? queries_ : length();
    if (queries_ + keys_ > 120) batch_.assign(batch_.size(), 1), heads_ = kv_heads_ = 1;
    dim_ = pick<int64_t>({1, 2, 3, 4, 6, 8, 16, 16, 17, 32});
    value_dim_ = chance(0.6) ? dim_ : between(1, 9);
  }

  void keys_seen() {
    AttentionOptions& o = request_.options;
    if (chance(0.3)) o.alignment(AttentionAlignment::bottom_right);
    if (chance(0.2)) o.query_offset(between(-5, 20));
    o.causal(chance(0.35));
    if (chance(0.25)) o.window(AttentionWindow{between(-1, 12), between(-1, 6)});
    if (chance(0.3)) o.global_keys(chance(0.2) ? between(0, 200) : between(0, 6));
    if (chance(0.2)) o.key_lengths(torch::randint(0, keys_ + 1, broadcast(batch_, 0.3), noise_, torch::kLong));
    if (chance(0.25)) {
      const int64_t count = between(1, 4);
      const bool own = queries_ != keys_ || chance(0.5);
      o.sequence_starts(starts(queries_, count));
      if (own) o.key_sequence_starts(starts(keys_, count));
    }
    const auto bools = [&](const std::vector<int64_t>& shape, double p) {
      return torch::rand(shape, noise_, torch::kDouble) < p;
    };
    if (chance(0.2)) {
      const Tensor mask = laid_out(bools(score_shape(), pick({0.9, 0.5, 0.05})));
      chance(0.5) ? o.mask(mask) : o.hidden(mask);
    }
    if (chance(0.1)) {
      o.block_size(between(1, 50));
      const auto blocks = [&](int64_t length) { return (length + o.block_size() - 1) / o.block_size(); };
      o.block_mask(laid_out(bools(broadcast(sizes(batch_, {heads_, blocks(queries_), blocks(keys_)}), 0.2), 0.6)));
    }
  }
  Tensor starts(int64_t length, int64_t count) {
    std::vector<int64_t> starts{0, length};
    while (static_cast<int64_t>(starts.size()) <= count) starts.push_back(between(0, length));
    std::sort(starts.begin(), starts.end());
    return torch::tensor(starts, torch::kLong);
  }

  void scores() {
    AttentionOptions& o = request_.options;
    const auto narrow = dtype_ == torch::kBFloat16 || dtype_ == torch::kHalf;
    const auto given = [&](const Tensor& x) { return laid_out(x.to(narrow && chance(0.3) ? torch::kFloat : dtype_)); };
    if (chance(0.3)) o.scale(pick({0.0, -0.5, 1.0, 3.0}));
    if (chance(0.2)) o.softcap(pick({0.5, 3.0, 50.0}));
    if (chance(0.35)) o.bias(given(bias())), request_.bias_has_gradient = chance(0.6);
    if (chance(0.15)) o.relative_bias(given(noise({chance(0.5) ? 1 : heads_, 2 * between(1, 25) - 1})));
    if (chance(0.15)) {
      o.alibi_slopes(given(noise(broadcast(sizes(batch_, {heads_, queries_}), 0.4)).abs() * pick({0.05, 1.0})));
    }
    if (chance(0.2)) o.sink(given(noise({heads_}) * pick({1.0, 10.0})));
    if (chance(0.2)) o.dropout(pick({0.1, 0.5, 0.9})).seed(bits_());
    if (chance(0.2) && dim_ >= 2) {
      o.rotary(table(between(1, dim_ / 2)));
    } else if (chance(0.25)) {
      const Tensor turns = table(dim_);
      o.polar(laid_out(torch::cat({torch::real(turns), torch::imag(turns)}, -1)));
      if (chance(0.7)) o.polar_phase(given(noise({kv_heads_, dim_})));
    }
  }
  /// Noise, or one number for all, or noise with numbers that hide.
  Tensor bias() {
    const std::vector<int64_t> shape = score_shape();
    if (chance(0.1)) return torch::full(shape, pick({-1e4, -3e4, 3e4}), torch::kDouble);
    const double least = dtype_ == torch::kDouble ? std::numeric_limits<double>::lowest()
                         : dtype_ == torch::kHalf ? -65504.0
                                                  : -3.3e38;
    Tensor bias = noise(shape);
    if (chance(0.4)) {
      bias = bias.masked_fill(torch::rand(broadcast(shape, 0.5), noise_, torch::kDouble) < pick({0.2, 0.7}),
                              pick({least, least, -double{INFINITY}, -1e3}));
    }
    return bias;
  }
  /// Of positions; options of where queries stand are changed so that there are rows for them.
  Tensor table(int64_t columns) {
    AttentionOptions& o = request_.options;
    // Positions must not be below 0
    if (o.query_offset() < 0) o.query_offset(0);
    o.alignment(AttentionAlignment::top_left);
    if (chance(0.5) && !o.sequence_starts().has_value() && keys_ >= queries_)
      o.alignment(AttentionAlignment::bottom_right);
    const Tensor angles = torch::rand({std::max(queries_ + keys_, keys_) + 25, columns}, noise_, torch::kDouble) * 6;
    return torch::polar(torch::ones_like(angles), angles);
  }

  std::mt19937_64 bits_;
  at::Generator noise_;
  torch::ScalarType dtype_;
  std::vector<int64_t> batch_;
  int64_t heads_ = 1, kv_heads_ = 1, queries_ = 1, keys_ = 1, dim_ = 1, value_dim_ = 1;
  RandomRequest request_;
};

/// Shapes and options, for whoever replays a seed.
std::string described(const RandomRequest& r) {
  const AttentionOptions& o = r.options;
  std::ostringstream out;
  const auto tensor = [&](const char* name, const std::optional<Tensor>& x) {
    if (x.has_value() && x->defined()) out << ", " << name << ' ' << x->scalar_type() << x->sizes();
  };
  out << r.threads << " threads, chunks " << r.chunks.kv_heads << ' ' << r.chunks.queries << ' ' << r.chunks.keys;
  tensor("q", r.q), tensor("k", r.k), tensor("v", r.v);
  if (o.scale().has_value()) out << ", scale " << *o.scale();
  if (o.softcap().has_value()) out << ", softcap " << *o.softcap();
  if (o.causal()) out << ", causal";
  if (o.alignment() == AttentionAlignment::bottom_right) out << ", bottom right";
  if (o.query_offset() != 0) out << ", offset " << o.query_offset();
  if (o.window().has_value()) out << ", window " << o.window()->left << ' ' << o.window()->right;
  if (o.global_keys() > 0) out << ", global keys " << o.global_keys();
  if (o.dropout() > 0) out << ", dropout " << o.dropout();
  tensor("key_lengths", o.key_lengths()), tensor("sequence_starts", o.sequence_starts());
  tensor("key_sequence_starts", o.key_sequence_starts()), tensor("mask", o.mask()), tensor("hidden", o.hidden());
  tensor("block_mask", o.block_mask()), tensor("bias", o.bias()), tensor("relative_bias", o.relative_bias());
  tensor("alibi_slopes", o.alibi_slopes()), tensor("sink", o.sink()), tensor("rotary", o.rotary());
  tensor("polar", o.polar()), tensor("polar_phase", o.polar_phase());
  return out.str();
}

Rounding rounding_of(torch::ScalarType dtype) {
  switch (dtype) {
    case torch::kDouble:
      return {1.2e-16, 0, 1.2e-16};
    case torch::kBFloat16:
      return {6e-8, 0x1p-8, 0x1p-8};  // products of pairs of bfloat16 round weights and gradients of scores
    case torch::kHalf:
      return {6e-8, 0, 0x1p-11};
    default:
      return {6e-8, 0, 6e-8};
  }
}

/// Results by name, and gradients where the request has the option.
using Results = std::map<std::string, Tensor>;

Results run(const RandomRequest& given, const AttentionForm& form) {
  RandomRequest r = given;
  std::vector<std::string> names;
  std::vector<Tensor> leaves;
  const auto leaf = [&](const char* name, Tensor& x) {
    x = x.detach().requires_grad_();
    names.emplace_back(name), leaves.push_back(x);
  };
  leaf("q", r.q), leaf("k", r.k), leaf("v", r.v);
  const auto optional_leaf = [&](const char* name, std::optional<Tensor>& x) {
    if (x.has_value()) leaf(name, *x);
  };
  if (r.bias_has_gradient) optional_leaf("bias", r.options.bias());
  optional_leaf("relative_bias", r.options.relative_bias());
  optional_leaf("alibi_slopes", r.options.alibi_slopes()), optional_leaf("sink", r.options.sink());
  optional_leaf("polar_phase", r.options.polar_phase());
  const auto [output, lse] = form(r.q, r.k, r.v, r.options);
  const auto grads = torch::autograd::grad({output, lse}, leaves, {r.grad_output, r.grad_lse.to(lse.scalar_type())});
  Results results{{"output", output.detach()}, {"lse", lse.detach()}};
  for (size_t i = 0; i < names.size(); ++i) results[names[i]] = grads[i];
  return results;
}

/// The request in double, with one batch dimension and everything expanded, as the loops want it.
class ByLoops {
 public:
  ByLoops(const RandomRequest& r, Rounding rounding)
      : request_(r),
        batch_(r.q.sizes().slice(0, r.q.dim() - 3).vec()),
        loops_(flat(r.q), flat(r.k), flat(r.v), expanded(), rounding) {}

  /// bool [..., H, Lq, Lk]
  Tensor seen() {
    std::vector<int64_t> sizes = request_.q.sizes().vec();
    sizes.back() = request_.k.size(-2);
    return loops_.seen().view(sizes);
  }

  std::map<std::string, Expected> results(const PlantedRows& planted) {
    auto results = loops_.run(flat(request_.grad_output), flat(request_.grad_lse, 2).contiguous(),
                              {flat_rows(planted.q), flat_rows(planted.keys), flat_rows(planted.grad_output)});
    const auto& o = request_.options;
    const std::pair<const char*, std::optional<Tensor>> inputs[] = {{"output", request_.grad_output},
                                                                    {"lse", request_.grad_lse},
                                                                    {"q", request_.q},
                                                                    {"k", request_.k},
                                                                    {"v", request_.v},
                                                                    {"bias", o.bias()},
                                                                    {"relative_bias", o.relative_bias()},
                                                                    {"alibi_slopes", o.alibi_slopes()},
                                                                    {"sink", o.sink()},
                                                                    {"polar_phase", o.polar_phase()}};
    for (const auto& [name, like] : inputs) {
      if (!like.has_value()) continue;
      Expected& x = results.at(name);
      for (Tensor* part : {&x.value, &x.error, &x.reached}) {
        const std::string key = name;
        if (key == "relative_bias" || key == "sink" || key == "polar_phase") continue;
        std::vector<int64_t> sizes = batch_;
        sizes.insert(sizes.end(), part->sizes().begin() + 1, part->sizes().end());
        *part = part->view(sizes);
      }
      x.reduce(like->sizes());
    }
    return results;
  }

 private:
  /// [..., `trailing` dimensions] -> [B, …], expanded, in double.
  Tensor flat(const Tensor& x, size_t trailing = 3) const {
    std::vector<int64_t> sizes = batch_;
    const at::IntArrayRef rest = x.sizes().slice(x.dim() - trailing);
    sizes.insert(sizes.end(), rest.begin(), rest.end());
    const Tensor all = x.detach().resolve_neg().expand(sizes);
    return (batch_.empty() ? all.unsqueeze(0) : all.flatten(0, static_cast<int64_t>(batch_.size()) - 1))
        .to(torch::kDouble)
        .contiguous();
  }
  Tensor flat_rows(const Tensor& x) const { return flat(x, 2).to(torch::kBool).contiguous(); }

  AttentionOptions expanded() const {
    AttentionOptions o = request_.options;
    const int64_t heads = request_.q.size(-3), queries = request_.q.size(-2), keys = request_.k.size(-2);
    const auto expand = [&](std::optional<Tensor>& x, std::vector<int64_t> rest) {
      if (!x.has_value()) return;
      std::vector<int64_t> sizes = batch_;
      sizes.insert(sizes.end(), rest.begin(), rest.end());
      x = flat(x->detach().resolve_neg().expand(sizes), rest.size());
    };
    const auto blocks = [&](int64_t length) { return (length + o.block_size() - 1) / o.block_size(); };
    for (auto* x : {&o.mask(), &o.hidden(), &o.bias()}) expand(*x, {heads, queries, keys});
    expand(o.block_mask(), {heads, blocks(queries), blocks(keys)});
    expand(o.alibi_slopes(), {heads, queries}), expand(o.key_lengths(), {});
    if (o.relative_bias().has_value()) {
      o.relative_bias(o.relative_bias()->detach().resolve_neg().to(torch::kDouble).expand({heads, -1}).contiguous());
    }
    if (o.polar_phase().has_value()) {
      o.polar_phase(o.polar_phase()->detach().resolve_neg().to(torch::kDouble).contiguous());
    }
    if (o.sink().has_value()) o.sink(o.sink()->detach().resolve_neg().to(torch::kDouble).contiguous());
    return o;
  }

  const RandomRequest& request_;
  std::vector<int64_t> batch_;
  AttentionByLoops loops_;
};

/// Chooses rows to plant, and gives the request with NaN or infinity in them: any row, or only what no pair sees.
RandomRequest planted(RandomRequest& r, Draw& draw, const Tensor& seen) {
  const Tensor by_keys = seen.any(-2);  // [...,H,Lk]
  const int64_t heads = r.k.size(-3);
  std::vector<int64_t> own(r.k.sizes().begin(), r.k.sizes().end() - 1);  // [... or 1,Hk,Lk]
  const Tensor seen_keys = by_keys.unflatten(-2, {heads, -1}).any(-2).to(torch::kLong).sum_to_size(own) > 0;
  const Tensor seeing = seen.any(-1);
  const double any = draw.pick({0.0, 0.0, 0.02});
  const auto choose = [&](const Tensor& live) {
    const Tensor noise = torch::rand(live.sizes(), torch::kDouble);
    return (noise < any).logical_or(live.logical_not().logical_and(noise < draw.pick({0.0, 0.5, 1.0})));
  };
  r.planted = {choose(seeing), choose(seen_keys), choose(seeing)};
  RandomRequest result = r;
  const auto plant = [&](Tensor& x, const Tensor& rows) {
    const double what = draw.pick({std::numeric_limits<double>::quiet_NaN(), double{INFINITY}, -double{INFINITY}});
    x = draw.laid_out(x.resolve_neg().masked_fill(rows.unsqueeze(-1), what));
  };
  plant(result.q, r.planted.q), plant(result.grad_output, r.planted.grad_output);
  draw.chance(0.5) ? plant(result.k, r.planted.keys) : plant(result.v, r.planted.keys);
  if (auto& bias = result.options.bias(); bias.has_value() && draw.chance(0.3)) {
    const Tensor used = seen.to(torch::kLong).sum_to_size(bias->sizes()) > 0;
    bias = draw.laid_out(bias->resolve_neg().masked_fill(used.logical_not(), std::numeric_limits<double>::quiet_NaN()));
  }
  return result;
}

/// CHECKs what nothing planted reaches: within four times the largest error of the naive form in the same dtype, and
/// what rounding makes of each element. `lse_error`: what the log-sum-exp may be off beyond that.
void check_results(const Results& given, const Results& naive, const std::map<std::string, Expected>& expected,
                   double lse_error = 0) {
  for (const auto& [name, result] : given) {
    INFO(name);
    const Expected& x = expected.at(name);
    REQUIRE(result.sizes() == x.value.sizes());
    const Tensor ours = result.to(torch::kDouble).contiguous(), theirs = naive.at(name).to(torch::kDouble);
    const auto error_of = [&](const Tensor& y) { return (y - x.value).abs().masked_fill(y == x.value, 0); };
    const auto dtype = result.scalar_type();
    const double top = dtype == torch::kHalf ? 6e4 : dtype == torch::kDouble ? 1e300 : 3e38;
    const Tensor skipped = (x.reached > 0).logical_or(x.value.abs().masked_fill(x.value.isinf(), 0) + x.error > top);
    // Where the naive form itself overflows it is no measure
    const double measure = largest(error_of(theirs).nan_to_num(0, 0, 0).masked_fill(skipped, 0));
    const double least = name == "lse" && lse_error > 0 ? lse_error : dtype == torch::kHalf ? 1e-7 : 1e-35;
    const Tensor allowed = x.error.nan_to_num(0, INFINITY, 0) * 4 + std::min(4 * measure, 1e300) + least;
    const Tensor wrong = (error_of(ours) <= allowed).logical_or(skipped).logical_not();
    if (wrong.any().item<bool>()) {
      const int64_t at = wrong.flatten().to(torch::kInt).argmax().item<int64_t>();
      const auto number = [&](const Tensor& y) { return y.contiguous().view(-1)[at].item<double>(); };
      FAIL_CHECK("element " << at << " of " << result.sizes() << " is " << number(ours) << ", expected "
                            << number(x.value) << " within " << number(allowed) << "; " << wrong.sum().item<int64_t>()
                            << " are wrong");
    }
  }
}

/// Chunks of sizes that are drawn: those of the backend are larger than these requests.
struct SmallChunks {
  static constexpr bool kDifferentiableLse = true;
  static inline headroom::detail::ChunkSizes sizes{1, 1, 1};

  static headroom::detail::AttentionForward forward(const headroom::detail::AttentionInputs& in) {
    return headroom::detail::ChunkedAttention(in, sizes).forward();
  }
  static headroom::detail::AttentionGradients backward(const headroom::detail::AttentionInputs& in,
                                                       const headroom::detail::AttentionForward& forward,
                                                       const headroom::detail::ResultGradients& grad,
                                                       const headroom::detail::WantedGradients& wanted) {
    return headroom::detail::ChunkedAttention(in, sizes).backward(forward, grad, wanted);
  }
};

AttentionResult in_small_chunks(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  const auto request = AttentionRequest::check(q, k, v, options);
  const auto result = headroom::detail::AttentionFunction<SmallChunks>::run(
      {q.resolve_neg(), k.resolve_neg(), v.resolve_neg(), request});
  return {result.output, result.lse};
}

void check_seed(uint64_t seed) {
  torch::manual_seed(seed);
  Draw draw(seed);
  RandomRequest clean = draw.request();
  INFO(described(clean));
  const Rounding rounding = rounding_of(clean.q.scalar_type());
  ByLoops loops(clean, rounding);
  const RandomRequest request = planted(clean, draw, loops.seen());
  const auto expected = loops.results(clean.planted);
  const Results naive = run(clean, naive_attention);
  torch::set_num_threads(request.threads);
  SmallChunks::sizes = request.chunks;
  {
    INFO("small chunks");
    check_results(run(request, in_small_chunks), naive, expected);
  }
  for (const auto backend :
       {AttentionBackend::tiled, AttentionBackend::chunked, AttentionBackend::fused, AttentionBackend::reference}) {
    INFO(backend);
    const bool may_refuse = backend == AttentionBackend::fused;
    // LibTorch's kernel takes exponentials of fewer bits for inputs of 16 bits, and its weights by that log-sum-exp
    const double lse_error = backend == AttentionBackend::fused && clean.q.itemsize() == 2 ? 1e-4 : 0;
    const AttentionForm form = [&](const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
      return attention_with_lse(q, k, v, AttentionOptions(options).backend(backend));
    };
    try {
      const Results given = run(request, form);
      const bool coarser = lse_error > rounding.factors;
      const Rounding of_weights{rounding.computed, lse_error, rounding.stored};
      check_results(given, naive, coarser ? ByLoops(clean, of_weights).results(clean.planted) : expected, lse_error);
    } catch (const Error& error) {
      if (!may_refuse || error.id() != "headroom.attention.backend") FAIL_CHECK(error.what());
    }
  }
}

}  // namespace

TEST_CASE("random requests") {
  const auto number = [](const char* name) {
    const char* const value = std::getenv(name);
    return value != nullptr ? std::optional<uint64_t>(std::stoull(value)) : std::nullopt;
  };
  const auto given = number("HEADROOM_FUZZ_SEED"), count = number("HEADROOM_FUZZ_COUNT");
  const uint64_t first = given.value_or(uint64_t{std::random_device{}()} << 16);
  const int threads = torch::get_num_threads();
  const auto start = std::chrono::steady_clock::now();
  for (uint64_t seed = first; seed - first < count.value_or(given.has_value() ? 1 : 400); ++seed) {
    INFO("HEADROOM_FUZZ_SEED=" << seed);
    check_seed(seed);
    if (!count.has_value() && std::chrono::steady_clock::now() - start > std::chrono::seconds(8)) break;
  }
  torch::set_num_threads(threads);
}
