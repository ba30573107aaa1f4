#pragma once

#include <algorithm>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "headroom/io/nearest.hpp"
#include "headroom/training/field.hpp"
#include "headroom/training/json.hpp"

namespace headroom::inline v0::training {

class Fields;

/// A struct that names its members once, for reading, writing, unknown keys and the table in the documentation:
///
///     struct Loss {
///       double weight = 1;
///       static void describe(auto& self, auto&& field) {
///         field("weight", self.weight, {.at_least = 0}, "factor of the loss");
///       }
///     };
template <class T>
concept Described = requires(T& value, Fields& field) {
  T::describe(value, field);
};

/// The members of a described struct in the order of their description: what describe() calls.
class Fields {
 public:
  template <class M>
  void operator()(const char* name, M& member, const Accepted& accepted, const char* meaning) {
    if constexpr (Described<M>) {
      Fields inner;
      M::describe(member, inner);
      fields_.push_back({.name = name, .meaning = meaning, .members = std::move(inner.fields_)});
    } else {
      fields_.push_back(make_field(name, member, accepted, meaning));
    }
  }

  std::vector<Field> take() { return std::move(fields_); }

 private:
  std::vector<Field> fields_;
};

/// The members of a described struct that outlives them.
template <Described T>
std::vector<Field> fields_of(T& value) {
  Fields fields;
  T::describe(value, fields);
  return fields.take();
}

/// "; did you mean `n_heads`?", or nothing where no word of `valid` is near.
inline std::string did_you_mean(const std::string& given, const std::vector<std::string>& valid) {
  const auto meant = io::nearest(given, valid);
  return meant ? "; did you mean `" + *meant + "`?" : "";
}

/// Reads the members of `json` into fields and appends everything that is wrong to `problems`: keys that are unknown
/// (with the nearest valid one) or missing, values of another type or outside their bounds. Members that are absent or
/// wrong keep the value that they had.
inline void read_fields(const Json& json, const std::vector<Field>& fields, const std::string& path,
                        std::vector<Problem>& problems) {
  if (!json.is_object()) return detail::reject(problems, path, json, "an object {...}");
  std::vector<std::string> known;
  for (const Field& field : fields) {
    known.push_back(field.name);
    const std::string here = detail::member_path(path, field.name);
    const auto found = json.find(field.name);
    if (field.is_struct()) {
      read_fields(found == json.end() ? Json::object() : *found, field.members, here, problems);
    } else if (found != json.end()) {
      field.read(*found, here, problems);
    } else if (field.required) {
      problems.push_back({here, "missing; expected " + field.expected + " (" + field.meaning + ")"});
    }
  }
  std::vector<std::string> unknown;
  for (const auto& [key, unused] : json.items()) {
    if (std::ranges::find(known, key) == known.end()) unknown.push_back(key);
  }
  std::ranges::sort(unknown);
  for (const std::string& key : unknown) {
    const std::string meant = did_you_mean(key, known);
    problems.push_back({detail::member_path(path, key), "unknown key" + (meant.empty() ? "; remove it" : meant)});
  }
}

/// Fields as JSON, in their order.
inline Json write_fields(const std::vector<Field>& fields) {
  Json json = Json::object();
  for (const Field& field : fields) json[field.name] = field.is_struct() ? write_fields(field.members) : field.write();
  return json;
}

/// Reads a described struct, see read_fields.
template <Described T>
void read_described(const Json& json, T& value, const std::string& path, std::vector<Problem>& problems) {
  read_fields(json, fields_of(value), path, problems);
}

/// A described struct as JSON, members in the order of their description.
template <Described T>
Json write_described(const T& value) {
  return write_fields(fields_of(value));
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

/// Appends what fields have otherwise than `after`, the JSON of such a struct. Members that are not in both are passed
/// over: they belong to other types of one thing, and the type differs as well.
inline void append_differences(const std::vector<Field>& before, const Json& after, const std::string& path,
                               std::vector<Difference>& found) {
  for (const Field& field : before) {
    const auto other = after.find(field.name);
    if (other == after.end()) continue;
    const std::string here = member_path(path, field.name);
    if (field.is_struct()) {
      append_differences(field.members, *other, here, found);
    } else if (const Json old = field.write(); old != *other) {
      found.push_back({here, old.dump(), other->dump(), field.bound});
    }
  }
}

/// Appends fields as rows of a Markdown table.
inline void append_rows(std::ostringstream& rows, const std::vector<Field>& fields, const std::string& path) {
  for (const Field& field : fields) {
    const std::string here = member_path(path, field.name);
    if (field.is_struct()) {
      append_rows(rows, field.members, here);
    } else {
      rows << "| `" << here << "` | ";
      field.required ? rows << "required" : rows << '`' << field.write().dump() << '`';
      rows << " | " << field.expected << " | " << field.meaning << " |\n";
    }
  }
}

}  // namespace detail

/// Members that differ, in the order of their description.
template <Described T>
std::vector<Difference> differences(const T& before, const T& after) {
  std::vector<Difference> found;
  detail::append_differences(fields_of(before), write_described(after), "", found);
  return found;
}

/// The members of a described struct as a Markdown table: key, default, what it may hold, meaning.
template <Described T>
std::string describe_markdown(const T& defaults, const std::string& path = "") {
  std::ostringstream rows;
  rows << "| key | default | accepted | meaning |\n|---|---|---|---|\n";
  detail::append_rows(rows, fields_of(defaults), path);
  return rows.str();
}

}  // namespace headroom::inline v0::training
