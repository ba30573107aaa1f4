#pragma once

#include <array>
#include <charconv>
#include <cstddef>
#include <string>
#include <string_view>

#include "headroom/core/finite.hpp"
#include "headroom/core/json_string.hpp"
#include "headroom/weights/bytes.hpp"
#include "headroom/weights/pickle.hpp"

namespace headroom::inline v0::weights::detail {

/// Writes values of a pickle as JSON text. A class or function is a string, its name; what only Python could make, and
/// a tensor, is a string in <>. Texts that are not UTF-8 and numbers that are not finite are null.
class PickleJson {
 public:
  /// Throws headroom.weights.pickle for values that contain themselves, and for more than anybody would write by hand.
  PickleJson(const Pickle& pickle, const Source& source) : pickle_(pickle), source_(source) {}

  std::string text(const PickleValue& value) {
    json_.clear();
    items_ = 0;
    write(value, 0);
    return json_;
  }

 private:
  using Kind = PickleKind;

  void write(const PickleValue& value, int depth) {
    constexpr int kDeepest = 16;
    check(depth < kDeepest, "that lie more than ", kDeepest, " deep");
    switch (value.kind) {
      case Kind::boolean:
        json_ += value.integer != 0 ? "true" : "false";
        break;
      case Kind::integer:
        json_ += std::to_string(value.integer);
        break;
      case Kind::real:
        write_real(value.real);
        break;
      case Kind::text:
        json_ += is_utf8(pickle_.text(value)) ? core::detail::json_string(pickle_.text(value)) : "null";
        break;
      case Kind::tuple:
      case Kind::list:
      case Kind::dict:
        write_items(value, depth);
        break;
      case Kind::global:
        write_name(pickle_.global(value));
        break;
      case Kind::opaque:
        write_name('<' + pickle_.global(value) + '>');
        break;
      case Kind::tensor:
      case Kind::storage:
        write_name("<tensor>");
        break;
      case Kind::none:
        json_ += "null";
    }
  }

  template <class... What>
  void check(bool fine, const What&... what) const {
    ByteReader(source_, "headroom.weights.pickle").check(fine, "has options ", what...);
  }

  void write_name(const std::string& name) { json_ += is_utf8(name) ? core::detail::json_string(name) : "null"; }

  void write_real(double value) {
    std::array<char, 32> digits;
    const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), value).ptr;
    const std::string_view written(digits.data(), static_cast<std::size_t>(end - digits.data()));
    if (!core::detail::is_finite(value)) {
      json_ += "null";
    } else {
      json_ += written;
      if (written.find_first_of(".e") == written.npos) json_ += ".0";
    }
  }

  /// Members of a dict whose keys are no texts are left out.
  void write_items(const PickleValue& value, int depth) {
    const bool is_dict = value.kind == Kind::dict;
    const std::size_t step = is_dict ? 2 : 1;
    json_ += is_dict ? '{' : '[';
    bool first = true;
    for (std::size_t i = 0; i < pickle_.items(value).size(); i += step) {
      constexpr std::size_t kMost = 64 << 10;
      check(++items_ < kMost && json_.size() < kMost, "of more than ", kMost, " items or bytes");
      const PickleValue& item = pickle_.items(value)[i];
      if (is_dict && item.kind != Kind::text) continue;
      if (!first) json_ += ',';
      first = false;
      write(item, depth + 1);
      if (!is_dict) continue;
      json_ += ':';
      write(pickle_.items(value)[i + 1], depth + 1);
    }
    json_ += is_dict ? '}' : ']';
  }

  const Pickle& pickle_;
  const Source& source_;
  std::string json_;
  std::size_t items_ = 0;  // that were looked at
};

}  // namespace headroom::inline v0::weights::detail
