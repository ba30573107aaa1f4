#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headroom/core/word_list.hpp"
#include "headroom/training/described.hpp"
#include "headroom/training/field.hpp"
#include "headroom/training/json.hpp"
#include "headroom/training/models.hpp"
#include "headroom/training/published_augmentations.hpp"
#include "headroom/training/published_keys.hpp"
#include "headroom/training/sections.hpp"
#include "headroom/training/separate.hpp"

// A published file is a configuration of Music-Source-Separation-Training, which comes with the weights of models of
// its kind: sections audio, model, training, augmentations, inference. What it leaves out has that program's defaults.
namespace headroom::inline v0::training {

/// A published file as a configuration of ours; `document` is empty where the file is one of a model that is not here.
struct Published {
  Json document = Json::object();
  std::vector<std::pair<std::string, std::string>> names = {};  ///< "training.segment_length", "audio.chunk_size"
  std::vector<std::string> notices = {};                        ///< what it asks for and does not get
};

/// Whether a document is a published file: it says things that only those say.
HEADROOM_TRAINING bool is_published(const Json& document);

/// Translates a published file. Appends to `problems` what is unknown, of another type, or asks for what is not here;
/// values out of bounds are left to who reads the translation.
HEADROOM_TRAINING Published translate_published(const Json& document, std::vector<Problem>& problems);

/// Calls the keys in problems with a translation what the published file calls them.
HEADROOM_TRAINING void rename_problems(std::vector<Problem>& problems, const Published& published);

#ifdef HEADROOM_TRAINING_HERE
namespace detail {

/// Keys that only have to be false here.
inline constexpr const char* kKeysThatAreFalse[] = {"model.stft_normalized", "model.multi_stft_normalized",
                                                    "training.normalize"};

class PublishedReader {
 public:
  PublishedReader(const Json& document, std::vector<Problem>& problems) : document_(document), problems_(problems) {}

  Published read() {
    if (find("model.dim") == nullptr || find("model.depth") == nullptr) {
      problems_.push_back({"model",
                           "has no `dim` and `depth`, as those of BS-RoFormers and Mel-Band RoFormers have; "
                           "other published models are not here"});
      return {};
    }
    read_model();
    read_audio();
    read_training();
    read_augmentations();
    pass("inference.chunk_size", "inference.segment_length");
    if (find("audio.chunk_size") == nullptr) pass("inference.chunk_size", "training.segment_length");
    pass("inference.batch_size", "inference.batch");
    pass("inference.normalize", "inference.normalize");
    const auto count = get<std::int64_t>("inference.num_overlap", 1, {.at_least = 1, .at_most = 1000});
    put("inference.overlap", 1 - 1 / static_cast<double>(std::max<std::int64_t>(count, 1)));
    for (const char* key : kKeysThatAreFalse) {
      if (get(key, false)) problems_.push_back({key, "got true, expected false: a model like that is not here"});
    }
    std::vector<std::string> idle;
    for (const char* key : kKeysWithoutEffect) {
      if (find(key) != nullptr) idle.push_back(key);
    }
    // Only BS-RoFormers have it; audio-separator's Mel-Band RoFormer takes it and does nothing with it, either
    if (find("model.num_bands") != nullptr && find("model.zero_dc") != nullptr) idle.push_back("model.zero_dc");
    if (!idle.empty()) published_.notices.push_back("without effect here: " + core::word_list(idle));
    tell_unknown_keys();
    return std::move(published_);
  }

 private:
  /// The value of "section.key", which is known from now on; null where there is none.
  const Json* find(const std::string& path) {
    known_.insert(path);
    const Json* json = &document_;
    for (std::size_t begin = 0; begin <= path.size();) {
      const std::size_t end = std::min(path.find('.', begin), path.size());
      if (!json->is_object()) return nullptr;
      const auto member = json->find(path.substr(begin, end - begin));
      if (member == json->end() || member->is_null()) return nullptr;
      json = &*member;
      begin = end + 1;
    }
    return json;
  }

