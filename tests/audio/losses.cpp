#include "headroom/audio/losses.hpp"

#include <torch/torch.h>

#include <cmath>
#include <complex>
#include <numbers>

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
  CHECK(testing::contains(c10::str(loss), "headroom::audio::SeparationLoss(stft_weight=0.5)"));
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
