#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "headroom/core/finite.hpp"
#include "headroom/core/score_rows.hpp"
#include "headroom/memory/format.hpp"
#include "headroom/memory/phase_meter.hpp"
#include "headroom/plan/page.hpp"
#include "headroom/training/chart.hpp"
#include "headroom/training/json.hpp"
#include "headroom/training/series.hpp"

namespace headroom::inline v0::training {

/// What a run looks like, from the lines of its metrics.jsonl: a web page of its own that loads nothing.
class RunPage {
 public:
  /// `facts`: what stands at its head, such as {"model", "bs_roformer"}.
  RunPage(std::string title, std::vector<std::pair<std::string, std::string>> facts)
      : title_(std::move(title)), facts_(std::move(facts)) {}

  /// A line of metrics.jsonl. Members that are missing leave no point.
  void add(const Json& line) {
    const int64_t step = line.at("step");
    // JSON equals text in a function that may not throw, and takes memory
    const auto* kind = line.at("kind").get_ptr<const std::string*>();
    if (kind == nullptr) return;
    if (*kind == "step") add_step(step, line);
    if (*kind == "validation" && line.contains("scores")) add_validation(step, line["scores"]);
  }

  /// Pictures of an excerpt as RunRecord keeps them.
  void set_pictures(Json pictures) { pictures_ = std::move(pictures); }

  /// The page; `state` says how the run goes. While it is `running` a browser loads the page anew each minute.
  std::string html(const std::string& state, bool running) const {
    std::ostringstream out;
    headroom::detail::begin_page(out, title_, std::string(running ? kRefresh : "") + kStyle);
    out << "<p id=\"state\">" << headroom::detail::html_text(state) << "</p>\n<table id=\"facts\">";
    for (const auto& [name, value] : facts_) {
      out << "<tr><th>" << headroom::detail::html_text(name) << "<td>" << headroom::detail::html_text(value);
    }
    out << "</table>\n<div class=\"charts\">\n";
    write_charts(out);
    out << "</div>\n";
    write_phases(out);
    if (!pictures_.empty()) write_pictures(out);
    headroom::detail::end_page(out);
    return out.str();
  }

 private:
  static constexpr const char* kRefresh = "<meta http-equiv=\"refresh\" content=\"60\">\n";
  static constexpr const char* kStyle =
      "<style>.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(440px,1fr));gap:8px 24px}"
      "figure{margin:0}figcaption{min-height:2.6em}figcaption span{margin-left:.8em;white-space:nowrap}"
      "figcaption .last{font-variant-numeric:tabular-nums}svg{width:100%}"
      ".line{fill:none;stroke-width:1.5;stroke-linejoin:round}.range{opacity:.25}"
      "#pictures img{display:block;width:240px;height:96px;image-rendering:pixelated}"
      "#pictures td,#pictures th{padding-bottom:10px;vertical-align:top}.note{color:var(--mute)}</style>\n";

  using Group = std::vector<Series>;

  static Series& series(Group& group, const std::string& name) {
    for (Series& one : group) {
      if (one.name() == name) return one;
    }
    return group.emplace_back(name);
  }

  /// NaN where there is none, which a series leaves out.
  static double number(const Json& object, const char* key) {
    const auto found = object.is_object() ? object.find(key) : object.end();
    return found != object.end() && found->is_number() ? found->get<double>()
                                                       : std::numeric_limits<double>::quiet_NaN();
  }

  void add_step(int64_t step, const Json& line) {
    constexpr double kGiB = 1 << 30;
    loss_.add(step, number(line, "loss"));
    rate_.add(step, number(line, "learning_rate"));
    norm_.add(step, number(line, "gradient_norm"));
    pace_.add(step, number(line, "examples") / number(line, "seconds"));
    data_.add(step, 1000 * number(line, "data_seconds"));
    series(memory_, "after the step").add(step, number(line, "live_bytes") / kGiB);
    if (!line.contains("phases")) return;
    for (const auto& [name, use] : line["phases"].items()) {
      const double seconds = number(use, "seconds"), bytes = number(use, "peak_bytes");
      constexpr double kMost = 1e18;
      if (!core::detail::is_finite(seconds) || !(std::abs(bytes) <= kMost)) continue;
      series(memory_, name).add(step, bytes / kGiB);
      add_phase(phases_, {name, seconds, static_cast<int64_t>(bytes)});
    }
  }