  /// The value of a key, or `otherwise` where there is none or another thing.
  template <class T>
  T get(const std::string& path, T otherwise, const Accepted& accepted = {}) {
    if (const Json* const json = find(path)) read_member(*json, otherwise, accepted, path, problems_);
    return otherwise;
  }

  /// The same of an integer that is passed on as well: it is told there when it is something else.
  std::int64_t integer(const std::string& path, std::int64_t otherwise) {
    const Json* const json = find(path);
    return json != nullptr && json->is_number_integer() ? json->get<std::int64_t>() : otherwise;
  }

  Json& ours(const std::string& path) {
    const std::size_t dot = path.find('.');
    return published_.document[path.substr(0, dot)][path.substr(dot + 1)];
  }
  template <class T>
  void put(const std::string& path, const T& value) {
    ours(path) = value;
  }
  /// A value that means the same in both.
  void pass(const std::string& theirs, const std::string& path) {
    const Json* const json = find(theirs);
    if (json != nullptr) put(path, *json);
    if (std::ranges::find(published_.names, path, &std::pair<std::string, std::string>::first) ==
        published_.names.end()) {
      published_.names.emplace_back(path, theirs);
    }
  }

  void read_model() {
    const std::string type = model_type();
    put("model.type", type);
    ModelConfig model(type);
    for (const Field& field : fields_of(model)) {
      if (field.name != "type") pass("model." + field.name, "model." + field.name);
    }
    if (get("model.use_torch_checkpoint", false) && find("model.gradient_checkpointing") == nullptr) {
      put("model.gradient_checkpointing", true);
    }
    put("loss.min_n_fft", integer("model.stft_n_fft", 2048));
    published_.names.emplace_back("loss.min_n_fft", "model.stft_n_fft");
    pass("model.multi_stft_resolution_loss_weight", "loss.stft_weight");
    pass("model.multi_stft_resolutions_window_sizes", "loss.windows");
    pass("model.multi_stft_hop_size", "loss.hop");
  }

  std::string model_type() {
    const bool mel = find("model.num_bands") != nullptr, bands = find("model.freqs_per_bands") != nullptr;
    if (mel && bands) {
      problems_.push_back({"model",
                           "has freqs_per_bands, which makes it a BS-RoFormer, and num_bands, which makes it "
                           "a Mel-Band RoFormer; expected one of the two"});
    }
    const std::string type = mel ? "mel_band_roformer" : "bs_roformer";
    return get<std::string>("training.model_type", type, {.choices = {type}});
  }

  void read_audio() {
    const bool stereo = get("model.stereo", false);
    put("audio.channels", stereo ? 2 : 1);
    published_.names.emplace_back("audio.channels", "model.stereo");
    if (get<std::int64_t>("audio.num_channels", stereo ? 2 : 1) != (stereo ? 2 : 1)) {
      problems_.push_back({"audio.num_channels", std::string("got ") + find("audio.num_channels")->dump() +
                                                     ", expected " + (stereo ? "2" : "1") + ", as model.stereo is " +
                                                     (stereo ? "true" : "false, or missing")});
    }
    pass("audio.sample_rate", "audio.sample_rate");
    pass("model.sample_rate", "audio.sample_rate");
    const Json *const of_model = find("model.sample_rate"), *const of_files = find("audio.sample_rate");
    if (of_model != nullptr && of_files != nullptr && *of_model != *of_files) {
      problems_.push_back({"model.sample_rate",
                           "got " + given_text(*of_model) + ", expected audio.sample_rate, " + given_text(*of_files)});
    }
    read_stems();
  }

  /// The stems of the model: all instruments, or the target alone, whose accompaniment are the others.
  void read_stems() {
    std::vector<std::string> stems, others;
    const auto count = get<std::int64_t>("model.num_stems", 1);
    const auto target = get<std::string>("training.target_instrument", "");
    const std::size_t problems = problems_.size();
    stems = get("training.instruments", stems, {.file_names = true});
    if (problems_.size() > problems) return;
    published_.names.emplace_back("audio.stems", "training.instruments");
    if (stems.empty()) {
      if (find("training.instruments") == nullptr) {
        problems_.push_back(
            {"training.instruments", "missing; expected the names of the stems, such as [vocals, other]"});
      }
      return;
    }
    if (!target.empty()) {
      std::erase(stems, target);
      others = std::exchange(stems, {target});
    }
    put("audio.stems", stems);
    put("data.accompaniment", others);
    const auto named = static_cast<std::int64_t>(stems.size());
    if (count != named) {
      problems_.push_back({"model.num_stems", "got " + std::to_string(count) + ", expected " + std::to_string(named) +
                                                  (target.empty() ? ", one for each of training.instruments"
                                                                  : ", training.target_instrument alone")});
    }
  }

