#include "headroom/core/stft.hpp"

#include <cmath>
#include <complex>
#include <numbers>
#include <random>
#include <thread>
#include <vector>

#include "support/catch.hpp"

using namespace headroom;
using core::Stft;
using core::StftOptions;
using Eigen::Index;
using Eigen::MatrixXcd;
using Eigen::VectorXd;

namespace {

VectorXd noise(Index samples, unsigned seed = 1) {
  std::mt19937_64 engine(seed);
  std::uniform_real_distribution<double> uniform(-1, 1);
  return VectorXd::NullaryExpr(samples, [&] { return uniform(engine); });
}

MatrixXcd complex_noise(Index rows, Index cols) {
  MatrixXcd result(rows, cols);
  result.real() = noise(rows * cols, 2).reshaped(rows, cols);
  result.imag() = noise(rows * cols, 3).reshaped(rows, cols);
  return result;
}

double hann(Index i, Index length) {
  const double sine = std::sin(std::numbers::pi * i / length);
  return sine * sine;
}

/// Frame t straight from the definition: build the mirrored signal, cut, weight, sum over the samples.
MatrixXcd direct_stft(const VectorXd& x, Index n_fft, Index hop, Index window) {
  const Index pad = n_fft / 2;
  std::vector<double> padded;
  for (Index i = pad; i > 0; --i) padded.push_back(x(i));
  padded.insert(padded.end(), x.begin(), x.end());
  for (Index i = 1; i <= pad; ++i) padded.push_back(x(x.size() - 1 - i));

  std::vector<std::vector<std::complex<double>>> frames;
  for (std::size_t begin = 0; begin + n_fft <= padded.size(); begin += hop) {
    auto& frame = frames.emplace_back();
    for (Index k = 0; k <= n_fft / 2; ++k) {
      std::complex<double> sum = 0;
      for (Index i = 0; i < window; ++i) {
        const Index n = (n_fft - window) / 2 + i;
        sum += hann(i, window) * padded[begin + n] * std::polar(1.0, -2 * std::numbers::pi * ((k * n) % n_fft) / n_fft);
      }
      frame.push_back(sum);
    }
  }
  MatrixXcd result(n_fft / 2 + 1, frames.size());
  for (Index t = 0; t < result.cols(); ++t) {
    for (Index k = 0; k < result.rows(); ++k) result(k, t) = frames[t][k];
  }
  return result;
}

struct Case {
  Index n_fft, hop, window, samples;
};

/// Even, divisible by four or not, odd, prime and tiny transforms; hops that divide nothing; short and exact lengths.
const std::vector<Case> cases = {{16, 4, 0, 64},  {16, 5, 0, 61},  {18, 7, 0, 50},   {15, 4, 0, 40},
                                 {31, 9, 0, 100}, {97, 13, 0, 49}, {64, 10, 32, 33}, {64, 11, 25, 90},
                                 {33, 5, 20, 77}, {2, 1, 0, 7},    {3, 1, 0, 8},     {20, 25, 0, 90}};

}  // namespace

TEST_CASE("core stft equals the definition") {
  for (const auto& [n_fft, hop, window, samples] : cases) {
    CAPTURE(n_fft, hop, window, samples);
    const Stft<double> stft({.n_fft = n_fft, .hop = hop, .window = window});
    const VectorXd x = noise(samples);
    const MatrixXcd expected = direct_stft(x, n_fft, hop, window == 0 ? n_fft : window);
    const MatrixXcd actual = stft.forward(x);
    REQUIRE(actual.rows() == stft.bins());
    REQUIRE(actual.cols() == stft.frames(samples));
    REQUIRE(expected.cols() == actual.cols());
    CHECK((actual - expected).cwiseAbs().maxCoeff() < 1e-13 * n_fft);
  }
}

