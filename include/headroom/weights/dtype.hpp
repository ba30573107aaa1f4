#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace headroom::inline v0::weights {

/// Types of elements that weight files hold.
enum class DType : std::uint8_t {
  f64,
  f32,
  f16,
  bf16,
  f8_e4m3,
  f8_e5m2,
  c64,
  i64,
  i32,
  i16,
  i8,
  u64,
  u32,
  u16,
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
inline constexpr std::array<DTypeNames, 16> kDTypes{{{DType::f64, 8, "F64", "DoubleStorage"},
                                                     {DType::f32, 4, "F32", "FloatStorage"},
                                                     {DType::f16, 2, "F16", "HalfStorage"},
                                                     {DType::bf16, 2, "BF16", "BFloat16Storage"},
                                                     {DType::f8_e4m3, 1, "F8_E4M3", ""},
                                                     {DType::f8_e5m2, 1, "F8_E5M2", ""},
                                                     {DType::c64, 8, "C64", "ComplexFloatStorage"},
                                                     {DType::i64, 8, "I64", "LongStorage"},
                                                     {DType::i32, 4, "I32", "IntStorage"},
                                                     {DType::i16, 2, "I16", "ShortStorage"},
                                                     {DType::i8, 1, "I8", "CharStorage"},
                                                     {DType::u64, 8, "U64", ""},
                                                     {DType::u32, 4, "U32", ""},
                                                     {DType::u16, 2, "U16", ""},
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
