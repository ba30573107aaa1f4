// Combinations of streams against plain forms on the whole recording, in double.

#include "headroom/core/combine.hpp"

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <complex>
#include <numbers>
#include <vector>

#include "support/catch.hpp"

using namespace headroom;
using core::Combination;
using core::Combine;
using core::Contribution;
using core::Domain;
using core::Statistic;
using Eigen::Index;
using Stream = Combine::Block;

namespace {

// Samples of a stream, all rows and streams different.
Stream recording(Index rows, Index length, double seed) {
  return Stream::NullaryExpr(rows, length, [&](Index r, Index t) {
    const double phase = seed + static_cast<double>(r);
    return static_cast<float>(std::sin(0.05 * (1 + phase) * static_cast<double>(t)) * std::cos(phase * 3e-4 * t * t));
  });
}

Stream combine(const Combination& how, const std::vector<std::vector<Contribution>>& rows,
               const std::vector<Stream>& streams, Index block) {
  const Index length = streams.front().cols();
  Stream result(static_cast<Index>(rows.size()), length);
  Index done = 0;
  Combine combine(how, rows, [&](const Eigen::Ref<const Stream>& finished) {
    result.middleCols(done, finished.cols()) = finished;
    done += finished.cols();
  });
  for (Index t = 0; t < length; t += block) {
    const Index n = std::min(block, length - t);
    std::vector<Stream> next;
    for (const Stream& stream : streams) next.emplace_back(stream.middleCols(t, n));
    combine.add(next, n);
  }
  combine.finish();
  REQUIRE(done == length);
  return result;
}

// Median, min or max as the tools have it.
template <class Value>
Value pick(Statistic statistic, std::vector<Value> values) {
  std::stable_sort(values.begin(), values.end(),
                   [&](const Value& a, const Value& b) { return std::abs(a) < std::abs(b); });
  const Value smallest = values.front();
  if (statistic == Statistic::min) return smallest;
  for (const Value& v : values) {
    if (std::abs(v) == std::abs(values.back())) return v;
  }
  return values.back();
}
double median_of(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t n = values.size();
  return n % 2 == 1 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

// Spectra of frames of 2048 samples around 0, 1024, … of x between silences, by definition; every 16th bin is enough to
// compare a filter with, but the inverse needs all: so this transforms with plain sums and is slow.
Eigen::ArrayXcd spectrum(const Eigen::ArrayXd& frame) {
  const Index n = frame.size();
  Eigen::ArrayXcd bins(n / 2 + 1);
  Eigen::ArrayXcd turn(n);
  for (Index i = 0; i < n; ++i)
    turn(i) = std::polar(1.0, -2 * std::numbers::pi * static_cast<double>(i) / static_cast<double>(n));
  for (Index k = 0; k < bins.size(); ++k) {
    std::complex<double> sum = 0;
    for (Index i = 0, at = 0; i < n; ++i, at = (at + k) % n) sum += frame(i) * turn(at);
    bins(k) = sum;
  }
  return bins;
}
Eigen::ArrayXd inverse(const Eigen::ArrayXcd& bins) {
  const Index n = 2 * (bins.size() - 1);
  Eigen::ArrayXcd turn(n);
  for (Index i = 0; i < n; ++i)
    turn(i) = std::polar(1.0, 2 * std::numbers::pi * static_cast<double>(i) / static_cast<double>(n));
  Eigen::ArrayXd frame(n);
  for (Index i = 0; i < n; ++i) {
    double sum = bins(0).real() + (i % 2 == 0 ? 1 : -1) * bins(n / 2).real();
    for (Index k = 1, at = i; k < n / 2; ++k, at = (at + i) % n) sum += 2 * (bins(k) * turn(at)).real();
    frame(i) = sum / static_cast<double>(n);
  }
  return frame;
}

// The recordings between silences, transformed, combined bin by bin, transformed back with the squares of the windows
// divided out.
Eigen::ArrayXd combine_spectra(Statistic statistic, const std::vector<Eigen::ArrayXd>& recordings) {
  const Index n = 2048, hop = 1024, length = recordings.front().size();
  const Eigen::ArrayXd window =
      0.5 - 0.5 * (Eigen::ArrayXd::LinSpaced(n, 0, static_cast<double>(n - 1)) * 2 * std::numbers::pi / n).cos();
  Eigen::ArrayXd sum = Eigen::ArrayXd::Zero(length + 3 * n), weights = sum;
  for (Index start = 0; start < length + hop; start += hop) {  // in the recording with a silence of hop in front
    std::vector<Eigen::ArrayXcd> spectra;
    for (const auto& x : recordings) {
      Eigen::ArrayXd padded = Eigen::ArrayXd::Zero(length + 3 * n);
      padded.segment(hop, length) = x;
      spectra.push_back(spectrum(padded.segment(start, n) * window));
    }
    Eigen::ArrayXcd combined(n / 2 + 1);
    for (Index k = 0; k < combined.size(); ++k) {
      std::vector<std::complex<double>> values;
      std::vector<double> real, imaginary;
      for (const auto& s : spectra) {
        values.push_back(s(k));
        real.push_back(s(k).real());
        imaginary.push_back(s(k).imag());
      }
      combined(k) = statistic == Statistic::median ? std::complex<double>(median_of(real), median_of(imaginary))
                                                   : pick(statistic, values);
    }
    sum.segment(start, n) += inverse(combined) * window;
    weights.segment(start, n) += window.square();
  }
  return sum.segment(hop, length) / weights.segment(hop, length);
}

}  // namespace

TEST_CASE("samples are combined by weighted mean, median, min and max of their magnitudes") {
  const std::vector<Stream> streams = {recording(2, 300, 0.3), recording(1, 300, 1.7), recording(2, 300, 2.1),
                                       recording(1, 300, 3.9)};
  // Rows of one, two, three and four streams.
  const std::vector<std::vector<Contribution>> rows = {{{1, 0, 2.5}},
                                                       {{0, 1, 1}, {2, 0, 3}},
                                                       {{0, 0, 0.5}, {1, 0, 1}, {3, 0, 2}},
                                                       {{0, 0, 1}, {1, 0, 1}, {2, 1, 1}, {3, 0, 1}}};
  for (const auto statistic : {Statistic::mean, Statistic::median, Statistic::min, Statistic::max}) {
    for (const Index block : {1, 77, 5000}) {
      const Stream result = combine({.statistic = statistic}, rows, streams, block);
      double worst = 0;
      for (std::size_t r = 0; r < rows.size(); ++r) {
        for (Index t = 0; t < 300; ++t) {
          std::vector<double> values;
          double sum = 0, weights = 0;
          for (const auto& [stream, row, weight] : rows[r]) {
            values.push_back(streams[stream](row, t));
            sum += weight * values.back();
            weights += weight;
          }
          const double expected = statistic == Statistic::mean     ? sum / weights
                                  : statistic == Statistic::median ? median_of(values)
                                                                   : pick(statistic, values);
          worst = std::max(worst, std::abs(result(static_cast<Index>(r), t) - expected));
        }
      }
      CHECK(worst < 1e-7);
    }
  }
}

TEST_CASE("of equal magnitudes min and max keep the first, sign included") {
  Stream plus(1, 1), minus(1, 1);
  plus << 0.5f;
  minus << -0.5f;
  for (const auto statistic : {Statistic::min, Statistic::max}) {
    CHECK(combine({.statistic = statistic}, {{{0, 0}, {1, 0}}}, {plus, minus}, 1)(0, 0) == 0.5f);
    CHECK(combine({.statistic = statistic}, {{{1, 0}, {0, 0}}}, {plus, minus}, 1)(0, 0) == -0.5f);
  }
}

TEST_CASE("spectra are combined by median, min and max of their magnitudes") {
  for (const Index length : {1, 1023, 1024, 2500}) {
    const std::vector<Stream> streams = {recording(1, length, 0.3), recording(1, length, 1.7),
                                         recording(1, length, 2.1)};
    std::vector<Eigen::ArrayXd> recordings;
    for (const Stream& stream : streams) recordings.emplace_back(stream.row(0).transpose().cast<double>());
    for (const auto statistic : {Statistic::median, Statistic::min, Statistic::max}) {
      INFO("length " << length << ", statistic " << int(statistic));
      const Stream result =
          combine({statistic, Domain::spectrum}, {{{0, 0}, {1, 0}, {2, 0}}, {{1, 0}, {0, 0}}}, streams, 700);
      const Eigen::ArrayXd three = combine_spectra(statistic, recordings);
      const Eigen::ArrayXd two = combine_spectra(statistic, {recordings[1], recordings[0]});
      CHECK((result.row(0).transpose().cast<double>() - three).abs().maxCoeff() < 1e-6);
      CHECK((result.row(1).transpose().cast<double>() - two).abs().maxCoeff() < 1e-6);
    }
  }
}

TEST_CASE("in the spectrum one stream stays as it is, and a mean is that of the waveforms") {
  for (const Index length : {1, 5, 1024, 5001}) {
    const std::vector<Stream> streams = {recording(1, length, 0.3), recording(1, length, 1.7)};
    for (const auto statistic : {Statistic::median, Statistic::min, Statistic::max}) {
      const Stream result = combine({statistic, Domain::spectrum}, {{{1, 0}}}, streams, 999);
      CHECK((result - streams[1]).abs().maxCoeff() < 1e-6f);
    }
    const std::vector<std::vector<Contribution>> both = {{{0, 0, 1}, {1, 0, 3}}};
    CHECK((combine({Statistic::mean, Domain::spectrum}, both, streams, 64) ==
           combine({Statistic::mean, Domain::waveform}, both, streams, 64))
              .all());
  }
}
