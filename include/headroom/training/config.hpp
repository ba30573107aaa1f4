#pragma once

#include <filesystem>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/io/input_file.hpp"
#include "headroom/training/described.hpp"
#include "headroom/training/json.hpp"
#include "headroom/training/models.hpp"
#include "headroom/training/rules.hpp"
#include "headroom/training/sections.hpp"
#include "headroom/training/separate.hpp"

namespace headroom::inline v0::training {

/// Reads a configuration from JSON text (// and /* */ comments allowed); `name` is what messages call it.
///
/// Throws headroom.training.json for text that is not JSON, with line and column, and headroom.training.config for one
/// that is no configuration, with every problem found: unknown keys and the nearest valid ones, missing keys, wrong
/// types, values out of bounds or impossible together. docs/070_training.md lists all keys.
HEADROOM_TRAINING Config parse_config(std::string_view text, const std::string& name);

/// Reads a configuration file. Throws headroom.training.config_file when it cannot be read, else like parse_config.
HEADROOM_TRAINING Config load_config(const std::filesystem::path& path);

/// The configuration with all its defaults as JSON text that parse_config reads back to the same values.
HEADROOM_TRAINING std::string to_json(const Config& config);

/// The documentation of every key as a Markdown table: key, default, accepted values, meaning. `model` is the
/// time-frequency transformer; model_table() has the keys of other models.
HEADROOM_TRAINING std::string config_table();

namespace detail {

/// What a text file holds. Throws headroom.training.config_file, with `content` and `expected` in its text.
inline std::string read_text(const std::filesystem::path& path, const char* content, const char* expected) {
  constexpr std::uint64_t kMost = 16 << 20;
  const io::InputFile file(path, {"headroom.training.config_file", content, expected}, kMost);
  return file.read(0, file.size());
}

}  // namespace detail

#ifdef HEADROOM_TRAINING_HERE
namespace detail {

/// An unknown key that is a valid one of another section gets told so.
inline void point_to_sections(const Config& config, std::vector<Problem>& problems) {
  const Json sections = write_described(config);
  for (Problem& problem : problems) {
    const std::size_t dot = problem.path.find('.');
    const std::string key = dot == std::string::npos ? problem.path : problem.path.substr(dot + 1);
    for (const auto& [section, members] : sections.items()) {
      if (problem.text.starts_with("unknown key") && members.contains(key)) {
        problem.text = "unknown key; it belongs to `" + section + "`";
      }
    }
  }
}

/// Gives the configuration a model of the type that a document names: it decides which other keys `model` has. Where
/// there is no such type the document loses the section, so that only this is told of it.
inline void choose_model(Json& document, Config& config, std::vector<Problem>& problems) {
  if (!document.is_object() || !document.contains("model") || !document["model"].is_object()) return;
  const Json& model = document["model"];
  if (!model.contains("type")) return;
  const Json& type = model["type"];
  const std::string name = type.is_string() ? type.get<std::string>() : type.dump();
  if (const std::string reason = why_no_model_type(name); !reason.empty()) {
    problems.push_back({"model.type", reason});
    document.erase("model");
  } else {
    config.model = ModelConfig(name);
  }
}

/// Reads what a document has of a configuration and appends all that is wrong.
inline void read_config(Json document, Config& config, std::vector<Problem>& problems) {
  choose_model(document, config, problems);
  std::vector<Field> fields = fields_of(config);
  if (!problems.empty()) std::erase_if(fields, [](const Field& field) { return field.name == "model"; });
  read_fields(document, fields, "", problems);
  point_to_sections(config, problems);
  check_together(config, problems);
}

}  // namespace detail

HEADROOM_TRAINING Config parse_config(std::string_view text, const std::string& name) {
  Config config;
  std::vector<Problem> problems;
  detail::read_config(parse_json(text, name), config, problems);
  if (problems.empty()) return config;
  std::ostringstream message;
  message << problems.size() << (problems.size() == 1 ? " problem in " : " problems in ") << name;
  for (const auto& [path, reason] : problems) {
    message << "\n  " << name << ": " << (path.empty() ? "the document" : path) << ": " << reason;
  }
  fail("headroom.training.config", message.str(), "\nEvery key is described in docs/070_training.md");
}

HEADROOM_TRAINING Config load_config(const std::filesystem::path& path) {
  return parse_config(detail::read_text(path, "a configuration", "a JSON file, such as those in examples/configs"),
                      path.string());
}

HEADROOM_TRAINING std::string to_json(const Config& config) { return write_described(config).dump(2) + "\n"; }

HEADROOM_TRAINING std::string config_table() { return describe_markdown(Config{}); }
#endif

}  // namespace headroom::inline v0::training
