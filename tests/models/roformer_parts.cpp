#include <ATen/autocast_mode.h>

#include <cmath>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "headroom/memory.hpp"
#include "headroom/models/bs_roformer.hpp"
#include "headroom/models/mel_band_roformer.hpp"
#include "headroom/plan.hpp"
#include "support/catch.hpp"
#include "support/fingerprint.hpp"
#include "support/one_thread.hpp"

using namespace headroom;
using testing::error_of;
using testing::fingerprint;
using testing::Fingerprint;
using torch::Tensor;

namespace {

template <class Options>
Options one_block(int64_t dim, int64_t depth) {
  Options options;
  options.dim(dim).depth(depth).time_transformer_depth(1).freq_transformer_depth(1);
  return options;
}

models::BsRoformerOptions small_bs() {
  auto options = one_block<models::BsRoformerOptions>(16, 2);
  options.freqs_per_bands({2, 3, 5, 7});
  options.heads(2).dim_head(8).stft_n_fft(32).stft_hop_length(8).stft_win_length(32).stems(2);
  return options;
}

std::map<std::string, Tensor> gradients(models::BsRoformer& model, const Tensor& mixture) {
  model->zero_grad();
  torch::manual_seed(7);
  (model->forward(mixture) - 0.1).square().mean().backward();
  std::map<std::string, Tensor> result;
  for (const auto& p : model->named_parameters()) result[p.key()] = p.value().grad().clone();
  return result;
}

models::BsRoformer like(models::BsRoformer& model, models::BsRoformerOptions options, const StackPolicy& policy) {
  options.gradient_checkpointing(policy);
  models::BsRoformer copy(options);
  const torch::NoGradGuard guard;
  for (const auto& p : model->named_parameters()) copy->named_parameters()[p.key()].copy_(p.value());
  return copy;
}

/// Bytes that the calls leave while their results live.
template <class F>
int64_t held(F&& f) {
  Tensor result;
  return MemoryMeter().measure([&] { result = f(); }).held();
}

/// The same in a plan for a device, of the function that `make` gives.
template <class Make>
int64_t planned_held(const DeviceProfile& device, Make&& make) {
  Tensor result;
  int64_t start = 0;
  const Plan planned = plan(
      [&] {
        auto f = make();
        start = TraceRecorder::current()->now();
        result = f();
      },
      device);
  int64_t bytes = 0;
  for (const auto& block : planned.trace.blocks) {
    if (block.begin >= start && block.end == MemoryTrace::kForever) bytes += block.bytes;
  }
  return bytes;
}

}  // namespace

TEST_CASE("names, shapes and numbers of parameters are those of the published checkpoints") {
  using models::BsRoformer, models::BsRoformerOptions, models::MelBandRoformer, models::MelBandRoformerOptions;
  auto bs = one_block<BsRoformerOptions>(512, 12);
  bs.stft_hop_length(441);
  CHECK(fingerprint<BsRoformer>(bs) == Fingerprint{699, 159'758'092, 0x2b6ff482e5d644d6});
  CHECK(fingerprint<BsRoformer>(one_block<BsRoformerOptions>(384, 12)) ==
        Fingerprint{699, 98'194'828, 0xfe9e21df5d8aec53});
  auto stems = one_block<BsRoformerOptions>(384, 8);
  stems.stems(4).mlp_expansion_factor(2);
  CHECK(fingerprint<BsRoformer>(stems) == Fingerprint{1355, 131'704'164, 0x2d0f8bb5d866edcd});
  auto mel = one_block<MelBandRoformerOptions>(384, 6);
  mel.mask_estimator_depth(2);
  CHECK(fingerprint<MelBandRoformer>(mel) == Fingerprint{684, 228'202'852, 0xcd812da74acdc6c7});
  auto linear = one_block<BsRoformerOptions>(64, 2);
  linear.linear_transformer_depth(1);
  CHECK(fingerprint<BsRoformer>(linear) == Fingerprint{497, 4'397'500, 0x453256f5af545ced});
  auto polar = one_block<BsRoformerOptions>(384, 12);
  polar.num_residual_streams(4).add_value_residual(true).use_pope(true);
  CHECK(fingerprint<BsRoformer>(polar) == Fingerprint{1151, 98'393'868, 0xbb523c16c551eec9});
  auto streams = one_block<MelBandRoformerOptions>(384, 6);
  streams.linear_transformer_depth(1).num_residual_streams(4).add_value_residual(true);
  CHECK(fingerprint<MelBandRoformer>(streams) == Fingerprint{942, 98'511'832, 0x6fa7cc5f04f7145d});
  auto one_stream = one_block<BsRoformerOptions>(64, 2);
  one_stream.num_residual_streams(1).add_value_residual(true);
  CHECK(fingerprint<BsRoformer>(one_stream) == Fingerprint{483, 4'069'948, 0xfeae94e516708c76});
}

