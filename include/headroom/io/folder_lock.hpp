#pragma once

#include <fcntl.h>
#include <sys/file.h>

#include <cerrno>
#include <filesystem>
#include <string_view>

#include "headroom/core/error.hpp"
#include "headroom/io/descriptor.hpp"

namespace headroom::inline v0::io {

/// Keeps other processes that ask for the same from working in a folder, until the end of the scope or of the process,
/// however that ends. It is the folder itself that is locked: no file is left behind. A file system without locks has
/// none to give, there everybody gets in.
class FolderLock {
 public:
  /// Throws `id` when another process has the folder.
  FolderLock(const std::filesystem::path& folder, std::string_view id)
      : folder_(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
    const bool taken = ::flock(folder_.number(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK;
    require(!taken, id, "another process works in ", folder, "; wait for its end or choose another folder");
  }

 private:
  detail::Descriptor folder_;
};

}  // namespace headroom::inline v0::io
