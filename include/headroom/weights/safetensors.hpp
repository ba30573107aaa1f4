#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headroom/weights/bytes.hpp"
#include "headroom/weights/dtype.hpp"
#include "headroom/weights/json_text.hpp"
#include "headroom/weights/tensor_record.hpp"

// The safetensors format (https://github.com/huggingface/safetensors): eight bytes with the length of a JSON header,
// the header, and the elements of all tensors, one tensor after the other without gaps. The header has for each tensor
// {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, offsets counted from the header's end, and may have
// texts under "__metadata__".

namespace headroom::inline v0::weights {

namespace detail {

/// Longest header that the reference implementation accepts, in bytes.
inline constexpr std::uint64_t kLongestHeader = 100'000'000;

class SafetensorsReader {
 public:
  explicit SafetensorsReader(const Source& source)
      : source_(source), reader_(source, "headroom.weights.safetensors"), json_(header_text(), reader_) {}

  Contents read() {
    json_.expect('{');
    json_.each_up_to('}', [&] {
      std::string name = json_.string();
      json_.expect(':');
      json_.expect('{');
      name == "__metadata__" ? read_metadata() : read_tensor(std::move(name));
    });
    json_.check(json_.at_end(), "the end of the header");
    check_no_gaps();
    sort_by_name();
    return std::move(contents_);
  }

 private:
  std::string_view header_text() {
    const auto length = reader_.number<std::uint64_t>();
    reader_.check(length <= kLongestHeader && length <= reader_.left(), "should begin with a header of ", length,
                  " bytes, expected at most ", std::min(kLongestHeader, reader_.left()));
    const std::string_view text = reader_.text(length);
    reader_.check(is_utf8(text), "has a header that is no UTF-8");
    return text;
  }

  void read_metadata() {
    reader_.check(!metadata_seen_, "has two __metadata__");
    metadata_seen_ = true;
    json_.each_up_to('}', [&] {
      std::string key = json_.string();
      json_.expect(':');
      const auto [place, is_new] = contents_.metadata.emplace(std::move(key), json_.string());
      reader_.check(is_new, "has two texts ", in_quotes(place->first), " in its metadata");
    });
  }

  void read_tensor(std::string name) {
    TensorRecord tensor{.name = std::move(name)};
    std::vector<std::int64_t> offsets;
    bool has_dtype = false, has_shape = false;
    json_.each_up_to('}', [&] {
      const std::string key = json_.string();
      json_.expect(':');
      if (key == "dtype" && !std::exchange(has_dtype, true)) {
        tensor.dtype = read_dtype(tensor.name);
      } else if (key == "shape" && !std::exchange(has_shape, true)) {
        tensor.shape = read_list(kMostDimensions);
      } else if (key == "data_offsets" && offsets.empty()) {
        offsets = read_list(2);
      } else {
        reader_.check(false, "says of tensor ", in_quotes(tensor.name),
                      " once more, or besides dtype, shape and "
                      "data_offsets, ",
                      in_quotes(key));
      }
    });
    reader_.check(has_dtype && has_shape && offsets.size() == 2, "does not say of tensor ", in_quotes(tensor.name),
                  " all of dtype, shape and data_offsets [begin, end]");
    place(tensor, static_cast<std::uint64_t>(offsets[0]), static_cast<std::uint64_t>(offsets[1]));
    contents_.tensors.push_back(std::move(tensor));
  }

  DType read_dtype(std::string_view tensor) {
    const std::string name = json_.string();
    const std::optional<DType> dtype = dtype_called(&DTypeNames::safetensors, name);
    reader_.check(dtype.has_value(), "has tensor ", in_quotes(tensor), " of dtype ", in_quotes(name),
                  ", which is not known");
    return *dtype;
  }
  std::vector<std::int64_t> read_list(std::size_t most) {
    std::vector<std::int64_t> values;
    json_.expect('[');
    json_.each_up_to(']', [&] {
      json_.check(values.size() < most, "at most " + std::to_string(most) + " numbers");
      values.push_back(json_.integer());
    });
    return values;
  }

  void place(TensorRecord& tensor, std::uint64_t begin, std::uint64_t end) const {
    const auto expected = data_bytes(tensor.shape, bytes_of(tensor.dtype));
    reader_.check(expected.has_value() && begin <= end && end - begin == *expected, "has tensor ",
                  in_quotes(tensor.name), " in bytes ", begin, " to ", end, ", expected ", expected.value_or(0),
                  " bytes by its dtype and shape");
    reader_.check(end <= reader_.left(), "ends before tensor ", in_quotes(tensor.name), " does, in bytes ", begin,
                  " to ", end, " of ", reader_.left());
    tensor.strides = contiguous_strides(tensor.shape);
    tensor.begin = reader_.position() + begin;
    tensor.bytes = *expected;
  }

  /// Every byte behind the header belongs to one tensor.
  void check_no_gaps() {
    std::ranges::sort(contents_.tensors, {}, [](const TensorRecord& t) { return std::pair(t.begin, t.bytes); });
    std::uint64_t end = reader_.position();
    for (const TensorRecord& tensor : contents_.tensors) {
      reader_.check(tensor.begin == end, "has tensor ", in_quotes(tensor.name), " in byte ", tensor.begin,
                    ", expected it in byte ", end, ", where the one before ends");
      end += tensor.bytes;
    }
    reader_.check(end == source_.bytes.size(), "has ", source_.bytes.size() - end, " bytes that belong to no tensor");
  }

  void sort_by_name() {
    std::ranges::sort(contents_.tensors, {}, &TensorRecord::name);
    const auto twice = std::ranges::adjacent_find(contents_.tensors, {}, &TensorRecord::name);
    reader_.check(twice == contents_.tensors.end(), "has two tensors ",
                  twice == contents_.tensors.end() ? "" : in_quotes(twice->name));
  }

  const Source& source_;
  ByteReader reader_;
  JsonText json_;
  Contents contents_;
  bool metadata_seen_ = false;
};

}  // namespace detail

/// Whether a file begins as a safetensors file: a length, and a header that is an object.
inline bool is_safetensors(Bytes bytes) { return bytes.size() > 8 && bytes[8] == std::byte{'{'}; }

/// The tensors of a safetensors file. Throws headroom.weights.safetensors for whatever the format forbids: a header
/// that is longer than the file (or than 100 MB) or no such JSON, names twice, unknown dtypes, byte ranges that do not
/// match the shape, overlap, leave gaps or end behind the file.
inline Contents read_safetensors(const Source& source) { return detail::SafetensorsReader(source).read(); }

}  // namespace headroom::inline v0::weights