TEST_CASE("mel bands have the bins of librosa's filters") {
  // librosa 0.11: the first bins of the 60 bands that published checkpoints have
  const std::vector<int64_t> first = {0,   4,   7,   10,  13,  16,  19,  22,  25,  28,  31,  34,  37,  40,  43,
                                      46,  49,  53,  56,  60,  65,  69,  74,  79,  84,  90,  97,  103, 110, 118,
                                      126, 135, 145, 155, 165, 177, 189, 203, 217, 232, 248, 265, 284, 304, 325,
                                      348, 372, 398, 426, 455, 487, 521, 558, 597, 638, 683, 731, 782, 836, 895};
  const std::vector<models::Band> bands = models::mel_bands(60, 2048, 44100);
  int64_t width = 0;
  for (size_t i = 0; i < bands.size(); ++i) {
    CHECK(bands[i].first == first[i]);
    width += bands[i].count;
  }
  CHECK(width == 1979);
  CHECK(bands.front() == models::Band{0, 7});
  CHECK(bands[18] == models::Band{56, 9});
  CHECK(bands.back() == models::Band{895, 130});
  // and of others the sum over bands i and bins f of (i + 1)·f
  const auto moment = [](int64_t count, int64_t n_fft, int64_t rate) {
    int64_t sum = 0, number = 0;
    for (const models::Band& band : models::mel_bands(count, n_fft, rate)) {
      ++number;
      for (int64_t f = band.first; f < band.first + band.count; ++f) sum += number * f;
    }
    return sum;
  };
  CHECK(moment(60, 4096, 44100) == 208'739'043);
  CHECK(moment(40, 2048, 16000) == 33'108'841);
  CHECK(moment(64, 2048, 48000) == 55'930'692);
  CHECK(moment(4, 32, 8000) == 623);
  CHECK(moment(30, 2048, 44100) == 24'766'092);
  CHECK(moment(48, 4096, 96000) == 165'951'721);
}

TEST_CASE("bands and mixtures that do not fit a model are refused") {
  CHECK(error_of([] { models::mel_bands(60, 256, 44100); }).id() == "headroom.models.bands");
  CHECK(error_of([] { models::mel_bands(1, 2048, 44100); }).id() == "headroom.models.bands");
  CHECK(error_of([] { models::adjacent_bands({2, 0, 15}, 17); }).id() == "headroom.models.bands");
  const Error sum = error_of([] { models::BsRoformer{models::BsRoformerOptions().freqs_per_bands({2, 3})}; });
  CHECK(sum.id() == "headroom.models.bands");
  CHECK(testing::contains(sum.what(), "5 bins together, and the spectrum has 1025"));
  auto odd = small_bs();
  odd.dim_head(7);
  CHECK(error_of([&] { models::BsRoformer{odd}; }).id() == "headroom.models.options");
  models::BsRoformer model(small_bs());
  CHECK(error_of([&] { model->forward(torch::randn({1, 1, 500})); }).id() == "headroom.models.mixture");
}

