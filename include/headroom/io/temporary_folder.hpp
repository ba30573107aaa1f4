#pragma once

#include <cstdlib>
#include <filesystem>

namespace headroom::inline v0::io {

/// The folder for temporary files, as std::filesystem::temp_directory_path() finds it (TMPDIR, …, or /tmp). Whether it
/// is there is left to who makes a file in it and has an error of its own for that.
inline std::filesystem::path temporary_folder() {
  for (const char* const name : {"TMPDIR", "TMP", "TEMP", "TEMPDIR"}) {
    if (const char* const folder = std::getenv(name); folder != nullptr && *folder != '\0') return folder;
  }
  return "/tmp";
}

}  // namespace headroom::inline v0::io