TEST_CASE("core stft gives the numbers of torch.stft") {
  // torch.stft(x, n_fft=7, hop_length=3, win_length=4, window=torch.hann_window(4), return_complex=True), torch 2.13
  const VectorXd x = VectorXd::NullaryExpr(9, [](Index i) { return static_cast<double>(7 * i % 11) / 11 - 0.4; });
  MatrixXcd expected(4, 3);
  expected.real() << -0.163636363636364, 0.518181818181818, 0.336363636363636,  //
      0.227611479668572, -0.510039645527824, -0.377065666543116,                //
      -0.282188901275929, 0.420092085402508, 0.376023879144609,                 //
      0.136395603425539, -0.169143348965593, -0.167140030783311;
  expected.imag() << 0, 0, 0,                                     //
      0.109611911557610, -0.127290219021546, -0.063253325780665,  //
      -0.353853689928631, 0.313552045314932, 0.258292262515587,   //
      0.597588184240439, -0.475176001472761, -0.466398891031225;
  const Stft<double> stft({.n_fft = 7, .hop = 3, .window = 4});
  CHECK((stft.forward(x) - expected).cwiseAbs().maxCoeff() < 1e-14);
}

TEST_CASE("core stft counts frames and bins as torch does") {
  CHECK(StftOptions{.n_fft = 4096, .hop = 1024}.frames(441000) == 431);
  CHECK(StftOptions{.n_fft = 4096, .hop = 1024}.bins() == 2049);
  CHECK(StftOptions{.n_fft = 6, .hop = 4}.frames(8) == 3);
  CHECK(StftOptions{.n_fft = 7, .hop = 4}.frames(8) == 2);
  CHECK(StftOptions{.n_fft = 7, .hop = 4}.bins() == 4);
}

TEST_CASE("core stft inverse returns the signal with its exact length") {
  for (const auto& [n_fft, hop, window, samples] : cases) {
    if (hop > (window == 0 ? n_fft : window) / 2) continue;
    CAPTURE(n_fft, hop, window, samples);
    const Stft<double> stft({.n_fft = n_fft, .hop = hop, .window = window});
    const VectorXd x = noise(samples);
    const VectorXd back = stft.inverse(stft.forward(x), samples);
    REQUIRE(back.size() == samples);
    CHECK((back - x).cwiseAbs().maxCoeff() < 1e-13);
  }
}

TEST_CASE("core stft inverse of any spectrum is the weighted overlap-add of real inverse transforms") {
  for (const Index n_fft : {12, 10, 9, 13}) {
    CAPTURE(n_fft);
    const Index hop = 4, length = 30;
    const Stft<double> stft({.n_fft = n_fft, .hop = hop});
    const MatrixXcd spectrum = complex_noise(stft.bins(), stft.frames(length));  // bin 0 and n_fft / 2 are not real
    VectorXd sum = VectorXd::Zero(length), weight = VectorXd::Zero(length);
    for (Index t = 0; t < spectrum.cols(); ++t) {
      for (Index i = 0; i < n_fft; ++i) {
        const Index sample = t * hop + i - n_fft / 2;
        if (sample < 0 || sample >= length) continue;
        double value = 0;
        for (Index k = 0; k < stft.bins(); ++k) {
          const bool has_mirror = k != 0 && 2 * k != n_fft;
          const double angle = 2 * std::numbers::pi * ((k * i) % n_fft) / n_fft;
          value += (has_mirror ? 2 : 1) * (spectrum(k, t).real() * std::cos(angle) -
                                           (has_mirror ? spectrum(k, t).imag() * std::sin(angle) : 0));
        }
        sum(sample) += hann(i, n_fft) * value / n_fft;
        weight(sample) += hann(i, n_fft) * hann(i, n_fft);
      }
    }
    CHECK((stft.envelope(length) - weight).cwiseAbs().maxCoeff() < 1e-14);
    CHECK((stft.inverse(spectrum, length) - sum.cwiseQuotient(weight)).cwiseAbs().maxCoeff() < 1e-13);
  }
}

TEST_CASE("core stft keeps the energy of every windowed frame") {
  const Index n_fft = 30, hop = 9, samples = 200;
  const Stft<double> stft({.n_fft = n_fft, .hop = hop});
  const VectorXd x = noise(samples);
  const MatrixXcd spectrum = stft.forward(x);
  for (Index t = 2; t * hop + n_fft / 2 <= samples; ++t) {
    const double in_time = x.segment(t * hop - n_fft / 2, n_fft).cwiseProduct(stft.window()).squaredNorm();
    const double in_frequency = 2 * spectrum.col(t).squaredNorm() - std::norm(spectrum(0, t)) -
                                std::norm(spectrum(stft.bins() - 1, t));  // inner bins stand for two frequencies
    CHECK(in_frequency / n_fft == Approx(in_time).epsilon(1e-12));
  }
}

