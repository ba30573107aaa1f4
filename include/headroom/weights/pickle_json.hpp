#pragma once

#include <array>
#include <charconv>
#include <cstddef>
#include <map>
#include <string>
#include <string_view>
#include <vector>

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
    looked_at_ = 0;
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
        write_text(pickle_.text(value));
        break;
      case Kind::tuple:
      case Kind::list:
      case Kind::dict:
        write_items(value, depth);
        break;
      case Kind::global:
        write_text(pickle_.global(value));
        break;
      case Kind::opaque:
        write_text('<' + pickle_.global(value) + '>');
        break;
      case Kind::tensor:
      case Kind::storage:
        write_text("<tensor>");
        break;
      case Kind::none:
        json_ += "null";
    }
  }

  template <class... What>
  void check(bool fine, const What&... what) const {
    ByteReader(source_, "headroom.weights.pickle").check(fine, "has options ", what...);
  }

  /// Of values that a pickle repeats, each time counts.
  void look_at(std::size_t bytes) {
    constexpr std::size_t kMost = 64 << 10;
    looked_at_ += bytes;
    check(looked_at_ < kMost, "of more than ", kMost, " items and bytes");
  }

  void write_text(std::string_view text) {
    look_at(text.size());
    json_ += is_utf8(text) ? core::detail::json_string(text) : "null";
  }

  void write_real(double value) {
    if (!core::detail::is_finite(value)) {
      json_ += "null";
      return;
    }
    std::array<char, 32> digits;
    const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), value).ptr;
    const std::string_view written(digits.data(), static_cast<std::size_t>(end - digits.data()));
    json_ += written;
    if (written.find_first_of(".e") == written.npos) json_ += ".0";
  }

  void write_items(const PickleValue& value, int depth) {
    const std::vector<PickleValue>& items = pickle_.items(value);
    if (value.kind == Kind::dict) return write_members(items, depth);
    json_ += '[';
    for (std::size_t i = 0; i < items.size(); ++i) {
      look_at(1);
      if (i > 0) json_ += ',';
      write(items[i], depth + 1);
    }
    json_ += ']';
  }

  /// Members whose keys are no texts are left out; of those with one key the last counts, as in Python.
  void write_members(const std::vector<PickleValue>& items, int depth) {
    std::map<std::string_view, const PickleValue*> members;
    for (std::size_t i = 0; i + 1 < items.size(); i += 2) {
      look_at(1);
      if (items[i].kind != Kind::text) continue;
      const std::string_view key = pickle_.text(items[i]);
      look_at(key.size());
      if (is_utf8(key)) members[key] = &items[i + 1];
    }
    json_ += '{';
    for (const auto& [key, member] : members) {
      if (json_.back() != '{') json_ += ',';
      json_ += core::detail::json_string(key) + ':';
      write(*member, depth + 1);
    }
    json_ += '}';
  }

  const Pickle& pickle_;
  const Source& source_;
  std::string json_;
  std::size_t looked_at_ = 0;  // items, and bytes of texts
};

}  // namespace headroom::inline v0::weights::detail
