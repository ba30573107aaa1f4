#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <c10/core/Device.h>
#include <torch/nn/module.h>
#include <torch/serialize.h>
#include <torch/types.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/io/atomic_file.hpp"
#include "headroom/runtime/random_state.hpp"
#include "headroom/training/cause.hpp"
#include "headroom/training/schedule.hpp"
#include "headroom/training/separate.hpp"
#include "headroom/weights/load.hpp"
#include "headroom/weights/tensor_map.hpp"
#include "headroom/weights/tensors.hpp"

namespace headroom::inline v0::training {

using weights::TensorMap;
using weights::tensors_of;

/// Where a safetensors file of ours has its configuration: JSON text in its metadata.
inline constexpr const char* kConfigKey = "headroom.config";

/// Everything that a step depends on beside the configuration and the files of the data set, and what scores are
/// compared with: a run that goes on from it, in any process, gives the bits of one that never stopped. One file a
/// state.
struct TrainingState {
  std::string config = {};                ///< JSON text of the configuration
  int64_t step = 0;                       ///< optimizer steps, those that were skipped included: place in the schedule
  int64_t examples = 0;                   ///< place in the data: examples before the next step's first
  std::vector<double> epoch_losses = {};  ///< mean loss of each finished epoch
  int64_t unfinished_steps = 0;           ///< steps in the epoch that is under way; -1: a file does not say
  int64_t unfinished_skipped = 0;         ///< those of them that were skipped
  double unfinished_loss = 0;             ///< sum of the losses of the others
  int64_t skipped_steps = 0;              ///< steps so far whose loss or gradient was not finite
  int64_t skipped_in_a_row = 0;           ///< the last of them, without a good one in between
  std::string best_metric = {};           ///< what `best_score` measures, such as "validation nSDR" or "training loss"
  double best_score = 0;                  ///< greatest score, or least loss, so far; valid once a metric is named
  int64_t validations_since_best = 0;     ///< judgements in a row that were no better
  int64_t microbatch = 0;                 ///< examples in one pass since memory ran out; 0: it never did
  Plateau plateau = {};                   ///< of the schedule of that name
  double seconds_per_step = 0;            ///< pace of the last run that time limited; 0: there was none
  torch::Tensor random = {};              ///< state of LibTorch's default CPU generator
  torch::Tensor random_on_device = {};    ///< of the accelerator's that trains; undefined on the CPU
  TensorMap model = {};                   ///< parameters and buffers
  TensorMap lora = {};                    ///< A and B of low-rank changes, which `model` has in it
  TensorMap ema = {};                     ///< averages of parameters over steps; empty: none are taken
  TensorMap optimizer = {};               ///< moments and step counts by parameter, see optimizer_tensors
};

namespace detail {

/// The last bytes of a saved state. They come after the archive, so that Python's torch.load reads the file too.
struct Trailer {
  static constexpr std::array<char, 8> kMagic = {'h', 'e', 'a', 'd', 'r', 'm', '0', '1'};
  std::array<char, 8> magic = kMagic;
  uint64_t size = 0;
  uint64_t checksum = 0;
};
static_assert(sizeof(Trailer) == 24);

}  // namespace detail

/// Replaces the file by the concatenation of `parts`, or leaves it as it was, see io::write_file.
/// Throws headroom.training.state.write.
inline void write_atomically(const std::filesystem::path& path, std::initializer_list<std::string_view> parts,
                             const std::function<void()>& before_replacing = {}) {
  io::write_file(path, "headroom.training.state.write", parts, before_replacing);
}

namespace detail {

inline c10::Dict<std::string, torch::Tensor> to_dictionary(const TensorMap& tensors) {
  c10::Dict<std::string, torch::Tensor> dictionary;
  for (const auto& [name, tensor] : tensors) {
    const torch::Tensor value = tensor.detach().cpu().contiguous();
    // A view would drag the whole storage behind it into the file
    dictionary.insert(name, value.storage().nbytes() == value.nbytes() ? value : value.clone());
  }
  return dictionary;
}

inline TensorMap to_tensor_map(const c10::IValue& value) {
  TensorMap tensors;
  for (const auto& entry : value.toGenericDict()) {
    tensors.emplace(entry.key().toStringRef(), entry.value().toTensor());
  }
  return tensors;
}

}  // namespace detail

/// Writes a saved state atomically. Python reads it too: torch.load(path, weights_only=False). When it is whole, and
/// before it takes the place of what was there, `before_replacing` is called. Throws headroom.training.state.write.
HEADROOM_TRAINING void save_state(const std::filesystem::path& path, const TrainingState& state,
                                  const std::function<void()>& before_replacing = {});

/// Reads a saved state. Throws headroom.training.state.read when there is no such file and
/// headroom.training.state.corrupt when it is truncated, changed, or something else.
HEADROOM_TRAINING TrainingState load_state(const std::filesystem::path& path);

/// Whether a file ends as saved states do, also where it is damaged.
HEADROOM_TRAINING bool is_saved_state(const std::filesystem::path& path);

#ifdef HEADROOM_TRAINING_HERE
HEADROOM_TRAINING void save_state(const std::filesystem::path& path, const TrainingState& state,
                                  const std::function<void()>& before_replacing) {
  c10::impl::GenericDict content(c10::StringType::get(), c10::AnyType::get());
  content.insert("config", state.config);
  content.insert("step", state.step);
  content.insert("examples", state.examples);
  content.insert("epoch_losses", c10::List<double>(state.epoch_losses));
  content.insert("unfinished_steps", state.unfinished_steps);
  content.insert("unfinished_skipped", state.unfinished_skipped);
  content.insert("unfinished_loss", state.unfinished_loss);
  content.insert("skipped_steps", state.skipped_steps);
  content.insert("skipped_in_a_row", state.skipped_in_a_row);
  content.insert("best_metric", state.best_metric);
  content.insert("best_score", state.best_score);
  content.insert("validations_since_best", state.validations_since_best);
  content.insert("microbatch", state.microbatch);
  content.insert("plateau_waited", state.plateau.waited);
  content.insert("plateau_lowered", state.plateau.lowered);
  content.insert("seconds_per_step", state.seconds_per_step);
  content.insert("random", state.random);
  if (state.random_on_device.defined()) content.insert("random_on_device", state.random_on_device);
  content.insert("model", detail::to_dictionary(state.model));
  if (!state.lora.empty()) content.insert("lora", detail::to_dictionary(state.lora));
  if (!state.ema.empty()) content.insert("ema", detail::to_dictionary(state.ema));
  content.insert("optimizer", detail::to_dictionary(state.optimizer));
  const std::vector<char> archive = torch::pickle_save(content);
  const std::string_view bytes(archive.data(), archive.size());
  const detail::Trailer trailer{.size = bytes.size(), .checksum = io::detail::fnv1a(bytes)};
  write_atomically(path, {bytes, {reinterpret_cast<const char*>(&trailer), sizeof trailer}}, before_replacing);
}

namespace detail {

/// A damaged saved state, or a file that is none. Throws headroom.training.state.corrupt unless `fine`.
template <class... What>
void check_saved_state(bool fine, const std::filesystem::path& path, uint64_t size, const What&... what) {
  require(fine, "headroom.training.state.corrupt", path.string(), " (", size, " bytes) ", what...,
          "; use another saved state of the run, such as best.pt or last.pt");
}

/// A file that may be a saved state.
struct StateFile {
  std::ifstream stream;  ///< not open where it cannot be read
  std::error_code failure = {};
  uint64_t size = 0;
  Trailer trailer{.magic = {}};
};

/// Opens a file and reads its end.
inline StateFile open_state(const std::filesystem::path& path) {
  StateFile file;  // its failure: a loop of links, or a folder that may not be entered
  const bool regular = std::filesystem::is_regular_file(path, file.failure);
  if (regular) file.stream.open(path, std::ios::binary | std::ios::ate);  // to open a pipe would wait for its writer
  if (!file.stream.is_open()) return file;
  file.size = static_cast<uint64_t>(file.stream.tellg());
  if (file.size > sizeof(Trailer)) {
    file.stream.seekg(-static_cast<std::streamoff>(sizeof(Trailer)), std::ios::end);
    file.stream.read(reinterpret_cast<char*>(&file.trailer), sizeof(Trailer));
  }
  return file;
}

/// The archive in a saved state. Its end is looked at first: whatever else was given by mistake, of any size, is
/// refused before it is read. Throws as load_state.
inline std::vector<char> read_archive(const std::filesystem::path& path) {
  auto [file, failure, size, trailer] = open_state(path);
  require(file.is_open(), "headroom.training.state.read", "cannot read a saved state from ", path.string(),
          failure ? ": " + failure.message() : "", "; expected a file that train wrote, such as last.pt");
  const auto check = [&, size = size](bool fine, const auto&... what) { check_saved_state(fine, path, size, what...); };
  check(trailer.magic == Trailer::kMagic,
        "has no end mark: it is truncated or no saved state (other weights come with their configuration, --config)");
  check(trailer.size == size - sizeof trailer, "should hold ", trailer.size, " bytes of data and holds ",
        size - sizeof trailer);
  std::vector<char> bytes(trailer.size);
  file.seekg(0).read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  check(file.good() && trailer.checksum == io::detail::fnv1a({bytes.data(), bytes.size()}),
        "does not match its checksum: it is damaged");
  return bytes;
}

}  // namespace detail

HEADROOM_TRAINING bool is_saved_state(const std::filesystem::path& path) {
  return detail::open_state(path).trailer.magic == detail::Trailer::kMagic;
}

HEADROOM_TRAINING TrainingState load_state(const std::filesystem::path& path) {
  const std::vector<char> bytes = detail::read_archive(path);
  try {
    const auto content = torch::pickle_load(bytes).toGenericDict();
    // States of older versions know less
    const auto whole = [&](const char* key, int64_t otherwise) {
      return content.contains(key) ? content.at(key).toInt() : otherwise;
    };
    return {.config = content.at("config").toStringRef(),
            .step = content.at("step").toInt(),
            .examples = whole("examples", -1),
            .epoch_losses = content.at("epoch_losses").toDoubleVector(),
            .unfinished_steps = whole("unfinished_steps", -1),
            .unfinished_skipped = whole("unfinished_skipped", 0),
            .unfinished_loss = content.at("unfinished_loss").toDouble(),
            .skipped_steps = whole("skipped_steps", 0),
            .skipped_in_a_row = whole("skipped_in_a_row", 0),
            .best_metric = content.at("best_metric").toStringRef(),
            .best_score = content.at("best_score").toDouble(),
            .validations_since_best = whole("validations_since_best", 0),
            .microbatch = whole("microbatch", 0),
            .plateau = {.waited = whole("plateau_waited", 0), .lowered = whole("plateau_lowered", 0)},
            .seconds_per_step = content.contains("seconds_per_step") ? content.at("seconds_per_step").toDouble() : 0,
            .random = content.at("random").toTensor(),
            .random_on_device =
                content.contains("random_on_device") ? content.at("random_on_device").toTensor() : torch::Tensor(),
            .model = detail::to_tensor_map(content.at("model")),
            .lora = content.contains("lora") ? detail::to_tensor_map(content.at("lora")) : TensorMap(),
            .ema = content.contains("ema") ? detail::to_tensor_map(content.at("ema")) : TensorMap(),
            .optimizer = detail::to_tensor_map(content.at("optimizer"))};
  } catch (const std::exception& error) {
    detail::check_saved_state(false, path, bytes.size() + sizeof(detail::Trailer),
                              "is not laid out as this version writes it: ", cause(error));
    throw;
  }
}
#endif

/// Copies tensors into others of the same names. Throws headroom.training.state.structure unless names, shapes and
/// types agree, with every difference, before anything is changed. `what` names the source, such as a file.
inline void copy_tensors(const TensorMap& source, const TensorMap& target, const std::string& what) {
  const weights::Matches matches = weights::match_tensors(source, target, {.same_types = true});
  require(matches.report.complete(), "headroom.training.state.structure", what,
          " does not fit this model; train with the configuration saved in it, or start anew",
          to_string(matches.report));
  matches.copy();
}

/// How many bytes a file of tensors takes at most, beside what else it holds.
inline std::uint64_t file_bytes(const TensorMap& tensors) {
  constexpr std::uint64_t kAround = 1024;  // a name, a shape, and what aligns the values
  std::uint64_t bytes = 0;
  for (const auto& [name, tensor] : tensors) bytes += tensor.nbytes() + kAround;
  return bytes;
}

/// The state of LibTorch's default generator of a device.
inline torch::Tensor random_state(c10::Device device = c10::kCPU) {
  return headroom::detail::generator_state(at::globalContext().defaultGenerator(device));
}

/// Throws headroom.training.state.random unless it is a state of LibTorch's CPU generator; `what` names its source.
inline void check_random_state(const torch::Tensor& state, const std::string& what) {
  try {
    at::make_generator<at::CPUGeneratorImpl>().set_state(state);
  } catch (const c10::Error& error) {
    fail("headroom.training.state.random", what, " holds no state of LibTorch's CPU random generator (", cause(error),
         "); use another saved state of the run, or start anew");
  }
}

/// Puts a state from random_state() back.
inline void set_random_state(const torch::Tensor& state, c10::Device device = c10::kCPU) {
  headroom::detail::set_generator_state(at::globalContext().defaultGenerator(device), state);
}

/// What a saved state holds of a model for use: its averaged weights where it has some, and the rest.
inline TensorMap exported_tensors(const TrainingState& state) {
  TensorMap tensors = state.ema;
  tensors.insert(state.model.begin(), state.model.end());
  return tensors;
}

/// Writes the exported weights of a saved state alone, with its configuration, as a safetensors file: what Python opens
/// without a pickle, and load_model without a configuration. Throws headroom.weights.write.
inline void save_weights(const std::filesystem::path& path, const TrainingState& state) {
  std::map<std::string, std::string> metadata = {
      {"format", "pt"}, {kConfigKey, state.config}, {"headroom.step", std::to_string(state.step)}};
  if (!state.best_metric.empty()) metadata["headroom.best " + state.best_metric] = std::to_string(state.best_score);
  weights::save_tensors(path, exported_tensors(state), metadata);
}

}  // namespace headroom::inline v0::training