  void read_training() {
    pass("audio.chunk_size", "training.segment_length");
    put("training.batch_size", 1);
    pass("training.batch_size", "training.batch_size");
    pass("training.gradient_accumulation_steps", "training.gradient_accumulation_steps");
    put("training.clip_grad_norm", 0);
    pass("training.grad_clip", "training.clip_grad_norm");
    pass("training.num_epochs", "training.epochs");
    // An epoch there is a number of batches, here one of steps
    const auto passes = std::max<std::int64_t>(integer("training.gradient_accumulation_steps", 1), 1);
    const auto batches = get<std::int64_t>("training.num_steps", 1000, {.at_least = 1});
    put("training.steps_per_epoch", (batches + passes - 1) / passes);
    published_.names.emplace_back("training.steps_per_epoch", "training.num_steps");
    put("training.warmup_steps", 0);
    // Files that are published for separation alone may have no patience
    put("training.schedule", find("training.patience") != nullptr ? "plateau" : "constant");
    put("training.min_learning_rate_ratio", 0);
    pass("training.patience", "training.plateau_patience");
    pass("training.reduce_factor", "training.plateau_factor");
    pass("training.ema_momentum", "training.ema_decay");
    pass("training.q", "loss.masked_quantile");
    pass("training.coarse_loss_clip", "loss.masked_by_example");
    const bool mixed = get("training.use_amp", true);
    put("training.bf16", mixed);
    if (mixed) published_.notices.push_back("training.use_amp: bfloat16, not float16");
    read_optimizer();
  }

  void read_optimizer() {
    const auto name = get<std::string>("training.optimizer", "adam");
    const bool is_adam = name == "adam" || name == "adamw" || name == "adamw8bit";
    pass("optimizer.betas", "training.betas");
    put("training.weight_decay", name == "adamw" || name == "adamw8bit" ? 0.01 : 0);  // PyTorch's defaults
    pass("optimizer.weight_decay", "training.weight_decay");
    if (name == "adamw8bit") put("training.optimizer_state", "8bit");
    if (name == "sgd") {
      put("training.momentum", 0);
      pass("optimizer.momentum", "training.momentum");
    }
    if (is_adam || name == "radam" || name == "prodigy" || name == "sgd") {
      if (!is_adam) put("training.optimizer", name);
      return pass("training.lr", "training.learning_rate");
    }
    published_.notices.push_back("training.optimizer: " + name +
                                 " is not here; AdamW trains, with a learning rate of " +
                                 number_text(TrainingConfig().learning_rate) + " in the place of training.lr");
    find("training.lr");
    const Json of_it = section("optimizer");
    for (const auto& [key, value] : of_it.items()) find("optimizer." + key);
  }

  /// Random changes of stems. Those that are here act on every stem.
  void read_augmentations() {
    const bool any = get("augmentations.enable", false);
    const bool loudness = any && get("augmentations.loudness", false);
    const std::array<double, 2> gain = {get("augmentations.loudness_min", 1.0), get("augmentations.loudness_max", 1.0)};
    put("data.gain", loudness ? gain : std::array{1.0, 1.0});
    put("data.swap_channels", any && get("augmentations.all.channel_shuffle", 0.0) > 0);
    put("data.flip_polarity", any && get("augmentations.all.random_polarity", 0.0) > 0);
    published_.names.emplace_back("data.gain", "augmentations.loudness_min");
    const auto further = get("augmentations.mixup_probs", std::vector<double>{}, {.may_be_empty = true});
    if (any && get("augmentations.mixup", false)) put("data.mixup", further);
    published_.names.emplace_back("data.mixup", "augmentations.mixup_probs");
    for (const PublishedChange& change : kPublishedChanges) read_change(change, any);
    std::vector<std::string> idle;
    const auto tell = [&](const std::string& parent) {
      const Json members = section(parent);
      for (const auto& [key, value] : members.items()) {
        const std::string path = parent + "." + key;
        const bool is_read = known_.contains(path) || key.starts_with("loudness") || key == "all";
        const bool is_detail =
            !idle.empty() && key.starts_with(idle.back() + "_");  // pitch_shift, pitch_shift_min_semitones
        if (!is_read && !is_detail && any) idle.push_back(key);
        find(path);
      }
    };
    tell("augmentations.all");
    tell("augmentations");
    if (!idle.empty()) published_.notices.push_back("augmentations that are not here: " + core::word_list(idle));
  }

