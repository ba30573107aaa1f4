#pragma once

#include <algorithm>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"

namespace headroom::inline v0::training {

/// A JSON document whose objects keep the order of their members.
using Json = nlohmann::ordered_json;

/// The text of a document, in lines with so many spaces a level, or in one line. JSON is UTF-8, and names of files may
/// be anything: what is no UTF-8 becomes U+FFFD.
inline std::string json_text(const Json& json, int indent = -1) {
  return json.dump(indent, ' ', false, Json::error_handler_t::replace);
}

namespace detail {

/// "model.n_heads".
inline std::string member_path(const std::string& parent, std::string_view name) {
  return parent.empty() ? std::string(name) : parent + "." + std::string(name);
}

/// Where the `byte`-th byte of a text is, counted from 1. The parser's own column is wrong before a line's end.
inline std::string position_text(std::string_view text, std::size_t byte) {
  const std::string_view before = text.substr(0, std::min(text.size(), std::max<std::size_t>(byte, 1) - 1));
  const auto line = 1 + std::ranges::count(before, '\n');
  const std::size_t column = before.size() - (before.rfind('\n') + 1) + 1;  // npos + 1 is 0
  return "line " + std::to_string(line) + ", column " + std::to_string(column);
}

/// What the parser says, without its own prefix: "[json.exception.parse_error.101] parse error at line 3, column 5: …".
inline std::string_view explanation(std::string_view message) {
  message.remove_prefix(message.find("] ") + 2);
  return message.starts_with("parse error") ? message.substr(message.find(": ") + 2) : message;
}

/// Follows a parser through a document and refuses what the parser takes and nobody can have meant.
class JsonWatch {
 public:
  explicit JsonWatch(std::string name) : name_(std::move(name)) {}

  /// Throws headroom.training.json.
  void see(Json::parse_event_t event, const Json& parsed) {
    using Event = Json::parse_event_t;
    if (event == Event::key) {
      open_.back().key = parsed.get<std::string>();
      require(open_.back().keys.insert(open_.back().key).second, "headroom.training.json", name_, ": ", path(),
              ": the key `", open_.back().key, "` is given twice in one object; remove one of the two");
    } else if (event == Event::object_start || event == Event::array_start) {
      constexpr std::size_t kDeepest = 32;
      require(open_.size() < kDeepest, "headroom.training.json", name_, ": ", path(), ": lists and objects lie ",
              kDeepest, " deep here, expected no more; remove this value");
      open_.push_back({event == Event::array_start, 0, {}, {}});
    } else {
      if (event == Event::object_end || event == Event::array_end) open_.pop_back();
      if (!open_.empty()) ++open_.back().index;  // a value is complete
    }
  }

 private:
  struct Level {
    bool list;
    std::size_t index;  ///< of the element that comes, in a list
    std::string key;    ///< that was read last, in an object
    std::set<std::string> keys;
  };

  std::string path() const {
    std::string path;
    for (const Level& level : open_) {
      path = level.list ? path + "[" + std::to_string(level.index) + "]" : member_path(path, level.key);
    }
    return path;
  }

  std::string name_;
  std::vector<Level> open_;
};

}  // namespace detail

/// Parses JSON text in which // and /* */ comments are allowed. `name` is what error messages call it.
/// Throws headroom.training.json with line and column, and with the path of a key that is given twice or of a value
/// that lies deeper than anything of this library (32 levels): who walks a document calls itself for each level.
inline Json parse_json(std::string_view text, const std::string& name) {
  detail::JsonWatch watch(name);
  try {
    return Json::parse(
        text,
        [&](int, Json::parse_event_t event, const Json& parsed) {
          watch.see(event, parsed);
          return true;
        },
        true, true);
  } catch (const Json::parse_error& error) {
    fail("headroom.training.json", name, ": ", detail::position_text(text, error.byte), ": ",
         detail::explanation(error.what()), "; expected valid JSON (// and /* */ comments are allowed)");
  } catch (const Json::exception& error) {
    fail("headroom.training.json", name, ": ", detail::explanation(error.what()));
  }
}

/// The same for text that may be anything: null where it is no JSON.
inline Json try_parse_json(std::string_view text) {
  try {
    return parse_json(text, "");
  } catch (const Error&) {
    return {};
  }
}

}  // namespace headroom::inline v0::training
