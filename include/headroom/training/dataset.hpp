#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "headroom/audio/file.hpp"
#include "headroom/core/error.hpp"
#include "headroom/io/file_name.hpp"
#include "headroom/training/example.hpp"

namespace headroom::inline v0::training {

/// How a track is drawn.
enum class TrackDraw {
  uniform,    ///< every track equally often
  by_length,  ///< every segment of the whole data set equally often
};

/// What a MusdbDataset draws.
struct MusdbOptions {
  std::int64_t segment_length = 441000;                                   ///< S, samples
  std::int64_t channels = 2;                                              ///< C, of every file
  std::int64_t sample_rate = 44100;                                       ///< of every file, Hz
  std::vector<std::string> stems = {"vocals", "drums", "bass", "other"};  ///< plain file names without .wav, N of them
  std::vector<std::string> accompaniment = {};                            ///< files of the mixture that are no stems
  TrackDraw draw = TrackDraw::uniform;
  /// Probability that each stem of an example comes from a track and position of its own; the mixture is their sum.
  /// Otherwise the example is what the files hold. The three options that follow act on the stems of remixed examples.
  double remix = 0;
  std::array<double, 2> gain = {0.25, 1.25};  ///< least and greatest random factor
  bool swap_channels = true;                  ///< reverse the order of the channels of half of the stems
  bool flip_polarity = true;                  ///< negate half of the stems
};

namespace detail {

/// SplitMix64 (Steele, Lea, Flood 2014). Unlike those of <random>, its numbers are the same with every library.
class SplitMix64 {
 public:
  explicit SplitMix64(std::uint64_t state) : state_(state) {}

  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  /// In [0, 1).
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  /// In {0, …, n - 1}.
  std::int64_t below(std::int64_t n) {
    return std::min(n - 1, static_cast<std::int64_t>(uniform() * static_cast<double>(n)));
  }
  bool coin() { return next() >> 63; }

 private:
  std::uint64_t state_;
};

}  // namespace detail

/// Random segments of a folder in the MUSDB18-HQ layout, FOLDER/<Artist - Title>/{mixture,vocals,drums,bass,other}.wav.
/// A track without mixture.wav has the sum of its stems and their accompaniment for one. Folders that hold none of the
/// files (`__MACOSX`) and tracks that are shorter than a segment are left out, see notices().
///
/// The constructor looks at the header of every file, so that a bad one is found before training and not in the middle
/// of it; samples are read when an example is, and nothing else of the file. An example is a pure function of a seed
/// and its index: a training run continues where it stopped by knowing the index alone, and examples can be made in any
/// order by any number of threads.
class MusdbDataset {
 public:
  /// `folder`: the split, e.g. musdb18hq/train. Throws `headroom.training.dataset.{options, empty, missing, differs,
  /// short}` and `headroom.audio.file.*`; each names the file.
  MusdbDataset(std::filesystem::path folder, MusdbOptions options)
      : folder_(std::move(folder)), options_(std::move(options)) {
    check_options();
    std::string short_track;  // the first one, and its length
    for (const std::string& name : folder_names()) {
      if (const auto track = checked_track(name)) {
        if (track->frames >= options_.segment_length) {
          tracks_.push_back(*track);
          continue;
        }
        if (short_track.empty()) short_track = name + "\" has " + std::to_string(track->frames);
        notices_.push_back(name + " is left out: it has " + std::to_string(track->frames) + " frames, a segment has " +
                           std::to_string(options_.segment_length));
      } else {
        notices_.push_back(name + " is left out: none of the files of a track is in it");
      }
    }
    require(!tracks_.empty() || short_track.empty(), "headroom.training.dataset.short", "\"", folder_.string(), "/",
            short_track, " frames, a segment has ", options_.segment_length,
            ", and no track is longer; shorten segment_length or give longer tracks");
    require_tracks(!tracks_.empty(), "");
    std::int64_t positions = 0;
    for (const Track& track : tracks_) {
      ends_.push_back(positions += track.frames - options_.segment_length + 1);
    }
  }

  std::int64_t size() const { return static_cast<std::int64_t>(tracks_.size()); }  ///< tracks
  const MusdbOptions& options() const { return options_; }

  /// What of the folder is left out and why, a sentence each.
  const std::vector<std::string>& notices() const { return notices_; }

