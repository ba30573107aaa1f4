#include "headroom/models/htdemucs.hpp"

#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "headroom/memory.hpp"
#include "headroom/plan.hpp"
#include "headroom/weights/tensors.hpp"
#include "support/catch.hpp"
#include "support/fingerprint.hpp"
#include "support/hashed_noise.hpp"
#include "support/one_thread.hpp"
#include "support/python_models.hpp"

using namespace headroom;
using headroom::testing::contains;
using headroom::testing::error_of;
using headroom::testing::fingerprint;
using headroom::testing::Fingerprint;
using headroom::testing::hashed_noise;
using torch::Tensor;

namespace {

struct HTDemucsCase {
  std::string name;
  int64_t samples;
  models::HTDemucsOptions options;
};

/// The models of htdemucs_reference.py.
std::vector<HTDemucsCase> htdemucs_cases() {
  models::HTDemucsOptions stereo, mono, plain;
  stereo.stems(2).channels(4).nfft(64).depth(2).kernel_size(4).stride(2).dconv_mode(3).dconv_comp(2).dconv_init(0.1);
  stereo.norm_starts(1).norm_groups(2).bottom_channels(4).t_layers(2).t_heads(2).t_hidden_scale(2);
  stereo.use_train_segment(false);
  mono.stems(3).audio_channels(1).channels(4).growth(1).nfft(256).depth(2).context(0).context_enc(1);
  mono.dconv_comp(4).dconv_depth(1).emb_smooth(false).t_layers(2).t_heads(1).t_hidden_scale(1).t_cross_first(true);
  mono.t_norm_in(false).t_norm_in_group(true).t_group_norm(true).t_gelu(false).t_weight_pos_embed(0.5).segment(500);
  plain.stems(1).channels(4).nfft(64).depth(1).kernel_size(4).stride(2).rewrite(false).freq_emb(0).dconv_mode(0);
  plain.t_layers(2).t_heads(2).t_hidden_scale(1).t_norm_first(false).t_layer_scale(false).t_max_period(100);
  plain.use_train_segment(false);
  return {{"stereo", 203, stereo}, {"mono", 301, mono}, {"plain", 34, plain}};
}

void set_htdemucs_parameters(torch::nn::Module& model) {
  const torch::NoGradGuard guard;
  uint32_t salt = 0;
  for (const auto& [name, x] : weights::tensors_of(model)) {
    const Tensor u = hashed_noise(x.sizes(), ++salt);
    Tensor(x).copy_(name.ends_with("bias") ? 0.1 * u
                    : x.dim() == 1         ? 1 + 0.25 * u
                                           : u * std::sqrt(3.0 / static_cast<double>(x[0].numel())));
  }
}

Tensor htdemucs_mixture(const HTDemucsCase& c, uint32_t which) {
  const Tensor x = 0.5 * hashed_noise({2, c.options.audio_channels(), c.samples}, 1000 + which);
  x[0][-1].slice(0, c.samples / 3, c.samples / 2).zero_();
  x[1].slice(1, 0, c.samples / 2).zero_();
  return x.to(torch::kFloat);
}

Tensor htdemucs_loss(const HTDemucsCase& c, const Tensor& stems, uint32_t which) {
  const Tensor target = 0.5 * hashed_noise({2, c.options.stems(), c.options.audio_channels(), c.samples}, 2000 + which);
  return (stems - target.to(torch::kFloat).to(stems.dtype())).abs().mean();
}

/// "evaluated", "output", "loss" and "grad.NAME" for a mixture, in double.
std::map<std::string, Tensor> htdemucs_results(const HTDemucsCase& c, models::HTDemucs& model, uint32_t mixture,
                                               torch::Dtype dtype) {
  model->to(dtype);
  model->zero_grad();
  const Tensor x = htdemucs_mixture(c, mixture).to(dtype);
  std::map<std::string, Tensor> results;
  if (c.options.use_train_segment()) {
    model->eval();
    results["evaluated"] = model->forward(x);
  }
  model->train();
  results["output"] = model->forward(x);
  results["loss"] = htdemucs_loss(c, results["output"], mixture);
  results["loss"].backward();
  for (const auto& p : model->named_parameters()) {
    if (p.value().grad().defined()) results["grad." + p.key()] = p.value().grad();
  }
  for (auto& [name, y] : results) y = y.detach().to(torch::kDouble);
  return results;
}

}  // namespace

