// The operators that python/headroom loads: torch.ops.headroom.attention and those it is composed of.

#include <headroom/attention/register_ops.hpp>
#include <headroom/core/attention/entry.hpp>

TORCH_LIBRARY_FRAGMENT(headroom, library) {
  library.def("instruction_set() -> str", [] { return std::string(headroom::core::instruction_set()); });
}
