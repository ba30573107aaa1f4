#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <concepts>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

#include "headroom/core/error.hpp"
#include "headroom/io/atomic_file.hpp"
#include "headroom/io/descriptor.hpp"

namespace headroom::inline v0::io {

/// A text file that grows by whole lines. A process that is killed leaves a whole line or, at the end, a part of one,
/// which is cut off when the file is opened again; a line that cannot be written leaves nothing behind.
class LineFile {
 public:
  /// Opens a file or makes it. Its lines of before are given to `keep`, in order and without their ends: from the first
  /// one on that it refuses, the file is cut. Throws `id`.
  template <std::predicate<const std::string&> Keep>
  LineFile(const std::filesystem::path& path, std::string_view id, Keep&& keep) {
    const std::string reason = why_not_writable(path);
    require(reason.empty(), id, "cannot write ", path.string(), ": ", reason, "; choose another folder");
    std::ifstream before(path, std::ios::binary);
    std::string line;
    while (std::getline(before, line) && !before.eof() && keep(line)) {  // a line that the end of the file ends is torn
      bytes_ += static_cast<off_t>(line.size()) + 1;
    }
    file_ = detail::Descriptor(::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666));
    const bool cut = file_.number() >= 0 && ::ftruncate(file_.number(), bytes_) == 0;  // sets errno before it is read
    require(cut, id, "cannot write ", path.string(), ": ", std::strerror(errno), "; choose another folder");
  }

  /// Appends a line, which has no end of line in it. Says why that was not possible, or nothing.
  std::string append(std::string line) {
    line += '\n';
    if (const int error = detail::write_all(file_.number(), line)) {
      // What was written of it goes; where even this fails, the next opening cuts it off
      if (::ftruncate(file_.number(), bytes_) != 0) return std::string(std::strerror(error)) + ", in part";
      return std::strerror(error);
    }
    bytes_ += static_cast<off_t>(line.size());
    return "";
  }

 private:
  detail::Descriptor file_;
  off_t bytes_ = 0;  ///< of whole lines
};

}  // namespace headroom::inline v0::io
