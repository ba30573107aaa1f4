#pragma once

#include <cstdint>

#include "headroom/memory/resident.hpp"
#include "headroom/memory/tensor_arena.hpp"

namespace headroom::benchmarks {

/// Bytes that the resident size grows by at its highest while `body` runs; what others left behind is not its to use.
template <class Body>
int64_t resident_growth(Body&& body) {
  TensorArena::instance().release_free_pages();
  reset_peak_resident_bytes();
  const int64_t before = resident_bytes();
  body();
  return peak_resident_bytes() - before;
}

}  // namespace headroom::benchmarks
