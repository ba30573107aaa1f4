// Counts how often the host waits for the device: functions of CUDA's runtime that wait, in front of the library's own.
// The dynamic linker finds these first, since they are in the program.

#include "gpu/synchronizations.hpp"

#include <dlfcn.h>

#include <atomic>

namespace {

std::atomic<int64_t> waits{0};

template <class... Args>
int counted(const char* name, Args... args) {
  using Function = int (*)(Args...);
  ++waits;
  const auto next = reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
  return next != nullptr ? next(args...) : 1;
}

}  // namespace

namespace headroom::testing {

int64_t synchronizations() { return waits; }

}  // namespace headroom::testing

extern "C" {

__attribute__((visibility("default"))) int cudaStreamSynchronize(void* stream) {
  return counted("cudaStreamSynchronize", stream);
}
__attribute__((visibility("default"))) int cudaEventSynchronize(void* event) {
  return counted("cudaEventSynchronize", event);
}
__attribute__((visibility("default"))) int cudaDeviceSynchronize() { return counted("cudaDeviceSynchronize"); }
__attribute__((visibility("default"))) int cudaMemcpy(void* to, const void* from, size_t bytes, int kind) {
  return counted("cudaMemcpy", to, from, bytes, kind);
}

}  // extern "C"