  void add_validation(int64_t step, const Json& scores) {
    for (const auto& [metric, of_stems] : scores.items()) {
      for (const auto& [stem, value] : of_stems.items()) {
        if (value.is_number()) series(scores_[metric], stem).add(step, value);
      }
    }
  }

  static Chart chart_of(std::string title, const Group& group, bool from_zero) {
    Chart chart{.title = std::move(title), .lines = {}, .from_zero = from_zero};
    for (const Series& one : group) chart.lines.push_back(&one);
    return chart;
  }

  void write_charts(std::ostream& out) const {
    write_chart(out, {.title = "Loss of a step", .lines = {&loss_}});
    for (const core::MetricName& metric : core::kMetricNames) {
      const auto found = scores_.find(std::string(metric.metric));
      if (found == scores_.end()) continue;
      const std::string unit = metric.unit.empty() ? "" : ", " + std::string(metric.unit);
      write_chart(out, chart_of("Validation: " + std::string(metric.name) + unit, found->second, false));
    }
    write_chart(out, {.title = "Learning rate", .lines = {&rate_}, .from_zero = true});
    write_chart(out, {.title = "Norm of the gradient", .lines = {&norm_}});
    write_chart(out, chart_of("Memory: highest in a phase, GiB", memory_, true));
    write_chart(out, {.title = "Examples a second", .lines = {&pace_}, .from_zero = true});
    write_chart(out, {.title = "Waiting for data, ms a step", .lines = {&data_}, .from_zero = true});
  }

  void write_phases(std::ostream& out) const {
    if (phases_.empty()) return;
    double seconds = 0;
    for (const PhaseUse& use : phases_) seconds += use.seconds;
    out << "<h2>Phases of a step</h2>\n<table id=\"phases\"><tr><th>phase<th>highest sum of all tensors<th>time";
    for (const PhaseUse& use : phases_) {
      out << "<tr><td>" << headroom::detail::html_text(use.name) << "<td class=\"n\">" << format_bytes(use.peak_bytes)
          << "<td class=\"n\">" << short_number(seconds > 0 ? 100 * use.seconds / seconds : 0) << " %";
    }
    out << "</table>\n";
  }

  static void write_picture(std::ostream& out, const Json& address, const std::string& what) {
    out << "<td><img alt=\"" << headroom::detail::html_text(what) << "\" src=\""
        << headroom::detail::html_text(address.get<std::string>()) << "\">";
  }

  void write_pictures(std::ostream& out) const {
    const Json& first = pictures_["first"];
    const Json& last = pictures_["last"];
    const auto at_step = [](const Json& estimates) { return "step " + estimates["step"].dump(); };
    out << "<h2>An excerpt of the validation data</h2>\n<p class=\"note\">" << short_number(pictures_["seconds"])
        << " seconds from left to right; 0 to " << short_number(pictures_["highest"])
        << " Hz upward, in equal steps of mel; black is 80 dB below the loudest of the mixture.</p>\n"
        << "<table id=\"pictures\"><tr><th><th>true<th>estimate at " << at_step(first) << "<th>estimate at "
        << at_step(last) << "<tr><th>mixture";
    write_picture(out, pictures_["mixture"], "spectrogram of the mixture");
    for (std::size_t i = 0; i < pictures_["stems"].size(); ++i) {
      const std::string stem = pictures_["stems"][i];
      out << "<tr><th>" << headroom::detail::html_text(stem);
      write_picture(out, pictures_["truth"][i], "spectrogram of the true " + stem);
      write_picture(out, first["estimates"][i], "estimate of " + stem + " at " + at_step(first));
      write_picture(out, last["estimates"][i], "estimate of " + stem + " at " + at_step(last));
    }
    out << "</table>\n";
  }

  std::string title_;
  std::vector<std::pair<std::string, std::string>> facts_;
  Series loss_{"loss"}, rate_{"learning rate"}, norm_{"norm"}, pace_{"examples a second"}, data_{"waiting"};
  Group memory_;
  std::map<std::string, Group> scores_;  ///< by metric
  std::vector<PhaseUse> phases_;
  Json pictures_;
};

}  // namespace headroom::inline v0::training
