#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <climits>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <ostream>
#include <streambuf>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/io/descriptor.hpp"
#include "headroom/io/file_name.hpp"

namespace headroom::inline v0::io {

namespace detail {

/// Names of the temporary files that are there, for a signal handler, which may neither lock nor allocate. A slot is
/// empty, or holds a name that its owner keeps alive until the slot is empty again.
inline std::array<std::atomic<const char*>, 256> temporary_names{};

/// A temporary file's name while it is in the list; where that is full, a signal leaves the file behind.
class ListedName {
 public:
  explicit ListedName(std::string name) : name_(std::make_unique<std::string>(std::move(name))) {
    for (auto& slot : temporary_names) {
      const char* empty = nullptr;
      if (slot.compare_exchange_strong(empty, name_->c_str())) {
        slot_ = &slot;
        break;
      }
    }
  }
  ListedName(ListedName&& other) noexcept : name_(std::move(other.name_)), slot_(std::exchange(other.slot_, nullptr)) {}
  ListedName& operator=(ListedName&&) = delete;
  ~ListedName() {
    if (slot_ != nullptr) slot_->store(nullptr);
  }

 private:
  std::unique_ptr<std::string> name_;
  std::atomic<const char*>* slot_ = nullptr;
};

/// Where writing to `path` would end: what a link names, also one to a file that is not there yet.
inline std::filesystem::path followed(std::filesystem::path path) {
  std::error_code failure;
  for (int links = 0; links < 40 && std::filesystem::is_symlink(path, failure); ++links) {
    path = folder_of(path) / std::filesystem::read_symlink(path, failure);
  }
  return path;
}

/// A number made of bytes (64-bit FNV-1a), the same in each process.
inline std::uint64_t fnv1a(std::string_view bytes) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const char byte : bytes) hash = (hash ^ static_cast<unsigned char>(byte)) * 0x100000001b3u;
  return hash;
}

/// NAME.partial beside `path`; of a name that leaves no room for that, as much as there is room for, and a number made
/// of all of it.
inline std::string temporary_name(const std::filesystem::path& path) {
  constexpr std::string_view kSuffix = ".partial";
  std::string name = path.filename().string();
  if (name.size() + kSuffix.size() > NAME_MAX) {
    const std::string number = std::to_string(fnv1a(name));
    name.resize(NAME_MAX - kSuffix.size() - number.size() - 1);
    name.append("~").append(number);
  }
  return (path.parent_path() / name.append(kSuffix)).string();
}

/// Whether `path` is a device, a pipe or a descriptor of this process, which is written to and not replaced.
inline bool is_stream(const std::filesystem::path& path) {
  struct stat status {};
  const bool there = ::stat(path.c_str(), &status) == 0;
  return there && !S_ISDIR(status.st_mode) && (!S_ISREG(status.st_mode) || path.native().starts_with("/dev/"));
}

}  // namespace detail

/// Removes the temporary files of all AtomicFile that are open: what a signal handler does before the process ends.
/// Calls nothing that a handler may not.
inline void discard_temporary_files() noexcept {
  for (auto& slot : detail::temporary_names) {
    if (const char* const name = slot.exchange(nullptr)) ::unlink(name);
  }
}

/// Why a file cannot be written at `path`, or nothing: asked before the work whose result it will hold.
inline std::string why_not_writable(const std::filesystem::path& path) {
  const std::filesystem::path target = detail::followed(path), folder = folder_of(target);
  std::error_code failure;
  if (!target.has_filename()) return "it names no file";
  if (target.filename().native().size() > NAME_MAX) return std::strerror(ENAMETOOLONG);
  if (std::filesystem::is_symlink(target, failure)) return "its links go in a circle";
  if (std::filesystem::is_directory(target, failure)) return "it is a folder";
  if (detail::is_stream(path)) return ::access(path.c_str(), W_OK) == 0 ? "" : std::strerror(errno);
  if (!std::filesystem::exists(folder, failure))
    return std::string(std::strerror(ENOENT)) + ": there is no folder \"" + folder.string() + "\"; create it first";
  if (!std::filesystem::is_directory(folder, failure)) return folder.string() + " is no folder";
  return ::access(folder.c_str(), W_OK | X_OK) == 0 ? "" : std::strerror(errno);
}

/// A file that appears under its name when it is whole, in the place of what was there. Until then it is NAME.partial
/// (see detail::temporary_name) in the same folder, which is removed on errors, and by discard_temporary_files() on
/// signals. Only a process that is killed outright leaves it; who writes NAME next takes it over. A link is followed:
/// what it names is replaced.
class AtomicFile {
 public:
  /// Creates the temporary file. Throws `id` with the true reason where the target cannot be written, and where it is
  /// being written by another process.
  AtomicFile(std::filesystem::path path, std::string_view id)
      : path_(std::move(path)), target_(detail::followed(path_)), id_(id), temporary_(detail::temporary_name(target_)) {
    if (const std::string reason = why_not_writable(path_); !reason.empty()) fail_to_write(reason);
    if (detail::is_stream(path_)) fail_to_write("it is a device or a pipe, expected a file");
    open_temporary();
  }
  AtomicFile(AtomicFile&&) = default;
  AtomicFile& operator=(AtomicFile&&) = delete;
  ~AtomicFile() { discard(); }

  const std::filesystem::path& path() const { return path_; }
  /// Of the temporary file, to write and to read; the object keeps it.
  int descriptor() const { return file_.number(); }

  /// Puts all bytes onto the disk, so that `publish` is the only thing left that can fail. Throws the constructor's id.
  void finish() {
    if (::fsync(file_.number()) != 0) fail_to_write(std::strerror(errno));
  }

