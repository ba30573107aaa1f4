#include "headroom/core/attention/reference.hpp"

#include "core/attention_run.hpp"

namespace headroom::testing {

template <class Scalar>
void run_reference(const AttentionTensors<Scalar>& forward, const AttentionBackwardTensors<Scalar>& backward,
                   const AttentionParams& params, const AnyMask& mask) {
  attention_forward_reference(forward, params, mask);
  attention_backward_reference(backward, params, mask);
}
template void run_reference(const AttentionTensors<float>&, const AttentionBackwardTensors<float>&,
                            const AttentionParams&, const AnyMask&);
template void run_reference(const AttentionTensors<double>&, const AttentionBackwardTensors<double>&,
                            const AttentionParams&, const AnyMask&);

}  // namespace headroom::testing
