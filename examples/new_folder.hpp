#pragma once

#include <filesystem>
#include <string_view>
#include <system_error>
#include <utility>

#include "headroom/core/error.hpp"

/// A folder for files that are about to be made. Where it was not there before and none of them was, it goes away again
/// with this object, and so do the folders above it.
class NewFolder {
 public:
  /// Throws `id` where it cannot be made.
  NewFolder(std::filesystem::path folder, std::string_view id) : folder_(std::move(folder)), kept_(folder_) {
    std::error_code failure;
    while (!std::filesystem::exists(kept_, failure) && kept_.has_relative_path()) kept_ = kept_.parent_path();
    std::filesystem::create_directories(folder_, failure);
    if (std::error_code other; std::filesystem::is_directory(folder_, other)) return;
    remove_empty();
    headroom::fail(id, "can't make the folder ", folder_, ": ", failure.message(), "; choose another output folder");
  }
  NewFolder(NewFolder&& other) noexcept
      : folder_(std::exchange(other.folder_, {})), kept_(std::exchange(other.kept_, {})) {}
  NewFolder& operator=(NewFolder&&) = delete;
  ~NewFolder() { remove_empty(); }

 private:
  void remove_empty() const noexcept {
    std::error_code failure;
    for (std::filesystem::path folder = folder_; folder != kept_; folder = folder.parent_path()) {
      if (std::filesystem::exists(folder, failure) && !std::filesystem::remove(folder, failure)) return;
    }
  }

  std::filesystem::path folder_, kept_;  // the second was there before
};
