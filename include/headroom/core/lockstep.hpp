#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cstddef>
#include <functional>
#include <utility>
#include <vector>

namespace headroom::inline v0::core {

/// Brings streams of samples together that are not equally far: keeps what one has and another has not yet. All memory
/// is allocated by the constructor, `state_bytes` of it.
template <class Scalar>
class Lockstep {
 public:
  using Block = Eigen::Array<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using ConstBlockRef = Eigen::Ref<const Block>;
  /// Takes the next n samples, which every stream has: the first n columns of each block. They are its own to change.
  using Sink = std::function<void(std::vector<Block>& streams, Eigen::Index n)>;

  /// Streams of `rows` rows each, none of which is ever `capacity` samples ahead of another.
  Lockstep(const std::vector<Eigen::Index>& rows, Eigen::Index capacity, Sink sink)
      : held_(rows.size(), 0), sink_(std::move(sink)) {
    for (const Eigen::Index r : rows) blocks_.emplace_back(r, capacity);
  }

  static std::size_t state_bytes(const std::vector<Eigen::Index>& rows, Eigen::Index capacity) {
    Eigen::Index all = 0;
    for (const Eigen::Index r : rows) all += r;
    return sizeof(Scalar) * static_cast<std::size_t>(all * capacity);
  }

  /// The next samples of a stream, [its rows, any].
  void add(std::size_t stream, const ConstBlockRef& samples) {
    blocks_[stream].middleCols(held_[stream], samples.cols()) = samples;
    held_[stream] += samples.cols();
    const Eigen::Index n = *std::min_element(held_.begin(), held_.end());
    if (n == 0) return;
    sink_(blocks_, n);
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      held_[i] -= n;
      for (Eigen::Index r = 0; r < blocks_[i].rows(); ++r) {
        Scalar* row = &blocks_[i](r, 0);
        std::copy(row + n, row + n + held_[i], row);
      }
    }
  }

 private:
  std::vector<Block> blocks_;
  std::vector<Eigen::Index> held_;  ///< samples in each block
  Sink sink_;
};

}  // namespace headroom::inline v0::core
