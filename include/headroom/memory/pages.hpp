#pragma once

#include <cstdlib>
#include <initializer_list>

#if __has_include(<malloc.h>)
#include <malloc.h>
#endif

// The pages that lie under tensors in the main memory.
namespace headroom::inline v0 {

/// Gives the pages that malloc keeps for later back to the system; does nothing where malloc is not glibc's. What
/// allocations of many sizes leave free lies in holes, and between them the heap of a long run grows.
inline void release_free_pages() {
#ifdef __GLIBC__
  ::malloc_trim(0);
#endif
}

/// Lets malloc keep what is freed, so that a step which needs what the one before it needed gets no fresh pages:
/// clearing and mapping them takes a fifth of a training step on the CPU. Whoever chose otherwise in malloc's
/// environment variables stays right. Does nothing where malloc is not glibc's.
inline void keep_free_pages() {
#ifdef __GLIBC__
  for (const char* const chosen :
       {"MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}) {
    if (std::getenv(chosen) != nullptr) return;
  }
  ::mallopt(M_MMAP_MAX, 0);         // large tensors are of the heap, too,
  ::mallopt(M_TRIM_THRESHOLD, -1);  // which does not shrink
  ::mallopt(M_TOP_PAD, 64 << 20);   // and grows by this at least
#endif
}

}  // namespace headroom::inline v0
