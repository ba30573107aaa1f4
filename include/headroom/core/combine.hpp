#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <cmath>
#include <complex>
#include <cstddef>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "headroom/core/centered_frames.hpp"
#include "headroom/core/error.hpp"
#include "headroom/core/median.hpp"
#include "headroom/core/real_transform.hpp"
#include "headroom/core/stft.hpp"

namespace headroom::inline v0::core {

/// What becomes of several estimates of one number.
enum class Statistic {
  mean,    ///< Σ weight·value / Σ weight
  median,  ///< of an even count the mean of the two in the middle; of complex numbers that of each part
  min,     ///< the one with the smallest magnitude as it is, the first of equal ones
  max,     ///< the one with the largest magnitude as it is, the first of equal ones
};

/// Which numbers are combined: samples, or bins of a spectrum (frames of 2048 samples, a hop of 1024, a periodic Hann
/// window, silence around the recording). A mean is the same in both.
enum class Domain { waveform, spectrum };

/// How an ensemble's estimates become one. `{mean, waveform}` is avg_wave of audio-separator and of
/// Music-Source-Separation-Training, `{max, spectrum}` their max_fft, and so on. median_fft is audio-separator's; the
/// other one orders complex numbers by their real parts. In both, the last few samples of a recording can be far too
/// loud in the spectrum, where a single frame that has nearly faded out is scaled up; here a frame more covers them.
struct Combination {
  Statistic statistic = Statistic::mean;
  Domain domain = Domain::waveform;
};

/// A row of a stream that takes part in a row of the result.
struct Contribution {
  std::size_t stream = 0;
  Eigen::Index row = 0;
  double weight = 1;  ///< counts in a mean only
};

namespace detail {

inline std::complex<double> median(const std::vector<std::complex<double>>& values) {
  std::vector<double> real, imaginary;
  for (const auto& value : values) {
    real.push_back(value.real());
    imaginary.push_back(value.imag());
  }
  return {median(real), median(imaginary)};
}

/// Median, min or max of at least one value, which it may reorder.
template <class Value>
Value combined(Statistic statistic, std::vector<Value>& values) {
  const auto smaller = [](const Value& a, const Value& b) { return std::abs(a) < std::abs(b); };
  switch (statistic) {
    case Statistic::min:
      return *std::min_element(values.begin(), values.end(), smaller);
    case Statistic::max:
      return *std::max_element(values.begin(), values.end(), smaller);
    default:
      return median(values);
  }
}

}  // namespace detail

/// Combines rows of several streams of samples that come together, block by block. What is kept is one frame a row.
class Combine {
 public:
  using Block = Eigen::Array<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  /// Takes the next samples of the result [rows, n], in order.
  using Sink = std::function<void(const Eigen::Ref<const Block>& finished)>;

  /// `rows`: what takes part in each row of the result; at least one each, with positive weights.
  Combine(const Combination& how, std::vector<std::vector<Contribution>> rows, Sink sink)
      : how_(how),
        rows_(std::move(rows)),
        sink_(std::move(sink)),
        result_(static_cast<Eigen::Index>(rows_.size()), kHop) {
    if (!in_spectrum()) return;
    for (const auto& contributions : rows_) inputs_ += static_cast<Eigen::Index>(contributions.size());
    frames_.emplace(inputs_, kLength, kHop, FramePadding::zeros);
    window_ = Stft<double>({.n_fft = kLength}).window();
    taken_ = Eigen::MatrixXd::Zero(inputs_, kHop);
    sum_ = Eigen::MatrixXd::Zero(kLength, result_.rows());
  }

  /// Adds the first n columns of each stream.
  void add(const std::vector<Block>& streams, Eigen::Index n) {
    for (Eigen::Index from = 0; from < n; from += kHop) {
      const Eigen::Index count = std::min(kHop, n - from);
      if (in_spectrum()) {
        take(streams, from, count);
      } else {
        for (std::size_t row = 0; row < rows_.size(); ++row) combine(streams, from, count, row);
        sink_(result_.leftCols(count));
      }
    }
  }

