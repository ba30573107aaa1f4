#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/core/finite.hpp"
#include "headroom/io/file_name.hpp"
#include "headroom/training/json.hpp"

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

/// Something wrong with one member of a JSON document; `path` is written like `model.n_heads` or `loss.windows[2]`.
struct Problem {
  std::string path;
  std::string text;
};

/// A line for each problem, with a line break before it: "\n  model.n_heads: got 0, expected an integer >= 1".
inline std::string to_string(const std::vector<Problem>& problems) {
  std::string text;
  for (const Problem& problem : problems) text += "\n  " + problem.path + ": " + problem.text;
  return text;
}

/// A member of a struct whose type is no longer known: what reads, writes and explains it. A struct in a struct has
/// `members` in the place of `read` and `write`.
struct Field {
  std::string name;
  std::string meaning;
  bool required = false, bound = false;  ///< as in Accepted
  std::string expected = {};             ///< what it may hold, in words
  std::function<Json()> write = {};
  /// Takes the value of a document, or appends what is wrong with it. Empty for a member that is constant.
  std::function<void(const Json&, const std::string& path, std::vector<Problem>&)> read = {};
  std::vector<Field> members = {};

  bool is_struct() const { return !write; }
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

inline std::string number_text(double value) {
  const bool whole = value == std::floor(value) && std::abs(value) < 1e15;
  return (whole ? Json(static_cast<std::int64_t>(value)) : Json(value)).dump();
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

/// "one of "a", "b"".
inline std::string one_of(const std::vector<std::string>& choices) {
  std::string text;
  for (const std::string& choice : choices) text += (text.empty() ? "one of " : ", ") + Json(choice).dump();
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
    if constexpr (is_list<Element>) return "a list of " + count + ", each " + expected_text<Element>(accepted);
    if (!accepted.choices.empty()) return "a list of " + count + ", each " + one_of(accepted.choices);
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
    if (!accepted.choices.empty()) return one_of(accepted.choices);
    return accepted.may_be_empty ? "a string" : "a string that is not empty";
  }
}

inline bool within(double value, const Accepted& accepted) {
  return value >= accepted.at_least && value <= accepted.at_most && value > accepted.above && value < accepted.below;
}

/// Reads `json` into `value`; false when it is not what the field may hold.
template <class T>
bool read_value(const Json& json, T& value, const Accepted& accepted) {
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
inline std::string given_text(const Json& json) {
  std::string text = json_text(json);
  constexpr std::size_t limit = 60;
  return text.size() <= limit ? text : text.substr(0, limit) + "...";
}

/// A wrong value: "got 5, expected a number > 0".
inline void reject(std::vector<Problem>& problems, const std::string& path, const Json& given,
                   const std::string& expected) {
  problems.push_back({path, "got " + given_text(given) + ", expected " + expected});
}

/// Reads `json` into a member, or appends to `problems` what is wrong with it. A scalar that is wrong stays as it was.
template <class T>
void read_member(const Json& json, T& member, const Accepted& accepted, const std::string& path,
                 std::vector<Problem>& problems) {
  if constexpr (is_list<T>) {
    const bool right_size =
        json.is_array() && (fixed_size<T> > 0 ? json.size() == fixed_size<T> : accepted.may_be_empty || !json.empty());
    if (!right_size) return reject(problems, path, json, expected_text<T>(accepted));
    if constexpr (fixed_size<T> == 0) member.resize(json.size());
    for (std::size_t i = 0; i < json.size(); ++i) {
      read_member(json[i], member[i], accepted, path + "[" + std::to_string(i) + "]", problems);
    }
  } else if (T read{}; read_value(json, read, accepted)) {
    member = read;
  } else {
    reject(problems, path, json, expected_text<T>(accepted));
  }
}

}  // namespace detail

/// The field of a member that outlives it.
template <class M>
Field make_field(const char* name, M& member, const Accepted& accepted, const char* meaning) {
  Field field{.name = name, .meaning = meaning, .required = accepted.required, .bound = accepted.bound};
  field.expected = detail::expected_text<std::remove_const_t<M>>(accepted);
  field.write = [&member] { return Json(member); };
  if constexpr (!std::is_const_v<M>) {
    field.read = [&member, accepted](const Json& json, const std::string& path, std::vector<Problem>& problems) {
      detail::read_member(json, member, accepted, path, problems);
    };
  }
  return field;
}

}  // namespace headroom::inline v0::training
