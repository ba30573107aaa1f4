#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <cstddef>
#include <functional>
#include <map>
#include <optional>
#include <ranges>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headroom/core/bss_correlations.hpp"
#include "headroom/core/bsseval.hpp"
#include "headroom/core/error.hpp"
#include "headroom/core/executor.hpp"
#include "headroom/core/log_wmse.hpp"
#include "headroom/core/nsdr.hpp"
#include "headroom/core/si_sdr.hpp"
#include "headroom/core/spectral_scores.hpp"

// All scores of a track in two readings of it, in the memory of a window whatever its length.

namespace headroom::inline v0::core {

/// What a stem can be scored with: nSDR and SI-SDR, BSSEval's four, and what Music-Source-Separation-Training adds.
inline constexpr std::array<std::string_view, 10> kMetrics = {"nsdr", "si_sdr",  "sdr",      "isr",       "sir",
                                                              "sar",  "l1_freq", "log_wmse", "bleedless", "fullness"};

/// Whether a metric is of frames, of which a track has the median.
inline bool is_bss_metric(std::string_view metric) {
  return metric == "sdr" || metric == "isr" || metric == "sir" || metric == "sar";
}

/// What a track is scored with, and what it is made of.
struct TrackOptions {
  Eigen::Index sources = 4, channels = 2;
  double sample_rate = 44100;                   ///< Hz; frames of BSSEval have one second
  std::vector<std::string> metrics = {"nsdr"};  ///< of kMetrics

  /// Whether `metric` is one of `metrics`.
  bool asks_for(std::string_view metric) const { return std::ranges::find(metrics, metric) != metrics.end(); }
  /// Samples that a track has at least.
  Eigen::Index least_samples() const { return asks_for("l1_freq") ? L1FrequencyScore::kLeastSamples : 1; }
  /// Whether one of BSSEval's four is.
  bool asks_for_bss() const { return std::ranges::any_of(metrics, is_bss_metric); }
  /// Whether a track is read twice, from its beginning: once for what the second reading needs.
  bool reads_twice() const { return asks_for_bss() || asks_for("bleedless") || asks_for("fullness"); }

  /// Throws headroom.core.track_scores.options.
  void check() const {
    require(sources >= 1 && channels >= 1 && sample_rate >= 1, "headroom.core.track_scores.options", "got ", sources,
            " sources, ", channels, " channels, ", sample_rate, " Hz; expected at least 1 of each");
    for (const std::string& metric : metrics) {
      require(std::ranges::find(kMetrics, metric) != kMetrics.end(), "headroom.core.track_scores.options",
              "there is no metric \"", metric, "\"; expected some of kMetrics, such as nsdr");
    }
  }
};

/// Some samples of a track.
struct TrackBlock {
  Eigen::MatrixXf references, estimates;  ///< [sources x channels, n], the channels of a source one after the other
  Eigen::MatrixXf mixture;                ///< [channels, n]
};

/// The scores of a track.
struct TrackScores {
  /// By metric, for each source; nothing where a ratio says nothing: nSDR and SI-SDR of a silent reference, SI-SDR of a
  /// silent estimate, BSSEval where each frame has something silent.
  std::map<std::string, std::vector<std::optional<double>>, std::less<>> metrics;
  std::vector<std::optional<double>> mixture_nsdr;  ///< nSDR of the mixture in the place of each estimate
  /// Of each source, whether it is silent from beginning to end.
  std::vector<bool> silent_reference, silent_estimate;
  /// BSSEval of each second; none where it was not asked for.
  std::vector<BssFrame> frames;
};

namespace detail {

/// What is collected of one source by itself.
class SourceScores {
 public:
  explicit SourceScores(const TrackOptions& options) : options_(options) {
    if (asks_for("l1_freq")) l1_frequency_.emplace(options.channels);
    if (asks_for("log_wmse")) error_.emplace(options.channels, options.sample_rate);
    if (reads_mel()) peaks_.emplace(options.channels, options.sample_rate);
  }

  /// The first reading; the references and estimates of this source, [channels, n].
  void add(const Eigen::MatrixXf& reference, const Eigen::MatrixXf& estimate, const Eigen::MatrixXf& mixture) {
    silent_reference_ = silent_reference_ && (reference.array() == 0).all();
    silent_estimate_ = silent_estimate_ && (estimate.array() == 0).all();
    if (asks_for("nsdr")) nsdr_.add(reference, estimate), mixture_nsdr_.add(reference, mixture);
    if (asks_for("si_sdr")) si_sdr_.add(reference, estimate);
    if (l1_frequency_) l1_frequency_->add(reference, estimate);
    if (error_) error_->add(estimate.cast<double>() - reference.cast<double>());
    if (peaks_) peaks_->add(reference, estimate);
  }

  /// The second reading.
  void add_again(const Eigen::MatrixXf& reference, const Eigen::MatrixXf& estimate) {
    if (!peaks_) return;
    if (!bleed_) {
      peaks_->finish();
      bleed_.emplace(*peaks_, options_.channels, options_.sample_rate);
    }
    bleed_->add(reference, estimate);
  }