TEST_CASE("masks of bands are their mean, forward and backward") {
  const models::detail::MeanOfBands::Layout layout{{{0, 3}, {2, 2}, {3, 2}}, 5, 2, /*silent_dc=*/true};
  std::vector<Tensor> masks;
  for (const models::Band& band : layout.bands) {
    masks.push_back(torch::randn({2, 3, 2 * band.count}, torch::kDouble).requires_grad_());
  }
  const auto mean = [&](const std::vector<Tensor>& x) {
    return models::detail::MeanOfBands::apply(at::TensorList(x), layout);
  };
  const Tensor all = mean(masks);
  CHECK(all.slice(-1, 0, 2).eq(0).all().item<bool>());
  CHECK(all.slice(-1, 2, 4).equal(masks[0].slice(-1, 2, 4)));
  CHECK(all.slice(-1, 4, 6).allclose((masks[0].slice(-1, 4, 6) + masks[1].slice(-1, 0, 2)) / 2));
  CHECK(all.slice(-1, 6, 8).allclose((masks[1].slice(-1, 2, 4) + masks[2].slice(-1, 0, 2)) / 2));
  const Tensor weight = torch::randn_like(all);
  const auto grads = torch::autograd::grad({(all * weight).sum()}, masks);
  CHECK(grads[0].slice(-1, 0, 2).eq(0).all().item<bool>());
  CHECK(grads[0].slice(-1, 2, 4).equal(weight.slice(-1, 2, 4)));
  CHECK(grads[1].allclose(weight.slice(-1, 4, 8) / 2));
  CHECK(grads[2].slice(-1, 2, 4).equal(weight.slice(-1, 8, 10)));
}

TEST_CASE("a block keeps its input, q, k and v, attention's result, the gates and the input of GELU, and no more") {
  const testing::OneThread one_thread;
  const int64_t batch = 2, time = 40, bands = 12, dim = 48, heads = 4, head_dim = 16, inner = heads * head_dim;
  const int64_t tokens = batch * time * bands;
  auto options = models::RoformerTransformerOptions().attention(
      models::GatedAttentionOptions().dim(dim).heads(heads).head_dim(head_dim));
  const int64_t axis = GENERATE(1, 2);
  const bool norm = GENERATE(false, true);
  CAPTURE(axis, norm);
  const auto make = [&] {
    models::RotaryEmbedding rotary(head_dim);
    const Tensor x = torch::randn({batch, time, bands, dim}).requires_grad_();
    models::RoformerTransformer transformer(options.norm_output(norm), rotary);
    const models::AttentionPlace place{axis, rotary->table(x.size(axis))};
    return [x, block = transformer->blocks(place, x.sizes()).front()] { return block.forward(x); };
  };
  // per token: q, k, v; attention's result; log-sum-exp and gate of each head; x between the halves; GELU's input. The
  // block's input is there already, and its output is what the next block keeps
  const int64_t floats = 3 * inner + inner + heads + dim + 4 * dim + dim + (norm ? dim : 0);
  const int64_t here = tokens * (4 * floats + 8 * heads);  // the log-sum-exp is in double
  const auto block = make();
  block().sum().backward();  // chooses kernels
  CHECK(held(block) == here);
  CHECK(planned_held(this_machine(), make) == here);
  // kernels of CUDA have another in float, of lengths in steps of 32, and their random state
  const int64_t length = axis == 1 ? time : bands, padded = (length + 31) / 32 * 32;
  CHECK(planned_held(device_profile("rtx-4090-24gb"), make) == here + tokens / length * padded * heads * 4 + 32);
}

TEST_CASE("a chain with gates has the values and gradients of its formula, in chunks and by operators") {
  const testing::OneThread one_thread;
  torch::manual_seed(5);
  const auto type = GENERATE(torch::kFloat, torch::kDouble);
  const auto noise = [&](at::IntArrayRef sizes) { return torch::randn(sizes, type).requires_grad_(); };
  const std::vector<Tensor> inputs{noise({2, 290, 12}), noise({2, 290, 3}), noise({10, 12}), noise({2, 290, 10})};
  const auto& [x, gates, weight, residual] = std::tie(inputs[0], inputs[1], inputs[2], inputs[3]);
  const Tensor ours = nn::detail::run({.x = x, .residual = residual, .gates = gates, .weights = {weight}});
  const Tensor opened = (x.unflatten(-1, {3, 4}) * gates.sigmoid().unsqueeze(-1)).flatten(-2);
  const Tensor plain = opened.matmul(weight.t()) + residual;
  const double tolerance = type == torch::kFloat ? 2e-5 : 1e-13;
  CHECK(ours.allclose(plain, tolerance, tolerance));
  const Tensor grad = torch::randn_like(plain);
  const auto ours_grads = torch::autograd::grad({ours}, inputs, {grad}, true, true),
             plain_grads = torch::autograd::grad({plain}, inputs, {grad}, true, true);
  const auto once = torch::autograd::grad({ours}, inputs, {grad}, true);
  for (size_t i = 0; i < inputs.size(); ++i) {
    CAPTURE(i);
    CHECK(once[i].allclose(plain_grads[i], 10 * tolerance, 10 * tolerance));
    CHECK(ours_grads[i].allclose(plain_grads[i], 10 * tolerance, 10 * tolerance));
  }
}

