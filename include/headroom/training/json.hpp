#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/core/finite.hpp"
#include "headroom/io/file_name.hpp"
#include "headroom/io/nearest.hpp"

namespace headroom::inline v0::training {

/// What a JSON member may hold. A type of its own has from_json and to_json for true, false and text, and says what
/// text may be in T::kExpected. The bounds of a list hold for each of its elements.
struct Accepted {
  bool required = false;
  double at_least = -std::numeric_limits<double>::infinity();
  double at_most = std::numeric_limits<double>::infinity();
  double above = -std::numeric_limits<double>::infinity();
  double below = std::numeric_limits<double>::infinity();
  std::vector<std::string> choices = {};  ///< the only values that a string may have; empty: any
  bool may_be_empty = false;              ///< a string or list without elements is accepted
  bool file_names = false;                ///< each string is the plain name of a file, see io::is_file_name
  bool bound = false;                     ///< what was trained with one value means something else with another
};

namespace detail {
struct IgnoreField {
  void operator()(const char*, auto&, const Accepted&, const char*) const {}
};
}  // namespace detail

/// A struct that names its members once, for reading, writing, unknown keys and the table in the documentation:
///
///     struct Loss {
///       double weight = 1;
///       static void describe(auto& self, auto&& field) {
///         field("weight", self.weight, {.at_least = 0}, "factor of the loss");
///       }
///     };
template <class T>
concept Described = requires(T& value) {
  T::describe(value, detail::IgnoreField{});
};

/// Something wrong with one member of a JSON document; `path` is written like `model.n_heads` or `loss.windows[2]`.
struct Problem {
  std::string path;
  std::string text;
};

namespace detail {

template <class T>
inline constexpr bool is_list = false;
template <class T>
inline constexpr bool is_list<std::vector<T>> = true;
template <class T, std::size_t N>
inline constexpr bool is_list<std::array<T, N>> = true;

template <class T>
inline constexpr std::size_t fixed_size = 0;
template <class T, std::size_t N>
inline constexpr std::size_t fixed_size<std::array<T, N>> = N;

inline std::string member_path(const std::string& parent, std::string_view name) {
  return parent.empty() ? std::string(name) : parent + "." + std::string(name);
}

inline std::string number_text(double value) {
  return nlohmann::json(value == std::floor(value) && std::abs(value) < 1e15
                            ? nlohmann::json(static_cast<std::int64_t>(value))
                            : nlohmann::json(value))
      .dump();
}

/// " >= 1 and <= 64", or nothing when any number will do.
inline std::string bounds_text(const Accepted& accepted) {
  std::string text;
  const auto add = [&](const char* sign, double bound) {
    if (core::detail::is_finite(bound)) {
      text += (text.empty() ? " " : " and ") + std::string(sign) + " " + number_text(bound);
    }
  };
  add(">", accepted.above);
  add(">=", accepted.at_least);
  add("<", accepted.below);
  add("<=", accepted.at_most);
  return text;
}

inline std::string choices_text(const Accepted& accepted) {
  std::string text;
  for (const std::string& choice : accepted.choices) {
    text += (text.empty() ? "" : ", ") + nlohmann::json(choice).dump();
  }
  return text;
}

/// What a member of type T may hold, in words: "an integer >= 1".
template <class T>
std::string expected_text(const Accepted& accepted) {
  if constexpr (is_list<T>) {
    using Element = typename T::value_type;
    const std::string count = fixed_size<T> > 0       ? std::to_string(fixed_size<T>)
                              : accepted.may_be_empty ? "any number"
                                                      : "one or more";
    const char* elements = std::same_as<Element, std::string> ? accepted.file_names ? "plain file names" : "strings"
                           : std::integral<Element>           ? "integers"
                                                              : "numbers";
    return "a list of " + count + " " + elements + bounds_text(accepted);
  } else if constexpr (std::same_as<T, bool>) {
    return "true or false";
  } else if constexpr (std::integral<T>) {
    return "an integer" + bounds_text(accepted);
  } else if constexpr (std::floating_point<T>) {
    return "a number" + bounds_text(accepted);
  } else if constexpr (requires { T::kExpected; }) {
    return std::string("true, false or one of ") + T::kExpected;
  } else {
    static_assert(std::same_as<T, std::string>, "no JSON counterpart for this member type");
    if (accepted.file_names) return "the plain name of a file";
    return accepted.choices.empty() ? (accepted.may_be_empty ? "a string" : "a string that is not empty")
                                    : "one of " + choices_text(accepted);
  }
}

inline bool within(double value, const Accepted& accepted) {
  return value >= accepted.at_least && value <= accepted.at_most && value > accepted.above && value < accepted.below;
}

/// Reads `json` into `value`; false when it is not what the field may hold.
template <class T>
bool read_value(const nlohmann::json& json, T& value, const Accepted& accepted) {
  if constexpr (std::same_as<T, bool>) {
    if (!json.is_boolean()) return false;
    value = json.get<bool>();
    return true;
  } else if constexpr (std::integral<T>) {
    const bool fits = json.is_number_unsigned()
                          ? json.get<std::uint64_t>() <= std::uint64_t(std::numeric_limits<T>::max())
                          : json.is_number_integer();
    if (!fits) return false;
    value = json.get<T>();
    return within(static_cast<double>(value), accepted);
  } else if constexpr (std::floating_point<T>) {
    if (!json.is_number()) return false;
    value = json.get<T>();
    return within(value, accepted);
  } else if constexpr (requires { T::kExpected; }) {
    if (!json.is_boolean() && !json.is_string()) return false;
    try {
      value = json.get<T>();
      return true;
    } catch (const Error&) {
      return false;
    }
  } else {
    if (!json.is_string()) return false;
    value = json.get<std::string>();
    const bool allowed =
        accepted.choices.empty() || std::ranges::find(accepted.choices, value) != accepted.choices.end();
    return allowed && (accepted.may_be_empty || !value.empty()) && (!accepted.file_names || io::is_file_name(value));
  }
}

/// Shortens what a user gave so that one wrong value does not fill the screen.
inline std::string given_text(const nlohmann::json& json) {
  std::string text = json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  constexpr std::size_t limit = 60;
  return text.size() <= limit ? text : text.substr(0, limit) + "...";
}

}  // namespace detail

/// Reads the members of `json` into a described struct and appends everything that is wrong to `problems`: keys that
/// are unknown (with the nearest valid one) or missing, values of another type or outside their bounds. Members that
/// are absent or wrong keep the value that they had.
template <Described T>
void read_described(const nlohmann::json& json, T& value, const std::string& path, std::vector<Problem>& problems) {
  if (!json.is_object()) {
    problems.push_back({path, "got " + detail::given_text(json) + ", expected an object {...}"});
    return;
  }
  std::vector<std::string> known;
  T::describe(value, [&]<class M>(const char* name, M& member, const Accepted& accepted, const char* meaning) {
    known.push_back(name);
    const std::string here = detail::member_path(path, name);
    const auto found = json.find(name);
    if constexpr (Described<M>) {
      read_described(found == json.end() ? nlohmann::json::object() : *found, member, here, problems);
    } else if (found == json.end()) {
      if (accepted.required) {
        problems.push_back({here, "missing; expected " + detail::expected_text<M>(accepted) + " (" + meaning + ")"});
      }
    } else {
      const auto reject = [&](const std::string& where, const nlohmann::json& given, const std::string& expected) {
        problems.push_back({where, "got " + detail::given_text(given) + ", expected " + expected});
      };
      if constexpr (detail::is_list<M>) {
        const bool right_size =
            found->is_array() && (detail::fixed_size<M> > 0 ? found->size() == detail::fixed_size<M>
                                                            : accepted.may_be_empty || !found->empty());
        if (!right_size) {
          reject(here, *found, detail::expected_text<M>(accepted));
          return;
        }
        if constexpr (detail::fixed_size<M> == 0) {
          member.resize(found->size());
        }
        for (std::size_t i = 0; i < found->size(); ++i) {
          if (!detail::read_value((*found)[i], member[i], accepted)) {
            reject(here + "[" + std::to_string(i) + "]", (*found)[i],
                   detail::expected_text<typename M::value_type>(accepted));
          }
        }
      } else if (M read{}; detail::read_value(*found, read, accepted)) {
        member = read;
      } else {
        reject(here, *found, detail::expected_text<M>(accepted));
      }
    }
  });
  for (const auto& [key, unused] : json.items()) {
    if (std::ranges::find(known, key) == known.end()) {
      const auto meant = io::nearest(key, known);
      problems.push_back({detail::member_path(path, key),
                          "unknown key" + (meant ? "; did you mean `" + *meant + "`?" : "; remove it")});
    }
  }
}

/// A described struct as JSON, members in the order of their description.
template <Described T>
nlohmann::ordered_json write_described(const T& value) {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  T::describe(value, [&]<class M>(const char* name, const M& member, const Accepted&, const char*) {
    if constexpr (Described<M>) {
      json[name] = write_described(member);
    } else {
      json[name] = member;
    }
  });
  return json;
}

/// A member that two values of a described struct have differently, as JSON text.
struct Difference {
  std::string path;
  std::string before, after;
  bool bound = false;  ///< Accepted::bound of the member
};

/// "model.n_heads: 2 became 4".
inline std::string describe(const Difference& difference) {
  return difference.path + ": " + difference.before + " became " + difference.after;
}

namespace detail {

/// Appends what of a described struct is otherwise in `after`, the JSON of such a struct.
template <Described T>
void append_differences(const T& before, const nlohmann::ordered_json& after, const std::string& path,
                        std::vector<Difference>& found) {
  T::describe(before, [&]<class M>(const char* name, const M& member, const Accepted& accepted, const char*) {
    const std::string here = member_path(path, name);
    if constexpr (Described<M>) {
      append_differences(member, after.at(name), here, found);
    } else if (const nlohmann::ordered_json old = member; old != after.at(name)) {
      found.push_back({here, old.dump(), after.at(name).dump(), accepted.bound});
    }
  });
}

}  // namespace detail

/// Members that differ, in the order of their description.
template <Described T>
std::vector<Difference> differences(const T& before, const T& after) {
  std::vector<Difference> found;
  detail::append_differences(before, write_described(after), "", found);
  return found;
}

/// The members of a described struct as rows of a Markdown table: key, default, what it may hold, meaning.
template <Described T>
std::string describe_markdown(const T& defaults, const std::string& path = "") {
  std::ostringstream rows;
  T::describe(defaults, [&]<class M>(const char* name, const M& member, const Accepted& accepted, const char* meaning) {
    const std::string here = detail::member_path(path, name);
    if constexpr (Described<M>) {
      rows << describe_markdown(member, here);
    } else {
      rows << "| `" << here << "` | " << (accepted.required ? "required" : "`" + nlohmann::json(member).dump() + "`")
           << " | " << detail::expected_text<M>(accepted) << " | " << meaning << " |\n";
    }
  });
  return rows.str();
}

namespace detail {

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
  void see(nlohmann::json::parse_event_t event, const nlohmann::json& parsed) {
    using Event = nlohmann::json::parse_event_t;
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
inline nlohmann::json parse_json(std::string_view text, const std::string& name) {
  detail::JsonWatch watch(name);
  try {
    return nlohmann::json::parse(
        text,
        [&](int, nlohmann::json::parse_event_t event, const nlohmann::json& parsed) {
          watch.see(event, parsed);
          return true;
        },
        true, true);
  } catch (const nlohmann::json::parse_error& error) {
    fail("headroom.training.json", name, ": ", detail::position_text(text, error.byte), ": ",
         detail::explanation(error.what()), "; expected valid JSON (// and /* */ comments are allowed)");
  } catch (const nlohmann::json::exception& error) {
    fail("headroom.training.json", name, ": ", detail::explanation(error.what()));
  }
}

}  // namespace headroom::inline v0::training
