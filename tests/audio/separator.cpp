#include "headroom/audio/separator.hpp"

#include "support/catch.hpp"

using namespace headroom;
using audio::SeparatorOptions;
using testing::error_of;

namespace {

// Stem n is the mixture times n + 1: a model that any cut and blend must leave alone.
torch::Tensor scale(const torch::Tensor& mixture) {             // [1,C,S]
  return torch::stack({mixture, 2 * mixture, 3 * mixture}, 1);  // [1,3,C,S]
}

// Adds the mean of its segment and works in place; sees its own mode and whether gradients are on.
struct ProbeImpl : torch::nn::Module {
  ProbeImpl() {
    frozen = register_module("frozen", torch::nn::Linear(1, 1));
    frozen->eval();
  }
  torch::Tensor forward(torch::Tensor x) {
    CHECK_FALSE(is_training());
    CHECK_FALSE(torch::GradMode::is_enabled());
    CHECK((x * frozen->weight).requires_grad() == false);
    return x.add_(x.mean()).unsqueeze(1);
  }
  torch::nn::Linear frozen{nullptr};
};
TORCH_MODULE(Probe);

}  // namespace

TEST_CASE("separating in memory keeps every sample in place, for any length") {
  for (const std::int64_t length : {0, 1, 7, 64, 65, 997, 70001}) {
    const torch::Tensor mixture = torch::randn({2, length});
    const torch::Tensor stems = audio::separate(mixture, scale, {.segments = {.length = 64}, .stems = 3});
    REQUIRE(stems.sizes() == torch::IntArrayRef({3, 2, length}));
    for (int n = 0; n < 3; ++n) {
      CHECK(torch::allclose(stems[n], (n + 1) * mixture, 1e-6, 1e-6));
    }
  }
}

TEST_CASE("segments are blended with the weights of overlap-add") {
  // Segments of 4 with step 2 at 0, 2, 4; the model returns the number of the segment; triangle 1 2 2 1 over 3.
  int segment = 0;
  const auto number = [&](const torch::Tensor& x) {
    CHECK(x.sizes() == torch::IntArrayRef({1, 1, 4}));
    return torch::full({1, 1, 1, 4}, ++segment);
  };
  const auto stems = audio::separate(torch::zeros({1, 8}), number,
                                     {.segments = {.length = 4, .overlap = 0.5}, .channels = 1, .stems = 1});
  const auto expected = torch::tensor({1., 1., 4. / 3, 5. / 3, 7. / 3, 8. / 3, 3., 3.}).to(torch::kFloat);
  CHECK(segment == 3);
  CHECK(torch::allclose(stems.flatten(), expected));
}

TEST_CASE("a module runs in evaluation mode without gradients, on a copy, and gets its modes back") {
  Probe model;
  model->train();
  model->frozen->eval();
  const torch::Tensor mixture = torch::ones({2, 10});
  const auto stems = audio::separate(mixture, model, {.segments = {.length = 4, .overlap = 0.5}, .stems = 1});
  CHECK(torch::allclose(stems, torch::full({1, 2, 10}, 2.)));  // would grow where segments overlap if in place
  CHECK(torch::equal(mixture, torch::ones({2, 10})));
  CHECK(model->is_training());
  CHECK_FALSE(model->frozen->is_training());
  CHECK(torch::GradMode::is_enabled());
  const auto failing = [](const torch::Tensor&) -> torch::Tensor { fail("test.model", "no"); };
  CHECK(error_of([&] { audio::separate(mixture, failing, {.segments = {.length = 4}}); }).id() == "test.model");
  CHECK(torch::GradMode::is_enabled());
}

TEST_CASE("separate says what does not fit") {
  const SeparatorOptions options{.segments = {.length = 64}, .stems = 3};
  const auto cut = [](const torch::Tensor& x) { return scale(x).narrow(3, 0, 60); };
  const Error error = error_of([&] { audio::separate(torch::zeros({2, 5}), cut, options); });
  CHECK(error.id() == "headroom.audio.separator.model");
  CHECK_THAT(error.what(), Catch::Contains("[1, 3, 2, 60]") && Catch::Contains("[1, 3, 2, 64]"));
  CHECK(error_of([&] {
          audio::separate(torch::zeros({2, 5}), scale, {.stems = 0});
        }).id() == "headroom.audio.separator.options");
  CHECK(error_of([&] {
          audio::separate(torch::zeros({3, 5}), scale, options);
        }).id() == "headroom.audio.separator.source");
  CHECK(error_of([&] { audio::separate(torch::zeros({5}), scale, options); }).id() ==
        "headroom.audio.separator.source");
}