TEST_CASE("a model keeps what its blocks and mask estimators keep, the spectrum, and no more") {
  const testing::OneThread one_thread;
  const int64_t batch = 2, channels = 2, stems = 3, samples = 600, bands = 5, dim = 24, heads = 2, head_dim = 8;
  auto options = one_block<models::BsRoformerOptions>(dim, 2);
  options.freqs_per_bands({2, 3, 5, 7, 16});
  options.heads(heads).dim_head(head_dim).stft_n_fft(64).stft_hop_length(16).stft_win_length(64).stems(stems);
  options.mask_estimator_depth(3).mlp_expansion_factor(2);
  const bool recomputes = GENERATE(false, true);
  CAPTURE(recomputes);
  options.gradient_checkpointing(recomputes);
  const auto make = [&] {
    return [mixture = torch::randn({batch, channels, samples}), model = models::BsRoformer(options)]() mutable {
      return model->forward(mixture);
    };
  };
  const int64_t frames = options.frames(samples), tokens = batch * frames * bands, inner = heads * head_dim;
  const int64_t spectrum = 2 * batch * channels * options.bins() * frames;
  // of each block, and of two hidden layers and the gated linear unit of each estimator
  const int64_t blocks = 4 * tokens * (recomputes ? dim : 4 * inner + 3 * heads + dim + 4 * dim + dim);
  const int64_t estimators = recomputes ? 0 : stems * (2 * tokens * 2 * dim + 2 * spectrum);
  const int64_t floats = 2 * spectrum +                        // and each band's bins
                         tokens * dim + blocks +               // the first block's input
                         tokens * dim + estimators +           // the estimators' input
                         stems * batch * channels * samples +  // the stems themselves
                         (frames + bands) * head_dim +         // rotations
                         64 + samples;                         // window and its envelope
  auto forward = make();
  forward().sum().backward();
  CHECK(held(forward) == 4 * floats);
  CHECK(planned_held(this_machine(), make) == 4 * floats);
}

TEST_CASE("checkpoint policies change no gradient of a RoFormer; tiles change rounding alone") {
  const testing::OneThread one_thread;
  torch::manual_seed(3);
  for (const std::string layout : {"classic", "skip", "streams"}) {
    auto options = small_bs();
    options.linear_transformer_depth(1).skip_connection(layout == "skip");
    if (layout == "streams") options.num_residual_streams(2).add_value_residual(true).use_pope(true);
    models::BsRoformer plain(options);
    const Tensor mixture = torch::randn({2, 2, 300});
    const auto expected = gradients(plain, mixture);
    for (const char* policy :
         {"full", "selective", "3*full,none", "1*full+offload,3*selective,full", "full+offload", "nested", "tiled"}) {
      auto copy = like(plain, options, policy);
      for (const auto& [name, gradient] : gradients(copy, mixture)) {
        CAPTURE(layout, policy, name);
        const Tensor& known = expected.at(name);
        CHECK((gradient.equal(known) ||
               (policy == std::string("tiled") && layout != "streams" &&
                (gradient - known).abs().max().item<float>() <= 1e-5 * known.abs().max().item<float>() + 1e-9)));
      }
    }
    options.gradient_checkpointing("7*full,none");  // there are 6
    models::BsRoformer wrong(options);
    CHECK(error_of([&] { wrong->forward(mixture); }).id() == "headroom.checkpoint.policy");
  }
}

