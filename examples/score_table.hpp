#pragma once

#include <algorithm>
#include <cstddef>
#include <iomanip>
#include <iostream>
#include <string>
#include <vector>

#include "command_line.hpp"
#include "headroom/core/score_rows.hpp"

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

  void print(const std::string& name, const std::string& metric, const headroom::core::ScoreRow& row) const {
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

 private:
  static constexpr int kMetricWidth = 10;

  static int width_of(const std::string& column) { return std::max(9, static_cast<int>(column.size()) + 1); }

  std::vector<std::string> columns_;
  int width_ = 16;
};
