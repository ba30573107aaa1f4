#pragma once

#include <torch/version.h>

// Included by every header that uses what LibTorch may change from one version to the next without saying so: the
// autograd engine, the dispatcher, allocators, native kernels (tests/static/includes.py holds that). docs/100_gpu.md
// has a table of the versions that were tried.
#ifndef HEADROOM_ANY_LIBTORCH
static_assert(TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 11 && TORCH_VERSION_MINOR <= 14,
              "headroom uses internals of LibTorch and was tested with versions 2.11 to 2.14; this is another one. To "
              "try it all the same, define HEADROOM_ANY_LIBTORCH and run scripts/check_torch.sh with that version");
#endif