TEST_CASE("HTDemucs: forward, loss and all gradients are as exact as those of the Python model") {
  const testing::OneThread one_thread;
  for (const HTDemucsCase& c : htdemucs_cases()) {
    models::HTDemucs model(c.options);
    set_htdemucs_parameters(*model);
    testing::check_against_python(
        std::string(HEADROOM_MODEL_FILES) + "/../htdemucs/" + c.name + ".safetensors",
        [&](uint32_t mixture, torch::Dtype dtype) { return htdemucs_results(c, model, mixture, dtype); });
  }
}

TEST_CASE("HTDemucs: names, shapes and numbers of parameters are those of the published checkpoints") {
  const auto of_stems = [](int64_t stems) {
    return models::HTDemucsOptions().bottom_channels(512).dconv_mode(3).stems(stems).rescale(0);
  };
  CHECK(fingerprint<models::HTDemucs>(of_stems(4)) == Fingerprint{533, 41'984'456, 0x229581c9a0b3d883});
  CHECK(fingerprint<models::HTDemucs>(of_stems(6)) == Fingerprint{533, 41'989'076, 0x69f07ca9a83f62e5});
}

TEST_CASE("HTDemucs: policies change no gradient, and backends agree") {
  const testing::OneThread one_thread;
  HTDemucsCase c = htdemucs_cases()[0];
  c.options.t_layers(3);
  const auto gradients = [&](const StackPolicy& policy, AttentionBackend backend) {
    models::HTDemucs model(models::HTDemucsOptions(c.options).gradient_checkpointing(policy).attention(backend));
    set_htdemucs_parameters(*model);
    htdemucs_loss(c, model->forward(htdemucs_mixture(c, 0)), 0).backward();
    std::vector<Tensor> all;
    for (const Tensor& p : model->parameters()) all.push_back(p.grad());
    return all;
  };
  const auto plain = gradients("none", AttentionBackend::automatic);
  for (const char* policy : {"full", "1*selective,none", "1*none,full"}) {
    CAPTURE(policy);
    const auto same = gradients(policy, AttentionBackend::automatic);
    for (size_t i = 0; i < plain.size(); ++i) CHECK(torch::equal(same[i], plain[i]));
  }
  const auto tiled = gradients("tiled", AttentionBackend::automatic);
  const auto reference = gradients("none", AttentionBackend::reference);
  for (size_t i = 0; i < plain.size(); ++i) {
    CHECK(torch::allclose(tiled[i], plain[i], 1e-3, 1e-6));
    CHECK(torch::allclose(reference[i], plain[i], 1e-3, 1e-6));
  }
  const Error error = error_of([&] { gradients("4*full,none", AttentionBackend::automatic); });
  CHECK(error.id() == "headroom.checkpoint.policy");
}

TEST_CASE("HTDemucs: mixtures of any length have stems of that length; dropout is for training") {
  models::HTDemucs model(htdemucs_cases()[0].options.t_dropout(0.5));
  const torch::NoGradGuard guard;
  for (const int64_t samples : {1, 2, 15, 16, 17, 40, 333}) {
    const Tensor stems = model->forward(torch::randn({1, 2, samples}));
    CHECK(stems.sizes() == at::IntArrayRef({1, 2, 2, samples}));
    CHECK(stems.isfinite().all().item<bool>());
  }
  const Tensor mixture = torch::randn({1, 2, 333});
  CHECK_FALSE(torch::equal(model->forward(mixture), model->forward(mixture)));
  model->eval();
  CHECK(torch::equal(model->forward(mixture), model->forward(mixture)));
}

