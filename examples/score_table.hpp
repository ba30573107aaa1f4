#pragma once

#include <algorithm>
#include <cstddef>
#include <iomanip>
#include <iostream>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "command_line.hpp"
#include "headroom/core/bsseval.hpp"
#include "headroom/core/track_scores.hpp"
#include "headroom/training/json.hpp"

/// A value for each stem and, last, their mean; nothing where silence leaves no score.
using Row = std::vector<std::optional<double>>;

/// Over the values that are there.
inline std::optional<double> mean_of(const Row& values) {
  double sum = 0, count = 0;
  for (const auto& value : values) {
    sum += value.value_or(0);
    count += value.has_value();
  }
  return count > 0 ? std::optional(sum / count) : std::nullopt;
}

/// The row of the values of the stems.
inline Row with_mean(Row values) {
  values.push_back(mean_of(values));
  return values;
}

/// A metric over tracks, column by column, without those that are silent: museval's median for BSSEval, else the mean.
inline Row over_tracks(const std::string& metric, const std::vector<Row>& tracks) {
  Row result;
  for (std::size_t column = 0; column < tracks.front().size(); ++column) {
    Row values;
    std::vector<double> sounding;
    for (const Row& track : tracks) {
      values.push_back(track[column]);
      if (track[column]) sounding.push_back(*track[column]);
    }
    result.push_back(headroom::core::is_bss_metric(metric) ? headroom::core::median(sounding) : mean_of(values));
  }
  return result;
}

/// Prints scores, a line for each track and metric, with a column for each stem and one for their mean.
class ScoreTable {
 public:
  /// `names`: what stands before the lines.
  ScoreTable(const std::vector<std::string>& stems, const std::vector<std::string>& names) : columns_(stems) {
    columns_.push_back("mean");
    for (const std::string& name : names) width_ = std::max(width_, static_cast<int>(printable(name).size()) + 1);
    std::cout << std::left << std::setw(width_) << "track" << std::setw(kMetricWidth) << "metric" << std::right;
    for (const std::string& column : columns_) std::cout << std::setw(width_of(column)) << column;
    std::cout << '\n';
  }

  void print(const std::string& name, const std::string& metric, const Row& row) const {
    std::cout << std::left << std::setw(width_) << printable(name) << std::setw(kMetricWidth) << metric << std::right
              << std::fixed << std::setprecision(2);
    for (std::size_t i = 0; i < columns_.size(); ++i) {
      std::cout << std::setw(width_of(columns_[i]));
      if (row[i]) {
        std::cout << *row[i];
      } else {
        std::cout << "-";
      }
    }
    std::cout << std::endl;  // a row appears when its track is done
  }

  headroom::training::Json json(const Row& row) const {
    headroom::training::Json json;
    for (std::size_t i = 0; i < columns_.size(); ++i) {
      json[columns_[i]] = row[i] ? headroom::training::Json(*row[i]) : nullptr;
    }
    return json;
  }

 private:
  static constexpr int kMetricWidth = 10;

  static int width_of(const std::string& column) { return std::max(9, static_cast<int>(column.size()) + 1); }

  std::vector<std::string> columns_;
  int width_ = 16;
};
