#pragma once

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <system_error>
#include <vector>

#include "headroom/audio/stem_files.hpp"
#include "headroom/core/error.hpp"
#include "headroom/core/word_list.hpp"
#include "headroom/io/file_name.hpp"
#include "headroom/io/nearest.hpp"
#include "separation_inputs.hpp"

/// What is written of each recording, as the command line asks for it.
struct OutputChoice {
  std::vector<std::string> stems;  ///< of the model, none for all
  std::string two_stems;           ///< this one, and no_<it>
  std::string residual;            ///< what the model's stems leave of the recording, under this name
};

/// The stems that are made of a recording; none for all of the model's.
inline std::vector<std::string> needed_stems(const OutputChoice& choice) {
  return choice.two_stems.empty() && choice.residual.empty() ? choice.stems : std::vector<std::string>{};
}

/// A name, and of what a file with that name is the sum.
struct NamedSum {
  std::string name;
  std::vector<float> stems;
  float mixture = 0;
};

namespace detail {

inline std::size_t place_of(const std::string& stem, const std::vector<std::string>& stems) {
  const auto found = std::ranges::find(stems, stem);
  if (found == stems.end()) {
    const auto meant = headroom::io::nearest(stem, stems);
    headroom::fail("headroom.separate.stems", "the model has no stem \"", stem, "\"",
                   meant ? " (did you mean \"" + *meant + "\"?)" : "", ", expected one of ",
                   headroom::core::word_list(stems));
  }
  return static_cast<std::size_t>(found - stems.begin());
}

}  // namespace detail

/// The files of each recording, for a model with `stems`. What a model of one stem does not make, such as no_vocals, is
/// the recording without that stem. Throws headroom.separate.stems.
inline std::vector<NamedSum> chosen_sums(const std::vector<std::string>& stems, const OutputChoice& choice) {
  const auto none = std::vector<float>(stems.size(), 0);
  std::vector<NamedSum> sums;
  const auto add_stem = [&](const std::string& stem) {
    sums.push_back({stem, none, 0});
    sums.back().stems[detail::place_of(stem, stems)] = 1;
  };
  if (!choice.two_stems.empty()) {
    add_stem(choice.two_stems);
    NamedSum rest{"no_" + choice.two_stems, none, 0};
    const bool one = stems.size() == 1;
    for (std::size_t n = 0; n < stems.size(); ++n) rest.stems[n] = one ? -1.f : 1.f - sums.front().stems[n];
    rest.mixture = one ? 1.f : 0.f;
    sums.push_back(rest);
  } else {
    for (const std::string& stem : choice.stems.empty() ? stems : choice.stems) add_stem(stem);
  }
  if (!choice.residual.empty()) {
    headroom::require(headroom::io::is_file_name(choice.residual), "headroom.separate.stems", "--residual ",
                      choice.residual, " cannot be the name of a file; give a name without separators");
    sums.push_back({choice.residual, std::vector<float>(stems.size(), -1.f), 1.f});
  }
  for (auto sum = sums.begin(); sum != sums.end(); ++sum) {
    const bool twice = std::any_of(sums.begin(), sum, [&](const NamedSum& other) { return other.name == sum->name; });
    headroom::require(!twice, "headroom.separate.stems", "two files would be called ", sum->name,
                      "; give each name once, and --residual one that no stem has");
  }
  return sums;
}

/// A template such as {track}/{stem} with its placeholders replaced. Throws headroom.separate.name: a placeholder that
/// is none of them, or a path that leaves the output folder.
inline std::filesystem::path name_by(const std::string& pattern, const std::map<std::string, std::string>& values) {
  std::string name;
  for (std::size_t at = 0; at < pattern.size();) {
    if (pattern[at] != '{') {
      name += pattern[at++];
      continue;
    }
    const std::size_t end = std::min(pattern.find('}', at), pattern.size() - 1);
    const auto value = values.find(pattern.substr(at + 1, end - at - 1));
    headroom::require(value != values.end() && pattern[end] == '}', "headroom.separate.name", "--name ", pattern,
                      " has ", pattern.substr(at, end + 1 - at),
                      ", expected {track}, {ext}, {stem} or {model} in braces");
    name += value->second;
    at = end + 1;
  }
  const std::filesystem::path path = name;
  const bool inside = path.is_relative() && path.has_filename() && std::ranges::find(path, "..") == path.end();
  headroom::require(inside, "headroom.separate.name", "--name ", pattern, " names ", path,
                    ", expected a file below the output folder");
  return path;
}

/// Where the files go: one list for each track, in the order of `sums`.
struct OutputNames {
  std::filesystem::path folder;
  std::string pattern, model, extension;
};

/// The place that a path stands for, whatever links lead there; the path itself where nothing says so, as of a pipe.
inline std::filesystem::path location_of(const std::filesystem::path& path) {
  std::error_code failure;
  const std::filesystem::path location = std::filesystem::weakly_canonical(path, failure);
  return failure ? path : location;
}

/// Throws headroom.separate.name where two files would have one name.
inline std::vector<std::vector<headroom::audio::StemFile>> output_files(const std::vector<Track>& tracks,
                                                                        const std::vector<NamedSum>& sums,
                                                                        const OutputNames& names) {
  std::map<std::filesystem::path, std::filesystem::path> taken;  // by which input
  std::set<std::filesystem::path> inputs;
  for (const Track& track : tracks) inputs.insert(location_of(track.file));
  std::vector<std::vector<headroom::audio::StemFile>> files;
  for (const Track& track : tracks) {
    files.emplace_back();
    for (const auto& [name, stems, mixture] : sums) {
      const auto below =
          name_by(names.pattern,
                  {{"track", track.name()}, {"ext", track.extension()}, {"stem", name}, {"model", names.model}})
              .lexically_normal();
      const std::filesystem::path path = names.folder / track.folder / (below.string() + names.extension);
      const auto [other, fresh] = taken.emplace(path, track.file);
      headroom::require(
          fresh, "headroom.separate.name", "--name ", names.pattern, " names files of ", other->second, " and ",
          track.file, " alike: ", path,
          "; use {track}, {stem} and, where names differ in it alone, {ext}; or separate them one after the other");
      headroom::require(!inputs.contains(location_of(path)), "headroom.separate.name", path,
                        " is an input, it would be replaced; choose another output folder");
      files.back().push_back({path, stems, mixture});
    }
  }
  return files;
}

/// Refuses to replace what is there unasked: it may be the true stems of the recording. Throws
/// headroom.separate.exists.
inline void require_new(const std::vector<std::vector<headroom::audio::StemFile>>& files) {
  std::error_code failure;
  for (const auto& of_track : files) {
    for (const auto& file : of_track) {
      headroom::require(!std::filesystem::exists(file.path, failure), "headroom.separate.exists", file.path,
                        " is there already; choose another output folder or give --overwrite");
    }
  }
}