TEST_CASE("a block with streams keeps its streams, what its branches read and gave, and its weights") {
  const testing::OneThread one_thread;
  const int64_t batch = 2, time = 40, bands = 12, dim = 48, heads = 4, head_dim = 16, inner = heads * head_dim;
  const int64_t streams = 4, positions = batch * time * bands;
  auto options = models::RoformerTransformerOptions().streams(streams).attention(
      models::GatedAttentionOptions().dim(dim).heads(heads).head_dim(head_dim));
  const int64_t axis = GENERATE(1, 2);
  CAPTURE(axis);
  const auto make = [&] {
    models::PolarEmbedding polar(heads, head_dim);
    const Tensor x = torch::randn({batch * streams, time, bands, dim}).requires_grad_();
    models::RoformerTransformer transformer(options, polar);
    const models::AttentionPlace place{axis, polar->table(x.size(axis))};
    return [x, block = transformer->blocks(place, x.sizes()).front()] { return block.forward(x); };
  };
  // of a connection, beside the streams: their projections and weights, what the branch reads and gives
  const int64_t connection = streams * (2 + streams) + streams + streams * (streams + 1) + 2 * dim;
  // along time the block's input is put together in another order; the streams between the halves; the result
  const int64_t tokens = streams * dim * (axis == 1 ? 3 : 2);
  const int64_t branches = 3 * inner + inner + heads + 4 * dim;        // as without streams
  const int64_t parameters = 2 * (dim + (2 + streams) * dim) + inner;  // norms' weights, projections, phases
  const int64_t here = positions * (4 * (2 * connection + tokens + branches) + 8 * heads) + 4 * parameters;
  const auto block = make();
  block().sum().backward();  // chooses kernels
  CHECK(held(block) == here);
  CHECK(planned_held(this_machine(), make) == here);
}

TEST_CASE("the newer layout goes on under autocast, within bfloat16's rounding") {
  const testing::OneThread one_thread;
  torch::manual_seed(9);
  auto options = small_bs();
  options.num_residual_streams(2).add_value_residual(true).use_pope(true);
  models::BsRoformer model(options);
  const Tensor mixture = torch::randn({1, 2, 300});
  const auto expected = gradients(model, mixture);
  const Tensor stems = model->forward(mixture);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const Tensor narrow = model->forward(mixture);
  const auto rounded = gradients(model, mixture);
  at::autocast::set_autocast_enabled(at::kCPU, false);
  CHECK((narrow - stems).norm().item<float>() < 0.05 * stems.norm().item<float>());
  for (const auto& [name, gradient] : rounded) {
    CAPTURE(name);
    CHECK(gradient.isfinite().all().item<bool>());
  }
  const Tensor x = torch::randn({2, 3, 5, 8}), weights = torch::rand({2, 5, 3, 3});
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const Tensor sums = nn::mix_streams(x, weights);
  at::autocast::set_autocast_enabled(at::kCPU, false);
  CHECK(sums.equal(nn::mix_streams(x, weights)));
}

TEST_CASE("a block that mixes values keeps its own values and the gates beside, and copies nothing else") {
  const testing::OneThread one_thread;
  const int64_t dim = 48, heads = 4, head_dim = 16, tokens = 2 * 40 * 12;
  const auto make = [&](models::ValueResidual kind) {
    models::RotaryEmbedding rotary(head_dim);
    const Tensor x = torch::randn({2, 40, 12, dim}).requires_grad_();
    models::GatedAttention attention(
        models::GatedAttentionOptions().dim(dim).heads(heads).head_dim(head_dim).value_residual(kind), rotary);
    models::AttentionPlace place{1, rotary->table(40), std::make_shared<models::FirstValues>()};
    place.first_values->give(torch::randn({2, 40, 12, heads, head_dim}).requires_grad_());
    return [x, attention, place]() mutable { return attention->forward(x, place); };
  };
  auto plain = make(models::ValueResidual::none), mixes = make(models::ValueResidual::mixes);
  plain().sum().backward(), mixes().sum().backward();  // chooses kernels
  const int64_t values = 4 * tokens * heads * head_dim, gates = 4 * tokens * heads;
  CHECK(held(mixes) - held(plain) == values + gates);
  CHECK(planned_held(this_machine(), [&] { return make(models::ValueResidual::mixes); }) == held(mixes));
  const torch::NoGradGuard no_grad;
  const auto peak = [](auto& run) { return MemoryMeter().measure([&] { run(); }).added_peak(); };
  CHECK(peak(mixes) - peak(plain) <= 2 * gates);  // mixed where they lie
}

