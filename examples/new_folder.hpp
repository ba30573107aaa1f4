#pragma once

#include <filesystem>
#include <string_view>
#include <system_error>
#include <vector>

#include "headroom/core/error.hpp"

/// A folder for files that are about to be made. Where it was not there before and none of them was, it goes away again
/// with this object, and so do the folders above it.
class NewFolder {
 public:
  /// Throws `id` where it cannot be made.
  NewFolder(const std::filesystem::path& folder, std::string_view id)
      : NewFolder() {  // so what it made goes if it fails
    std::error_code failure;
    for (auto part = folder; !std::filesystem::exists(part, failure) && part.has_relative_path();
         part = part.parent_path()) {
      made_.push_back(part);
    }
    std::filesystem::create_directories(folder, failure);
    if (std::error_code other; std::filesystem::is_directory(folder, other)) return;
    headroom::fail(id, "can't make the folder ", folder, ": ", failure.message(), "; choose another output folder");
  }
  NewFolder(NewFolder&&) noexcept = default;
  NewFolder& operator=(NewFolder&&) = delete;
  ~NewFolder() {
    std::error_code failure;
    for (const std::filesystem::path& folder : made_) {
      if (std::filesystem::exists(folder, failure) && !std::filesystem::remove(folder, failure)) return;
    }
  }

 private:
  NewFolder() = default;

  std::vector<std::filesystem::path> made_;  // a folder before the one that it is in
};