TEST_CASE("core stft in float stays near double") {
  for (const Index n_fft : {1024, 1021}) {
    const StftOptions options{.n_fft = n_fft, .hop = 256};
    const VectorXd x = noise(5000);
    const Eigen::VectorXf narrow = x.cast<float>();
    const MatrixXcd exact = Stft<double>(options).forward(narrow.cast<double>());
    const Stft<float> stft(options);
    const Eigen::MatrixXcf spectrum = stft.forward(narrow);
    const double rms = std::sqrt(exact.squaredNorm() / static_cast<double>(exact.size()));
    CHECK((spectrum.cast<std::complex<double>>() - exact).cwiseAbs().maxCoeff() < 3e-6 * rms);
    CHECK((stft.inverse(spectrum, 5000) - narrow).cwiseAbs().maxCoeff() < 2e-6f);
  }
}

TEST_CASE("core stft reads any Eigen vector, strided channels too") {
  const Stft<double> stft({.n_fft = 16, .hop = 4});
  const Eigen::MatrixXd stereo = noise(2 * 50).reshaped(2, 50);  // column-major: a channel has stride 2
  const VectorXd right = stereo.row(1);
  CHECK(stft.forward(stereo.row(1).transpose()) == stft.forward(right));
  const MatrixXcd spectrum = stft.forward(right);
  MatrixXcd taller = MatrixXcd::Ones(20, spectrum.cols());
  taller.topRows(stft.bins()) = spectrum;
  CHECK(stft.inverse(taller.topRows(stft.bins()), 50) == stft.inverse(spectrum, 50));
}

TEST_CASE("one core stft serves several threads", "[threads]") {
  const Stft<double> stft({.n_fft = 60, .hop = 15});
  std::vector<double> error(4, -1);
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      const VectorXd x = noise(3000, i);
      error[i] = (stft.inverse(stft.forward(x), 3000) - x).cwiseAbs().maxCoeff();
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const double e : error) {
    CHECK(e >= 0);
    CHECK(e < 1e-13);
  }
}

TEST_CASE("core stft errors say what is wrong") {
  using testing::contains;
  using testing::error_of;
  for (const StftOptions& bad :
       {StftOptions{.n_fft = 1}, StftOptions{.n_fft = 16, .hop = 0}, StftOptions{.n_fft = 16, .hop = 4, .window = 17},
        StftOptions{.n_fft = 16, .hop = 4, .window = 1}, StftOptions{.n_fft = 16, .hop = 4, .window = -4}}) {
    CHECK(error_of([&] { Stft<double>{bad}; }).id() == "headroom.core.stft.options");
  }

  const Stft<double> stft({.n_fft = 16, .hop = 4});
  const Error length = error_of([&] { stft.forward(noise(8)); });
  CHECK(length.id() == "headroom.core.stft.length");
  CHECK(contains(length.what(), "8 samples is too short for n_fft 16"));
  CHECK(contains(length.what(), "at least 9"));
  CHECK_NOTHROW(stft.forward(noise(9)));

  const MatrixXcd spectrum = stft.forward(noise(40));  // 9 x 11
  CHECK_NOTHROW(stft.inverse(spectrum, 43));
  CHECK(error_of([&] { stft.inverse(spectrum, 44); }).id() == "headroom.core.stft.spectrum");
  CHECK(contains(error_of([&] { stft.inverse(spectrum, 39); }).what(), "9 bins x 11 frames; 39 samples"));
  CHECK(error_of([&] { stft.inverse(spectrum.topRows(8), 40); }).id() == "headroom.core.stft.spectrum");

  // Hop 16: sample 8 begins frame 1, where a periodic Hann window of 16 is zero, and no other frame reaches it
  const Stft<double> sparse({.n_fft = 16, .hop = 16});
  const Error envelope = error_of([&] { sparse.inverse(sparse.forward(noise(40)), 40); });
  CHECK(envelope.id() == "headroom.core.stft.envelope");
  CHECK(contains(envelope.what(), "leaves sample 8 of 40"));
  const Stft<double> narrow({.n_fft = 16, .hop = 6, .window = 4});
  CHECK(error_of([&] { narrow.inverse(narrow.forward(noise(40)), 40); }).id() == "headroom.core.stft.envelope");
}
