#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "headroom/core/error.hpp"
#include "headroom/training/field.hpp"
#include "headroom/training/json.hpp"
#include "headroom/weights/bytes.hpp"
#include "headroom/weights/file_map.hpp"
#include "headroom/weights/pytorch.hpp"

// A checkpoint of demucs (.th) has, beside the weights, the class of the model and the arguments that it is made with.
namespace headroom::inline v0::training {

namespace detail {

inline constexpr auto kDemucs = "headroom.training.demucs";

/// Arguments that other arguments make useless, or that matter in Python's training alone.
inline constexpr std::array<std::string_view, 18> kIdleDemucsArguments = {
    "wiener_iters",          "end_iters",
    "wiener_residual",       "multi_freqs_depth",
    "time_stride",           "t_max_positions",
    "t_weight_decay",        "t_lr",
    "t_cape_mean_normalize", "t_cape_augment",
    "t_cape_glob_loc_scale", "t_mask_type",
    "t_mask_random_seed",    "t_sparse_attn_window",
    "t_global_window",       "t_sparsity",
    "t_auto_sparsity",       "segment"};

/// Keys of a model in a configuration that are no arguments.
inline constexpr std::array<std::string_view, 3> kNoDemucsArguments = {"type", "attention", "gradient_checkpointing"};

/// What an argument has to be, as JSON text, where it is there.
struct FixedArgument {
  std::string_view name, value;
};
inline constexpr std::array<FixedArgument, 7> kFixedDemucsArguments{{{"cac", "true"},
                                                                     {"channels_time", "null"},
                                                                     {"multi_freqs", "[]"},
                                                                     {"t_emb", "\"sin\""},
                                                                     {"t_sin_random_shift", "0"},
                                                                     {"t_sparse_self_attn", "false"},
                                                                     {"t_sparse_cross_attn", "false"}}};

/// A number of an argument, samples or seconds, or `otherwise`.
inline double number_of(const Json& arguments, const char* name, double otherwise, const std::string& file) {
  const auto found = arguments.find(name);
  if (found == arguments.end()) return otherwise;
  constexpr double kMost = 1e9;
  const double number = found->is_number() ? found->get<double>() : 0;
  require(number > 0 && number < kMost, kDemucs, file, " has the argument ", name, " of ", given_text(*found),
          ", expected a number above 0 and below ", kMost);
  return number;
}

/// The configuration of the HTDemucs that `klass(*args, **kwargs)` would make in Python.
inline Json demucs_config(const Json& package, const std::string& file) {
  const Json &klass = package["klass"], &args = package["args"];
  require(klass.is_string() && klass.get<std::string>().ends_with("htdemucs.HTDemucs") &&
              package["kwargs"].is_object() && args.is_array(),
          kDemucs, file, " has a model of the class ", given_text(klass),
          ", expected demucs.htdemucs.HTDemucs, the one of demucs' models that is here");
  const Json& arguments = package["kwargs"];
  require(args.size() + arguments.contains("sources") == 1, kDemucs, file, " has ", args.size(),
          " arguments without a name, expected the sources and nothing else");
  const double rate = number_of(arguments, "samplerate", 44100, file),
               seconds = number_of(arguments, "segment", 10, file);
  Json config = {
      {"model", {{"type", "htdemucs"}}},
      {"audio", {{"sample_rate", static_cast<std::int64_t>(rate)}}},
      // A fraction of a second, such as 39/5, is whole samples but for rounding
      {"training", {{"segment_length", static_cast<std::int64_t>(seconds * rate + 1e-6)}, {"batch_size", 1}}},
      {"loss", {{"stft_weight", 0}}},
      {"inference", {{"normalize", true}}}};  // as demucs' programs do, not its class
  config["audio"]["stems"] = args.empty() ? arguments["sources"] : args[0];
  for (const auto& [name, value] : arguments.items()) {
    const auto fixed = std::ranges::find(kFixedDemucsArguments, std::string_view(name), &FixedArgument::name);
    if (fixed != kFixedDemucsArguments.end()) {
      const bool is_empty = value.is_null() && fixed->value == "[]";
      require(is_empty || value == Json::parse(fixed->value), kDemucs, file, " is a model with ", name, " ",
              given_text(value), ", expected ", fixed->value, ": demucs publishes no other, and another is not here");
    } else if (std::ranges::find(kNoDemucsArguments, std::string_view(name)) != kNoDemucsArguments.end()) {
      fail(kDemucs, file, " has the argument ", name, ", which HTDemucs does not have");
    } else if (name == "audio_channels") {
      config["audio"]["channels"] = value;
    } else if (name != "sources" && name != "samplerate" &&
               std::ranges::find(kIdleDemucsArguments, std::string_view(name)) == kIdleDemucsArguments.end()) {
      config["model"][name] = value;
    }
  }
  return config;
}

}  // namespace detail

/// The configuration, as JSON text, of a checkpoint that demucs wrote; none where the file is something else. Nothing
/// of the file is executed. Throws headroom.weights.read, and headroom.training.demucs for a model that is not here.
inline std::optional<std::string> read_demucs_config(const std::filesystem::path& path) {
  const weights::FileMap map(path);
  const weights::Source source{map.bytes(), path.string()};
  std::optional<Json> package;
  try {
    const auto text = weights::read_torch_members(source, {"klass", "args", "kwargs"});
    if (text) package = parse_json(*text, path.string());
  } catch (const Error&) {  // damaged, or something else: who reads it next says what is wrong
    return std::nullopt;
  }
  if (!package) return std::nullopt;
  return detail::demucs_config(*package, path.string()).dump();
}

}  // namespace headroom::inline v0::training
