#pragma once

#include <torch/types.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/weights/bytes.hpp"
#include "headroom/weights/dtype.hpp"
#include "headroom/weights/file.hpp"
#include "headroom/weights/safetensors_writer.hpp"
#include "headroom/weights/tensor_map.hpp"
#include "headroom/weights/tensor_record.hpp"

namespace headroom::inline v0::weights {

namespace detail {

inline constexpr std::pair<DType, torch::ScalarType> kScalarTypes[] = {{DType::u64, torch::kUInt64},
                                                                       {DType::i64, torch::kLong},
                                                                       {DType::f64, torch::kDouble},
                                                                       {DType::c64, torch::kComplexFloat},
                                                                       {DType::f32, torch::kFloat},
                                                                       {DType::u32, torch::kUInt32},
                                                                       {DType::i32, torch::kInt},
                                                                       {DType::bf16, torch::kBFloat16},
                                                                       {DType::f16, torch::kHalf},
                                                                       {DType::u16, torch::kUInt16},
                                                                       {DType::i16, torch::kShort},
                                                                       {DType::f8_e4m3, torch::kFloat8_e4m3fn},
                                                                       {DType::f8_e5m2, torch::kFloat8_e5m2},
                                                                       {DType::i8, torch::kChar},
                                                                       {DType::u8, torch::kByte},
                                                                       {DType::boolean, torch::kBool}};

inline torch::ScalarType scalar_type(DType dtype) {
  return std::ranges::find(kScalarTypes, dtype, &std::pair<DType, torch::ScalarType>::first)->second;
}

inline std::optional<DType> dtype_of(torch::ScalarType type) {
  for (const auto& [dtype, scalar] : kScalarTypes) {
    if (scalar == type) return dtype;
  }
  return std::nullopt;
}

}  // namespace detail

/// A tensor on the bytes of the file, which stays mapped as long as the tensor lives: pages are read when they are
/// used, and writing changes the process's copy, not the file. It is a copy only where the bytes are not aligned to the
/// dtype, and of booleans, which a file may hold in more than two values.
inline torch::Tensor to_tensor(const WeightFile& file, const TensorRecord& record) {
  const torch::ScalarType type = detail::scalar_type(record.dtype);
  if (record.bytes == 0) return torch::empty(record.shape, type);
  std::byte* const begin = file.map->at(record.begin);
  const auto map = file.map;
  const auto on_file = [&](torch::ScalarType viewed) {
    return torch::from_blob(
        begin, record.shape, record.strides, [map](void*) {}, viewed);
  };
  if (record.dtype == DType::boolean) return on_file(torch::kByte).ne(0);
  if (reinterpret_cast<std::uintptr_t>(begin) % bytes_of(record.dtype) == 0) return on_file(type);
  const torch::Tensor copy = torch::empty({static_cast<int64_t>(record.bytes / bytes_of(record.dtype))}, type);
  std::memcpy(copy.data_ptr(), begin, record.bytes);
  return copy.as_strided(record.shape, record.strides);
}

/// All tensors of a file, see open_weights and to_tensor.
inline TensorMap load_tensors(const std::filesystem::path& path, std::string_view key = "") {
  const WeightFile file = open_weights(path, key);
  TensorMap tensors;
  for (const TensorRecord& record : file.contents.tensors) tensors.emplace(record.name, to_tensor(file, record));
  return tensors;
}

/// Writes tensors of any device and layout as a safetensors file, one copy of one tensor at a time where it is not
/// contiguous on the CPU. Tensors that share memory are written each by itself. Throws headroom.weights.write and
/// headroom.weights.names, and headroom.weights.dtype for a dtype that the format does not have.
inline void save_tensors(const std::filesystem::path& path, const TensorMap& tensors,
                         const std::map<std::string, std::string>& metadata = {}) {
  std::vector<TensorHeader> headers;
  std::vector<const torch::Tensor*> values;
  for (const auto& [name, tensor] : tensors) {
    const auto dtype = tensor.defined() ? detail::dtype_of(tensor.scalar_type()) : std::nullopt;
    require(dtype.has_value(), "headroom.weights.dtype", "got ", in_quotes(name), " of dtype ",
            tensor.defined() ? c10::toString(tensor.scalar_type()) : "undefined",
            " to write; safetensors files do not have it: convert it, e.g. to float");
    headers.push_back({name, *dtype, tensor.sizes().vec()});
    values.push_back(&tensor);
  }
  write_safetensors(path, headers, metadata, [&](std::size_t i, std::ostream& stream) {
    const torch::Tensor plain = values[i]->detach().cpu().resolve_conj().resolve_neg().contiguous();
    stream.write(static_cast<const char*>(plain.data_ptr()), static_cast<std::streamsize>(plain.nbytes()));
  });
}

}  // namespace headroom::inline v0::weights