  void read_change(const PublishedChange& change, bool any) {
    const std::string theirs = std::string("augmentations.all.") + change.theirs;
    const std::string ours = std::string("data.") + change.ours, range = ours + "_" + change.unit;
    const double probability = get(theirs, 0.0);
    std::array<double, 2> bounds = {get(theirs + "_" + change.least, change.otherwise[0]),
                                    get(theirs + "_" + change.greatest, change.otherwise[1])};
    if (std::string_view(change.ours) == "noise") {
      for (double& bound : bounds) bound = 20 * std::log10(std::max(bound, 1e-10));
    }
    published_.names.emplace_back(range, theirs + "_" + change.least);
    published_.names.emplace_back(ours, theirs);
    if (!any || probability <= 0) return;
    put(ours, probability);
    put(range, bounds);
  }

  Json section(const std::string& name) {
    const Json* const found = find(name);
    return found != nullptr && found->is_object() ? *found : Json::object();
  }

  void tell_unknown_keys() {
    for (const auto& [name, members] : document_.items()) {
      std::vector<std::string> sections, keys;
      for (const std::string& path : known_) {
        sections.push_back(path.substr(0, path.find('.')));
        if (path.starts_with(name + ".")) keys.push_back(path.substr(name.size() + 1));
      }
      if (std::ranges::find(sections, name) == sections.end()) {
        problems_.push_back({name, "unknown section" + did_you_mean(name, sections)});
      } else if (!keys.empty() && !members.is_object()) {
        reject(problems_, name, members, "an object {...}");
      } else if (!keys.empty()) {
        tell_unknown_keys(name, members, keys);
      }
    }
  }
  void tell_unknown_keys(const std::string& section, const Json& members, const std::vector<std::string>& keys) {
    for (const auto& [key, value] : members.items()) {
      if (known_.contains(section + "." + key)) continue;
      const std::string meant = did_you_mean(key, keys);
      const char* const unlike = section == "model" ? "; a model that has it is not here" : "; remove it";
      problems_.push_back({member_path(section, key), "unknown key" + (meant.empty() ? unlike : meant)});
    }
  }

  const Json& document_;
  std::vector<Problem>& problems_;
  Published published_;
  std::set<std::string> known_;
};

}  // namespace detail

HEADROOM_TRAINING bool is_published(const Json& document) {
  const auto has = [&](const char* section, const char* key) {
    const auto found = document.is_object() ? document.find(section) : document.end();
    return found != document.end() && found->is_object() && found->contains(key);
  };
  return has("training", "instruments") || has("training", "target_instrument") || has("audio", "chunk_size") ||
         has("inference", "num_overlap");
}

HEADROOM_TRAINING Published translate_published(const Json& document, std::vector<Problem>& problems) {
  return detail::PublishedReader(document, problems).read();
}

HEADROOM_TRAINING void rename_problems(std::vector<Problem>& problems, const Published& published) {
  for (auto& [path, text] : problems) {
    for (const auto& [ours, theirs] : published.names) {
      if (path == ours || path.starts_with(ours + "[")) path.replace(0, ours.size(), theirs);
      for (std::size_t at = text.find(ours); at != text.npos; at = text.find(ours, at + theirs.size())) {
        text.replace(at, ours.size(), theirs);
      }
    }
  }
}
#endif

}  // namespace headroom::inline v0::training
