#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <system_error>

#include "headroom/io/descriptor.hpp"

namespace headroom::inline v0::io {

/// What is going to be written into a folder, bytes.
struct RoomNeeded {
  std::uint64_t all = 0;           ///< all files together, without what they replace
  std::uint64_t largest_file = 0;  ///< the largest of them
};

/// Why a folder cannot take that, or nothing: asked before the work whose result it will hold. The largest file is
/// reserved for a moment where the file system can do so, because quotas and limits on the size of files count then,
/// too.
inline std::string why_no_room(const std::filesystem::path& folder, const RoomNeeded& needed) {
  std::error_code no_answer;
  const auto space = std::filesystem::space(folder, no_answer);
  if (!no_answer && space.available < needed.all) {
    return "it has room for " + std::to_string(space.available) + " of " + std::to_string(needed.all) + " bytes";
  }
  std::string name = (folder / ".room-XXXXXX").string();
  const detail::Descriptor probe(::mkostemp(name.data(), O_CLOEXEC));
  if (probe.number() < 0) return std::strerror(errno);
  ::unlink(name.c_str());
  const bool reserved =
      needed.largest_file == 0 || ::fallocate(probe.number(), 0, 0, static_cast<off_t>(needed.largest_file)) == 0;
  return reserved || errno == EOPNOTSUPP || errno == ENOSYS
             ? ""
             : "a file of " + std::to_string(needed.largest_file) + " bytes: " + std::strerror(errno);
}

}  // namespace headroom::inline v0::io
