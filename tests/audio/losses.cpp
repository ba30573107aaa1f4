#include "headroom/audio/losses.hpp"

#include <torch/torch.h>

#include <cmath>
#include <complex>
#include <numbers>

#include "headroom/core/log_wmse.hpp"
#include "headroom/memory/meter.hpp"
#include "support/catch.hpp"
#include "support/tensors.hpp"

using namespace headroom;
using audio::MultiResolutionStftLoss;
using audio::MultiResolutionStftLossOptions;
using audio::SeparationLoss;
using audio::SeparationLossOptions;
using testing::noise;
using torch::Tensor;

namespace {

/// sum over windows of mean |STFT(a) - STFT(b)|, each bin a sum over samples, both signals transformed.
double direct_loss(const Tensor& a, const Tensor& b, const std::vector<int64_t>& windows, int64_t hop,
                   int64_t min_n_fft) {
  const Tensor left = a.reshape({-1, a.size(-1)}), right = b.reshape({-1, b.size(-1)});
  const auto x = left.accessor<double, 2>(), y = right.accessor<double, 2>();
  const int64_t samples = a.size(-1);
  const auto mirrored = [&](int64_t i) { return i < 0 ? -i : i >= samples ? 2 * (samples - 1) - i : i; };
  double loss = 0;
  for (const int64_t window : windows) {
    const int64_t n_fft = std::max(window, min_n_fft);
    double sum = 0;
    int64_t count = 0;
    for (int64_t row = 0; row < left.size(0); ++row) {
      for (int64_t centre = 0; centre <= samples; centre += hop) {  // n_fft is even in these tests
        for (int64_t k = 0; k <= n_fft / 2; ++k) {
          std::complex<double> p = 0, q = 0;
          for (int64_t i = 0; i < window; ++i) {
            const double sine = std::sin(std::numbers::pi * i / window);
            const int64_t n = (n_fft - window) / 2 + i;
            const auto wave = sine * sine * std::polar(1.0, -2 * std::numbers::pi * k * n / n_fft);
            p += wave * x[row][mirrored(centre - n_fft / 2 + n)];
            q += wave * y[row][mirrored(centre - n_fft / 2 + n)];
          }
          sum += std::abs(p - q);
          ++count;
        }
      }
    }
    loss += sum / static_cast<double>(count);
  }
  return loss;
}

/// The same loss as a plain graph of PyTorch operations, as BS-RoFormer writes it.
Tensor graph_loss(const Tensor& a, const Tensor& b, const MultiResolutionStftLossOptions& options) {
  const auto transform = [&](const Tensor& x, int64_t window) {
    const Tensor hann = torch::hann_window(window, x.options().requires_grad(false));
    return torch::stft(x.flatten(0, -2), std::max(window, options.min_n_fft()), options.hop(), window, hann, true,
                       "reflect", false, true, true);
  };
  Tensor loss = torch::zeros({}, a.options());
  for (const int64_t window : options.windows()) {
    loss = loss + torch::l1_loss(transform(a, window), transform(b, window));
  }
  return loss;
}

/// Losses as plain graphs of the whole stems, from the formulas that their sources have.
Tensor mse_graph(const Tensor& a, const Tensor& b) { return (a - b).square().mean(); }
Tensor masked_graph(const Tensor& a, const Tensor& b, double q, bool by_example) {
  Tensor errors = (a - b).square().transpose(0, 1);  // [N,B,C,S]
  if (by_example) errors = errors.mean(torch::IntArrayRef{2, 3});
  errors = errors.reshape({errors.size(0), -1});
  return (errors * (errors < at::quantile(errors.detach(), q, 1, true))).mean();
}
Tensor frequency_graph(const Tensor& a, const Tensor& b) {
  const auto magnitudes = [](const Tensor& x) {
    const Tensor frames = torch::reflection_pad1d(x.flatten(0, 2), {1024, 1024}).unfold(1, 2048, 1024);
    return torch::fft_rfft(frames).abs();
  };
  return (magnitudes(a) - magnitudes(b)).abs().mean();
}
/// The filter as a convolution of the whole signal, behind whose end it rings on.
Tensor log_wmse_graph(const Tensor& a, const Tensor& b, const Tensor& mixture) {
  const Eigen::VectorXd taps = core::detail::hearing_filter(44100);
  const Tensor kernel = at::tensor(at::ArrayRef<double>(taps.data(), taps.size())).flip(0).view({1, 1, -1});
  const auto energy = [&](const Tensor& x) {
    const Tensor rows = x.reshape({-1, 1, x.size(-1)});
    const Tensor filtered = torch::conv1d(rows, kernel, {}, 1, taps.size() - 1);
    return (filtered.square().sum({1, 2}) / x.size(-1)).view(x.sizes().slice(0, x.dim() - 1));
  };
  return 4 * (energy(a - b) / energy(mixture).unsqueeze(1) + 1e-8).log().mean();
}

MultiResolutionStftLossOptions tiny() {
  return MultiResolutionStftLossOptions().windows({32, 12, 7}).hop(5).min_n_fft(16);
}

}  // namespace

