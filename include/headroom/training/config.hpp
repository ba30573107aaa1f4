#pragma once

#include <filesystem>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/io/input_file.hpp"
#include "headroom/training/described.hpp"
#include "headroom/training/json.hpp"
#include "headroom/training/models.hpp"
#include "headroom/training/published.hpp"
#include "headroom/training/rules.hpp"
#include "headroom/training/sections.hpp"
#include "headroom/training/separate.hpp"
#include "headroom/training/yaml.hpp"

namespace headroom::inline v0::training {

/// Reads a configuration from JSON text (// and /* */ comments allowed) or YAML; `name` is what messages call it. It is
/// YAML when `name` ends with .yaml or .yml, JSON when it ends with .json, else what its first character says. It may
/// have the keys of a published file, see published.hpp: `notices` gets what such a file asks for in vain.
///
/// Throws headroom.training.json or .yaml for text that is neither, with line and column, and headroom.training.config
/// for one that is no configuration, with every problem found: unknown keys and the nearest valid ones, missing keys,
/// wrong types, values out of bounds or impossible together. docs/070_training.md lists all keys.
HEADROOM_TRAINING Config parse_config(std::string_view text, const std::string& name,
                                      std::vector<std::string>* notices = nullptr);

/// Reads a configuration file. Throws headroom.training.config_file when it cannot be read, else like parse_config.
HEADROOM_TRAINING Config load_config(const std::filesystem::path& path, std::vector<std::string>* notices = nullptr);

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
        break;
      }
    }
  }
}

/// Gives the configuration a model of the type that a document names: it decides which other keys `model` has. Where
/// there is no such type the document loses the section, so that only this is told of it, and it returns false.
inline bool choose_model(Json& document, Config& config, std::vector<Problem>& problems) {
  if (!document.is_object() || !document.contains("model") || !document["model"].is_object()) return true;
  const Json& model = document["model"];
  if (!model.contains("type")) return true;
  const Json& type = model["type"];
  const std::string name = type.is_string() ? type.get<std::string>() : type.dump();
  if (const std::string reason = why_no_model_type(name); !reason.empty()) {
    problems.push_back({"model.type", reason});
    document.erase("model");
    return false;
  }
  config.model = ModelConfig(name);
  return true;
}

/// Whether a text is meant to be YAML.
inline bool is_yaml(std::string_view text, const std::string& name) {
  const std::string extension = std::filesystem::path(name).extension().string();
  if (extension == ".yaml" || extension == ".yml") return true;
  const std::size_t first = text.find_first_not_of(" \t\r\n");
  return extension != ".json" && first != text.npos && std::string_view("{[/").find(text[first]) == text.npos;
}

/// Reads what a document has of a configuration and appends all that is wrong.
inline void read_config(Json document, Config& config, std::vector<Problem>& problems) {
  const bool has_model = choose_model(document, config, problems);
  std::vector<Field> fields = fields_of(config);
  if (!has_model) std::erase_if(fields, [](const Field& field) { return field.name == "model"; });
  read_fields(document, fields, "", problems);
  point_to_sections(config, problems);
  check_together(config, problems);
}

}  // namespace detail

HEADROOM_TRAINING Config parse_config(std::string_view text, const std::string& name,
                                      std::vector<std::string>* notices) {
  Config config;
  std::vector<Problem> problems;
  Json document = detail::is_yaml(text, name) ? parse_yaml(text, name) : parse_json(text, name);
  if (is_published(document)) {
    Published published = translate_published(document, problems);
    if (!published.document.empty()) detail::read_config(std::move(published.document), config, problems);
    rename_problems(problems, published);
    if (notices != nullptr) *notices = std::move(published.notices);
  } else {
    detail::read_config(std::move(document), config, problems);
  }
  if (problems.empty()) return config;
  std::ostringstream message;
  message << problems.size() << (problems.size() == 1 ? " problem in " : " problems in ") << name;
  for (const auto& [path, reason] : problems) {
    message << "\n  " << name << ": " << (path.empty() ? "the document" : path) << ": " << reason;
  }
  fail("headroom.training.config", message.str(), "\nEvery key is described in docs/070_training.md");
}

HEADROOM_TRAINING Config load_config(const std::filesystem::path& path, std::vector<std::string>* notices) {
  return parse_config(
      detail::read_text(path, "a configuration", "a JSON or YAML file, such as those in examples/configs"),
      path.string(), notices);
}

HEADROOM_TRAINING std::string to_json(const Config& config) { return write_described(config).dump(2) + "\n"; }

HEADROOM_TRAINING std::string config_table() { return describe_markdown(Config{}); }
#endif

}  // namespace headroom::inline v0::training