TEST_CASE("a graph with value residuals is freed without a backward pass") {
  const testing::OneThread one_thread;
  const char* const policy = GENERATE("none", "full", "nested", "full+every-2");
  CAPTURE(policy);
  auto options = small_bs();
  options.add_value_residual(true).gradient_checkpointing(policy);
  models::BsRoformer model(options);
  const Tensor mixture = torch::randn({1, 2, 300});
  model->forward(mixture);
  CHECK(MemoryMeter().measure([&] { model->forward(mixture); }).held() == 0);
}

TEST_CASE("sums of streams have the values and gradients of their formula") {
  const testing::OneThread one_thread;
  torch::manual_seed(6);
  const auto type = GENERATE(torch::kFloat, torch::kDouble);
  const bool more = GENERATE(false, true);
  const auto noise = [&](at::IntArrayRef sizes) { return torch::randn(sizes, type).requires_grad_(); };
  std::vector<Tensor> inputs{noise({3, 4, 37, 10}), noise({3, 37, more ? 5 : 4, 2})};
  if (more) inputs.push_back(noise({3, 1, 37, 10}));
  const Tensor all = more ? torch::cat({inputs[0], inputs[2]}, 1) : inputs[0];
  const Tensor plain = (all.permute({0, 2, 1, 3}).unsqueeze(3) * inputs[1].unsqueeze(-1)).sum(2).permute({0, 2, 1, 3});
  const Tensor ours =
      nn::mix_streams(inputs[0], inputs[1], more ? std::optional<Tensor>(inputs[2]) : std::nullopt);  // [3,2,37,10]
  const double tolerance = type == torch::kFloat ? 1e-5 : 1e-13;
  CHECK(ours.allclose(plain, tolerance, tolerance));
  const Tensor grad = torch::randn_like(plain);
  const auto expected = torch::autograd::grad({plain}, inputs, {grad}, true);
  for (const bool differentiable : {false, true}) {
    const auto grads = torch::autograd::grad({ours}, inputs, {grad}, true, differentiable);
    for (size_t i = 0; i < inputs.size(); ++i) {
      CAPTURE(differentiable, i);
      CHECK(grads[i].allclose(expected[i], tolerance, tolerance));
    }
  }
  CHECK(error_of([&] { nn::mix_streams(inputs[0], inputs[1].narrow(2, 0, 1)); }).id() == "headroom.nn.streams.shape");
  CHECK(error_of([&] {
          nn::mix_streams(inputs[0], torch::zeros({3, 37, 5, 2}), inputs[0]);
        }).id() == "headroom.nn.streams.shape");
}

TEST_CASE("polar attention has the values and gradients of its formula, by each backend") {
  const testing::OneThread one_thread;
  torch::manual_seed(8);
  const auto type = GENERATE(torch::kFloat, torch::kDouble);
  const auto backend = GENERATE(AttentionBackend::tiled, AttentionBackend::chunked, AttentionBackend::reference);
  const int64_t axis = GENERATE(1, 2), heads = 4, kv_heads = 2, dim = 6;
  CAPTURE(type, backend, axis);
  const Tensor packed = torch::randn({2, 9, 7, heads + 2 * kv_heads, dim}, type).requires_grad_();
  const Tensor phase = (-torch::rand({kv_heads, dim}, type)).requires_grad_();
  const int64_t length = packed.size(axis);
  const Tensor angles = torch::outer(torch::arange(length, torch::kDouble), torch::rand({dim}, torch::kDouble));
  const auto options = AttentionOptions().backend(backend).window(AttentionWindow{3, 2}).global_keys(1);
  const Tensor ours = headroom::detail::packed_attention(
      packed, heads, std::nullopt, axis,
      AttentionOptions(options).polar(torch::cat({angles.cos(), angles.sin()}, -1)).polar_phase(phase));

  const auto part = [&](int64_t first, int64_t count) {
    return packed.to(torch::kDouble).narrow(-2, first, count).movedim(axis, -2);
  };
  const auto grouped = [&](const Tensor& x) { return x.repeat_interleave(heads / kv_heads, -3); };
  const Tensor q = torch::softplus(part(0, heads)).unsqueeze(-2);                         // [...,H,L,1,D]
  const Tensor k = grouped(torch::softplus(part(heads, kv_heads))).unsqueeze(-3);         // [...,H,1,L,D]
  const Tensor v = grouped(part(heads + kv_heads, kv_heads));                             // [...,H,L,D]
  const Tensor turn = angles.unsqueeze(0) - angles.unsqueeze(1);                          // [L,L,D]: key - query
  const Tensor phases = phase.to(torch::kDouble).repeat_interleave(heads / kv_heads, 0);  // [H,D]
  Tensor scores = (q * k * (turn + phases.view({heads, 1, 1, dim})).cos()).sum(-1) / std::sqrt(6.0);
  const Tensor i = torch::arange(length).unsqueeze(1), j = torch::arange(length);
  scores = scores.masked_fill(((j < i - 3) | (j > i + 2)) & (i != 0) & (j != 0), -INFINITY);
  const Tensor plain = scores.softmax(-1).matmul(v).movedim(-2, axis);
  const double tolerance = type == torch::kFloat ? 2e-5 : 1e-12;
  CHECK(ours.allclose(plain.to(type), tolerance, tolerance));
  const Tensor grad = torch::randn_like(ours);
  const auto ours_grads = torch::autograd::grad({ours}, {packed, phase}, {grad});
  const auto plain_grads = torch::autograd::grad({plain}, {packed, phase}, {grad.to(torch::kDouble)});
  for (const int which : {0, 1}) {
    CAPTURE(which);
    CHECK(ours_grads[which].allclose(plain_grads[which], 10 * tolerance, 10 * tolerance));
  }
}

