#pragma once

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <string_view>

namespace headroom::inline v0::io {

/// Whether `name` can become the name of a file in a folder and nothing else: not empty, at most 200 bytes (a suffix
/// and the name of a temporary file need some of the 255 that systems allow), no separators or control characters, and
/// no dot first, which is how hidden files and the names of the folder itself and of the one above it begin. Names that
/// come from a file are held against this before they become a path.
inline bool is_file_name(std::string_view name) {
  constexpr std::size_t kLongest = 200;
  const auto forbidden = [](char c) {
    return static_cast<unsigned char>(c) < 0x20 || c == 0x7f || c == '/' || c == '\\';
  };
  return !name.empty() && name.size() <= kLongest && name.front() != '.' && std::ranges::none_of(name, forbidden);
}

/// The folder that a file is in.
inline std::filesystem::path folder_of(const std::filesystem::path& path) {
  return path.has_parent_path() ? path.parent_path() : ".";
}

}  // namespace headroom::inline v0::io
