#pragma once

#include <c10/core/AllocatorConfig.h>
#include <c10/core/Device.h>

#include <cstdlib>

#include "headroom/runtime/torch_version.hpp"

namespace headroom::inline v0 {

/// Lets an accelerator's caching allocator grow its segments in the place of making new ones, so that blocks of
/// changing sizes leave no holes behind: LibTorch's `expandable_segments:True`. To be called before the first
/// large tensor on the device. Where PYTORCH_ALLOC_CONF or PYTORCH_CUDA_ALLOC_CONF say how memory is allocated, they
/// are left alone, and so is every device but CUDA. Says whether it changed anything. Untested on a GPU.
inline bool expand_segments(c10::Device device) {
  const bool told = std::getenv("PYTORCH_ALLOC_CONF") != nullptr || std::getenv("PYTORCH_CUDA_ALLOC_CONF") != nullptr;
  if (!device.is_cuda() || told) return false;
  c10::CachingAllocator::setAllocatorSettings("expandable_segments:True");
  return true;
}

}  // namespace headroom::inline v0
