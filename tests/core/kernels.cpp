// The attention kernels, compiled once for all units that include attention_run.hpp.

#include "headroom/core/attention.hpp"

template void headroom::core::detail::ForwardPass<float>::run(Eigen::Index, int, std::byte*) const;
template void headroom::core::detail::ForwardPass<double>::run(Eigen::Index, int, std::byte*) const;
template void headroom::core::detail::BackwardPass<float>::run(Eigen::Index, int);
template void headroom::core::detail::BackwardPass<double>::run(Eigen::Index, int);
