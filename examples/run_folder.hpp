#pragma once

#include <filesystem>
#include <system_error>

#include "headroom/core/error.hpp"
#include "headroom/io/folder_lock.hpp"

/// The folder `out` of a run, made and locked. One that holds another run is only used when it is asked for: to go on
/// from a state in it, `resume`, or to `overwrite` it. Throws headroom.train.output, headroom.train.locked and
/// headroom.train.used.
inline headroom::io::FolderLock open_run_folder(const std::filesystem::path& out, const std::filesystem::path& resume,
                                                bool overwrite) {
  namespace fs = std::filesystem;
  std::error_code failure;
  fs::create_directories(out, failure);
  headroom::require(!failure && fs::is_directory(out), "headroom.train.output", "cannot make the folder ", out.string(),
                    ": ", failure.message(), "; give --out another one");
  headroom::io::FolderLock lock(out, "headroom.train.locked");
  const fs::path from = resume.has_parent_path() ? resume.parent_path() : ".";
  const bool goes_on = !resume.empty() && fs::equivalent(from, out, failure);
  for (const char* name : {"last.pt", "best.pt", "last.safetensors", "best.safetensors", "summary.json"}) {
    headroom::require(goes_on || overwrite || !fs::exists(out / name, failure), "headroom.train.used",
                      "there is a run in ", out.string(), " already, with ", name,
                      "; go on with --resume, give --out another folder, or --overwrite to lose it");
  }
  return lock;
}