  /// One source more in the result. `mixture`: its energy as log_wmse asks for it.
  void finish(TrackScores& result, const Eigen::ArrayXd& mixture) {
    const auto unless_silent = [&](double value) { return silent_reference_ ? std::nullopt : std::optional(value); };
    const auto put = [&](const char* metric, std::optional<double> value) {
      if (asks_for(metric)) result.metrics[metric].push_back(value);
    };
    put("nsdr", unless_silent(nsdr_.value()));
    put("si_sdr", silent_estimate_ ? std::nullopt : unless_silent(si_sdr_.value()));
    if (l1_frequency_) put("l1_freq", l1_frequency_->finish());
    if (error_) put("log_wmse", log_wmse(error_->finish(), mixture));
    if (bleed_) {
      const BleedFullness score = bleed_->finish();
      put("bleedless", score.bleedless);
      put("fullness", score.fullness);
    }
    result.mixture_nsdr.push_back(unless_silent(mixture_nsdr_.value()));
    result.silent_reference.push_back(silent_reference_);
    result.silent_estimate.push_back(silent_estimate_);
  }

 private:
  bool asks_for(std::string_view metric) const { return options_.asks_for(metric); }
  bool reads_mel() const { return asks_for("bleedless") || asks_for("fullness"); }

  TrackOptions options_;
  NsdrAccumulator nsdr_, mixture_nsdr_;
  SiSdrAccumulator si_sdr_;
  std::optional<L1FrequencyScore> l1_frequency_;
  std::optional<HearingEnergy> error_;
  std::optional<MelPeaks> peaks_;
  std::optional<BleedFullnessScore> bleed_;
  bool silent_reference_ = true, silent_estimate_ = true;
};

/// The aggregates of frames.
inline void add_medians(TrackScores& result, const TrackOptions& options) {
  for (Eigen::Index source = 0; source < options.sources; ++source) {
    const std::optional<BssScores> scores = median_scores(result.frames, source);
    for (const auto& [metric, score] : {std::pair("sdr", &BssScores::sdr), std::pair("isr", &BssScores::isr),
                                        std::pair("sir", &BssScores::sir), std::pair("sar", &BssScores::sar)}) {
      if (!options.asks_for(metric)) continue;
      result.metrics[metric].push_back(scores ? std::optional((*scores).*score) : std::nullopt);
    }
  }
}

}  // namespace detail

/// Scores of a track. `read(on_block)` reads it from its beginning and calls `on_block(const TrackBlock&)` for one
/// block after the other, of any length; it is called twice where BSSEval, bleedless or fullness are asked for. The
/// threads of the executor share the sources and, in BSSEval, the channels; the scores are the same for any number of
/// them. Throws headroom.core.track_scores.options, headroom.core.frames.length, and what `read` throws.
template <class Reading, Executor E = DefaultExecutor>
TrackScores score_track(const TrackOptions& options, Reading&& read, const E& executor = {}) {
  options.check();
  const Eigen::Index channels = options.channels;
  std::vector<detail::SourceScores> sources(static_cast<std::size_t>(options.sources), detail::SourceScores(options));
  const auto of = [&](const Eigen::MatrixXf& signals, Eigen::Index source) {
    return Eigen::MatrixXf(signals.middleRows(source * channels, channels));
  };
  const bool asks_for_bss = options.asks_for_bss();
  const auto second = static_cast<Eigen::Index>(options.sample_rate);
  const BssOptions bss{.sources = options.sources, .channels = channels, .window = second, .hop = second};
  std::optional<BssCorrelations<E>> correlations;
  if (asks_for_bss) correlations.emplace(bss, executor);
  std::optional<HearingEnergy> mixture;
  if (options.asks_for("log_wmse")) mixture.emplace(channels, options.sample_rate);

  read([&](const TrackBlock& block) {
    executor.run(options.sources, [&](Eigen::Index source, int /*worker*/) {
      sources[static_cast<std::size_t>(source)].add(of(block.references, source), of(block.estimates, source),
                                                    block.mixture);
    });
    if (mixture) mixture->add(block.mixture);
    if (correlations) correlations->add(block.references, block.estimates);
  });

  std::optional<BssFrames<E>> frames;
  if (correlations) frames.emplace(BssFilters(*correlations), executor);
  correlations.reset();
  if (options.reads_twice()) {
    read([&](const TrackBlock& block) {
      executor.run(options.sources, [&](Eigen::Index source, int /*worker*/) {
        sources[static_cast<std::size_t>(source)].add_again(of(block.references, source), of(block.estimates, source));
      });
      if (frames) frames->add(block.references, block.estimates);
    });
  }

  TrackScores result;
  const Eigen::ArrayXd mixture_energy = mixture ? mixture->finish() : Eigen::ArrayXd();
  for (detail::SourceScores& source : sources) source.finish(result, mixture_energy);
  if (frames) result.frames = frames->finish();
  if (asks_for_bss) detail::add_medians(result, options);
  return result;
}

}  // namespace headroom::inline v0::core
