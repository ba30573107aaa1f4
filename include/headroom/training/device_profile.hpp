#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/plan/device_profile.hpp"
#include "headroom/training/config.hpp"
#include "headroom/training/described.hpp"
#include "headroom/training/json.hpp"
#include "headroom/training/separate.hpp"

namespace headroom::inline v0::training {

/// Reads a device profile from JSON text; `name` is what messages call it. Throws headroom.training.json and, for a
/// malformed profile, headroom.training.device_profile.
HEADROOM_TRAINING DeviceProfile parse_device_profile(std::string_view text, const std::string& name);

#ifdef HEADROOM_TRAINING_HERE
HEADROOM_TRAINING DeviceProfile parse_device_profile(std::string_view text, const std::string& name) {
  DeviceProfile profile;
  std::vector<Problem> problems;
  read_described(parse_json(text, name), profile, "", problems);
  if (problems.empty() && profile.usable_bytes() <= 0) {
    problems.push_back({"total_bytes", "nothing is left of it after context_bytes and workspace_bytes"});
  }
  require(problems.empty(), "headroom.training.device_profile", name, " is no device profile:", to_string(problems),
          "\nEvery key is described in docs/030_memory.md");
  return profile;
}
#endif

/// Reads a device profile from a JSON file. Throws headroom.training.config_file, else like parse_device_profile.
inline DeviceProfile load_device_profile(const std::filesystem::path& path) {
  return parse_device_profile(detail::read_text(path, "a device profile", "a JSON file, or the name of a known device"),
                              path.string());
}

/// A profile by name (device_profile) or, where `name` ends with .json, from a file.
inline DeviceProfile find_device_profile(const std::string& name) {
  return name.ends_with(".json") ? load_device_profile(name) : device_profile(name);
}

}  // namespace headroom::inline v0::training
