#include <cstdint>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "headroom/memory.hpp"
#include "headroom/models/bs_roformer.hpp"
#include "headroom/models/mel_band_roformer.hpp"
#include "headroom/plan.hpp"
#include "headroom/runtime/dry_run.hpp"
#include "headroom/weights/load.hpp"
#include "support/catch.hpp"
#include "support/one_thread.hpp"

using namespace headroom;
using testing::error_of;
using torch::Tensor;

namespace {

/// As roformer_reference.py prints it: names and shapes of the state, and the elements of parameters, the frequencies
/// of rotary embedding counted once for each axis.
struct Fingerprint {
  int64_t names = 0, elements = 0;
  uint64_t hash = 0xcbf29ce484222325;
  bool operator==(const Fingerprint&) const = default;
};

template <class Holder, class Options>
Fingerprint fingerprint(const Options& options) {
  const DryRun shapes_only(torch::kCPU);
  const Holder model(options);
  Fingerprint result;
  std::set<const void*> seen;
  std::ostringstream lines;
  for (const auto& [name, x] : weights::tensors_of(*model)) {  // sorted
    ++result.names;
    if (seen.insert(x.unsafeGetTensorImpl()).second) result.elements += x.numel();
    lines << name << " " << x.sizes() << "\n";
  }
  for (const char byte : lines.str()) {
    result.hash = (result.hash ^ static_cast<unsigned char>(byte)) * 0x100000001b3;
  }
  return result;
}

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
    return [x, block = transformer->blocks(axis, rotary->table(x.size(axis))).front()] { return block.forward(x); };
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
  for (const bool skip : {false, true}) {
    auto options = small_bs();
    options.linear_transformer_depth(1).skip_connection(skip);
    models::BsRoformer plain(options);
    const Tensor mixture = torch::randn({2, 2, 300});
    const auto expected = gradients(plain, mixture);
    for (const char* policy :
         {"full", "selective", "3*full,none", "1*full+offload,3*selective,full", "full+offload", "tiled"}) {
      auto copy = like(plain, options, policy);
      for (const auto& [name, gradient] : gradients(copy, mixture)) {
        CAPTURE(skip, policy, name);
        const Tensor& known = expected.at(name);
        CHECK((gradient.equal(known) ||
               (policy == std::string("tiled") &&
                (gradient - known).abs().max().item<float>() <= 1e-5 * known.abs().max().item<float>() + 1e-9)));
      }
    }
    options.gradient_checkpointing("7*full,none");  // there are 6
    models::BsRoformer wrong(options);
    CHECK(error_of([&] { wrong->forward(mixture); }).id() == "headroom.checkpoint.policy");
  }
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
