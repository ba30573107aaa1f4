#pragma once

#include <filesystem>
#include <string>
#include <system_error>

#include "command_line.hpp"
#include "headroom/core/error.hpp"
#include "headroom/io/file_name.hpp"
#include "headroom/io/folder_lock.hpp"
#include "headroom/training/saved_states.hpp"
#include "headroom/training/trainer.hpp"

/// The folder `out` of a run, made and locked. One that holds another run is only used when it is asked for: to go on
/// from a state in it, `resume`, or to `overwrite` it, which removes that run's files. Throws headroom.train.output,
/// headroom.train.locked and headroom.train.used.
inline headroom::io::FolderLock open_run_folder(const std::filesystem::path& out, const std::filesystem::path& resume,
                                                bool overwrite) {
  namespace fs = std::filesystem;
  std::error_code failure;
  fs::create_directories(out, failure);
  headroom::require(!failure && fs::is_directory(out), "headroom.train.output", "cannot make the folder ", out.string(),
                    ": ", failure.message(), "; give --out another one");
  headroom::io::FolderLock lock(out, "headroom.train.locked");
  const fs::path from = fs::is_directory(resume, failure) ? resume : headroom::io::folder_of(resume);
  if (!resume.empty() && fs::equivalent(from, out, failure)) return lock;
  for (const auto& entry : fs::directory_iterator(out)) {
    const std::string name = entry.path().filename().string();
    const bool of_run = headroom::training::is_saved_file(name) || name == "summary.json";
    headroom::require(!of_run || overwrite, "headroom.train.used", "there is a run in ", out.string(),
                      " already, with ", name,
                      "; go on with --resume, give --out another folder, or --overwrite to lose it");
    if (of_run) fs::remove(entry.path(), failure);
  }
  return lock;
}

/// Goes on from a saved state, the file or the newest whole one of a folder, and prints which one and what changed.
inline void resume_run(headroom::training::Trainer& trainer, const std::filesystem::path& path) {
  const headroom::training::FoundState found = headroom::training::find_state(path);
  for (const std::string& notice : found.notices) say("resume:   " + notice);
  for (const auto& change : trainer.resume(found.state, found.path.string())) {
    say("resume:   " + headroom::training::describe(change));
  }
}
