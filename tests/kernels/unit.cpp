// Compiled with several sets of flags, each time with another name HEADROOM_UNIT. Kernels are its own, unless it is
// told to call those of the program.

#include "kernels/unit.hpp"

#include "headroom/core/attention.hpp"

namespace headroom::testing {

const char* HEADROOM_UNIT(const Arrays& x) {
  using namespace core;
  const auto view = [&](auto* data) { return dense_view(data, 1, x.heads, x.length, x.dim); };
  const auto lse = dense_view(x.lse, 1, x.heads, x.length, 1);
  const SerialExecutor executor;
  attention_forward<float>({view(x.q), view(x.k), view(x.v), view(x.output), lse}, {}, CausalMask{}, executor);
  attention_backward<float>({.q = view(x.q),
                             .k = view(x.k),
                             .v = view(x.v),
                             .output = view(static_cast<const float*>(x.output)),
                             .lse = lse,
                             .grad_output = view(x.grad_output),
                             .grad_q = view(x.grad_q),
                             .grad_k = view(x.grad_k),
                             .grad_v = view(x.grad_v)},
                            {}, CausalMask{}, executor);
  attention_forward<Eigen::bfloat16>({view(x.narrow_q), view(x.narrow_k), view(x.narrow_v), view(x.narrow_output)}, {},
                                     CausalMask{}, executor);
  return instruction_set();
}

}  // namespace headroom::testing
