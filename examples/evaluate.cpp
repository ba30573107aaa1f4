// evaluate: how close separated stems are to the true ones, track by track and over all tracks: nSDR beside that of two
// estimators that need no model, silence (always 0 dB) and the mixture itself, and whatever other metrics are asked
// for.
//
//   evaluate --reference musdb18hq/test --estimate separated/test --json result.json
//   evaluate --reference "musdb18hq/test/Artist - Title" --estimate "separated/Artist - Title" --metrics all
//   evaluate --reference musdb18hq/test --estimate separated/test --metrics bsseval --museval scores/test

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <iostream>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "command_line.hpp"
#include "evaluation.hpp"
#include "headroom/core/bsseval.hpp"
#include "headroom/core/error.hpp"
#include "headroom/core/score_rows.hpp"
#include "headroom/core/track_scores.hpp"
#include "headroom/core/word_list.hpp"
#include "headroom/io/atomic_file.hpp"
#include "headroom/io/file_name.hpp"
#include "headroom/io/nearest.hpp"
#include "headroom/training/json.hpp"
#include "headroom/training/score_json.hpp"
#include "museval_file.hpp"
#include "new_folder.hpp"
#include "score_table.hpp"

namespace fs = std::filesystem;

namespace {

struct Arguments {
  fs::path reference, estimate, json, museval;
  std::vector<std::string> stems = {"vocals", "drums", "bass", "other"}, metrics = {"nsdr"};
};

// The metrics that are asked for, in the order of the library. Throws headroom.evaluate.metrics.
std::vector<std::string> chosen_metrics(const Arguments& arguments) {
  std::vector<std::string> known(headroom::core::kMetrics.begin(), headroom::core::kMetrics.end()), names = known;
  names.insert(names.end(), {"bsseval", "all"});
  for (const std::string& given : arguments.metrics) {
    if (std::ranges::find(names, given) != names.end()) continue;
    const auto meant = headroom::io::nearest(given, names);
    headroom::fail("headroom.evaluate.metrics", "there is no metric \"", given, "\"; expected ",
                   headroom::core::word_list(names), meant ? "; did you mean " + *meant + "?" : "");
  }
  const auto asks_for = [&](const char* name) {
    return std::ranges::find(arguments.metrics, name) != arguments.metrics.end();
  };
  std::erase_if(known, [&](const std::string& metric) {
    return !asks_for("all") && !asks_for(metric.c_str()) &&
           !(headroom::core::is_bss_metric(metric) && (asks_for("bsseval") || !arguments.museval.empty()));
  });
  return known;
}

// Asked before anything is computed: whether the results can be written.
void check_results(const Arguments& arguments, const std::vector<std::string>& tracks) {
  std::vector<fs::path> results;
  if (!arguments.json.empty()) results.push_back(arguments.json);
  if (!arguments.museval.empty()) {
    for (const std::string& track : tracks) results.push_back(arguments.museval / (track + ".json"));
  }
  for (const fs::path& result : results) {
    const bool is_sound = result.extension() == ".wav" || result.extension() == ".flac";
    headroom::require(!is_sound, "headroom.evaluate.json", result,
                      " has the name of a sound, which may be a stem; give another path, such as result.json");
    const std::string reason = headroom::io::why_not_writable(result);
    headroom::require(reason.empty(), "headroom.evaluate.json", "can't write ", result, ": ", reason,
                      "; give another path");
  }
}

void notice(const std::string& text) { std::cerr << "evaluate: " << printable(text) << '\n'; }

void report_silence(const std::string& track, const headroom::core::TrackScores& scores,
                    const std::vector<std::string>& stems) {
  for (std::size_t i = 0; i < stems.size(); ++i) {
    if (scores.silent_reference[i]) notice(track + ": the true " + stems[i] + " is silent");
    if (scores.silent_estimate[i]) notice(track + ": the estimate of " + stems[i] + " is silent");
  }
  const auto silent =
      std::ranges::count_if(scores.frames, [](const headroom::core::BssFrame& frame) { return !frame; });
  if (silent > 0) {
    notice(track + ": BSSEval leaves out " + std::to_string(silent) + " of " + std::to_string(scores.frames.size()) +
           " frames, in which some stem is silent");
  }
}

void run(const Arguments& arguments) {
  for (const std::string& stem : arguments.stems) {
    headroom::require(headroom::io::is_file_name(stem), "headroom.evaluate.stems", "the stem \"", stem,
                      "\" is no plain file name; give names such as vocals,drums");
    headroom::require(std::ranges::count(arguments.stems, stem) == 1, "headroom.evaluate.stems", "the stem \"", stem,
                      "\" is given twice; give each once");
  }
  const std::vector<std::string> metrics = chosen_metrics(arguments);
  const std::vector<std::string> tracks = find_tracks(arguments.reference, arguments.stems);
  std::vector<std::string> names = tracks;
  if (tracks.front().empty()) names = {fs::canonical(arguments.reference).filename().string()};
  std::optional<NewFolder> folder;
  if (!arguments.museval.empty()) folder.emplace(arguments.museval, "headroom.evaluate.json");
  check_results(arguments, names);
  for (const std::string& track : tracks) {  // what does not fit is told before hours of work, not after
    const TrackFiles files(arguments.reference / track, arguments.estimate / track, arguments.stems);
    files.require_length({.metrics = metrics});
  }

  const ScoreTable table(arguments.stems, names);
  std::map<std::string, std::vector<headroom::core::ScoreRow>> rows;  // by metric, for each track
  headroom::training::Json json;
  for (std::size_t i = 0; i < tracks.size(); ++i) {
    TrackFiles files(arguments.reference / tracks[i], arguments.estimate / tracks[i], arguments.stems);
    headroom::core::TrackOptions options = files.options();
    options.metrics = metrics;
    const headroom::core::TrackScores scores =
        headroom::core::score_track(options, [&](auto&& on_block) { files.read(on_block); });
    for (const std::string& metric : metrics) {
      rows[metric].push_back(headroom::core::with_mean(scores.metrics.at(metric)));
      table.print(names[i], metric, rows[metric].back());
      json["tracks"][names[i]][metric] = headroom::training::score_json(arguments.stems, rows[metric].back());
    }
    rows["nsdr_mixture"].push_back(headroom::core::with_mean(scores.mixture_nsdr));
    headroom::core::ScoreRow silence = rows["nsdr_mixture"].back();
    for (auto& value : silence) value = value ? std::optional(0.0) : std::nullopt;
    rows["nsdr_silence"].push_back(silence);
    report_silence(names[i], scores, arguments.stems);
    if (!arguments.museval.empty()) {
      write_museval_file(arguments.museval / (names[i] + ".json"), arguments.stems, scores.frames);
    }
  }
  for (const std::string& metric : metrics) {
    const headroom::core::ScoreRow row = headroom::core::over_tracks(metric, rows[metric]);
    table.print(headroom::core::is_bss_metric(metric) ? "median" : "mean", metric, row);
    json[metric] = headroom::training::score_json(arguments.stems, row);
  }
  if (std::ranges::find(metrics, "nsdr") != metrics.end()) {
    for (const auto& [name, key] : {std::pair("silence", "nsdr_silence"), std::pair("mixture", "nsdr_mixture")}) {
      const headroom::core::ScoreRow row = headroom::core::over_tracks("nsdr", rows[key]);
      table.print(name, "nsdr", row);
      json[key] = headroom::training::score_json(arguments.stems, row);
    }
  }
  if (!arguments.json.empty()) {
    headroom::io::write_file(arguments.json, "headroom.evaluate.json", {headroom::training::json_text(json, 2), "\n"});
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_tool("evaluate", [&] {
    CommandLine line("Compares separated stems with the true ones: scores of each stem and track.");
    Arguments arguments;
    line.path("--reference", arguments.reference,
              "track folder with mixture.wav and the true stems, or a folder of such")
        .required();
    line.path("--estimate", arguments.estimate, "separated stems in the same layout and with the same names")
        .required();
    line.texts("--stems", arguments.stems, "file names without .wav or .flac").separated_by(',').with_default();
    line.texts("--metrics", arguments.metrics,
               "nsdr, si_sdr, sdr, isr, sir, sar (these four: bsseval), l1_freq, log_wmse, bleedless, fullness, or all")
        .separated_by(',')
        .with_default();
    line.path("--json", arguments.json, "also write the result to this file");
    line.path("--museval", arguments.museval,
              "also compute BSSEval and write DIR/TRACK.json as museval does, with each frame");
    line.threads();
    if (const auto ended = line.parse(argc, argv)) return *ended;
    run(arguments);
    return 0;
  });
}
