#include "headroom/audio/stft.hpp"

#include <torch/torch.h>

#include "headroom/runtime/autocast_state.hpp"
#include "support/catch.hpp"
#include "support/tensors.hpp"

using namespace headroom;
using audio::Stft;
using audio::StftOptions;
using testing::noise;
using torch::Tensor;

namespace {

/// The Eigen implementation on one waveform.
Tensor core_forward(const core::Stft<double>& stft, const Tensor& waveform) {
  const Eigen::Map<const Eigen::VectorXd> signal(waveform.data_ptr<double>(), waveform.numel());
  Eigen::MatrixXcd spectrum = stft.forward(signal);
  return torch::from_blob(spectrum.data(), {spectrum.cols(), spectrum.rows()}, torch::kComplexDouble)
      .transpose(0, 1)
      .clone();
}

Tensor core_inverse(const core::Stft<double>& stft, const Tensor& spectrum, int64_t length) {
  const Tensor frames_first = spectrum.transpose(0, 1).contiguous();
  const Eigen::Map<const Eigen::MatrixXcd> map(
      reinterpret_cast<const std::complex<double>*>(frames_first.data_ptr<c10::complex<double>>()), spectrum.size(0),
      spectrum.size(1));
  Eigen::VectorXd signal = stft.inverse(map, length);
  return torch::from_blob(signal.data(), {length}, torch::kDouble).clone();
}

double largest(const Tensor& tensor) { return tensor.abs().max().item<double>(); }

/// Largest difference between autograd's gradient of sum(weight * f(x)) and central differences, x real.
template <class F>
double gradient_error(F&& f, const Tensor& x) {
  const Tensor leaf = x.clone().requires_grad_();
  const Tensor y = f(leaf);
  const Tensor weight = noise(y.sizes(), 7);
  const Tensor gradient = torch::autograd::grad({(y * weight).sum()}, {leaf})[0];
  Tensor expected = torch::empty_like(x);
  const double step = 1e-4;
  for (int64_t i = 0; i < x.numel(); ++i) {
    Tensor up = x.clone(), down = x.clone();
    up.view(-1)[i] += step;
    down.view(-1)[i] -= step;
    expected.view(-1)[i] = ((f(up) - f(down)) * weight).sum() / (2 * step);
  }
  return largest(gradient - expected);
}

struct Case {
  int64_t n_fft, hop, window, samples;
};

const std::vector<Case> cases = {{512, 128, 0, 2000}, {100, 33, 0, 777},   {255, 64, 0, 1001},
                                 {97, 20, 0, 500},    {256, 50, 128, 900}, {128, 25, 61, 65}};

}  // namespace

TEST_CASE("audio stft equals core stft and torch.istft") {
  for (const auto& [n_fft, hop, window, samples] : cases) {
    CAPTURE(n_fft, hop, window, samples);
    Stft stft(StftOptions().n_fft(n_fft).hop(hop).window(window));
    const core::Stft<double> reference({.n_fft = n_fft, .hop = hop, .window = window});
    const Tensor waveform = noise({samples});
    const Tensor spectrum = stft(waveform);
    CHECK(spectrum.sizes() == torch::IntArrayRef({stft->bins(), stft->frames(samples)}));
    CHECK(largest(spectrum - core_forward(reference, waveform)) < 1e-12);

    // A masked spectrum belongs to no signal, and its first and last bins are not real
    const Tensor masked = spectrum * torch::complex(noise(spectrum.sizes(), 2), noise(spectrum.sizes(), 3));
    const Tensor back = stft->inverse(masked, samples);
    CHECK(largest(back - core_inverse(reference, masked, samples)) < 1e-12);
    const int64_t length = window == 0 ? n_fft : window;
    CHECK(largest(back - torch::istft(masked, n_fft, hop, length, torch::hann_window(length, torch::kDouble), true,
                                      false, true, samples)) < 1e-12);
  }
}

TEST_CASE("audio stft inverse returns every length exactly") {
  Stft stft(StftOptions().n_fft(64).hop(16));
  for (const int64_t samples : {33, 160, 161, 175, 176}) {
    CAPTURE(samples);
    const Tensor waveform = noise({2, samples});
    const Tensor back = stft->inverse(stft(waveform), samples);
    REQUIRE(back.sizes() == waveform.sizes());
    CHECK(largest(back - waveform) < 1e-13);
  }
}

TEST_CASE("audio stft keeps leading dimensions") {
  Stft stft(StftOptions().n_fft(32).hop(8));
  const Tensor waveform = noise({2, 3, 2, 100});
  const Tensor spectrum = stft(waveform);
  REQUIRE(spectrum.sizes() == torch::IntArrayRef({2, 3, 2, 17, 13}));
  CHECK(torch::equal(spectrum[1][2][0], stft(waveform[1][2][0])));
  const Tensor back = stft->inverse(spectrum, 100);
  REQUIRE(back.sizes() == waveform.sizes());
  CHECK(largest(back - waveform) < 1e-13);
  const Tensor strided = waveform.transpose(0, 3);  // [100,3,2,2]
  CHECK(torch::equal(stft(strided.transpose(0, 3)), spectrum));
}

