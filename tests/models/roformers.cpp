#include <cmath>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "headroom/audio/losses.hpp"
#include "headroom/models/bs_roformer.hpp"
#include "headroom/models/mel_band_roformer.hpp"
#include "headroom/weights/tensors.hpp"
#include "support/catch.hpp"
#include "support/hashed_noise.hpp"
#include "support/one_thread.hpp"
#include "support/python_models.hpp"

using namespace headroom;
using headroom::testing::hashed_noise;
using torch::Tensor;

namespace {

void set_parameters(torch::nn::Module& model) {
  const torch::NoGradGuard guard;
  // The package counts the frequencies of rotary embedding once for each axis, by the first name that they have
  uint32_t salt = 0;
  std::set<const void*> seen;
  for (const auto& [name, x] : weights::tensors_of(model)) {
    if (name.ends_with("inv_freqs") || !seen.insert(x.unsafeGetTensorImpl()).second) continue;
    ++salt;
    if (name.ends_with("freqs")) continue;
    const Tensor u = hashed_noise(x.sizes(), salt);
    x.copy_(name.ends_with("gamma")         ? 1 + 0.25 * u
            : name.ends_with("bias")        ? 0.1 * u
            : name.ends_with("temperature") ? 0.5 * u
            : x.dim() > 1                   ? u * std::sqrt(3.0 / static_cast<double>(x.size(1)))
                                            : u);
  }
}

struct Case {
  std::string name;
  int64_t samples;
  std::shared_ptr<models::RoformerImpl> model;
  int64_t channels, stems;
  int64_t whole;  ///< samples that the package gives
  int64_t loss_hop = 7;
};

models::BsRoformerOptions bs_mono() {
  models::BsRoformerOptions options;
  options.freqs_per_bands({2, 3, 5, 7});
  options.dim(6).depth(1).dim_head(6).heads(2).time_transformer_depth(1).freq_transformer_depth(1).channels(1);
  options.stft_n_fft(32).stft_hop_length(8).stft_win_length(24);
  return options;
}

models::BsRoformerOptions bs_linear() {
  models::BsRoformerOptions options;
  options.freqs_per_bands({2, 3, 4}).zero_dc(false);
  options.dim(6).depth(1).dim_head(6).heads(2).time_transformer_depth(2).freq_transformer_depth(1);
  options.linear_transformer_depth(1).channels(2).stems(4).mask_estimator_depth(3).mlp_expansion_factor(1);
  options.stft_n_fft(16).stft_hop_length(6).stft_win_length(16);
  return options;
}

models::BsRoformerOptions bs_skip() {
  models::BsRoformerOptions options;
  options.freqs_per_bands({3, 6}).zero_dc(false);
  options.dim(8).depth(3).dim_head(4).heads(2).time_transformer_depth(1).freq_transformer_depth(1).channels(1);
  options.stft_n_fft(16).stft_hop_length(4).stft_win_length(16).mask_estimator_depth(1).skip_connection(true);
  return options;
}

models::MelBandRoformerOptions mel_stereo() {
  models::MelBandRoformerOptions options;
  options.num_bands(4).sample_rate(8000);
  options.dim(4).depth(1).dim_head(8).heads(2).time_transformer_depth(1).freq_transformer_depth(1);
  options.stft_n_fft(32).stft_hop_length(8).stft_win_length(32).attn_dropout(0).ff_dropout(0);
  return options;
}

models::MelBandRoformerOptions mel_stems() {
  models::MelBandRoformerOptions options;
  options.num_bands(4).sample_rate(8000).match_input_audio_length(true);
  options.dim(4).depth(1).dim_head(4).heads(2).time_transformer_depth(1).freq_transformer_depth(2).channels(1).stems(2);
  options.stft_n_fft(32).stft_hop_length(10).stft_win_length(32).mask_estimator_depth(2);
  options.attn_dropout(0).ff_dropout(0);
  return options;
}

models::BsRoformerOptions bs_streams() {
  models::BsRoformerOptions options;
  options.freqs_per_bands({2, 3, 4}).zero_dc(false);
  options.dim(6).depth(2).dim_head(6).heads(2).time_transformer_depth(2).freq_transformer_depth(1).channels(1);
  options.stft_n_fft(16).stft_hop_length(6).stft_win_length(16).mask_estimator_depth(1);
  options.num_residual_streams(2).mc_hyper_conn_sinkhorn_iters(3).add_value_residual(true);
  return options;
}

models::BsRoformerOptions bs_polar() {
  models::BsRoformerOptions options;
  options.freqs_per_bands({3, 6});
  options.dim(6).depth(2).dim_head(5).heads(2).time_transformer_depth(1).freq_transformer_depth(1).stems(2);
  options.stft_n_fft(16).stft_hop_length(4).stft_win_length(16).mask_estimator_depth(1);
  options.num_residual_streams(1).add_value_residual(true).use_pope(true);
  return options;
}

models::MelBandRoformerOptions mel_streams() {
  models::MelBandRoformerOptions options;
  options.num_bands(4).sample_rate(8000);
  options.dim(4).depth(2).dim_head(4).heads(2).time_transformer_depth(1).freq_transformer_depth(1).channels(1);
  options.linear_transformer_depth(1).stft_n_fft(32).stft_hop_length(8).stft_win_length(32);
  options.attn_dropout(0).ff_dropout(0).num_residual_streams(4).add_value_residual(true).use_pope(true);
  return options;
}

template <class Holder, class Options>
Case tiny(const std::string& name, int64_t samples, const Options& options) {
  const bool matches = [&] {
    if constexpr (requires { options.match_input_audio_length(); }) return options.match_input_audio_length();
    return false;
  }();
  const int64_t hop = options.stft_hop_length();
  return {name,
          samples,
          Holder(options).ptr(),
          options.channels(),
          options.stems(),
          matches ? samples : samples / hop * hop};
}

std::vector<Case> cases() {
  Case streams = tiny<models::MelBandRoformer>("mel_streams", 205, mel_streams());
  streams.loss_hop = 16;
  return {tiny<models::BsRoformer>("bs_mono", 203, bs_mono()),
          tiny<models::BsRoformer>("bs_linear", 150, bs_linear()),
          tiny<models::BsRoformer>("bs_skip", 160, bs_skip()),
          tiny<models::MelBandRoformer>("mel_stereo", 205, mel_stereo()),
          tiny<models::MelBandRoformer>("mel_stems", 211, mel_stems()),
          tiny<models::BsRoformer>("bs_streams", 150, bs_streams()),
          tiny<models::BsRoformer>("bs_polar", 160, bs_polar()),
          streams};
}

/// The signals of roformer_reference.py.
Tensor mixture_of(const Case& c, uint32_t which) {
  const Tensor x = 0.5 * hashed_noise({2, c.channels, c.samples}, 1000 + which);
  x[0][-1].slice(0, c.samples / 3, c.samples / 2).zero_();
  x[1].slice(1, 0, c.samples / 2).zero_();
  return x.to(torch::kFloat);
}
Tensor target_of(const Case& c, uint32_t which) {
  return (0.5 * hashed_noise({2, c.stems, c.channels, c.samples}, 2000 + which)).to(torch::kFloat);
}

/// That of the Python models, for their first `whole` samples.
Tensor loss_of(const Case& c, const Tensor& stems, const Tensor& target) {
  audio::SeparationLoss loss(audio::SeparationLossOptions().stft(audio::MultiResolutionStftLossOptions()
                                                                     .windows({64, 32, 16})
                                                                     .hop(c.loss_hop)
                                                                     .min_n_fft(c.model->stft->options.n_fft())));
  return loss->forward(stems.slice(-1, 0, c.whole), target.slice(-1, 0, c.whole));
}

/// "output", "loss" and "grad.NAME" for a mixture, in double.
std::map<std::string, Tensor> results_of(const Case& c, uint32_t mixture, torch::Dtype dtype) {
  c.model->to(dtype);
  c.model->zero_grad();
  const Tensor stems = c.model->forward(mixture_of(c, mixture).to(dtype));
  const Tensor loss = loss_of(c, stems, target_of(c, mixture).to(dtype));
  loss.backward();
  std::map<std::string, Tensor> results{{"output", stems.slice(-1, 0, c.whole)}, {"loss", loss}};
  std::set<const void*> seen;  // layers share position embeddings, which have the first of their names
  for (const auto& p : c.model->named_parameters()) {
    if (!seen.insert(p.value().unsafeGetTensorImpl()).second) continue;
    REQUIRE(p.value().grad().defined());
    results["grad." + p.key()] = p.value().grad();
  }
  for (auto& [name, x] : results) x = x.detach().to(torch::kDouble);
  return results;
}

}  // namespace

TEST_CASE("forward, loss and all gradients are as exact as those of the Python models") {
  const testing::OneThread one_thread;
  for (const Case& c : cases()) {
    c.model->train();
    set_parameters(*c.model);
    testing::check_against_python(std::string(HEADROOM_MODEL_FILES) + "/" + c.name + ".safetensors",
                                  [&](uint32_t mixture, torch::Dtype dtype) { return results_of(c, mixture, dtype); });
  }
}
