#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace headroom::inline v0::weights {

/// Types of elements that weight files hold, in the order in which tensors stand in the safetensors files of the
/// reference implementation: wide ones first.
enum class DType : std::uint8_t {
  u64,
  i64,
  f64,
  c64,
  f32,
  u32,
  i32,
  bf16,
  f16,
  u16,
  i16,
  f8_e4m3,
  f8_e5m2,
  i8,
  u8,
  boolean
};

/// What the formats call a type.
struct DTypeNames {
  DType dtype;
  std::size_t bytes;               ///< of an element
  std::string_view safetensors;    ///< in the header
  std::string_view torch_storage;  ///< class below `torch`; empty: a storage of this type is not read
};

// In the order of the enumeration
inline constexpr std::array<DTypeNames, 16> kDTypes{{{DType::u64, 8, "U64", ""},
                                                     {DType::i64, 8, "I64", "LongStorage"},
                                                     {DType::f64, 8, "F64", "DoubleStorage"},
                                                     {DType::c64, 8, "C64", "ComplexFloatStorage"},
                                                     {DType::f32, 4, "F32", "FloatStorage"},
                                                     {DType::u32, 4, "U32", ""},
                                                     {DType::i32, 4, "I32", "IntStorage"},
                                                     {DType::bf16, 2, "BF16", "BFloat16Storage"},
                                                     {DType::f16, 2, "F16", "HalfStorage"},
                                                     {DType::u16, 2, "U16", ""},
                                                     {DType::i16, 2, "I16", "ShortStorage"},
                                                     {DType::f8_e4m3, 1, "F8_E4M3", ""},
                                                     {DType::f8_e5m2, 1, "F8_E5M2", ""},
                                                     {DType::i8, 1, "I8", "CharStorage"},
                                                     {DType::u8, 1, "U8", "ByteStorage"},
                                                     {DType::boolean, 1, "BOOL", "BoolStorage"}}};

inline constexpr const DTypeNames& names_of(DType dtype) { return kDTypes[static_cast<std::size_t>(dtype)]; }
inline constexpr std::size_t bytes_of(DType dtype) { return names_of(dtype).bytes; }

/// The type that has `name` in a format, as in `dtype_called(&DTypeNames::safetensors, "BF16")`.
inline std::optional<DType> dtype_called(std::string_view DTypeNames::*format, std::string_view name) {
  const auto found = std::ranges::find_if(kDTypes, [&](const DTypeNames& names) { return names.*format == name; });
  return found == kDTypes.end() || name.empty() ? std::nullopt : std::optional(found->dtype);
}

}  // namespace headroom::inline v0::weights
