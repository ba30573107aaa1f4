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
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "command_line.hpp"
#include "headroom/audio/file.hpp"
#include "headroom/audio/metrics.hpp"
#include "headroom/io/atomic_file.hpp"
#include "headroom/io/file_name.hpp"

namespace fs = std::filesystem;
using headroom::audio::AudioReader;
using headroom::audio::NsdrAccumulator;

namespace {

// dB of each stem, and "mean" over the stems. Nothing where the true stem is silent: the ratio says nothing then.
using Scores = std::map<std::string, std::optional<double>>;

struct TrackScores {
  Scores estimate, silence, mixture;
};

void require_same_shape(const AudioReader& reader, const AudioReader& reference) {
  headroom::require(reader.channels() == reference.channels() && reader.frames() == reference.frames() &&
                        reader.sample_rate() == reference.sample_rate(),
                    "headroom.evaluate.differs", reader.path(), " has ", reader.channels(), " channels, ",
                    reader.frames(), " frames, ", reader.sample_rate(), " Hz, expected ", reference.channels(), ", ",
                    reference.frames(), ", ", reference.sample_rate(), " like ", reference.path(),
                    "; separate the track again from its mixture.wav");
}

// Over the values that are there.
std::optional<double> mean_of(const std::vector<std::optional<double>>& values) {
  double sum = 0, count = 0;
  for (const auto& value : values) {
    sum += value.value_or(0);
    count += value.has_value();
  }
  return count > 0 ? std::optional(sum / count) : std::nullopt;
}

void add_mean(Scores& scores) {
  std::vector<std::optional<double>> values;
  for (const auto& [stem, value] : scores) {
    values.push_back(value);
  }
  scores["mean"] = mean_of(values);
}

Scores mean_over_tracks(const std::vector<TrackScores>& tracks, Scores TrackScores::*estimator) {
  Scores means;
  for (const auto& [column, ignored] : tracks.front().*estimator) {
    std::vector<std::optional<double>> values;
    for (const TrackScores& track : tracks) {
      values.push_back((track.*estimator).at(column));
    }
    means[column] = mean_of(values);
  }
  return means;
}

// A track's mixture: mixture.wav, or the sum of the stems where there is none.
class Mixture {
 public:
  Mixture(const fs::path& track, const std::vector<std::string>& stems, const AudioReader& like) {
    std::vector<std::string> files = {"mixture"};
    if (!fs::exists(track / "mixture.wav")) files = stems;
    for (const std::string& file : files) {
      readers_.emplace_back(track / (file + ".wav"));
      require_same_shape(readers_.back(), like);
    }
  }

  torch::Tensor read(std::int64_t frames) {  // [C,n]
    torch::Tensor sum = readers_.front().read(frames);
    for (std::size_t i = 1; i < readers_.size(); ++i) sum += readers_[i].read(frames);
    return sum;
  }

 private:
  std::vector<AudioReader> readers_;
};

// Reads the files of a track a second at a time.
TrackScores evaluate_track(const fs::path& reference, const fs::path& estimate, const std::vector<std::string>& stems) {
  TrackScores scores;
  for (const std::string& stem : stems) {
    AudioReader truth(reference / (stem + ".wav")), guess(estimate / (stem + ".wav"));
    require_same_shape(guess, truth);
    Mixture mixture(reference, stems, truth);
    NsdrAccumulator of_guess, of_silence, of_mixture;
    while (truth.position() < truth.frames()) {
      const torch::Tensor s = truth.read(truth.sample_rate());  // [C,n]
      headroom::audio::add(of_guess, s, guess.read(s.size(1)));
      headroom::audio::add(of_silence, s, torch::zeros_like(s));
      headroom::audio::add(of_mixture, s, mixture.read(s.size(1)));
    }
    const auto value = [&](const NsdrAccumulator& of) {
      return of_silence.reference_energy() > 0 ? std::optional(of.value()) : std::nullopt;
    };
    scores.estimate[stem] = value(of_guess);
    scores.silence[stem] = value(of_silence);
    scores.mixture[stem] = value(of_mixture);
  }
  add_mean(scores.estimate);
  add_mean(scores.silence);
  add_mean(scores.mixture);
  return scores;
}

// Names of the tracks below `reference`; "" stands for the folder itself. A track has a mixture or all stems.
std::vector<std::string> find_tracks(const fs::path& reference, const std::vector<std::string>& stems) {
  const auto is_track = [&](const fs::path& folder) {
    const auto has = [&](const std::string& name) { return fs::exists(folder / (name + ".wav")); };
    return has("mixture") || std::ranges::all_of(stems, has);
  };
  if (is_track(reference)) {
    return {""};
  }
  std::vector<std::string> names;
  std::error_code failure;
  for (const auto& entry : fs::directory_iterator(reference, failure)) {
    if (is_track(entry.path())) {
      names.push_back(entry.path().filename().string());
    }
  }
  std::ranges::sort(names);
  headroom::require(
      !names.empty(), "headroom.evaluate.empty", "no tracks in ", reference, failure ? ": " + failure.message() : "",
      ", expected mixture.wav or all stems in it or in its folders; give a track or a split, e.g. musdb18hq/test");
  return names;
}

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

nlohmann::ordered_json to_json(const Scores& scores, const std::vector<std::string>& columns) {
  nlohmann::ordered_json json;
  for (const std::string& column : columns) {
    json[column] = scores.at(column) ? nlohmann::ordered_json(*scores.at(column)) : nullptr;
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
  nlohmann::ordered_json json;
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
  CLI::App app{"Compares separated stems with the true ones: nSDR in dB of each stem and track."};
  fs::path reference, estimate, json;
  std::vector<std::string> stems = {"vocals", "drums", "bass", "other"};
  add_path(app, "--reference", reference, "track folder with mixture.wav and the true stems, or a folder of such")
      ->required();
  add_path(app, "--estimate", estimate, "separated stems in the same layout and with the same names")->required();
  app.add_option("--stems", stems, "file names without .wav")->delimiter(',')->capture_default_str();
  add_path(app, "--json", json, "also write the result to this file");
  return run_tool("evaluate", app, argc, argv, [&] {
    run(reference, estimate, stems, json);
    return 0;
  });
}
