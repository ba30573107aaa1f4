#pragma once

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>

#include "headroom/attention/options.hpp"
#include "headroom/core/error.hpp"
#include "headroom/training/rules.hpp"
#include "headroom/training/sections.hpp"
#include "headroom/weights/tensor_map.hpp"

// What entries of the registry have in common.
namespace headroom::inline v0::training::detail {

/// A model's options with what other sections of a configuration say.
template <class Options>
Options with_sections(Options model, const Config& config) {
  model.stems(static_cast<int64_t>(config.audio.stems.size()))
      .gradient_checkpointing(config.model.gradient_checkpointing)
      .attention(attention_backend(config.model.attention));
  if constexpr (requires { model.audio_channels(0); }) {  // where `channels` is a width
    model.audio_channels(config.audio.channels);
  } else {
    model.channels(config.audio.channels);
  }
  if constexpr (requires { model.sample_rate(0); }) model.sample_rate(config.audio.sample_rate);
  if constexpr (requires { model.segment(0); }) model.segment(config.training.segment_length);
  return model;
}

/// What a check of options, which throws, says against them is said of `members`.
inline void check_options(std::initializer_list<const char*> members, Rules& rule, auto&& check) {
  std::string reason;
  try {
    if (!rule.any_wrong_in("model")) check();
  } catch (const Error& error) {
    reason = error.what();
  }
  rule(
      members, [&] { return reason.empty(); }, reason);
}

/// What names and shapes of weights tell. What they do not have is 0.
struct WeightShapes {
  const weights::TensorMap& weights;

  bool any(const std::string& prefix) const {
    const auto next = weights.lower_bound(prefix);
    return next != weights.end() && next->first.starts_with(prefix);
  }
  /// How many of PREFIX0., PREFIX1., … there are.
  int64_t count(const std::string& prefix) const {
    int64_t number = 0;
    while (any(prefix + std::to_string(number) + ".")) ++number;
    return number;
  }
  int64_t size(const std::string& name, int64_t axis) const {
    const auto found = weights.find(name);
    return found != weights.end() && found->second.dim() > axis ? found->second.size(axis) : 0;
  }
};

/// The STFT of a model, each size with its key.
struct StftSizes {
  struct Size {
    const char* key;
    int64_t samples;
  };
  Size n_fft, hop, window;
};

inline void check_stft(const StftSizes& stft, const Config& config, Rules& rule) {
  const auto& [n_fft, hop, window] = stft;
  rule(
      {n_fft.key}, [&] { return stft.n_fft.samples % 2 == 0; }, "got ", n_fft.samples, ", expected an even number");
  rule(
      {hop.key, window.key}, [&] { return stft.hop.samples <= stft.window.samples / 2; }, "got ", hop.samples,
      ", expected at most half of ", window.key, ", which is ", window.samples, ", else the spectrum has no inverse");
  rule(
      {"training.segment_length", n_fft.key}, [&] { return config.training.segment_length >= stft.n_fft.samples; },
      "got ", config.training.segment_length, ", expected at least ", n_fft.key, ", which is ", n_fft.samples);
}

/// The sizes of a stack of layers that attend along two axes.
struct StackSizes {
  int64_t layers, width, heads;
};

/// "4 layers, width 96, 6 heads; 1000 tokens a segment (100 frames x 10 bands)".
inline std::string size_summary(const StackSizes& stack, int64_t frames, int64_t count, const char* unit) {
  std::ostringstream text;
  text << stack.layers << " layers, width " << stack.width << ", " << stack.heads << " heads; " << frames * count
       << " tokens a segment (" << frames << " frames x " << count << " " << unit << ")";
  return text.str();
}

}  // namespace headroom::inline v0::training::detail
