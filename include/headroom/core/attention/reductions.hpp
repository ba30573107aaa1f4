#pragma once

#include "headroom/core/attention/schedule.hpp"
#include "headroom/core/attention/score_terms.hpp"
#include "headroom/core/scratch.hpp"

/// Sums of gradients of parameters on their way from tiles to the tensors that receive them. They are added up in an
/// order that depends on the shape alone: tiles of a strip, strips of a head, heads.
namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// Sums for a head: of one strip of keys, or of all; those that are not wanted are null.
class HeadSums {
 public:
  HeadSums(std::byte* at, const BackwardProblem& x) : x_(x), scratch_(at), start_(Scratch(at).take<double>(0)) {
    const AttentionParamGradients& grads = x.param_grads;
    const auto take = [&](bool wanted, Index count) { return wanted ? scratch_.take<double>(count) : nullptr; };
    bias_over_keys_ = take(grads.bias_over_keys(), x.q.length());
    relative_ = take(grads.relative_bias.data != nullptr, grads.relative_bias.dim());
    slopes_ = take(grads.slopes.data != nullptr, x.q.length());
    sink_ = take(grads.sink.data != nullptr, 1);
    score_tables_ = take(grads.score_tables.data != nullptr, grads.score_tables.dim());
    polar_phase_ = take(grads.polar_phase.data != nullptr, grads.polar_phase.dim());
  }
  Index bytes() const { return scratch_.bytes(); }
  void clear() const { std::fill_n(start_, count(), 0.0); }
  void add(const HeadSums& other) const {
    for (Index i = 0; i < count(); ++i) start_[i] += other.start_[i];
  }
  /// Adds the sums to the gradients of the problem.
  void commit(HeadIndex head) const {
    const auto [b, h] = head;
    const AttentionParamGradients& grads = x_.param_grads;
    for (Index r = 0; r < grads.relative_bias.dim() && relative_ != nullptr; ++r) {
      grads.relative_bias(0, h, 0, r) += relative_[r];
    }
    if (sink_ != nullptr) grads.sink(0, h, 0, 0) += *sink_;
    for (Index i = 0; i < x_.q.length() && slopes_ != nullptr; ++i) grads.slopes(b, h, i, 0) += slopes_[i];
    for (Index i = 0; i < grads.score_tables.dim() && score_tables_ != nullptr; ++i) {
      grads.score_tables(0, 0, 0, i) += score_tables_[i];
    }
    for (Index d = 0; d < grads.polar_phase.dim() && polar_phase_ != nullptr; ++d) {
      grads.polar_phase(0, h * x_.k.shape[1] / x_.heads(), 0, d) += polar_phase_[d];
    }
    if (bias_over_keys_ == nullptr) return;
    grads.bias.head(b, h, x_.heads()).visit([&](auto bias) {
      add_strided(bias.data, bias.row_stride, bias_over_keys_, x_.q.length());
    });
  }
  /// Where tiles add, with `bias` for what goes to a bias tile by tile.
  ParamSums tile_sums(const StoredMatrix& bias, Index first_key) const {
    return {bias, first_key, bias_over_keys_, relative_, slopes_, sink_, score_tables_, polar_phase_};
  }

 private:
  Index count() const { return bytes() / static_cast<Index>(sizeof(double)); }

  const BackwardProblem& x_;
  Scratch scratch_;
  double* start_;
  double *bias_over_keys_, *relative_, *slopes_, *sink_, *score_tables_, *polar_phase_;
};

/// Sums of one strip of keys for the gradient of a bias that several heads or queries share and that is stored in
/// fewer bits than it is computed in, so that it is rounded once: [B or 1,H or 1,Lq or 1,keys] of a family. Empty where
/// tiles add to the gradient itself.
template <class Scalar>
class SharedBiasSums {
 public:
  SharedBiasSums(std::byte* at, const BackwardProblem& x, const HeadFamilies& families) : x_(x), scratch_(at) {
    const StoredTensor& bias = x.param_grads.bias;
    if (x.param_grads.bias_by_tiles() && bias.type != kStoredType<Scalar>) {
      const std::array<Index, 3> extents{families.batches(), families.heads(), x.q.length()};
      bool shared = false;
      for (std::size_t d = 0; d < 3; ++d) {
        shared |= bias.strides[d] == 0 && extents[d] > 1;
        shape_[d] = bias.strides[d] == 0 ? 1 : extents[d];
      }
      if (shared) shape_[3] = Strips<Scalar>::kMostLanes;
    }
    data_ = scratch_.take<Scalar>(size());
  }
  Index bytes() const { return scratch_.bytes(); }
  void clear() const { std::fill_n(data_, size(), Scalar(0)); }

  /// Where the tiles of a head and a strip add, from the strip's first key on; without data where the gradient of a
  /// bias is not summed by tiles.
  StoredMatrix of_head(const HeadFamily& family, HeadIndex head, KeyRange keys) const {
    if (!x_.param_grads.bias_by_tiles()) return {};
    if (size() > 0) return sums(head.b - family.first_batch, head.h - family.first_head);
    return gradient(head).block(0, keys.begin, x_.q.length(), keys.end - keys.begin);
  }
  /// Adds the sums of a strip to the gradient.
  void commit(const HeadFamily& family, KeyRange keys) const {
    for (Index b = 0; b < shape_[0] && size() > 0; ++b) {
      for (Index h = 0; h < shape_[1]; ++h) {
        const auto from = sums(b, h).template as<Scalar>();
        gradient({family.first_batch + b, family.first_head + h}).visit([&](auto to) {
          for (Index i = 0; i < shape_[2]; ++i) {
            add_strided(&to(i, keys.begin), to.col_stride, &from(i, 0), keys.end - keys.begin);
          }
        });
      }
    }
  }

 private:
  Index size() const { return shape_[0] * shape_[1] * shape_[2] * shape_[3]; }
  StoredMatrix gradient(HeadIndex head) const { return x_.param_grads.bias.head(head.b, head.h, x_.heads()); }
  StoredMatrix sums(Index b, Index h) const {
    const Index at = (std::min(b, shape_[0] - 1) * shape_[1] + std::min(h, shape_[1] - 1)) * shape_[2] * shape_[3];
    return {data_ + at, kStoredType<Scalar>, shape_[2], shape_[3], shape_[2] == 1 ? 0 : shape_[3], 1};
  }

  const BackwardProblem& x_;
  std::array<Index, 4> shape_{};
  Scratch scratch_;
  Scalar* data_;
};

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
