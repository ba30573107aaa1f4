#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

#include "headroom/core/error.hpp"
#include "headroom/weights/bytes.hpp"
#include "headroom/weights/file_map.hpp"
#include "headroom/weights/pytorch.hpp"
#include "headroom/weights/safetensors.hpp"
#include "headroom/weights/tensor_record.hpp"
#include "headroom/weights/zip.hpp"

namespace headroom::inline v0::weights {

/// A weight file whose tensors are known, and not read yet.
struct WeightFile {
  std::shared_ptr<const FileMap> map;
  Contents contents;
};

/// What the bytes of a weight file, of whichever format, hold; `key` as in open_weights.
inline Contents read_contents(const Source& source, std::string_view key = "") {
  if (is_zip(source.bytes) || is_torch_legacy(source.bytes)) return read_torch(source, key);
  require(is_safetensors(source.bytes), "headroom.weights.format", source.name, " (", source.bytes.size(),
          " bytes) begins neither as a safetensors file nor as one that torch.save wrote; a web page in its place is "
          "a common reason: look into it, download it again");
  return read_safetensors(source);
}

/// Opens a safetensors file or what torch.save wrote, told apart by their first bytes. `key` names the dict that has
/// the tensors, such as "ema"; empty: they are at the top, or under state_dict, model_state_dict, state, model or ema,
/// looked for in this order. Throws headroom.weights.read, .format, and what read_safetensors and read_torch throw.
inline WeightFile open_weights(const std::filesystem::path& path, std::string_view key = "") {
  auto map = std::make_shared<const FileMap>(path);
  const Source source{map->bytes(), path.string()};
  return {std::move(map), read_contents(source, key)};
}

}  // namespace headroom::inline v0::weights