TEST_CASE("audio stft of a ten-second segment has 431 frames and 2049 bins") {
  Stft stft(StftOptions().n_fft(4096).hop(1024));
  CHECK(stft(torch::zeros({441000})).sizes() == torch::IntArrayRef({2049, 431}));
  CHECK(stft->bins() == 2049);
  CHECK(stft->frames(441000) == 431);
}

TEST_CASE("audio stft gradients equal finite differences") {
  for (const auto& [n_fft, hop, window] : {std::tuple{8, 3, 0}, std::tuple{7, 2, 5}}) {
    CAPTURE(n_fft);
    Stft stft(StftOptions().n_fft(n_fft).hop(hop).window(window));
    CHECK(gradient_error([&](const Tensor& x) { return torch::view_as_real(stft(x)); }, noise({2, 14})) < 1e-9);
    const Tensor spectrum = noise({2, stft->bins(), stft->frames(14), 2});
    CHECK(gradient_error([&](const Tensor& z) { return stft->inverse(torch::view_as_complex(z), 14); }, spectrum) <
          1e-9);
  }
}

TEST_CASE("audio stft computes in float for half-precision input and under autocast") {
  Stft stft(StftOptions().n_fft(256).hop(64));
  const Tensor waveform = noise({1000}, 1, torch::kBFloat16);
  const Tensor expected = stft(waveform.to(torch::kFloat));
  CHECK(stft(waveform).scalar_type() == torch::kComplexFloat);
  CHECK(torch::equal(stft(waveform), expected));

  Tensor spectrum, back;
  {
    const headroom::detail::AutocastGuard autocast(at::kCPU, at::kBFloat16);
    spectrum = stft(waveform);
    back = stft->inverse(spectrum, 1000);
  }
  CHECK(torch::equal(spectrum, expected));
  CHECK(back.scalar_type() == torch::kFloat);
  CHECK(largest(back - waveform.to(torch::kFloat)) < 2e-6);
  CHECK(stft->inverse(spectrum.to(torch::kComplexHalf), 1000).scalar_type() == torch::kFloat);
}

TEST_CASE("audio stft holds nothing that a state dict or a change of type could touch") {
  Stft stft(StftOptions().n_fft(256).hop(64));
  CHECK(stft->parameters().empty());
  CHECK(stft->buffers().empty());
  const Tensor waveform = noise({1000});
  const Tensor before = stft(waveform);
  stft->to(torch::kBFloat16);
  CHECK(torch::equal(stft(waveform), before));
  CHECK(torch::equal(std::dynamic_pointer_cast<audio::StftImpl>(stft->clone())->forward(waveform), before));
  CHECK(c10::str(stft) == "headroom::audio::Stft(n_fft=256, hop=64, window=256)");
}

TEST_CASE("audio stft errors say what is wrong") {
  using testing::contains;
  using testing::error_of;
  CHECK(error_of([] { Stft(StftOptions().hop(0)); }).id() == "headroom.core.stft.options");
  Stft stft(StftOptions().n_fft(64).hop(16));
  const Error length = error_of([&] { stft(noise({2, 32})); });
  CHECK(length.id() == "headroom.core.stft.length");
  CHECK(contains(length.what(), "32 samples is too short for n_fft 64"));
  for (const Tensor& bad :
       {Tensor(), torch::zeros({100}, torch::kLong), torch::zeros({100}, torch::kComplexFloat), torch::tensor(1.0)}) {
    CHECK(error_of([&] { stft(bad); }).id() == "headroom.audio.stft.waveform");
  }
  CHECK(contains(error_of([&] { stft(torch::zeros({2, 9}, torch::kLong)); }).what(), "got Long [2, 9]"));
  const Tensor spectrum = stft(noise({2, 100}));  // [2,33,7]
  CHECK(error_of([&] { stft->inverse(torch::real(spectrum), 100); }).id() == "headroom.audio.stft.spectrum");
  CHECK(error_of([&] { stft->inverse(spectrum[0][0], 100); }).id() == "headroom.audio.stft.spectrum");
  CHECK(error_of([&] { stft->inverse(spectrum, 120); }).id() == "headroom.core.stft.spectrum");
  CHECK(error_of([&] { stft->inverse(spectrum.transpose(1, 2), 100); }).id() == "headroom.core.stft.spectrum");
  Stft sparse(StftOptions().n_fft(64).hop(64));
  CHECK(error_of([&] { sparse->inverse(sparse(noise({200})), 200); }).id() == "headroom.core.stft.envelope");
}