TEST_CASE("multi-resolution stft loss equals its formula") {
  MultiResolutionStftLoss loss(tiny());
  const Tensor a = noise({2, 2, 60}, 1), b = noise({2, 2, 60}, 2);
  const double expected = direct_loss(a, b, {32, 12, 7}, 5, 16);
  CHECK(loss(a, b).item<double>() == Approx(expected).epsilon(1e-12));
  CHECK(loss(a.requires_grad_(), b).item<double>() == Approx(expected).epsilon(1e-12));
}

TEST_CASE("multi-resolution stft loss defaults are BS-RoFormer's") {
  MultiResolutionStftLoss loss;
  const Tensor a = noise({1, 2, 3000}, 1), b = noise({1, 2, 3000}, 2);
  const MultiResolutionStftLossOptions published =
      MultiResolutionStftLossOptions().windows({4096, 2048, 1024, 512, 256}).hop(147).min_n_fft(2048);
  CHECK(loss(a, b).item<double>() == Approx(graph_loss(a, b, published).item<double>()).epsilon(1e-12));
}

TEST_CASE("multi-resolution stft loss has the gradient of the graph that it does not keep") {
  MultiResolutionStftLoss loss(tiny());
  const Tensor a = noise({2, 3, 2, 50}, 1).requires_grad_(), b = noise({2, 3, 2, 50}, 2).requires_grad_();
  const auto gradients = torch::autograd::grad({loss(a, b) * 3}, {a, b});
  const auto expected = torch::autograd::grad({graph_loss(a, b, tiny()) * 3}, {a, b});
  CHECK(torch::allclose(gradients[0], expected[0], 1e-11, 1e-15));
  CHECK(torch::allclose(gradients[1], expected[1], 1e-11, 1e-15));

  const double step = 1e-5;
  const Tensor x = a.detach(), y = b.detach();
  for (const int64_t i : {0, 4, 49, 50, 317, 599}) {  // ends, mirrored samples and the middle, several waveforms
    Tensor up = x.clone(), down = x.clone();
    up.view(-1)[i] += step;
    down.view(-1)[i] -= step;
    const double difference = (loss(up, y) - loss(down, y)).item<double>() * 3 / (2 * step);
    CHECK(gradients[0].reshape(-1)[i].item<double>() == Approx(difference).epsilon(1e-6));
  }
}

TEST_CASE("losses vanish for equal waveforms, with a zero gradient") {
  SeparationLoss loss(SeparationLossOptions().stft(tiny()));
  const Tensor a = noise({1, 2, 2, 40}, 1).requires_grad_();
  const Tensor value = loss(a, a.detach().clone());
  CHECK(value.item<double>() == 0);
  value.backward();
  CHECK(torch::equal(a.grad(), torch::zeros_like(a)));
}

TEST_CASE("separation loss is l1 plus the weighted stft loss") {
  const Tensor a = noise({2, 2, 1, 40}, 1), b = noise({2, 2, 1, 40}, 2);
  const double l1 = (a - b).abs().sum().item<double>() / 160;
  const double spectral = direct_loss(a, b, {32, 12, 7}, 5, 16);
  for (const double weight : {0.0, 1.0, 0.25}) {
    SeparationLoss loss(SeparationLossOptions().stft_weight(weight).stft(tiny()));
    CHECK(loss(a, b).item<double>() == Approx(l1 + weight * spectral).epsilon(1e-12));
  }
  CHECK(SeparationLoss()->options.stft_weight() == 1.0);

  SeparationLoss loss(SeparationLossOptions().stft_weight(0.25).stft(tiny()));
  const Tensor leaf = a.clone().requires_grad_();
  const Tensor gradient = torch::autograd::grad({loss(leaf, b)}, {leaf})[0];
  const Tensor expected =
      torch::autograd::grad({(leaf - b).abs().mean() + 0.25 * graph_loss(leaf, b, tiny())}, {leaf})[0];
  CHECK(torch::allclose(gradient, expected, 1e-11, 1e-15));
}

