#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/io/number.hpp"
#include "headroom/training/config.hpp"

namespace headroom::inline v0::training {

/// The shape of a batch: its examples, and their length in samples. Steps of one training may have several.
struct Bucket {
  int64_t batch_size, segment_length;
  bool operator==(const Bucket&) const = default;
};

namespace detail {

/// "2.5", or with a unit "2.5s", which is as many samples at `sample_rate`; none where it is no number.
inline std::optional<double> number_or_seconds(std::string_view text, int64_t sample_rate) {
  const bool seconds = text.ends_with('s');
  if (seconds) text.remove_suffix(1);
  const auto number = io::parse_number<double>(text);
  return number && seconds ? std::optional(*number * static_cast<double>(sample_rate)) : number;
}

}  // namespace detail

/// Reads "8x3s": 8 examples of 3 s; "8x132300" is in samples. Throws headroom.training.bucket.
inline Bucket parse_bucket(const std::string& text, int64_t sample_rate) {
  const size_t times = std::min(text.find('x'), text.size());
  const auto examples = detail::number_or_seconds(text.substr(0, times), 0);
  const auto samples = detail::number_or_seconds(times < text.size() ? text.substr(times + 1) : "", sample_rate);
  require(examples && *examples >= 1 && *examples <= 1e6 && *examples == std::floor(*examples) && samples &&
              *samples >= 1 && *samples <= 1e9,
          "headroom.training.bucket", "\"", text,
          "\" is no bucket; expected a number of examples and their length, as in 8x3s or, in samples, 8x132300");
  return {static_cast<int64_t>(*examples), std::llround(*samples)};
}

/// "8x132300".
inline std::string to_string(const Bucket& bucket) {
  return std::to_string(bucket.batch_size) + "x" + std::to_string(bucket.segment_length);
}

/// The shape of the batches of a configuration.
inline Bucket bucket_of(const Config& config) { return {config.training.batch_size, config.training.segment_length}; }

/// The configuration with batches of another shape.
inline Config with_bucket(Config config, const Bucket& bucket) {
  config.training.batch_size = bucket.batch_size;
  config.training.segment_length = bucket.segment_length;
  return config;
}

}  // namespace headroom::inline v0::training
