#pragma once

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>
#include <string_view>

#include "headroom/core/error.hpp"

namespace headroom::inline v0 {

namespace detail {

/// A field such as "VmRSS:" of /proc/self/status, in bytes.
inline std::int64_t process_status(std::string_view field) {
  std::ifstream status("/proc/self/status");
  require(status.is_open(), "headroom.memory.resident", "cannot read /proc/self/status: ", std::strerror(errno),
          "; resident sizes need Linux with /proc mounted");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(field)) {
      return std::stoll(line.substr(field.size())) * 1024;  // the kernel prints "kB" and means KiB
    }
  }
  fail("headroom.memory.resident", "/proc/self/status has no ", field,
       " line; resident sizes need Linux with /proc mounted");
}

}  // namespace detail

/// Bytes of physical memory that the process holds now (Linux: VmRSS). It counts what no allocator sees: code,
/// stacks, workspaces of libraries, pages that malloc keeps.
inline std::int64_t resident_bytes() { return detail::process_status("VmRSS:"); }

/// Highest resident_bytes() since the process started or since reset_peak_resident_bytes() (Linux: VmHWM).
inline std::int64_t peak_resident_bytes() { return detail::process_status("VmHWM:"); }

/// Lets peak_resident_bytes() start again from what is resident now.
inline void reset_peak_resident_bytes() {
  std::ofstream clear("/proc/self/clear_refs");
  clear << "5" << std::flush;  // 5: "reset the peak resident set size to the current value" (proc(5))
  require(clear.good(), "headroom.memory.resident",
          "cannot write 5 to /proc/self/clear_refs; resetting the peak needs Linux 4.0 with CONFIG_PROC_PAGE_MONITOR, "
          "measure in a process of its own instead");
}

}  // namespace headroom::inline v0
