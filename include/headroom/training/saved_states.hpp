#pragma once

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/io/file_name.hpp"
#include "headroom/io/room.hpp"
#include "headroom/training/sections.hpp"
#include "headroom/training/separate.hpp"
#include "headroom/training/state.hpp"

namespace headroom::inline v0::training {

/// File name of the last saved state, last.pt, and of those before it, the younger first: last-1.pt, last-2.pt, …
inline std::string last_state_name(int64_t age) { return age == 0 ? "last.pt" : "last-" + std::to_string(age) + ".pt"; }

/// Undoes last_state_name; none for another name.
inline std::optional<int64_t> age_of_state(const std::string& name) {
  int64_t age = 0;
  if (name.starts_with("last-")) std::from_chars(name.data() + 5, name.data() + name.size(), age);
  return age >= 0 && name == last_state_name(age) ? std::optional(age) : std::nullopt;
}

/// Whether a file of this name in the folder of a run is one that SavedStates writes.
inline bool is_saved_file(const std::string& name) {
  return age_of_state(name) || name == "best.pt" || name == "last.safetensors" || name == "best.safetensors";
}

/// The saved states of a run in its folder, and when they are due: the last ones and the best, each beside its weights
/// as a safetensors file. Without a folder nothing is saved.
class SavedStates {
 public:
  /// For a run that begins at `now`, in seconds.
  SavedStates(std::filesystem::path folder, const TrainingConfig& training, double now)
      : folder_(std::move(folder)),
        keep_(training.checkpoints_kept),
        every_steps_(training.checkpoint_every_steps),
        every_seconds_(60 * training.checkpoint_every_minutes),
        saved_at_(now) {}

  bool wanted() const { return !folder_.empty(); }

  /// Whether the last state is due within an epoch, after `step` steps and at `now`.
  bool due(int64_t step, double now) const {
    return (every_steps_ > 0 && step % every_steps_ == 0) || (every_seconds_ > 0 && now - saved_at_ >= every_seconds_);
  }

  /// Whether last.pt is that of this step.
  bool has(int64_t step) const { return step == saved_step_; }

  /// Refuses a run whose folder cannot take its files: saved states of so many bytes, weights of so many.
  /// Throws headroom.training.state.room.
  void require_room(std::uint64_t state, std::uint64_t weights) const {
    const auto kept = static_cast<std::uint64_t>(keep_);
    const std::uint64_t all = (kept + 2) * state + 3 * weights, there = bytes_there();  // the last, the best, and one
    const std::string reason =
        io::why_no_room(folder_, {.all = all > there ? all - there : 0, .largest_file = std::max(state, weights)});
    require(reason.empty(), "headroom.training.state.room", folder_.string(),
            " cannot take the saved states of the run, ", kept + 1, " of ", state, " bytes and their weights: ", reason,
            "; make room, give another folder, or lower training.checkpoints_kept");
  }

  /// Keeps the states before as last-1.pt, last-2.pt, …, of another step than this one.
  /// Throws headroom.training.state.write and headroom.weights.write.
  void save_last(const TrainingState& state, double now) {
    if (!wanted()) return;
    save("last", state, [&] {
      if (state.step != saved_step_) age();
    });
    saved_step_ = state.step;
    saved_at_ = now;
  }

  /// As best.pt. Throws like save_last.
  void save_best(const TrainingState& state) const {
    if (wanted()) save("best", state, {});
  }

 private:
  /// Weights first: a run that is killed in between goes on from a state of before, and writes them again.
  void save(const std::string& name, const TrainingState& state, const std::function<void()>& before_replacing) const {
    save_weights(folder_ / (name + ".safetensors"), state);
    save_state(folder_ / (name + ".pt"), state, before_replacing);
  }

