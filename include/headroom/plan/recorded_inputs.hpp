#pragma once

#include <ATen/core/ivalue.h>
#include <ATen/record_function.h>
#include <c10/util/ArrayRef.h>

namespace headroom::inline v0::detail {

/// The arguments of an operator, in a callback at its start. at::RecordFunction::inputs() is the same, but asserts a
/// flag that exists only without NDEBUG: in a program compiled without it, on a LibTorch compiled with it as all that
/// are published, nobody sets it. So the member is read past its access, which an explicit instantiation may do.
c10::ArrayRef<const c10::IValue> recorded_inputs(const at::RecordFunction& function);

template <auto Inputs>
struct RecordedInputs {
  friend c10::ArrayRef<const c10::IValue> recorded_inputs(const at::RecordFunction& function) {
    return function.*Inputs;
  }
};
template struct RecordedInputs<&at::RecordFunction::inputs_>;

}  // namespace headroom::inline v0::detail