  /// Gives the finished file its name. Throws the constructor's id.
  void publish() {
    if (::rename(temporary_.c_str(), target_.c_str()) != 0) fail_to_write(std::strerror(errno));
    listed_.reset();
    file_.close();
    // The name is safe when the folder is on the disk as well; not every file system offers it, so no error if not
    const detail::Descriptor folder(::open(folder_of(target_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (folder.number() >= 0) ::fsync(folder.number());
  }

  /// Removes the temporary file; what was there before stays.
  void discard() noexcept {
    if (file_.number() < 0) return;
    ::unlink(temporary_.c_str());
    listed_.reset();
    file_.close();
  }

  /// Discards and throws the constructor's id.
  [[noreturn]] void fail_to_write(const std::string& reason) {
    discard();
    fail(id_, "cannot write ", path_.string(), ": ", reason,
         "; what was there before is unchanged. Check the room on the disk and the permissions, or choose another "
         "place");
  }

 private:
  /// The temporary file belongs to who has its lock, until it has another name or none. It is listed before it is made,
  /// so that no signal comes between, or, where it was there, once it is ours.
  void open_temporary() {
    const char* const name = temporary_.c_str();
    for (;;) {
      listed_.reset();
      const bool new_file = ::access(name, F_OK) != 0;
      if (new_file) listed_.emplace(temporary_);
      const int flags = O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | (new_file ? O_EXCL : 0);
      detail::Descriptor file(::open(name, flags, 0666));
      if (file.number() < 0 && errno == EEXIST && ::access(name, F_OK) == 0) continue;  // another process made it
      if (file.number() < 0) fail_to_write(std::strerror(errno));
      const bool locked = ::flock(file.number(), LOCK_EX | LOCK_NB) == 0;
      if (!locked && errno == EWOULDBLOCK) fail_to_write("another process is writing it");
      struct stat opened {
      }, named{};
      const bool same = ::fstat(file.number(), &opened) == 0 && ::stat(name, &named) == 0 &&
                        opened.st_ino == named.st_ino && opened.st_dev == named.st_dev;
      if (!same) continue;  // its owner has just published or removed it
      if (!new_file) listed_.emplace(temporary_);
      file_ = std::move(file);
      if (::ftruncate(file_.number(), 0) != 0) fail_to_write(std::strerror(errno));
      return;
    }
  }

  std::filesystem::path path_, target_;
  std::string id_;
  std::string temporary_;
  std::optional<detail::ListedName> listed_;  // while the file is this object's
  detail::Descriptor file_;
};

namespace detail {

/// Writes all bytes to a descriptor; 0, or what errno says.
inline int write_all(int descriptor, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor, bytes.data(), bytes.size());
    if (written < 0 && errno != EINTR) return errno;
    bytes.remove_prefix(static_cast<std::size_t>(std::max<ssize_t>(written, 0)));
  }
  return 0;
}

/// What a stream writes goes to a descriptor; the first error is kept.
class DescriptorBuffer : public std::streambuf {
 public:
  explicit DescriptorBuffer(int descriptor) : descriptor_(descriptor) {
    setp(buffer_.data(), buffer_.data() + buffer_.size());
  }

  int error() const { return error_; }

 protected:
  int sync() override {
    if (error_ == 0) error_ = write_all(descriptor_, {pbase(), static_cast<std::size_t>(pptr() - pbase())});
    setp(buffer_.data(), buffer_.data() + buffer_.size());
    return error_ == 0 ? 0 : -1;
  }
  int_type overflow(int_type next) override {
    if (sync() != 0) return traits_type::eof();
    return traits_type::eq_int_type(next, traits_type::eof()) ? traits_type::not_eof(next)
                                                              : sputc(traits_type::to_char_type(next));
  }

 private:
  int descriptor_, error_ = 0;
  std::vector<char> buffer_ = std::vector<char>(1 << 16);
};

}  // namespace detail

/// Replaces a file by what `writer` puts into a std::ostream, or leaves it as it was; a process that is killed leaves
/// the old or the new file. A device or a pipe is written to. When the new file is whole, and before it takes the place
/// of the old one, `before_replacing` is called. Throws `id`, and what `writer` throws.
template <std::invocable<std::ostream&> Writer>
void write_file(const std::filesystem::path& path, std::string_view id, Writer&& writer,
                const std::function<void()>& before_replacing = {}) {
  const auto write_to = [&](int descriptor) {
    detail::DescriptorBuffer buffer(descriptor);
    std::ostream stream(&buffer);
    writer(stream);
    stream.flush();
    return buffer.error();
  };
  if (!detail::is_stream(path)) {
    AtomicFile file(path, id);
    if (const int error = write_to(file.descriptor())) file.fail_to_write(std::strerror(error));
    file.finish();
    if (before_replacing) before_replacing();
    file.publish();
    return;
  }
  const detail::Descriptor stream(::open(path.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC));
  const int error = stream.number() < 0 ? errno : write_to(stream.number());
  require(error == 0, id, "cannot write ", path, ": ", std::strerror(error), "; choose another place");
}

/// The same for the concatenation of `parts`.
inline void write_file(const std::filesystem::path& path, std::string_view id,
                       std::initializer_list<std::string_view> parts,
                       const std::function<void()>& before_replacing = {}) {
  const auto write = [&](std::ostream& stream) {
    for (const std::string_view part : parts) stream.write(part.data(), static_cast<std::streamsize>(part.size()));
  };
  write_file(path, id, write, before_replacing);
}

}  // namespace headroom::inline v0::io
