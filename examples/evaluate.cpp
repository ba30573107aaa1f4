// evaluate: how close separated stems are to the true ones, in dB of nSDR, track by track and in the mean, beside two
// estimators that need no model: silence (always 0 dB) and the mixture itself.
//
//   evaluate --reference musdb18hq/test --estimate separated/test --json result.json
//   evaluate --reference "musdb18hq/test/Artist - Title" --estimate "separated/Artist - Title"

#include <algorithm>
#include <filesystem>
#include <iomanip>
#include <iostream>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "command_line.hpp"
#include "evaluation.hpp"
#include "headroom/io/atomic_file.hpp"
#include "headroom/io/file_name.hpp"
#include "headroom/training/json.hpp"

namespace fs = std::filesystem;

namespace {

int width_of(const std::string& column) { return std::max(9, static_cast<int>(column.size()) + 1); }

void print_row(const std::string& name, const Scores& scores, const std::vector<std::string>& columns, int width) {
  std::cout << std::left << std::setw(width) << name << std::right << std::fixed << std::setprecision(2);
  for (const std::string& column : columns) {
    std::cout << std::setw(width_of(column));
    if (const auto& value = scores.at(column)) {
      std::cout << *value;
    } else {
      std::cout << "silent";
    }
  }
  std::cout << std::endl;  // a row appears when its track is done
}

headroom::training::Json to_json(const Scores& scores, const std::vector<std::string>& columns) {
  headroom::training::Json json;
  for (const std::string& column : columns) {
    json[column] = scores.at(column) ? headroom::training::Json(*scores.at(column)) : nullptr;
  }
  return json;
}

void run(const fs::path& reference, const fs::path& estimate, const std::vector<std::string>& stems,
         const fs::path& json_path) {
  for (const std::string& stem : stems) {
    headroom::require(headroom::io::is_file_name(stem), "headroom.evaluate.stems", "the stem \"", stem,
                      "\" is no plain file name; give names such as vocals,drums");
  }
  if (!json_path.empty()) {
    const std::string reason = headroom::io::why_not_writable(json_path);
    headroom::require(reason.empty(), "headroom.evaluate.json", "can't write ", json_path, ": ", reason,
                      "; give another path");
  }
  const std::vector<std::string> tracks = find_tracks(reference, stems);
  const auto name_of = [&](const std::string& track) {
    return track.empty() ? fs::canonical(reference).filename().string() : track;
  };
  int width = 16;
  for (const std::string& track : tracks) {
    width = std::max(width, static_cast<int>(name_of(track).size()) + 1);
  }

  std::vector<std::string> columns = stems;
  columns.push_back("mean");
  std::cout << std::left << std::setw(width) << "nSDR [dB]" << std::right;
  for (const std::string& column : columns) {
    std::cout << std::setw(width_of(column)) << column;
  }
  std::cout << '\n';
  std::vector<TrackScores> scores;
  headroom::training::Json json;
  for (const std::string& track : tracks) {
    scores.push_back(evaluate_track(reference / track, estimate / track, stems));
    print_row(name_of(track), scores.back().estimate, columns, width);
    json["tracks"][name_of(track)] = to_json(scores.back().estimate, columns);
  }
  for (const auto& [name, key, estimator] : {std::tuple("mean", "nsdr", &TrackScores::estimate),
                                             std::tuple("silence", "nsdr_silence", &TrackScores::silence),
                                             std::tuple("mixture", "nsdr_mixture", &TrackScores::mixture)}) {
    const Scores mean = mean_over_tracks(scores, estimator);
    print_row(name, mean, columns, width);
    json[key] = to_json(mean, columns);
  }

  if (!json_path.empty()) {
    headroom::io::write_file(json_path, "headroom.evaluate.json", {json.dump(2), "\n"});
  }
}

}  // namespace

int main(int argc, char** argv) {
  CommandLine line("Compares separated stems with the true ones: nSDR in dB of each stem and track.");
  fs::path reference, estimate, json;
  std::vector<std::string> stems = {"vocals", "drums", "bass", "other"};
  line.path("--reference", reference, "track folder with mixture.wav and the true stems, or a folder of such")
      .required();
  line.path("--estimate", estimate, "separated stems in the same layout and with the same names").required();
  line.texts("--stems", stems, "file names without .wav").separated_by(',').with_default();
  line.path("--json", json, "also write the result to this file");
  return line.run("evaluate", argc, argv, [&] {
    run(reference, estimate, stems, json);
    return 0;
  });
}
