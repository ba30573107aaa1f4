#pragma once

#include <ATen/ATen.h>

#include <array>
#include <cstdint>
#include <optional>

#include "headroom/optim/moment.hpp"

namespace headroom::inline v0::optim {

/// The type to compute the update of a parameter in: 16 bits hold neither 0.999 nor 1e-8.
inline at::ScalarType computed_type(const at::Tensor& parameter) {
  return parameter.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

/// Makes, reads and rounds the running averages of an optimizer, all in one format.
class MomentStore {
 public:
  explicit MomentStore(MomentFormat format) : format_(format) {}

  MomentFormat format() const { return format_; }

  /// Zeros of the shape of a parameter.
  static at::Tensor zeros(const at::Tensor& parameter, at::ScalarType type) {
    return at::zeros(parameter.sizes(), parameter.options().dtype(type).requires_grad(false));
  }

  /// A moment of zero. One that is never negative has codes without a sign.
  StoredMoment zero(const at::Tensor& parameter, bool is_signed) {
    if (format_ == MomentFormat::eight_bit && parameter.numel() >= kSmallestEightBit) {
      return quantise(zeros(parameter, at::kFloat), code(parameter, is_signed));
    }
    return {zeros(parameter, format_ == MomentFormat::bf16 ? at::kBFloat16 : computed_type(parameter)), {}, is_signed};
  }

  /// The numbers of a moment in the computed type: in place where they are stored as such.
  at::Tensor load(const StoredMoment& moment, const at::Tensor& parameter) {
    const auto type = computed_type(parameter);
    if (!moment.scales.defined()) return moment.values.to(type);
    return dequantise(moment, code(parameter, moment.is_signed), parameter.sizes()).to(type);
  }

  /// `value` in the format of `before`, for StoredMoment::copy_.
  StoredMoment round(const StoredMoment& before, const at::Tensor& value, int64_t step) {
    if (before.scales.defined()) {
      const at::Tensor x = value.to(at::kFloat);
      return quantise(x, code(x, before.is_signed), rounding_position(step));
    }
    if (before.values.scalar_type() != at::kBFloat16) return {value, {}, before.is_signed};
    return {round_to_bf16(value.to(at::kFloat), step), {}, before.is_signed};
  }

 private:
  const DynamicCode& code(const at::Tensor& like, bool is_signed) {
    auto& known = codes_[is_signed];
    if (!known || known->values.device() != like.device()) known.emplace(is_signed, like);
    return *known;
  }

  MomentFormat format_;
  std::array<std::optional<DynamicCode>, 2> codes_;
};

}  // namespace headroom::inline v0::optim
