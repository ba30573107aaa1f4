#pragma once

#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/io/atomic_file.hpp"
#include "headroom/io/descriptor.hpp"
#include "headroom/io/temporary_folder.hpp"

namespace headroom::inline v0::io {

namespace detail {

/// Copies what comes out of a pipe, up to `most` bytes and one more, into a file without a name. Says why not, or
/// nothing. The pipe was opened without waiting: a pipe with a name that nobody writes to would be waited for without
/// end. Who has just been started to write gets two seconds to come, who is there gets any time.
inline std::string copy_pipe(int pipe, int file, std::uint64_t most) {
  constexpr int kTries = 40, kMilliseconds = 50;
  std::vector<char> buffer(1 << 16);
  std::uint64_t copied = 0;
  bool writer_seen = false;
  for (int tries = 0; copied <= most;) {
    const ssize_t count = ::read(pipe, buffer.data(), buffer.size());
    if (count > 0) {
      const int error = write_all(file, {buffer.data(), static_cast<std::size_t>(count)});
      if (error != 0) return std::string("its copy in the folder for temporary files: ") + std::strerror(error);
      copied += static_cast<std::uint64_t>(count);
      writer_seen = true;
    } else if (count == 0 && writer_seen) {
      return "";
    } else if (count == 0) {
      pollfd wanted{pipe, POLLIN, 0};
      ::poll(&wanted, 1, kMilliseconds);
      writer_seen = (wanted.revents & (POLLIN | POLLHUP)) != 0;  // or has been here and is gone
      if (!writer_seen && ++tries == kTries) return "it is a pipe that nobody writes to";
    } else if (errno == EAGAIN) {  // a writer is there and has nothing yet
      writer_seen = true;
      pollfd wanted{pipe, POLLIN, 0};
      ::poll(&wanted, 1, -1);
    } else if (errno != EINTR) {
      return std::strerror(errno);
    }
  }
  return "";
}

/// Reads up to `count` bytes from `offset` on: how many there were; fewer at the end, or where reading fails.
inline std::size_t read_at(int descriptor, std::uint64_t offset, char* to, std::size_t count) {
  std::size_t done = 0;
  while (done < count) {
    const ssize_t got = ::pread(descriptor, to + done, count - done, static_cast<off_t>(offset + done));
    if (got == 0 || (got < 0 && errno != EINTR)) break;
    done += static_cast<std::size_t>(std::max<ssize_t>(got, 0));
  }
  return done;
}

/// A file in the folder for temporary files that has no name any more and so is gone with its descriptor.
inline Descriptor nameless_file() {
  std::string name = (temporary_folder() / "headroom-XXXXXX").string();
  Descriptor file(::mkostemp(name.data(), O_CLOEXEC));
  if (file.number() >= 0) ::unlink(name.c_str());
  return file;
}

}  // namespace detail

/// How an InputFile tells that it cannot be read: "[id] cannot read <content> from <path>: <reason>; expected
/// <expected>".
struct InputErrors {
  const char* id;
  const char* content;   ///< "a configuration"
  const char* expected;  ///< "a JSON file, such as those in examples/configs"
};

/// A file that is open to read at any place. A pipe (with a name, of a shell's `<(…)`, or `-`, which is the standard
/// input) is copied into a nameless temporary file first.
class InputFile {
 public:
  /// `most` is how many bytes any such file has. Throws `errors.id` with the true reason: not there, a folder, a
  /// device, no permission, a pipe that nobody writes to, more bytes.
  InputFile(const std::filesystem::path& path, const InputErrors& errors,
            std::uint64_t most = std::numeric_limits<std::int64_t>::max()) {
    const auto check = [&](bool fine, const auto&... reason) {
      require(fine, errors.id, "cannot read ", errors.content, " from ", path, ": ", reason..., "; expected ",
              errors.expected);
    };
    const std::filesystem::path file = path == "-" ? "/dev/stdin" : path;
    struct stat status {};
    const bool there = ::stat(file.c_str(), &status) == 0;  // on its own: arguments may be computed in any order
    check(there, errno == ENOENT ? "there is no such file, check the spelling and the folder" : std::strerror(errno));
    check(!S_ISDIR(status.st_mode), "it is a folder");
    check(S_ISREG(status.st_mode) || S_ISFIFO(status.st_mode), "it is a device");
    file_ = detail::Descriptor(::open(file.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC));
    check(file_.number() >= 0, std::strerror(errno));
    if (S_ISFIFO(status.st_mode)) {
      detail::Descriptor copy = detail::nameless_file();
      check(copy.number() >= 0, "its copy in the folder for temporary files: ", std::strerror(errno));
      const std::string reason = detail::copy_pipe(file_.number(), copy.number(), most);
      check(reason.empty(), reason);
      const bool at_start = ::lseek(copy.number(), 0, SEEK_SET) == 0;
      check(at_start, std::strerror(errno));
      file_ = std::move(copy);
    }
    const bool known = ::fstat(file_.number(), &status) == 0;
    check(known, std::strerror(errno));
    size_ = static_cast<std::uint64_t>(status.st_size);
    check(size_ <= most, "it has more than the ", most, " bytes that any has");
  }

  /// Of the open file; the object keeps it.
  int descriptor() const { return file_.number(); }
  std::uint64_t size() const { return size_; }  ///< bytes

  /// Up to `count` bytes from `offset` on; fewer at the end, or where reading fails.
  std::string read(std::uint64_t offset, std::uint64_t count) const {
    std::string bytes(offset < size_ ? std::min(count, size_ - offset) : 0, '\0');
    bytes.resize(detail::read_at(file_.number(), offset, bytes.data(), bytes.size()));
    return bytes;
  }

 private:
  detail::Descriptor file_;
  std::uint64_t size_ = 0;
};

}  // namespace headroom::inline v0::io
