#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/io/input_file.hpp"
#include "headroom/training/data_choices.hpp"

namespace headroom::inline v0::training {

/// The files of a track as they were found.
struct FoundTrack {
  std::string name;
  std::map<std::string, std::filesystem::path> files;  ///< by stem; the mixture is called "mixture"
  bool whole = true;  ///< they begin together and are all there is; else one file of one stem
};

namespace detail {

/// What the name of an audio file may end with, the first of which is taken where there are several.
inline constexpr std::array kAudioExtensions = {".wav", ".flac", ".aiff", ".aif", ".caf",
                                                ".au",  ".w64",  ".rf64", ".ogg", ".mp3"};

/// FOLDER/<name>.wav, or .flac, …
inline std::optional<std::filesystem::path> find_audio(const std::filesystem::path& folder, const std::string& name) {
  std::error_code failure;  // of a name that no file can have: none is there
  for (const char* extension : kAudioExtensions) {
    const std::filesystem::path path = folder / (name + extension);
    if (std::filesystem::exists(path, failure)) return path;
  }
  return std::nullopt;
}

inline bool is_audio(const std::filesystem::path& path) {
  std::error_code failure;
  return std::filesystem::is_regular_file(path, failure) &&
         std::ranges::find(kAudioExtensions, path.extension().string()) != kAudioExtensions.end();
}

/// What is in a folder but for hidden files, sorted: the file system's order differs between machines.
inline std::vector<std::filesystem::path> entries_of(const std::filesystem::path& folder, std::error_code& failure) {
  std::vector<std::filesystem::path> entries;
  for (const auto& entry : std::filesystem::directory_iterator(folder, failure)) {
    if (!entry.path().filename().string().starts_with('.')) entries.push_back(entry.path());
  }
  std::ranges::sort(entries);
  return entries;
}

/// The audio files in a folder; none where it is no folder.
inline std::vector<std::filesystem::path> audio_in(const std::filesystem::path& folder) {
  std::error_code none;
  std::vector<std::filesystem::path> files = entries_of(folder, none);
  std::erase_if(files, [](const auto& path) { return !is_audio(path); });
  return files;
}

inline std::vector<FoundTrack> find_track_folders(const std::filesystem::path& root,
                                                  const std::vector<std::string>& stems) {
  std::vector<FoundTrack> tracks;
  std::error_code failure, other;
  for (const auto& folder : entries_of(root, failure)) {
    if (!std::filesystem::is_directory(folder, other)) continue;
    FoundTrack& track = tracks.emplace_back(FoundTrack{folder.filename().string(), {}});
    for (const std::string& stem : stems) {
      if (auto file = find_audio(folder, stem)) track.files.emplace(stem, std::move(*file));
    }
    if (auto file = find_audio(folder, "mixture")) track.files.emplace("mixture", std::move(*file));
  }
  require(!failure, "headroom.training.dataset.empty", "no tracks in ", root, ": ", failure.message(),
          ", expected folders \"<Artist - Title>\" with one file a stem; give the folder of the split, e.g. "
          "musdb18hq/train");
  return tracks;
}

inline std::vector<FoundTrack> find_stem_folders(const std::filesystem::path& root,
                                                 const std::vector<std::string>& stems) {
  std::vector<FoundTrack> tracks;
  for (const std::string& stem : stems) {
    for (const auto& file : audio_in(root / stem)) {
      tracks.push_back({stem + "/" + file.filename().string(), {{stem, file}}, false});
    }
  }
  return tracks;
}

/// The cells of a line of a CSV table (RFC 4180): a cell in quotes may hold commas, and quotes twice.
inline std::vector<std::string> cells_of(std::string_view line) {
  std::vector<std::string> cells(1);
  bool quoted = false;
  for (std::size_t i = 0; i < line.size(); ++i) {
    const char c = line[i];
    if (quoted && c == '"' && i + 1 < line.size() && line[i + 1] == '"') {
      cells.back() += line[++i];
    } else if (c == '"') {
      quoted = !quoted;
    } else if (c == ',' && !quoted) {
      cells.emplace_back();
    } else if (c != '\r') {
      cells.back() += c;
    }
  }
  return cells;
}

/// Rows of stems that are not asked for are passed over. A path is relative to the folder of the table.
inline std::vector<FoundTrack> find_listed_files(const std::filesystem::path& table,
                                                 const std::vector<std::string>& stems) {
  constexpr auto id = "headroom.training.dataset.list";
  constexpr std::uint64_t kMost = 256 << 20;
  const io::InputFile file(table, {id, "a list of audio files", "a CSV table with the columns instrum and path"},
                           kMost);
  const std::string text = file.read(0, file.size());
  std::vector<FoundTrack> tracks;
  std::error_code failure;
  std::size_t stem_column = 0, path_column = 0, columns = 0, number = 0;
  for (std::size_t begin = 0; begin < text.size(); begin = text.find('\n', begin) + 1) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    const std::vector<std::string> cells = cells_of(std::string_view(text).substr(begin, end - begin));
    const auto column = [&](const char* name) {
      return static_cast<std::size_t>(std::ranges::find(cells, name) - cells.begin());
    };
    if (++number == 1) {
      columns = cells.size();
      stem_column = std::min(column("instrum"), column("type"));
      path_column = column("path");
      require(stem_column < columns && path_column < columns, id, table,
              " has no columns instrum and path; expected a first line \"instrum,path\"");
    } else if (cells != std::vector<std::string>{""}) {
      require(cells.size() == columns, id, table, " has ", cells.size(), " cells in line ", number, ", expected ",
              columns, " as in its first line; put paths with commas into quotes");
      const std::string& stem = cells[stem_column];
      const std::filesystem::path path = table.parent_path() / cells[path_column];
      if (std::ranges::find(stems, stem) != stems.end()) {
        require(std::filesystem::is_regular_file(path, failure), id, table, " names ", path, " in line ", number,
                ", where no file is; correct the path, relative to the table's folder, or remove the line");
        tracks.push_back({cells[path_column], {{stem, path}}, false});
      }
    }
    if (end == text.size()) break;
  }
  return tracks;
}

}  // namespace detail

/// The layout of a root, as Layout::automatic finds it.
inline Layout layout_of(const std::filesystem::path& root, const std::vector<std::string>& stems) {
  std::error_code failure;
  if (std::filesystem::is_regular_file(root, failure) && root.extension() == ".csv") return Layout::csv;
  const bool by_stem =
      std::ranges::any_of(stems, [&](const std::string& stem) { return !detail::audio_in(root / stem).empty(); });
  return by_stem ? Layout::stems : Layout::tracks;
}

/// The tracks below a root that may have files of `stems`: sorted by name, by stem and name, or as a table has them.
/// Throws headroom.training.dataset.{empty, list}.
inline std::vector<FoundTrack> find_tracks(const std::filesystem::path& root, Layout layout,
                                           const std::vector<std::string>& stems) {
  if (layout == Layout::automatic) layout = layout_of(root, stems);
  return layout == Layout::csv     ? detail::find_listed_files(root, stems)
         : layout == Layout::stems ? detail::find_stem_folders(root, stems)
                                   : detail::find_track_folders(root, stems);
}

}  // namespace headroom::inline v0::training