TEST_CASE("a window as long as the mixture changes nothing; a shorter one with sinks is that of attention") {
  const testing::OneThread one_thread;
  auto options = small_bs();
  options.use_pope(GENERATE(false, true));
  models::BsRoformer plain(options);
  const Tensor mixture = torch::randn({1, 2, 300});  // 38 frames
  const Tensor stems = plain->forward(mixture);
  const auto windowed = [&](int64_t window, int64_t sinks) {
    auto other = options;
    other.time_window(window).time_sinks(sinks);
    return like(plain, other, {})->forward(mixture);
  };
  CHECK(windowed(37, 0).allclose(stems, 1e-5, 1e-7));
  CHECK(windowed(4, 38).allclose(stems, 1e-5, 1e-7));
  CHECK_FALSE(windowed(4, 2).allclose(stems, 1e-5, 1e-7));
  CHECK_FALSE(windowed(4, 2).allclose(windowed(4, 0), 1e-5, 1e-7));
  auto wrong = options;
  wrong.time_sinks(1);
  CHECK(error_of([&] { models::BsRoformer{wrong}; }).id() == "headroom.models.options");
}

TEST_CASE("dropout is for training, and drawn again alike in a recomputation") {
  const testing::OneThread one_thread;
  torch::manual_seed(4);
  auto options = small_bs();
  options.attn_dropout(0.2).ff_dropout(0.3);
  models::BsRoformer plain(options);
  const Tensor mixture = torch::randn({1, 2, 300});
  const auto expected = gradients(plain, mixture);
  auto copy = like(plain, options, "full");
  for (const auto& [name, gradient] : gradients(copy, mixture)) {
    CAPTURE(name);
    CHECK(gradient.equal(expected.at(name)));
  }
  CHECK_FALSE(plain->forward(mixture).equal(plain->forward(mixture)));
  plain->eval();
  CHECK(plain->forward(mixture).equal(plain->forward(mixture)));
}

TEST_CASE("stems are as long as the mixture; without match_input_audio_length the rest of a hop is silent") {
  auto options = one_block<models::MelBandRoformerOptions>(16, 1);
  options.num_bands(4).sample_rate(8000);
  options.heads(2).dim_head(8).stft_n_fft(32).stft_hop_length(8).stft_win_length(32).attn_dropout(0).ff_dropout(0);
  for (const bool match : {false, true}) {
    options.match_input_audio_length(match);
    models::MelBandRoformer model(options);
    const Tensor stems = model->forward(torch::randn({1, 2, 203}));
    CHECK(stems.sizes() == at::IntArrayRef({1, 1, 2, 203}));
    CHECK(stems.slice(-1, 200).eq(0).all().item<bool>() == !match);
  }
}
