#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <string_view>
#include <vector>

#include "headroom/core/median.hpp"
#include "headroom/core/track_scores.hpp"

namespace headroom::inline v0::core {

/// One metric of the stems of a track, or of several: a value for each stem and, last, their mean; nothing where
/// silence leaves no score.
using ScoreRow = std::vector<std::optional<double>>;

/// Over the values that are there.
inline std::optional<double> mean_of(const ScoreRow& values) {
  double sum = 0, count = 0;
  for (const auto& value : values) {
    sum += value.value_or(0);
    count += value.has_value();
  }
  return count > 0 ? std::optional(sum / count) : std::nullopt;
}

/// The row of the values of the stems.
inline ScoreRow with_mean(ScoreRow values) {
  values.push_back(mean_of(values));
  return values;
}

/// A metric over tracks, column by column, without those that are silent: museval's median for BSSEval, else the mean.
inline ScoreRow over_tracks(std::string_view metric, const std::vector<ScoreRow>& tracks) {
  ScoreRow result;
  for (std::size_t column = 0; column < tracks.front().size(); ++column) {
    ScoreRow values;
    std::vector<double> sounding;
    for (const ScoreRow& track : tracks) {
      values.push_back(track[column]);
      if (track[column]) sounding.push_back(*track[column]);
    }
    result.push_back(is_bss_metric(metric) ? median(sounding) : mean_of(values));
  }
  return result;
}

/// How a metric is written for people, and its unit. More is better with all of them.
struct MetricName {
  std::string_view metric, name, unit;
};
inline constexpr std::array<MetricName, 10> kMetricNames = {{{"nsdr", "nSDR", "dB"},
                                                             {"si_sdr", "SI-SDR", "dB"},
                                                             {"sdr", "SDR", "dB"},
                                                             {"isr", "ISR", "dB"},
                                                             {"sir", "SIR", "dB"},
                                                             {"sar", "SAR", "dB"},
                                                             {"l1_freq", "L1-freq", "of 100"},
                                                             {"log_wmse", "log-WMSE", ""},
                                                             {"bleedless", "bleedless", "of 100"},
                                                             {"fullness", "fullness", "of 100"}}};
static_assert(std::ranges::equal(kMetrics, kMetricNames, {}, {}, &MetricName::metric));

/// Of one of kMetrics.
inline const MetricName& metric_name(std::string_view metric) {
  return *std::ranges::find(kMetricNames, metric, &MetricName::metric);
}

}  // namespace headroom::inline v0::core