  /// Ends the recording: hands out what remains. The next one begins with another object.
  void finish() {
    if (!in_spectrum()) return;
    const auto on_frame = [this](const Eigen::MatrixXd& frame) { add_frame(frame); };
    taken_.setZero();
    frames_->add(taken_, on_frame);  // one frame more: two of them see each sample
    frames_->finish(on_frame);
  }

 private:
  static constexpr Eigen::Index kLength = 2048, kHop = kLength / 2;

  bool in_spectrum() const { return how_.domain == Domain::spectrum && how_.statistic != Statistic::mean; }

  static float sample(const std::vector<Block>& streams, const Contribution& from, Eigen::Index column) {
    return streams[from.stream](from.row, column);
  }

  /// One row of the result from `count` columns.
  void combine(const std::vector<Block>& streams, Eigen::Index from, Eigen::Index count, std::size_t row) {
    const std::vector<Contribution>& contributions = rows_[row];
    std::vector<double> values(contributions.size());
    for (Eigen::Index i = 0; i < count; ++i) {
      double sum = 0, weights = 0;
      for (std::size_t k = 0; k < contributions.size(); ++k) {
        values[k] = sample(streams, contributions[k], from + i);
        sum += contributions[k].weight * values[k];
        weights += contributions[k].weight;
      }
      const double value = how_.statistic == Statistic::mean ? sum / weights : detail::combined(how_.statistic, values);
      result_(static_cast<Eigen::Index>(row), i) = static_cast<float>(value);
    }
  }

  void take(const std::vector<Block>& streams, Eigen::Index from, Eigen::Index count) {
    Eigen::Index input = 0;
    for (const auto& contributions : rows_) {
      for (const Contribution& contribution : contributions) {
        const Block& stream = streams[contribution.stream];
        taken_.row(input++).head(count) = stream.row(contribution.row).segment(from, count).matrix().cast<double>();
      }
    }
    samples_ += count;
    frames_->add(taken_.leftCols(count), [this](const Eigen::MatrixXd& frame) { add_frame(frame); });
  }

  /// `frame` [length, inputs]
  void add_frame(const Eigen::MatrixXd& frame) {
    const Eigen::MatrixXcd spectra = transform_.forward((frame.array().colwise() * window_.array()).matrix());
    Eigen::Index input = 0;
    for (Eigen::Index row = 0; row < result_.rows(); ++row) {
      const auto count = static_cast<Eigen::Index>(rows_[static_cast<std::size_t>(row)].size());
      Eigen::VectorXcd spectrum(spectra.rows());
      std::vector<std::complex<double>> values(static_cast<std::size_t>(count));
      for (Eigen::Index bin = 0; bin < spectra.rows(); ++bin) {
        for (Eigen::Index k = 0; k < count; ++k) values[static_cast<std::size_t>(k)] = spectra(bin, input + k);
        spectrum(bin) = detail::combined(how_.statistic, values);
      }
      input += count;
      sum_.col(row) += transform_.inverse(spectrum).cwiseProduct(window_);
    }
    emit();
  }

  /// Hands out the first half of the sums, over which two frames went: the frame from -half on and the next ones.
  void emit() {
    const Eigen::Index n = std::min(kHop, samples_ - position_);
    if (position_ >= 0 && n > 0) {
      const Eigen::ArrayXd weights = window_.head(kHop).array().square() + window_.tail(kHop).array().square();
      result_.leftCols(n) = (sum_.topRows(n).array().colwise() / weights.head(n)).transpose().cast<float>();
      sink_(result_.leftCols(n));
    }
    position_ += kHop;
    sum_.topRows(kHop) = sum_.bottomRows(kHop).eval();
    sum_.bottomRows(kHop).setZero();
  }

  Combination how_;
  std::vector<std::vector<Contribution>> rows_;
  Sink sink_;
  Block result_;  // [rows, hop]
  // In the spectrum
  Eigen::Index inputs_ = 0;  ///< contributions of all rows
  std::optional<CenteredFrames> frames_;
  detail::RealTransform transform_{kLength};
  Eigen::VectorXd window_;
  Eigen::MatrixXd taken_;  // [inputs, hop]
  Eigen::MatrixXd sum_;    // [length, rows]: windowed frames from `position_` on
  Eigen::Index position_ = -kHop, samples_ = 0;
};

}  // namespace headroom::inline v0::core
