// The operators that python/headroom loads: torch.ops.headroom.attention and those it is composed of.

#include <headroom/attention/register_ops.hpp>
