#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/io/number.hpp"
#include "headroom/training/json.hpp"
#include "headroom/training/separate.hpp"
#include "headroom/weights/bytes.hpp"
#ifdef HEADROOM_TRAINING_HERE
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/mark.h>
#include <yaml-cpp/parser.h>
#endif

namespace headroom::inline v0::training {

/// A YAML document as JSON. Words without quotes are what PyYAML takes them for: true, yes and on, null and ~, whole
/// and decimal numbers; "1e-5" is a number, too. `!!python/tuple` makes a list. Anchors, aliases and `<<` are followed.
/// `name` is what error messages call the text.
///
/// Throws headroom.training.yaml with line and column: text that is not YAML or not UTF-8, a key that is given twice or
/// is not text, other tags (nothing is ever called), an alias of something that is not complete, more than one
/// document. A text has at most 256 KiB, lists and objects lie at most 32 deep, and a document has at most 20000 values
/// (a text counts once for each 100 bytes), those that aliases repeat included.
HEADROOM_TRAINING Json parse_yaml(std::string_view text, const std::string& name);

#ifdef HEADROOM_TRAINING_HERE
namespace detail {

inline bool is_any_of(std::string_view word, std::initializer_list<std::string_view> words) {
  return std::ranges::find(words, word) != words.end();
}

/// What a word without quotes stands for.
inline Json plain_value(const std::string& word) {
  if (is_any_of(word, {"", "~", "null", "Null", "NULL"})) return nullptr;
  if (is_any_of(word, {"true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"})) return true;
  if (is_any_of(word, {"false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"})) return false;
  const bool looks_like_a_number = word.find_first_not_of("+-0123456789.eE") == std::string::npos;
  const std::string digits = word.starts_with('+') ? word.substr(1) : word;
  if (!looks_like_a_number || digits.starts_with('+')) return word;
  if (const auto integer = io::parse_number<std::int64_t>(digits)) return *integer;
  if (const auto number = io::parse_number<double>(digits)) return *number;
  return word;
}

/// Makes JSON of what yaml-cpp finds in a text.
class YamlReader : public YAML::EventHandler {
 public:
  explicit YamlReader(std::string name) : name_(std::move(name)) {}

  /// The first document of `text`, the only one.
  Json read(std::string_view text) {
    constexpr std::size_t kMostBytes = 256 << 10;
    check(text.size() <= kMostBytes, {}, "the text has ", text.size(), " bytes, expected at most ", kMostBytes);
    check(weights::is_utf8(text) && text.find('\0') == text.npos, {}, "the text is not UTF-8; save it as UTF-8");
    std::istringstream stream{std::string(text)};
    try {
      YAML::Parser parser(stream);
      parser.HandleNextDocument(*this);
      check(!parser.HandleNextDocument(*this), last_, "another document begins here; expected one in a file");
    } catch (const YAML::ParserException& error) {
      check(false, error.mark, error.msg, "; expected valid YAML");
    }
    return std::move(root_);
  }

  void OnDocumentStart(const YAML::Mark& mark) override { last_ = mark; }
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override { add(mark, anchor, 1, nullptr); }

