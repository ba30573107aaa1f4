#include "headroom/models/time_frequency_transformer.hpp"

#include "headroom/memory.hpp"
#include "support/catch.hpp"

using namespace headroom;
using torch::Tensor;

namespace {

models::TimeFrequencyTransformerOptions small() {
  return models::TimeFrequencyTransformerOptions()
      .n_fft(64)
      .hop_length(16)
      .n_layers(2)
      .emb_dim(16)
      .n_heads(2)
      .ffn_hidden_dim({24, 20});
}

}  // namespace

TEST_CASE("a mixture becomes stems of the same length, for any length") {
  torch::manual_seed(1);
  models::TimeFrequencyTransformer model(small().stems(3));
  for (const int64_t samples : {100, 1000, 1003}) {
    CHECK(model->forward(torch::randn({2, 2, samples})).sizes() == at::IntArrayRef({2, 3, 2, samples}));
  }
  CHECK(testing::error_of([&] { model->forward(torch::randn({2, 1, 500})); }).id() == "headroom.models.mixture");
}

TEST_CASE("with masks of 1/N each stem is the mixture divided by N") {
  models::TimeFrequencyTransformer model(small());
  torch::NoGradGuard guard;
  model->to_masks->weight.zero_();
  const Tensor mixture = torch::randn({1, 2, 700});
  CHECK((model->forward(mixture) * 4 - mixture.unsqueeze(1)).abs().max().item<float>() < 1e-5);
}

TEST_CASE("the level of the mixture changes nothing but the level of the stems") {
  torch::manual_seed(2);
  models::TimeFrequencyTransformer model(small());
  const Tensor mixture = torch::randn({1, 2, 700});
  const Tensor stems = model->forward(mixture), quiet = model->forward(mixture * 0.01) * 100;
  CHECK((stems - quiet).abs().max().item<float>() < 1e-2 * stems.abs().max().item<float>());
}

TEST_CASE("every parameter has a gradient; it agrees between backends, with checkpointing bit for bit") {
  torch::manual_seed(3);
  models::TimeFrequencyTransformer tiled(small()), reference(small().attention(AttentionBackend::reference)),
      checkpointed(small().gradient_checkpointing(true));
  const Tensor mixture = torch::randn({2, 2, 400}), target = torch::randn({2, 4, 2, 400});
  const auto gradients = [&](models::TimeFrequencyTransformer& model) {
    torch::NoGradGuard guard;
    for (const auto& p : tiled->named_parameters()) model->named_parameters()[p.key()].copy_(p.value());
    torch::AutoGradMode enabled(true);
    model->zero_grad();
    (model->forward(mixture) - target).abs().mean().backward();
    std::map<std::string, Tensor> result;
    for (const auto& p : model->named_parameters()) result[p.key()] = p.value().grad();
    return result;
  };
  const auto a = gradients(tiled), b = gradients(reference), c = gradients(checkpointed);
  for (const auto& [name, gradient] : a) {
    CAPTURE(name);
    REQUIRE(gradient.defined());
    CHECK(gradient.abs().max().item<float>() > 0);
    CHECK((gradient - b.at(name)).abs().max().item<float>() < 1e-5 + 1e-3 * b.at(name).abs().max().item<float>());
    CHECK(gradient.equal(c.at(name)));
  }
}

TEST_CASE("the guide's crash in numbers: the scores of one frequency layer") {
  // memory_optimized, first version: one layer's frequency scores are [431,12,2049,2049] floats
  const auto options = models::TimeFrequencyTransformerOptions().n_layers(1).n_heads(12);
  const int64_t frequency = int64_t{431} * 12 * 2049 * 2049 * 4, time = int64_t{2049} * 12 * 431 * 431 * 4;
  CHECK(frequency == 86'856'519'888);
  CHECK(models::stored_scores_bytes(options, 1, 441000) == frequency + time);
  CHECK(models::stored_scores_bytes(models::TimeFrequencyTransformerOptions(options).n_layers(8), 2, 441000) ==
        16 * (frequency + time));
}

TEST_CASE("no allocation of a training step holds scores") {
  models::TimeFrequencyTransformer model(small().n_fft(1022).hop_length(256));  // 512 bins
  const Tensor mixture = torch::randn({1, 2, 8000});
  model->forward(mixture);
  MemoryMeter meter;
  const MemoryReport report = meter.measure([&] { model->forward(mixture).square().sum().backward(); });
  CHECK(*report.largest < 32 * 2 * 512 * 512 * 4);
}