TEST_CASE("HTDemucs: no allocation holds scores, and the peak is planned byte for byte") {
  torch::manual_seed(1);
  nn::CrossTransformer transformer(nn::CrossTransformerOptions(16, 2, 2));
  const Tensor spectrum = torch::randn({1, 16, 4, 500}), waveform = torch::randn({1, 16, 2000});
  const auto step = [&] {
    const auto [x, xt] = transformer->forward(spectrum, waveform);
    (x.square().mean() + xt.square().mean()).backward();
    transformer->zero_grad();
  };
  step();
  const MemoryReport report = MemoryMeter().measure(step);
  CHECK(*report.largest < 2000 * 2000 * 4 / 8);  // of one head

  const HTDemucsCase c = htdemucs_cases()[0];
  const auto train = [&] {
    models::HTDemucs model(c.options);
    model->forward(torch::ones({2, 2, c.samples})).square().mean().backward();
  };
  train();
  const int64_t measured = MemoryMeter().measure(train).added_peak();
  CHECK(plan(train, this_machine()).peak_bytes == measured);
}

TEST_CASE("HTDemucs: options, positions and signals that do not fit are refused") {
  using Options = models::HTDemucsOptions;
  const auto refused = [](const Options& options, const std::string& part) {
    const Error error = error_of([&] { models::HTDemucs model(options); });
    CHECK(error.id() == "headroom.models.options");
    CAPTURE(error.what());
    CHECK(contains(error.what(), part));
  };
  refused(Options().channels(0), "expected positive numbers");
  refused(Options().growth(1000), "the last of 4 layers has 4.8e+10 channels");
  refused(Options().kernel_size(6), "kernel_size is 6 and stride 4");
  refused(Options().stride(3).kernel_size(6), "an even stride");
  refused(Options().depth(5), "nfft is 4096, of which layer 4 gets 8 frequencies");
  refused(Options().nfft(2040), "the stride 4 divides");
  refused(Options().norm_starts(2).norm_groups(7), "norm_groups is 7");
  refused(Options().channels(18).norm_starts(1), "norm_groups is 4 and norm_starts 1");  // a decoder layer has 18
  refused(Options().audio_channels(1).stems(2).norm_starts(0), "norm_groups is 4 and norm_starts 0");
  refused(Options().norm_starts(-1), "norm_groups is 4 and norm_starts -1");
  refused(Options().growth(1).depth(100), "a depth of at most 16");
  refused(Options().t_hidden_scale(0.001), "t_hidden_scale 0.001 of a transformer of width 384");
  refused(Options().dconv_comp(49), "dconv_comp is 49, expected at most channels, 48");
  refused(Options().t_heads(7), "width 384 and t_heads 7");
  models::HTDemucs model(htdemucs_cases()[2].options);
  CHECK(error_of([&] { model->forward(torch::randn({2, 3, 100})); }).id() == "headroom.models.mixture");
  CHECK(model->forward(torch::ones({2, 2, 1})).isfinite().all().item<bool>());
  CHECK(error_of([] { nn::sine_embedding(3, 6, 1e4); }).id() == "headroom.nn.sine_embedding.dim");
  CHECK(error_of([] { nn::sine_embedding_2d(3, 3, 8, 1); }).id() == "headroom.nn.sine_embedding.dim");
  const auto transformer = [](int64_t dim, double dropout) {
    return nn::CrossTransformer(
        nn::CrossTransformerOptions(dim, 1, 1).layer(nn::CrossTransformerLayerOptions(dim, 1).dropout(dropout)));
  };
  CHECK(error_of([&] { transformer(6, 0); }).id() == "headroom.nn.cross_transformer.options");
  CHECK(error_of([&] { transformer(8, 1); }).id() == "headroom.nn.cross_transformer.options");
  CHECK(error_of([&] {
          transformer(8, 0)->forward(torch::ones({1, 8, 2, 3}), torch::ones({2, 8, 3}));
        }).id() == "headroom.nn.cross_transformer.shape");
}
