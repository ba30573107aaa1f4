#pragma once

#include <Eigen/Core>

#include "headroom/core/error.hpp"

namespace headroom::inline v0::core::detail {

/// Fails with `id` unless an estimate has the channels and samples of its reference.
template <class Reference, class Estimate>
void check_same_shape(const char* id, const Eigen::MatrixBase<Reference>& reference,
                      const Eigen::MatrixBase<Estimate>& estimate) {
  require(reference.rows() == estimate.rows() && reference.cols() == estimate.cols(), id, "got a reference of ",
          reference.rows(), " x ", reference.cols(), " and an estimate of ", estimate.rows(), " x ", estimate.cols(),
          "; expected the same channels and samples in both");
}

}  // namespace headroom::inline v0::core::detail
