#pragma once

#include <algorithm>
#include <array>
#include <cctype>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "headroom/audio/reader.hpp"
#include "headroom/core/error.hpp"

/// A recording that `separate` was given or found.
struct Track {
  std::filesystem::path file;
  std::filesystem::path folder;  ///< below the output folder, as it is below the folder that was given
  double seconds = 0;
  int sample_rate = 0;
  std::optional<headroom::audio::AudioReader> pipe;  ///< what is not a file can be opened once

  headroom::audio::AudioReader open() { return pipe ? std::move(*pipe) : headroom::audio::AudioReader(file); }
  /// The file's name without its extension.
  std::string name() const { return file == "-" ? "stdin" : file.stem().string(); }
  /// That extension, without the dot.
  std::string extension() const { return file.has_extension() ? file.extension().string().substr(1) : ""; }
};

/// What was found below the paths that were given, and what is wrong with the rest.
struct Tracks {
  std::vector<Track> tracks;
  std::vector<std::string> errors;
};

namespace detail {

/// Whether a file has the name of an audio file. Kinds that libsndfile cannot read are among them, so that they are
/// reported.
inline bool is_audio_name(const std::filesystem::path& path) {
  constexpr std::array<std::string_view, 23> extensions = {
      ".wav",  ".wave", ".bwf", ".rf64", ".w64", ".flac", ".mp3", ".mp2", ".ogg", ".oga", ".opus", ".aif",
      ".aiff", ".aifc", ".au",  ".snd",  ".caf", ".m4a",  ".aac", ".wma", ".ape", ".wv",  ".alac"};
  std::string extension = path.extension().string();
  std::ranges::transform(extension, extension.begin(), [](unsigned char c) { return std::tolower(c); });
  return std::ranges::find(extensions, extension) != extensions.end();
}

/// Opens a file to see that it can be read and how long it is.
inline void add_track(const std::filesystem::path& file, const std::filesystem::path& folder, Tracks& found) {
  try {
    headroom::audio::AudioReader reader(file);
    Track track{file, folder, static_cast<double>(reader.frames()) / reader.sample_rate(), reader.sample_rate(), {}};
    std::error_code failure;
    if (!std::filesystem::is_regular_file(file, failure)) track.pipe.emplace(std::move(reader));
    found.tracks.push_back(std::move(track));
  } catch (const headroom::Error& error) {
    found.errors.push_back(error.what());
  }
}

/// Adds what is below `folder`, by name. Hidden files, __MACOSX and `output` are passed over; links to folders are not
/// followed.
inline void add_folder(const std::filesystem::path& folder, const std::filesystem::path& below,
                       const std::filesystem::path& output, Tracks& found) {
  std::error_code failure;
  std::vector<std::filesystem::directory_entry> entries;
  for (std::filesystem::directory_iterator entry(folder, failure), end; !failure && entry != end;
       entry.increment(failure)) {
    entries.push_back(*entry);
  }
  if (failure) {
    found.errors.push_back("[headroom.separate.inputs] cannot list the folder " + folder.string() + ": " +
                           failure.message() + "; check its permissions");
  }
  std::ranges::sort(entries);
  for (const auto& entry : entries) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with('.') || name == "__MACOSX") continue;
    if (!entry.is_directory(failure)) {
      if (is_audio_name(name)) add_track(entry.path(), below, found);
    } else if (!entry.is_symlink(failure) && !std::filesystem::equivalent(entry.path(), output, failure)) {
      add_folder(entry.path(), below / name, output, found);
    }
  }
}

}  // namespace detail

/// All recordings in `inputs`, which are files, `-` or folders. Throws headroom.separate.inputs where there is none.
inline Tracks find_tracks(const std::vector<std::filesystem::path>& inputs, const std::filesystem::path& output) {
  Tracks found;
  std::error_code failure;
  for (const auto& input : inputs) {
    if (input != "-" && std::filesystem::is_directory(input, failure)) {
      detail::add_folder(input, "", output, found);
    } else {
      detail::add_track(input, "", found);
    }
  }
  headroom::require(!found.tracks.empty() || !found.errors.empty(), "headroom.separate.inputs",
                    "there is no audio file in ", inputs.front(),
                    "; expected files whose names end with .wav, .flac, .mp3, .ogg, .aiff or the like");
  return found;
}

/// How many tracks have another sample rate than the model: "2 files of 48000 Hz".
inline std::vector<std::string> other_rates(const std::vector<Track>& tracks, int sample_rate) {
  std::map<int, int> counts;
  for (const Track& track : tracks) counts[track.sample_rate] += track.sample_rate != sample_rate;
  std::vector<std::string> texts;
  for (const auto& [rate, count] : counts) {
    if (count > 0) {
      texts.push_back(std::to_string(count) + (count == 1 ? " file of " : " files of ") + std::to_string(rate) + " Hz");
    }
  }
  return texts;
}