  /// Gives last.pt the name last-1.pt as well, after what had that name became last-2.pt and so on. At any moment each
  /// state that is kept has a name. Where a file cannot have two names it only has the second until a new one has the
  /// first.
  void age() const {
    namespace fs = std::filesystem;
    std::error_code failure;
    const auto file = [&](int64_t age) { return folder_ / last_state_name(age); };
    for (int64_t age = keep_; fs::remove(file(age), failure); ++age) continue;  // when more were kept before
    if (keep_ < 2 || !fs::exists(file(0), failure) || fs::equivalent(file(0), file(1), failure)) return;
    for (int64_t age = keep_ - 1; age > 1; --age) fs::rename(file(age - 1), file(age), failure);
    fs::remove(file(1), failure);
    fs::create_hard_link(file(0), file(1), failure);
    if (failure) fs::rename(file(0), file(1), failure);
  }

  /// Bytes of the files that will be replaced or go.
  std::uint64_t bytes_there() const {
    std::uint64_t sum = 0;
    std::error_code failure;
    for (const auto& entry : std::filesystem::directory_iterator(folder_, failure)) {
      const bool ours = is_saved_file(entry.path().filename().string());
      const auto bytes = ours ? entry.file_size(failure) : 0;
      if (!failure) sum += bytes;
    }
    return sum;
  }

  std::filesystem::path folder_;
  int64_t keep_, every_steps_;
  double every_seconds_, saved_at_;
  int64_t saved_step_ = -1;  // of last.pt, once this run wrote it
};

/// A saved state that is whole, and what was passed over for it.
struct FoundState {
  std::filesystem::path path;
  TrainingState state;
  std::vector<std::string> notices = {};  ///< which files are damaged, by which check, and which one is used
};

/// The newest whole state of a run. `path` is its folder, or one of its states: that is tried first, then those before
/// it, at last best.pt. A damaged file is told in the notices and renamed to NAME.damaged, so that it takes no place
/// among those that are kept. A file by another name is the only one that is tried.
///
/// Throws headroom.training.state.read where there is none, headroom.training.state.corrupt when none is whole.
HEADROOM_TRAINING FoundState find_state(const std::filesystem::path& path);

#ifdef HEADROOM_TRAINING_HERE
namespace detail {

/// What find_state tries, one after the other.
inline std::vector<std::filesystem::path> states_to_try(const std::filesystem::path& path) {
  std::error_code failure;
  const bool is_folder = std::filesystem::is_directory(path, failure);
  const auto age = is_folder ? std::optional<int64_t>(-1) : age_of_state(path.filename().string());
  std::vector<std::filesystem::path> states;
  if (!is_folder) states.push_back(path);
  if (!age) return states;
  const std::filesystem::path folder = is_folder ? path : io::folder_of(path);
  std::map<int64_t, std::filesystem::path> older;
  for (const auto& entry : std::filesystem::directory_iterator(folder, failure)) {
    const auto other = age_of_state(entry.path().filename().string());
    if (other && *other > *age) older.emplace(*other, entry.path());
  }
  for (auto& [other, file] : older) states.push_back(std::move(file));
  if (std::filesystem::exists(folder / "best.pt", failure)) states.push_back(folder / "best.pt");
  return states;
}

}  // namespace detail

HEADROOM_TRAINING FoundState find_state(const std::filesystem::path& path) {
  const std::vector<std::filesystem::path> states = detail::states_to_try(path);
  require(!states.empty(), "headroom.training.state.read", "there is no saved state in ", path.string(),
          "; expected last.pt, as train writes it");
  std::vector<std::string> notices;
  std::vector<std::filesystem::path> damaged;
  for (const std::filesystem::path& file : states) {
    try {
      FoundState found{.path = file, .state = load_state(file), .notices = notices};
      if (!notices.empty()) {
        found.notices.push_back(file.string() + ", of step " + std::to_string(found.state.step) + ", is used instead");
      }
      std::error_code failure;
      for (const auto& other : damaged) std::filesystem::rename(other, other.string() + ".damaged", failure);
      return found;
    } catch (const Error& error) {
      if (states.size() == 1) throw;
      notices.emplace_back(error.what());
      if (error.id() == "headroom.training.state.corrupt") damaged.push_back(file);
    }
  }
  std::string reasons;
  for (const std::string& notice : notices) reasons += "\n  " + notice;
  fail("headroom.training.state.corrupt", "none of the ", states.size(), " saved states beside ", path.string(),
       " is whole; start anew, or from weights that are kept elsewhere", reasons);
}
#endif

}  // namespace headroom::inline v0::training
