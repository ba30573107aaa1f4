#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "headroom/audio/reader.hpp"
#include "headroom/core/error.hpp"
#include "headroom/training/data_choices.hpp"
#include "headroom/training/layout.hpp"
#include "headroom/training/stem_file.hpp"

namespace headroom::inline v0::training {

/// A recording and the files of its stems.
struct Track {
  std::string name;
  std::vector<std::optional<StemFile>> stems;  ///< in the order of the data set's; none: not there
  std::optional<StemFile> mixture;
  std::int64_t frames = 0;  ///< of each file
  bool whole = true;        ///< not just one file of one stem
  std::size_t root = 0;     ///< which of the data set's roots it lies in

  bool has(std::size_t stem) const { return stems[stem].has_value(); }
};

/// What tracks are found and which are taken.
struct TrackRules {
  std::vector<std::string> stems;  ///< names of files without extension
  SoundFormat format;
  std::int64_t least_frames = 1;
  Layout layout = Layout::automatic;
  MissingStem missing = MissingStem::error;
  bool leave_out_damaged = false;  ///< a track with a file that cannot be read is left out; else it is an error
};

/// Tracks whose headers have been looked at, so that a bad file is found before training and not in the middle of it.
class TrackList {
 public:
  /// Throws headroom.training.dataset.{differs, empty, list, missing, short} and headroom.audio.file.*; each names the
  /// file.
  TrackList(const std::vector<std::filesystem::path>& roots, TrackRules rules) : rules_(std::move(rules)) {
    std::string short_track;  // the first one, and its length
    for (std::size_t root = 0; root < roots.size(); ++root) {
      std::size_t found = 0;
      for (const FoundTrack& files : find_tracks(roots[root], rules_.layout, rules_.stems)) {
        std::optional<Track> track = usable(files);
        if (!track) continue;
        ++found;
        track->root = root;
        if (track->frames >= rules_.least_frames) {
          tracks_.push_back(std::move(*track));
          continue;
        }
        if (short_track.empty()) {
          short_track = (roots[root] / track->name).string() + "\" has " + std::to_string(track->frames);
        }
        leave_out(track->name, "it has " + std::to_string(track->frames) + " frames, a segment has " +
                                   std::to_string(rules_.least_frames));
      }
      require(found > 0, "headroom.training.dataset.empty", "no tracks in ", roots[root],
              ", expected folders \"<Artist - Title>\" with one file a stem, folders with the names of the stems, or a "
              "CSV table of files; give the folder of the split, e.g. musdb18hq/train");
    }
    require(!tracks_.empty(), "headroom.training.dataset.short", "\"", short_track, " frames, a segment has ",
            rules_.least_frames, ", and no track is longer; shorten segment_length or give longer tracks");
  }

  const std::vector<Track>& tracks() const { return tracks_; }
  const TrackRules& rules() const { return rules_; }

  /// What is left out and why, a sentence each.
  const std::vector<std::string>& notices() const { return notices_; }

 private:
  void leave_out(const std::string& name, const std::string& reason) {
    notices_.push_back(name + " is left out: " + reason);
  }

  /// The same as checked(); a damaged track is left out where that is wanted.
  std::optional<Track> usable(const FoundTrack& found) {
    if (!rules_.leave_out_damaged) return checked(found);
    try {
      return checked(found);
    } catch (const Error& error) {
      if (!audio::is_file_error(error)) throw;
      leave_out(found.name, error.what());
      return std::nullopt;
    }
  }

  /// A track with the headers of its files; none, and a notice, where it is left out.
  std::optional<Track> checked(const FoundTrack& found) {
    if (found.files.empty()) {
      leave_out(found.name, "none of the files of a track is in it");
      return std::nullopt;
    }
    if (found.whole && !has_enough(found)) return std::nullopt;
    Track track{.name = found.name, .stems = {}, .mixture = {}, .whole = found.whole};
    const StemFile* first = nullptr;
    const auto open = [&](const std::string& name) -> std::optional<StemFile> {
      const auto file = found.files.find(name);
      if (file == found.files.end()) return std::nullopt;
      return open_stem_file(file->second, rules_.format);
    };
    track.mixture = open("mixture");
    for (const std::string& stem : rules_.stems) track.stems.push_back(open(stem));
    if (track.mixture) first = &*track.mixture;
    for (const auto& file : track.stems) {
      if (!file) continue;
      if (first == nullptr) first = &*file;
      require_same_length(*file, *first);
      track.frames = track.frames == 0 ? std::min(file->frames, first->frames) : std::min(track.frames, file->frames);
    }
    return track;
  }

  /// Whether a track may be taken with the stems that it has.
  bool has_enough(const FoundTrack& found) {
    std::size_t there = 0;
    for (const std::string& stem : rules_.stems) {
      const bool is_there = found.files.contains(stem);
      there += is_there;
      if (is_there || rules_.missing == MissingStem::silence) continue;
      const std::filesystem::path folder = found.files.begin()->second.parent_path();
      require(rules_.missing == MissingStem::leave_out, "headroom.training.dataset.missing", "there is no ",
              folder / (stem + ".wav"),
              ", .flac or the like, expected one file a stem; add it or remove the track's folder, or let data.missing "
              "say what becomes of such tracks");
      leave_out(found.name, "there is no " + stem + " in it");
      return false;
    }
    if (there == 0) leave_out(found.name, "none of the stems is in it");
    return there > 0;
  }

  static void require_same_length(const StemFile& file, const StemFile& first) {
    const std::int64_t tolerance = file.sample_rate == first.sample_rate ? 0 : 1;  // rounded after resampling
    require(std::abs(file.frames - first.frames) <= tolerance, "headroom.training.dataset.differs", file.path, " has ",
            file.frames, " frames, expected ", first.frames, " frames like the track's ", first.path.filename(),
            "; export the track again or remove its folder");
  }

  TrackRules rules_;
  std::vector<Track> tracks_;
  std::vector<std::string> notices_;
};

}  // namespace headroom::inline v0::training
