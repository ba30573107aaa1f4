#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iomanip>
#include <ostream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "headroom/memory/format.hpp"
#include "headroom/plan/report.hpp"
#include "headroom/training/bucket.hpp"
#include "headroom/training/config.hpp"
#include "headroom/training/plan.hpp"

namespace headroom::inline v0::training {

/// A member of a configuration and the values that it takes one after the other.
struct Sweep {
  std::string section, key;
  std::vector<int64_t> values;
};

/// Reads "segment_length=3s..15s", "batch_size=1,2,4,8" or "model.n_layers=4..12:3": a number of the configuration by
/// its name, with or without its section, and a list, or a range in evenly spaced points (5 unless told). A number of
/// seconds is one of samples at `sample_rate`. `config` has the model whose numbers are meant. Throws
/// headroom.training.sweep.
inline Sweep parse_sweep(const std::string& text, int64_t sample_rate, const Config& config = {}) {
  const auto check = [&](bool fine, const auto&... what) {
    require(fine, "headroom.training.sweep", "cannot sweep ", text, ": ", what...,
            "; expected a number of the configuration and its values, such as segment_length=3s..15s, "
            "segment_length=3s..15s:7 or batch_size=1,2,4");
  };
  const size_t equals = text.find('=');
  check(equals != std::string::npos, "there is no =");
  const std::string name = text.substr(0, equals), rest = text.substr(equals + 1);
  const size_t dot = name.find('.');
  Sweep sweep{
      dot == std::string::npos ? "" : name.substr(0, dot), name.substr(dot == std::string::npos ? 0 : dot + 1), {}};
  bool found = false;
  const auto sections = write_described(config);
  for (const auto& [section, members] : sections.items()) {
    if ((sweep.section.empty() || sweep.section == section) && members.contains(sweep.key) &&
        members[sweep.key].is_number_integer()) {
      sweep.section = section;
      found = true;
    }
  }
  check(found, "no number of the configuration is called ", name);
  const auto number = [&](const std::string& value) {
    const auto parsed = detail::number_or_seconds(value, sample_rate);
    check(parsed && std::abs(*parsed) <= 1e15, "\"", value, "\" is no number up to 10^15");
    return *parsed;
  };
  if (const size_t dots = rest.find(".."); dots != std::string::npos) {
    const size_t colon = rest.find(':', dots);
    const double first = number(rest.substr(0, dots));
    const double last = number(rest.substr(dots + 2, colon == std::string::npos ? colon : colon - dots - 2));
    const double points = colon == std::string::npos ? 5 : number(rest.substr(colon + 1));
    check(points >= 2 && points <= 1000 && last > first, "a range rises and has 2 to 1000 points");
    for (int i = 0; i < static_cast<int>(points); ++i) {
      sweep.values.push_back(std::llround(first + (last - first) * i / (std::floor(points) - 1)));
    }
  } else {
    std::istringstream list(rest);
    for (std::string value; std::getline(list, value, ',');) sweep.values.push_back(std::llround(number(value)));
  }
  check(!sweep.values.empty(), "there are no values");
  return sweep;
}

/// The configuration with a member of the sweep at a value. Throws headroom.training.config where the two do not fit.
inline Config with_value(const Config& config, const Sweep& sweep, int64_t value) {
  auto document = write_described(config);
  document[sweep.section][sweep.key] = value;
  return parse_config(document.dump(), sweep.section + "." + sweep.key + " = " + std::to_string(value));
}

/// What one configuration needs at one value.
struct SweepRow {
  std::string configuration;
  int64_t value = 0;
  std::string attention;  ///< "reference", which stores the scores, or what stores none
  int64_t peak_bytes = 0, reserved_bytes = 0;
  bool fits = false;
  double flops = 0;    ///< of an optimizer step
  double seconds = 0;  ///< at least, by the device's peak rate; 0: that is not known
};

/// Plans every configuration at every value, with attention that stores the scores and with one that does not.
inline std::vector<SweepRow> plan_sweep(const std::vector<std::pair<std::string, Config>>& configurations,
                                        const Sweep& sweep, const DeviceProfile& device,
                                        const PlanOptions& options = {}) {
  std::vector<SweepRow> rows;
  for (const auto& [name, config] : configurations) {
    for (const int64_t value : sweep.values) {
      for (const char* attention : {"reference", device.device().is_cpu() ? "tiled" : "automatic"}) {
        Config candidate = with_value(config, sweep, value);
        candidate.model.attention = attention;
        const Plan plan = plan_training(candidate, device, options);
        rows.push_back({name, value, attention, plan.peak_bytes, plan.reserved_bytes, plan.fits, plan.flops,
                        device.flops_per_second > 0 ? plan.flops / device.flops_per_second : 0});
      }
    }
  }
  return rows;
}

/// The rows as a table for people, both kinds of attention side by side. `format` writes a value.
inline void print_sweep(std::ostream& out, const std::vector<SweepRow>& rows, const Sweep& sweep,
                        const DeviceProfile& device, const std::function<std::string(int64_t)>& format) {
  out << "A training step on " << device.name << "; * does not fit\n"
      << std::left << std::setw(36) << "configuration" << std::right << std::setw(16) << sweep.key << std::setw(18)
      << "stored scores" << std::setw(18) << "none stored" << std::setw(14) << "operations" << std::setw(12)
      << "at least"
      << "\n";
  for (size_t i = 0; i + 1 < rows.size(); i += 2) {
    const SweepRow &stored = rows[i], &none = rows[i + 1];
    const auto bytes = [](const SweepRow& row) { return format_bytes(row.peak_bytes) + (row.fits ? "  " : " *"); };
    std::ostringstream seconds;
    seconds << std::setprecision(3) << none.seconds << " s";
    out << std::left << std::setw(36) << none.configuration << std::right << std::setw(16) << format(none.value)
        << std::setw(18) << bytes(stored) << std::setw(18) << bytes(none) << std::setw(14)
        << headroom::detail::scaled_flops(none.flops) << std::setw(12) << (none.seconds > 0 ? seconds.str() : "-")
        << "\n";
  }
}

/// The rows as JSON: {"device", "budget_bytes", "key", "rows": [...]}.
inline std::string sweep_json(const std::vector<SweepRow>& rows, const Sweep& sweep, const DeviceProfile& device,
                              int64_t budget) {
  Json json = {{"device", device.name}, {"budget_bytes", budget}, {"key", sweep.section + "." + sweep.key}};
  for (const SweepRow& row : rows) {
    json["rows"].push_back({{"configuration", row.configuration},
                            {"value", row.value},
                            {"attention", row.attention},
                            {"peak_bytes", row.peak_bytes},
                            {"reserved_bytes", row.reserved_bytes},
                            {"fits", row.fits},
                            {"flops", row.flops},
                            {"seconds", row.seconds}});
  }
  return json_text(json, 2) + "\n";
}

}  // namespace headroom::inline v0::training
