#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <ostream>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/core/json_string.hpp"
#include "headroom/io/atomic_file.hpp"
#include "headroom/weights/bytes.hpp"
#include "headroom/weights/dtype.hpp"
#include "headroom/weights/tensor_record.hpp"

namespace headroom::inline v0::weights {

/// A tensor that is to be written.
struct TensorHeader {
  std::string name;
  DType dtype = DType::f32;
  std::vector<std::int64_t> shape;
};

namespace detail {

/// The length of the header and the header, padded with spaces so that the elements behind it are aligned.
inline std::string safetensors_header(std::span<const TensorHeader* const> tensors,
                                      const std::map<std::string, std::string>& metadata) {
  std::string header = "{";
  const auto member = [&](std::string& object, std::string_view key) -> std::string& {
    return (object += object == "{" ? "" : ",") += core::detail::json_string(key) + ":";
  };
  if (!metadata.empty()) {
    std::string texts = "{";
    for (const auto& [key, text] : metadata) member(texts, key) += core::detail::json_string(text);
    member(header, "__metadata__") += texts + "}";
  }
  std::uint64_t begin = 0;
  for (const TensorHeader* const tensor : tensors) {
    const std::uint64_t end = begin + *data_bytes(tensor->shape, bytes_of(tensor->dtype));
    std::string shape;
    for (const std::int64_t size : tensor->shape) {
      shape.append(shape.empty() ? "" : ",").append(std::to_string(size));
    }
    std::string& entry = member(header, tensor->name);
    entry.append("{\"dtype\":\"").append(names_of(tensor->dtype).safetensors).append("\",\"shape\":[").append(shape);
    entry.append("],\"data_offsets\":[")
        .append(std::to_string(begin))
        .append(",")
        .append(std::to_string(end))
        .append("]}");
    begin = end;
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  std::string length(8, '\0');
  for (int i = 0; i < 8; ++i) length[i] = static_cast<char>(header.size() >> 8 * i);
  return length + header;
}

inline void check_safetensors_names(std::span<const TensorHeader> tensors,
                                    const std::map<std::string, std::string>& metadata) {
  static constexpr auto kId = "headroom.weights.names";
  std::set<std::string_view> names;
  for (const TensorHeader& tensor : tensors) {
    require(is_utf8(tensor.name) && tensor.name != "__metadata__" && names.insert(tensor.name).second, kId,
            "got a tensor ", in_quotes(tensor.name),
            " to write; expected names in UTF-8, each once, and none of them __metadata__");
  }
  for (const auto& [key, text] : metadata) {
    require(is_utf8(key) && is_utf8(text), kId, "got metadata ", in_quotes(key), " to write; expected UTF-8");
  }
}

}  // namespace detail

/// Writes a safetensors file, which appears under its name when it is whole, see io::write_file. `write(i, stream)`
/// writes the elements of tensors[i], the last axis innermost. They are asked for in the order of the file, which is
/// the reference implementation's: wide types first, so that all are aligned, then by name. Throws
/// headroom.weights.write, and headroom.weights.names for names that the format cannot hold.
template <std::invocable<std::size_t, std::ostream&> Write>
void write_safetensors(const std::filesystem::path& path, std::span<const TensorHeader> tensors,
                       const std::map<std::string, std::string>& metadata, Write&& write) {
  detail::check_safetensors_names(tensors, metadata);
  std::vector<const TensorHeader*> order;
  for (const TensorHeader& tensor : tensors) order.push_back(&tensor);
  std::ranges::sort(order, {}, [](const TensorHeader* tensor) { return std::tie(tensor->dtype, tensor->name); });
  const std::string header = detail::safetensors_header(order, metadata);
  io::write_file(path, "headroom.weights.write", [&](std::ostream& stream) {
    stream.write(header.data(), static_cast<std::streamsize>(header.size()));
    for (const TensorHeader* const tensor : order) write(static_cast<std::size_t>(tensor - tensors.data()), stream);
  });
}

}  // namespace headroom::inline v0::weights