  /// Names of the tracks, sorted.
  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const Track& track : tracks_) {
      names.push_back(track.name);
    }
    return names;
  }

  /// Example number `index` >= 0 of the endless sequence that `seed` stands for.
  Example example(std::uint64_t seed, std::int64_t index) const {
    detail::SplitMix64 random(detail::SplitMix64(seed).next() + static_cast<std::uint64_t>(index));
    random = detail::SplitMix64(random.next());  // neighbouring indices must not walk through the same states
    const bool remixed = random.uniform() < options_.remix;
    const Position together = draw(random);
    std::vector<torch::Tensor> stems;  // N and those of the accompaniment, of [C,S]
    for (const std::string& stem : files()) {
      torch::Tensor samples = read(remixed ? draw(random) : together, stem);  // [C,S]
      if (remixed) {
        const auto [least, greatest] = options_.gain;
        const bool swapped = random.coin(), flipped = random.coin();
        const double gain = least + (greatest - least) * random.uniform();
        samples = options_.swap_channels && swapped ? samples.flip(0) : samples;
        samples = samples * (options_.flip_polarity && flipped ? -gain : gain);
      }
      stems.push_back(samples);
    }
    const torch::Tensor all = torch::stack(stems);  // [N+…,C,S]
    return {remixed || !together.track->has_mixture ? all.sum(0) : read(together, "mixture"),
            all.narrow(0, 0, static_cast<std::int64_t>(options_.stems.size()))};
  }

  /// Examples first_index, …, first_index + count - 1: [B,C,S] and [B,N,C,S].
  Example batch(std::uint64_t seed, std::int64_t first_index, std::int64_t count) const {
    require(count >= 1, "headroom.training.dataset.options", "asked for a batch of ", count, ", expected at least 1");
    std::vector<torch::Tensor> mixtures, stems;
    for (std::int64_t i = 0; i < count; ++i) {
      Example one = example(seed, first_index + i);
      mixtures.push_back(std::move(one.mixture));
      stems.push_back(std::move(one.stems));
    }
    return {torch::stack(mixtures), torch::stack(stems)};
  }

 private:
  struct Track {
    std::string name;
    std::int64_t frames;
    bool has_mixture;
  };
  struct Position {
    const Track* track;
    std::int64_t frame;
  };

  void check_options() const {
    constexpr auto id = "headroom.training.dataset.options";
    const auto& o = options_;
    require(o.segment_length >= 1 && o.channels >= 1 && o.sample_rate >= 1, id, "got segment_length ", o.segment_length,
            ", channels ", o.channels, ", sample_rate ", o.sample_rate, ", expected at least 1 each");
    require(!o.stems.empty(), id, "got no stems, expected names such as vocals");
    for (const std::string& stem : files()) {
      require(io::is_file_name(stem), id, "the stem \"", stem, "\" is no plain file name, expected one such as vocals");
    }
    require(o.remix >= 0 && o.remix <= 1, id, "remix is ", o.remix, ", expected a probability");
    require(o.gain[0] >= 0 && o.gain[0] <= o.gain[1], id, "gain is ", o.gain[0], " to ", o.gain[1],
            ", expected 0 <= least <= greatest");
  }

  /// Stems, then their accompaniment.
  std::vector<std::string> files() const {
    std::vector<std::string> names = options_.stems;
    names.insert(names.end(), options_.accompaniment.begin(), options_.accompaniment.end());
    return names;
  }

  std::filesystem::path path(const Track& track, const std::string& stem) const {
    return folder_ / track.name / (stem + ".wav");
  }

  void require_tracks(bool found, const std::string& reason) const {
    require(found, "headroom.training.dataset.empty", "no tracks in ", folder_, reason,
            ", expected folders \"<Artist - Title>\" with one file a stem; give the folder of the split, e.g. "
            "musdb18hq/train");
  }

  /// Names of the folders inside, sorted: the file system's order differs between machines.
  std::vector<std::string> folder_names() const {
    std::vector<std::string> names;
    std::error_code failure;
    for (const auto& entry : std::filesystem::directory_iterator(folder_, failure)) {
      const std::string name = entry.path().filename().string();
      if (entry.is_directory() && !name.starts_with('.')) names.push_back(name);
    }
    require_tracks(!failure, ": " + failure.message());
    std::ranges::sort(names);
    return names;
  }

  /// Checks the headers of a track's files; none where the folder has no file of a track.
  std::optional<Track> checked_track(const std::string& name) const {
    Track track{name, -1, false};
    track.has_mixture = std::filesystem::exists(path(track, "mixture"));
    std::vector<std::string> files = this->files();
    if (track.has_mixture) files.insert(files.begin(), "mixture");
    const auto is_there = [&](const std::string& file) { return std::filesystem::exists(path(track, file)); };
    if (std::ranges::none_of(files, is_there)) return std::nullopt;
    for (const std::string& stem : files) {
      const std::filesystem::path file = path(track, stem);
      require(is_there(stem), "headroom.training.dataset.missing", "there is no ", file,
              ", expected one file a stem; add it or remove the track's folder");
      const audio::AudioReader reader(file);
      audio::require_sample_rate(reader, static_cast<int>(options_.sample_rate));
      track.frames = track.frames < 0 ? reader.frames() : track.frames;
      require(reader.channels() == options_.channels && reader.frames() == track.frames,
              "headroom.training.dataset.differs", file, " has ", reader.channels(), " channels and ", reader.frames(),
              " frames, expected ", options_.channels, " channels as configured and ", track.frames,
              " frames like the track's ", files.front(), ".wav; export the track again or remove its folder");
    }
    return track;
  }

  Position draw(detail::SplitMix64& random) const {
    if (options_.draw == TrackDraw::uniform) {
      const Track& track = tracks_[static_cast<std::size_t>(random.below(size()))];
      return {&track, random.below(track.frames - options_.segment_length + 1)};
    }
    const std::int64_t position = random.below(ends_.back());
    const auto end = std::ranges::upper_bound(ends_, position);
    const Track& track = tracks_[static_cast<std::size_t>(end - ends_.begin())];
    return {&track, track.frames - options_.segment_length + 1 - (*end - position)};
  }

  torch::Tensor read(const Position& position, const std::string& stem) const {
    audio::AudioReader reader(path(*position.track, stem));
    reader.seek(position.frame);
    return reader.read(options_.segment_length);  // [C,S]
  }

  std::filesystem::path folder_;
  MusdbOptions options_;
  std::vector<Track> tracks_;
  std::vector<std::string> notices_;
  std::vector<std::int64_t> ends_;  ///< of each track in the sequence of all positions that a segment can have
};

}  // namespace headroom::inline v0::training
