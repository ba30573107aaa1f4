#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <string>

/// Ends the process, which a fuzzer takes for a fault, unless `holds`.
inline void expect(bool holds) {
  if (!holds) std::abort();
}

/// What a fuzzer made, as a file in memory with a path.
class InputInMemory {
 public:
  InputInMemory(const std::uint8_t* data, std::size_t size) : descriptor_(::memfd_create("input", MFD_CLOEXEC)) {
    expect(descriptor_ >= 0 && ::write(descriptor_, data, size) == static_cast<ssize_t>(size));
    ::lseek(descriptor_, 0, SEEK_SET);
  }
  InputInMemory(const InputInMemory&) = delete;
  InputInMemory& operator=(const InputInMemory&) = delete;
  ~InputInMemory() { ::close(descriptor_); }

  std::filesystem::path path() const { return "/proc/self/fd/" + std::to_string(descriptor_); }

 private:
  int descriptor_;
};