  void OnAlias(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    const auto found = anchors_.find(anchor);
    check(found != anchors_.end(), mark, "an alias of what it stands in; write the value out");
    add(mark, 0, found->second.weight, found->second.value);
  }

  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    const bool is_key = !open_.empty() && open_.back().value.is_object() && !open_.back().has_key;
    if (is_key) return set_key(mark, value);
    add(mark, anchor, weight_of(value), scalar(mark, tag, value));
  }

  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    check_tag(mark, tag, {kTag + "seq", kTag + "python/tuple", kTag + "python/list"});
    open(mark, anchor, Json::array());
  }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    check_tag(mark, tag, {kTag + "map", kTag + "python/dict"});
    open(mark, anchor, Json::object());
  }
  void OnSequenceEnd() override { close(); }
  void OnMapEnd() override { close(); }

 private:
  inline static const std::string kTag = "tag:yaml.org,2002:";

  struct Level {
    Json value;
    YAML::Mark mark;
    YAML::anchor_t anchor;
    std::size_t weight_before;
    bool has_key = false;
    std::string key = {};
    std::set<std::string> keys = {};
    Json merged = Json::array();  ///< what `<<` names, in its order
  };
  struct Anchored {
    Json value;
    std::size_t weight;
  };

  template <class... Text>
  void check(bool fine, const YAML::Mark& mark, const Text&... text) const {
    require(fine, "headroom.training.yaml", name_, ": line ", mark.line + 1, ", column ", mark.column + 1, ": ",
            text...);
  }

  void check_tag(const YAML::Mark& mark, const std::string& tag, std::initializer_list<std::string> known) const {
    const bool fine = tag.empty() || tag == "?" || tag == "!" || std::ranges::find(known, tag) != known.end();
    check(fine, mark, "the tag ", weights::in_quotes(tag), " asks for something that configurations do not have; ",
          "remove it");
  }

  static std::size_t weight_of(const std::string& text) { return 1 + text.size() / 100; }

  /// Each value of the document, and each that an alias repeats, weighs 1 or more.
  void count(const YAML::Mark& mark, std::size_t weight) {
    constexpr std::size_t kMost = 20'000;
    check((weight_ += weight) <= kMost, mark, "the document has more than ", kMost, " values here, those that aliases ",
          "repeat included; a configuration has fewer");
  }

  Json scalar(const YAML::Mark& mark, const std::string& tag, const std::string& value) const {
    if (tag == "!" || tag == kTag + "str" || tag == kTag + "python/unicode") return value;
    check_tag(mark, tag, {kTag + "int", kTag + "float", kTag + "bool", kTag + "null"});
    return plain_value(value);
  }

  void set_key(const YAML::Mark& mark, const std::string& key) {
    Level& level = open_.back();
    count(mark, weight_of(key));
    check(level.keys.insert(key).second, mark, "the key ", weights::in_quotes(key),
          " is given twice in one object; remove one of the two");
    level.key = key;
    level.has_key = true;
  }

  void open(const YAML::Mark& mark, YAML::anchor_t anchor, Json empty) {
    constexpr std::size_t kDeepest = 32;
    check(open_.size() < kDeepest, mark, "lists and objects lie ", kDeepest, " deep here, expected no more");
    check_is_value(mark);
    const std::size_t before = weight_;
    count(mark, 1);
    open_.push_back({std::move(empty), mark, anchor, before});
  }

  void close() {
    Level level = std::move(open_.back());
    open_.pop_back();
    for (const Json& merged : level.merged) {
      for (const auto& [key, value] : merged.items()) {
        if (level.keys.insert(key).second) level.value[key] = value;  // what stands in the object itself goes first
      }
    }
    if (level.anchor != 0) anchors_[level.anchor] = {level.value, weight_ - level.weight_before};
    put(level.mark, std::move(level.value));
  }

  /// A value that weighs so much.
  void add(const YAML::Mark& mark, YAML::anchor_t anchor, std::size_t weight, Json value) {
    check_is_value(mark);
    count(mark, weight);
    if (anchor != 0) anchors_[anchor] = {value, weight};
    put(mark, std::move(value));
  }

  /// Keys are texts; lists, objects and aliases come as values.
  void check_is_value(const YAML::Mark& mark) const {
    const bool fine = open_.empty() || !open_.back().value.is_object() || open_.back().has_key;
    check(fine, mark, "a key that is a list, an object, null or an alias; expected text");
  }

  void put(const YAML::Mark& mark, Json value) {
    if (open_.empty()) {
      root_ = std::move(value);
      return;
    }
    Level& level = open_.back();
    if (level.value.is_array()) return level.value.push_back(std::move(value));
    level.has_key = false;
    if (level.key != "<<") {
      level.value[level.key] = std::move(value);
      return;
    }
    level.merged = value.is_array() ? std::move(value) : Json::array({std::move(value)});
    for (const Json& merged : level.merged) check(merged.is_object(), mark, "`<<` takes objects or a list of them");
  }

  std::string name_;
  YAML::Mark last_;
  Json root_;
  std::vector<Level> open_;
  std::map<YAML::anchor_t, Anchored> anchors_;
  std::size_t weight_ = 0;
};

}  // namespace detail

HEADROOM_TRAINING Json parse_yaml(std::string_view text, const std::string& name) {
  return detail::YamlReader(name).read(text);
}
#endif

}  // namespace headroom::inline v0::training