TEST_CASE("every term of the separation loss has the value and the gradient of its plain form in double") {
  const Tensor mixture = noise({4, 2, 3000}, 3), b = noise({4, 3, 2, 3000}, 2);
  const Tensor loudness = torch::tensor({1.0, 0.3, 2.0, 0.6}, torch::kDouble).view({4, 1, 1, 1});
  const Tensor a = (b + noise({4, 3, 2, 3000}, 1) * loudness).requires_grad_();
  const SeparationLossOptions none = SeparationLossOptions().l1_weight(0).stft_weight(0);
  struct Case {
    const char* name;
    SeparationLossOptions options;
    Tensor expected;
  };
  auto by_sample = SeparationLossOptions(none).masked_by_example(false);
  const Case cases[] = {
      {"l1", SeparationLossOptions(none).l1_weight(2), 2 * (a - b).abs().mean()},
      {"mse", SeparationLossOptions(none).mse_weight(0.5), 0.5 * mse_graph(a, b)},
      {"masked, 0.95 of samples", SeparationLossOptions(by_sample).masked_weight(1), masked_graph(a, b, 0.95, false)},
      {"masked, 0.5 of samples", SeparationLossOptions(by_sample).masked_weight(3).masked_quantile(0.5),
       3 * masked_graph(a, b, 0.5, false)},
      {"masked, all samples but the worst", SeparationLossOptions(by_sample).masked_weight(1).masked_quantile(1),
       masked_graph(a, b, 1, false)},
      {"masked, 0.95 of examples", SeparationLossOptions(none).masked_weight(1), masked_graph(a, b, 0.95, true)},
      {"masked, 0.3 of examples", SeparationLossOptions(none).masked_weight(1).masked_quantile(0.3),
       masked_graph(a, b, 0.3, true)},
      {"frequency", SeparationLossOptions(none).frequency_weight(0.1), 0.1 * frequency_graph(a, b)},
      {"logWMSE", SeparationLossOptions(none).log_wmse_weight(0.25), 0.25 * log_wmse_graph(a, b, mixture)},
      {"all",
       SeparationLossOptions().mse_weight(1).masked_weight(1).log_wmse_weight(1).frequency_weight(1).stft(tiny()),
       (a - b).abs().mean() + mse_graph(a, b) + masked_graph(a, b, 0.95, true) + log_wmse_graph(a, b, mixture) +
           frequency_graph(a, b) + graph_loss(a, b, tiny())}};
  for (const auto& [name, options, expected] : cases) {
    INFO(name);
    const Tensor value = SeparationLoss(options)->forward(a, b, mixture);
    CHECK(value.item<double>() == Approx(expected.item<double>()).epsilon(1e-11));
    const Tensor gradient = torch::autograd::grad({value}, {a})[0];
    const Tensor reference = torch::autograd::grad({expected}, {a}, {}, /*retain_graph=*/true)[0];
    CHECK((gradient - reference).norm().item<double>() < 1e-10 * reference.norm().item<double>());
  }
}

TEST_CASE("logWMSE as a loss is the score, negated, of signals whose scores the package gives") {
  const Tensor mixture = noise({1, 2, 5000}, 1), a = noise({1, 1, 2, 5000}, 2), b = noise({1, 1, 2, 5000}, 3);
  constexpr double kRate = 32000;
  const auto energy = [&](const Tensor& x) {
    core::HearingEnergy all(2, kRate);
    const Tensor rows = x.reshape({2, 5000}).contiguous();
    all.add(Eigen::Map<const Eigen::Matrix<double, 2, 5000, Eigen::RowMajor>>(rows.data_ptr<double>()));
    return all.finish();
  };
  const auto options = SeparationLossOptions().l1_weight(0).stft_weight(0).log_wmse_weight(1).sample_rate(kRate);
  CHECK(SeparationLoss(options)->forward(a, b, mixture).item<double>() ==
        Approx(-core::log_wmse(energy(a - b), energy(mixture))).epsilon(1e-11));
}

