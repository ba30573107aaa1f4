#pragma once

#include <sys/mman.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>

#include "headroom/core/error.hpp"
#include "headroom/io/input_file.hpp"
#include "headroom/weights/bytes.hpp"

namespace headroom::inline v0::weights {

/// A file in the address space of the process, read from the disk page by page when it is looked at. Writing to it
/// changes the process's own copy of a page and never the file. The file must not become shorter meanwhile (replacing
/// it by another of the same name is fine): the system ends a process that reads what is gone.
class FileMap {
 public:
  /// Throws headroom.weights.read.
  explicit FileMap(const std::filesystem::path& path) {
    static constexpr auto kId = "headroom.weights.read";
    const io::InputFile file(path, {kId, "weights", "a safetensors file, or one that torch.save wrote"});
    require(file.size() > 0, kId, "cannot read weights from ", path, ": it is empty; download it again");
    void* const start =
        ::mmap(nullptr, file.size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file.descriptor(), 0);
    require(start != MAP_FAILED, kId, "cannot read weights from ", path, ": ", std::strerror(errno),
            "; raise the limit of this process's address space (ulimit -v)");
    start_ = static_cast<std::byte*>(start);
    size_ = file.size();
  }
  FileMap(const FileMap&) = delete;
  FileMap& operator=(const FileMap&) = delete;
  ~FileMap() { ::munmap(start_, size_); }

  Bytes bytes() const { return {start_, size_}; }
  /// The byte at `position`, also to write to.
  std::byte* at(std::uint64_t position) const { return start_ + position; }

 private:
  std::byte* start_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace headroom::inline v0::weights
