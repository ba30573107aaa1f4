#pragma once

#include <Eigen/Core>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace headroom::inline v0::core::detail {

/// Whether this process may use AMX's tiles: Linux wants to be asked. No function of its own: units with different
/// flags would share it.
EIGEN_ALWAYS_INLINE bool may_use_amx_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace headroom::inline v0::core::detail