TEST_CASE("the memory of a loss does not depend on its terms, resolutions and stems but for one gradient") {
  const auto added = [](int64_t stems, const SeparationLossOptions& options) {
    SeparationLoss loss(options);
    const Tensor a = noise({2, stems, 2, 20'000}, 1, torch::kFloat).requires_grad_();
    const Tensor b = noise({2, stems, 2, 20'000}, 2, torch::kFloat), mixture = b.sum(1);
    const auto run = [&] { torch::autograd::grad({loss->forward(a, b, mixture)}, {a}); };
    run();                                                           // makes what is kept
    return MemoryMeter().measure(run).added_peak() - a.numel() * 4;  // the gradient
  };
  const auto few = MultiResolutionStftLossOptions().windows({1024});
  const auto many = MultiResolutionStftLossOptions().windows({1024, 512, 256, 128}).min_n_fft(512);
  const auto options = [](const auto& stft) {
    return SeparationLossOptions().stft(MultiResolutionStftLossOptions(stft).hop(147).min_n_fft(1024));
  };
  const int64_t one = added(1, options(few));
  CHECK(std::abs(added(1, options(many)) - one) < 20'000);
  CHECK(std::abs(added(6, options(few)) - one) < 20'000);
  auto all = options(many).mse_weight(1).masked_weight(1).frequency_weight(1).log_wmse_weight(1);
  CHECK(added(6, all) - one < 3 * 20'000 * 4);
}

TEST_CASE("losses of half-precision estimates are computed in float and return gradients of the estimates' type") {
  SeparationLoss loss(SeparationLossOptions().stft(tiny()));
  const Tensor a = noise({1, 2, 2, 40}, 1, torch::kBFloat16).requires_grad_();
  const Tensor b = noise({1, 2, 2, 40}, 2, torch::kFloat);
  const Tensor value = loss(a, b);
  CHECK(value.scalar_type() == torch::kFloat);
  CHECK(value.item<float>() == loss(a.detach().to(torch::kFloat), b).item<float>());
  value.backward();
  CHECK(a.grad().scalar_type() == torch::kBFloat16);
}

TEST_CASE("losses build no graph where none is wanted") {
  MultiResolutionStftLoss loss(tiny());
  const Tensor a = noise({1, 40}, 1).requires_grad_();
  torch::NoGradGuard no_grad;
  CHECK_FALSE(loss(a, noise({1, 40}, 2)).requires_grad());
}

TEST_CASE("loss modules print and clone") {
  SeparationLoss loss(SeparationLossOptions().stft_weight(0.5).stft(tiny()));
  CHECK(testing::contains(c10::str(loss), "headroom::audio::SeparationLoss(l1_weight=1, stft_weight=0.5)"));
  CHECK(testing::contains(c10::str(loss), "MultiResolutionStftLoss(windows=[32, 12, 7], hop=5, min_n_fft=16)"));
  CHECK(loss->parameters().empty());
  CHECK(loss->buffers().empty());
  const Tensor a = noise({1, 1, 1, 40}, 1), b = noise({1, 1, 1, 40}, 2);
  const auto copy = std::dynamic_pointer_cast<audio::SeparationLossImpl>(loss->clone());
  CHECK(torch::equal(copy->forward(a, b), loss(a, b)));
}

TEST_CASE("loss errors say what is wrong") {
  using testing::contains;
  using testing::error_of;
  CHECK(error_of([] { MultiResolutionStftLoss(MultiResolutionStftLossOptions().windows({})); }).id() ==
        "headroom.audio.loss.options");
  CHECK(error_of([] { SeparationLoss(SeparationLossOptions().stft_weight(-1)); }).id() ==
        "headroom.audio.loss.options");
  CHECK(error_of([] { SeparationLoss(SeparationLossOptions().masked_quantile(0)); }).id() ==
        "headroom.audio.loss.options");
  const Error mixture = error_of([] {
    SeparationLoss(SeparationLossOptions().log_wmse_weight(1))(torch::zeros({1, 1, 2, 9}), torch::zeros({1, 1, 2, 9}));
  });
  CHECK(mixture.id() == "headroom.audio.loss.shape");
  CHECK(contains(mixture.what(), "got an undefined tensor for the mixture of stems Float [1, 1, 2, 9]"));
  const Error frames = error_of([] {
    SeparationLoss(SeparationLossOptions().frequency_weight(1))(torch::zeros({1, 1, 1, 9}), torch::zeros({1, 1, 1, 9}));
  });
  CHECK(contains(frames.what(), "the distance of magnitudes needs more than 1024 samples"));
  CHECK(error_of([] { MultiResolutionStftLoss(MultiResolutionStftLossOptions().hop(0)); }).id() ==
        "headroom.core.stft.options");

  SeparationLoss loss(SeparationLossOptions().stft(tiny()));
  const Error shape = error_of([&] { loss(torch::zeros({1, 2, 2, 40}), torch::zeros({1, 2, 2, 41})); });
  CHECK(shape.id() == "headroom.audio.loss.shape");
  CHECK(contains(shape.what(), "estimate Float [1, 2, 2, 40] and a reference Float [1, 2, 2, 41]"));
  CHECK(contains(error_of([&] { loss(torch::zeros({2, 2, 40}), torch::zeros({2, 2, 40})); }).what(), "[B, N, C, S]"));
  CHECK(error_of([&] { loss(Tensor(), torch::zeros({2, 2, 40})); }).id() == "headroom.audio.loss.shape");
  const Error length = error_of([&] { loss(torch::zeros({1, 2, 2, 16}), torch::zeros({1, 2, 2, 16})); });
  CHECK(length.id() == "headroom.core.stft.length");
  CHECK(contains(length.what(), "16 samples is too short for n_fft 32"));

  const Tensor a = noise({1, 1, 1, 40}, 1).requires_grad_();
  const Tensor value = loss(a, noise({1, 1, 1, 40}, 2));
  CHECK(error_of([&] { torch::autograd::grad({value}, {a}, {}, true, true); }).id() ==
        "headroom.audio.loss.second_derivative");
}
