// The train program as its users meet it: what it says and returns for wrong inputs, and what it leaves behind.
#ifdef HEADROOM_TRAIN

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>
#include <vector>

#include "headroom/audio/file.hpp"
#include "headroom/training/plan.hpp"
#include "headroom/training/state.hpp"
#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/tiny_separator.hpp"
#include "support/transformer_options.hpp"

using namespace headroom;
using headroom::testing::contains;
using headroom::testing::TemporaryFolder;
using headroom::testing::transformer;

namespace {

struct Result {
  int code;
  std::string output;
};

Result train(const std::string& arguments, const std::string& threads = "1") {
  const std::string command = std::string(HEADROOM_TRAIN) + " --threads " + threads + " " + arguments + " 2>&1";
  FILE* pipe = popen(command.c_str(), "r");
  REQUIRE(pipe != nullptr);
  std::string output;
  std::array<char, 4096> buffer;
  while (const std::size_t count = std::fread(buffer.data(), 1, buffer.size(), pipe))
    output.append(buffer.data(), count);
  const int status = pclose(pipe);
  return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), output};
}

/// A folder with a configuration and half a second of noise in the MUSDB18-HQ layout.
struct Setup {
  TemporaryFolder folder;
  std::string config = (folder / "a.json").string(), data = (folder / "data").string(), out = (folder / "out").string();

  explicit Setup(const std::string& emb_dim = "8") {
    std::ofstream(config) << R"({"model": {"n_fft": 64, "hop_length": 32, "n_layers": 1, "emb_dim": )" << emb_dim
                          << R"(, "n_heads": 2, "ffn_hidden_dim": [16]},
      "training": {"segment_length": 512, "batch_size": 1, "steps_per_epoch": 3, "epochs": 2, "warmup_steps": 1},
      "loss": {"windows": [128], "hop": 64, "min_n_fft": 128}})";
    const auto track = std::filesystem::path(data) / "train" / "A - B";
    std::filesystem::create_directories(track);
    torch::manual_seed(3);
    torch::Tensor mixture = torch::zeros({2, 22050});
    for (const char* stem : {"vocals", "drums", "bass", "other"}) {
      const torch::Tensor samples = 0.1 * torch::randn({2, 22050});
      audio::write_audio(track / (std::string(stem) + ".wav"), samples, 44100);
      mixture += samples;
    }
    audio::write_audio(track / "mixture.wav", mixture, 44100);
  }

  std::string arguments() const { return "--config " + config + " --data " + data + " --out " + out; }
};

/// The train program in a process of its own, in silence.
pid_t start(const std::string& config, const std::string& data, const std::string& out,
            const std::vector<std::string>& more) {
  std::vector<std::string> words = {HEADROOM_TRAIN, "--config", config, "--data", data, "--out", out};
  words.insert(words.end(), more.begin(), more.end());
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    if (dup2(open("/dev/null", O_WRONLY), STDOUT_FILENO) < 0) _exit(3);  // freopen would print what is in our buffer
    execv(HEADROOM_TRAIN, arguments.data());
    _exit(4);
  }
  return child;
}

/// Its exit code, or the signal that ended it as a negative number.
int wait_for(pid_t child) {
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

/// Whether training gives the same bits, whatever else the machine does: several processes at a time, processes that
/// are killed at any moment and go on from what they left, recomputation in the place of storage. A state is saved
/// after each step, and all are kept.
class SameBits {
 public:
  SameBits(const std::function<void(training::Config&)>& change, int64_t epochs) {
    config_ = training::load_config(setup_.config);
    transformer(config_).emb_dim(64);
    config_.training.steps_per_epoch = 2;
    config_.training.epochs = epochs;
    config_.training.checkpoint_every_steps = 1;
    config_.training.checkpoints_kept = 2 * epochs;
    change(config_);
    std::ofstream(setup_.config) << training::to_json(config_);
  }

  void in_processes(int count) {
    std::vector<pid_t> children;
    for (int i = 0; i < count; ++i) children.push_back(begin(folder(i), {}));
    for (const pid_t child : children) REQUIRE(wait_for(child) == 0);
    for (int i = 0; i < count; ++i) CHECK(last_bytes(folder(i)) == last_bytes(folder(0)));
    undisturbed_ = states(folder(0));
    REQUIRE(static_cast<int64_t>(undisturbed_.size()) == 2 * config_.training.epochs);
  }

  /// After in_processes. Runs begin again when they are through, until there were so many kills: every second one at a
  /// random moment, the others while a file is written. What a kill leaves are states of the undisturbed run. Returns
  /// how many kills left a file half written.
  int after_kills(int kills) {
    std::mt19937 random(static_cast<unsigned>(kills));
    const std::filesystem::path out = setup_.folder / "killed";
    int half_written = 0;
    for (int done = 0, finished = 0; done < kills || finished == 0;) {
      std::vector<std::string> more;
      if (states(out).empty()) {
        std::filesystem::remove_all(out);
      } else {
        more = {"--resume", out.string()};
      }
      const pid_t child = begin(out.string(), more);
      if (done < kills) {
        std::uniform_int_distribution moment(0, kLatestKill), file(1, 6), within(0, 2000);
        if (done % 2 == 0) {
          std::this_thread::sleep_for(std::chrono::microseconds(moment(random)));
        } else {
          wait_for_file(out, file(random));
          std::this_thread::sleep_for(std::chrono::microseconds(within(random)));
        }
        kill(child, SIGKILL);
      }
      const int code = wait_for(child);
      REQUIRE((code == 0 || code == -SIGKILL));
      for (const auto& [step, bytes] : states(out)) {
        const bool same = bytes == undisturbed_.at(step);
        CHECK(same);
      }
      if (code != 0) {
        ++done;
        half_written += is_writing(out);
        continue;
      }
      ++finished;
      CHECK(last_bytes(out.string()) == last_bytes(folder(0)));
      std::filesystem::remove_all(out);
    }
    return half_written;
  }

  /// After in_processes. The file also holds the configuration, which differs.
  void with_recomputation_and_readers() {
    config_.model.gradient_checkpointing = true;
    config_.training.reader_threads = 3;
    std::ofstream(setup_.config) << training::to_json(config_);
    const std::string out = (setup_.folder / "recomputed").string();
    REQUIRE(wait_for(begin(out, {})) == 0);
    const auto stored = training::load_state(std::filesystem::path(folder(0)) / "last.pt");
    const auto recomputed = training::load_state(std::filesystem::path(out) / "last.pt");
    CHECK(recomputed.epoch_losses == stored.epoch_losses);
    for (const auto& [name, tensor] : stored.model) CHECK(tensor.equal(recomputed.model.at(name)));
  }

 private:
  static constexpr int kLatestKill = 1'500'000;  // microseconds

  pid_t begin(const std::string& out, std::vector<std::string> more) const {
    more.insert(more.end(), {"--threads", "2"});
    return start(setup_.config, setup_.data, out, more);
  }
  std::string folder(int i) const { return (setup_.folder / ("process" + std::to_string(i))).string(); }
  static std::string last_bytes(const std::string& out) {
    return testing::read_bytes(std::filesystem::path(out) / "last.pt");
  }

  /// The bytes of all states in a folder, by step. Each of them must be whole.
  static std::map<int64_t, std::string> states(const std::filesystem::path& out) {
    std::map<int64_t, std::string> found;
    std::error_code failure;
    for (const auto& entry : std::filesystem::directory_iterator(out, failure)) {
      if (entry.path().extension() != ".pt" || entry.path().filename() == "best.pt") continue;
      found[training::load_state(entry.path()).step] = testing::read_bytes(entry.path());
    }
    return found;
  }

  static bool is_writing(const std::filesystem::path& out) {
    std::error_code failure;
    for (const auto& entry : std::filesystem::directory_iterator(out, failure)) {
      if (entry.path().extension() == ".partial") return true;
    }
    return false;
  }

  /// Waits until the n-th file is being written, but no longer than a run that does not get so far.
  static void wait_for_file(const std::filesystem::path& out, int n) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(3);
    for (bool before = false; std::chrono::steady_clock::now() < end;) {
      const bool writing = is_writing(out);
      if (writing && !before && --n == 0) return;
      before = writing;
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }

  Setup setup_;
  training::Config config_;
  std::map<int64_t, std::string> undisturbed_;  ///< its states, by step
};

/// Everything that has a path of its own to the parameters.
void check_same_bits(int processes, int kills, int64_t epochs) {
  setenv("OMP_WAIT_POLICY", "passive", 1);  // threads of several processes on few cores
  int half_written = 0;
  const auto check = [&](const char* name, const std::function<void(training::Config&)>& change) {
    INFO(name);
    SameBits run(change, epochs);
    run.in_processes(processes);
    half_written += run.after_kills(kills);
    if (name != std::string("reversible")) run.with_recomputation_and_readers();
  };
  check("plain", [](training::Config&) {});
  check("8 bits, accumulation", [](training::Config& config) {
    config.training.optimizer_state = "8bit";
    config.training.gradient_accumulation_steps = 2;
  });
  check("bf16", [](training::Config& config) { config.training.bf16 = true; });
  check("reversible", [](training::Config& config) {
    transformer(config).reversible(true);
    config.training.optimizer_in_backward = true;
    config.training.clip_grad_norm = 0;
  });
  unsetenv("OMP_WAIT_POLICY");
  if (kills > 1) WARN(half_written << " of " << 4 * kills << " kills left a file half written");
}

}  // namespace

TEST_CASE("train gives the same bits in every process, with recomputation, and after kills") {
  check_same_bits(3, 1, 2);
}

// Minutes: training_tests "[long]"
TEST_CASE("train gives the same bits in 12 processes and after 200 kills", "[.][long]") { check_same_bits(12, 50, 10); }

TEST_CASE("train trains, resumes and leaves a summary") {
  const Setup setup;
  const Result first = train(setup.arguments() + " --steps 5");
  INFO(first.output);
  REQUIRE(first.code == 0);
  CHECK(contains(first.output, "Epoch 1: 100%|██████████| 3/3 ["));
  CHECK(contains(first.output, "Epoch 2:  66%|██████    | 2/3 ["));
  CHECK(contains(first.output, "stored attention scores would take "));
  const std::filesystem::path out = setup.out;
  const auto summary = nlohmann::json::parse(std::ifstream(out / "summary.json"));
  CHECK(summary["steps"] == 5);
  CHECK(summary["losses"].size() == 2);
  CHECK(summary["peak_bytes"] > 0);
  CHECK(summary["train_seconds"] > 0);
  // 1 layer, 2 heads, 33 bins, 17 frames
  CHECK(summary["stored_scores_bytes"] == 2 * 33 * 17 * (33 + 17) * 4);
  CHECK(training::load_state(out / "last.pt").step == 5);
  CHECK(std::filesystem::exists(out / "best.pt"));
  CHECK(training::to_json(training::load_config(out / "config.json")) ==
        training::to_json(training::load_config(setup.config)));

  const Result again = train(setup.arguments() + " --steps 7 --resume " + setup.out + "/last.pt");
  INFO(again.output);
  CHECK(again.code == 0);
  CHECK(training::load_state(out / "last.pt").step == 7);
}

TEST_CASE("train tells what is wrong with its inputs") {
  const Setup setup;
  const auto fails = [](const std::string& arguments, int code, const std::vector<std::string>& parts) {
    const Result result = train(arguments);
    INFO(result.output);
    CHECK(result.code == code);
    for (const std::string& part : parts) {
      INFO(part);
      CHECK(contains(result.output, part));
    }
  };
  CHECK(train("--help").code == 0);
  fails("", 2, {"--config is required"});
  fails(setup.arguments() + " --steps 0", 2, {"--steps"});
  fails(setup.arguments() + " --stpes 3", 2, {"--stpes"});
  const Result threads = train(setup.arguments(), "1000000");
  CHECK(threads.code == 2);
  CHECK(contains(threads.output, "1024"));
  fails(setup.arguments() + " --device gpu", 1, {"[headroom.tools.device] there is no device gpu; expected cpu"});
  std::filesystem::create_symlink("loop", setup.folder / "loop");
  const std::string loop = (setup.folder / "loop").string();
  fails("--config " + loop + " --data " + setup.data, 1, {"[headroom.training.config_file]", loop});
  fails("--config " + setup.config + " --data " + loop, 1, {"[headroom.", loop});
  fails("--config " + setup.config + " --data " + setup.data + " --out " + loop, 1, {"headroom.train.output", loop});
  fails(setup.arguments() + " --resume " + loop, 1, {"headroom.training.state.read", loop});
  fails("--config none.json --data " + setup.data, 1, {"headroom.training.config_file", "none.json"});
  fails("--config " + setup.config, 1, {"headroom.train.data", "give --data"});
  const std::string empty = (setup.folder / "empty").string();
  fails("--config " + setup.config + " --data " + empty, 1, {"headroom.training.dataset.empty", empty});

  const std::string unknown = (setup.folder / "unknown.json").string();
  std::ofstream(unknown) << R"({"model": {"n_head": 2}})";
  fails("--config " + unknown + " --data " + setup.data, 1,
        {"headroom.training.config", unknown + ": model.n_head: unknown key; did you mean `n_heads`?"});
  const std::string broken = (setup.folder / "broken.json").string();
  std::ofstream(broken) << "{\n  \"model\" 3\n}";
  fails("--config " + broken + " --data " + setup.data, 1, {"headroom.training.json", broken, "line 2, column 11"});

  REQUIRE(train(setup.arguments() + " --steps 1").code == 0);
  const std::string checkpoint = setup.out + "/last.pt";
  const Setup wider("16");
  fails(wider.arguments() + " --resume " + checkpoint, 1,
        {"headroom.training.state.config", checkpoint, "\n  model.emb_dim: 8 became 16"});
  const Result other = train(setup.arguments() + " --steps 1 --resume " + checkpoint);
  CHECK_FALSE(contains(other.output, "resume: "));
  training::Config faster = training::load_config(setup.config);
  faster.training.learning_rate = 0.5;
  const std::string config = (setup.folder / "faster.json").string();
  std::ofstream(config) << training::to_json(faster);
  const Result resumed = train("--config " + config + " --data " + setup.data + " --out " + setup.out +
                               " --steps 2 --resume " + checkpoint);
  CHECK(resumed.code == 0);
  CHECK(contains(resumed.output, "resume:   training.learning_rate: 0.0003 became 0.5\n"));
  const auto truncate = [](const std::filesystem::path& file) {
    std::filesystem::resize_file(file, std::filesystem::file_size(file) / 2);
  };
  truncate(checkpoint);
  const Result one_before = train(setup.arguments() + " --steps 3 --resume " + checkpoint);
  CHECK(one_before.code == 0);
  CHECK(contains(one_before.output, "resume:   [headroom.training.state.corrupt] " + checkpoint));
  CHECK(contains(one_before.output, "last-1.pt, of step 1, is used instead\n"));
  CHECK(training::load_state(checkpoint).step == 3);
  CHECK(train(setup.arguments() + " --steps 4 --resume " + setup.out).code == 0);  // the folder alone
  for (const auto& entry : std::filesystem::directory_iterator(setup.out)) {
    if (entry.path().extension() == ".pt") truncate(entry.path());
  }
  fails(setup.arguments() + " --resume " + checkpoint, 1,
        {"headroom.training.state.corrupt", "none of the 3 saved states", checkpoint});
  fails(setup.arguments(), 1, {"headroom.train.used"});
  REQUIRE(train(setup.arguments() + " --steps 1 --overwrite").code == 0);
  CHECK(training::load_state(checkpoint).step == 1);
  CHECK_FALSE(std::filesystem::exists(setup.out + "/last-1.pt"));
  fails("--config " + setup.config + " --data " + setup.data + " --steps 1 --out " + setup.config + "/x", 1,
        {"headroom.train.output", "Not a directory"});
}

TEST_CASE("train keeps a budget: it refuses, explains memory that ran out, and goes on in parts where that is wanted") {
  const Setup setup;
  training::Config config = training::load_config(setup.config);
  const auto with = [&](const std::string& arguments) {
    std::ofstream(setup.config) << training::to_json(config);
    return train(setup.arguments() + " --steps 2 " + arguments);
  };
  const auto peak = [&](int64_t batch) {
    config.training.batch_size = batch;
    return training::plan_training(config, this_machine()).peak_bytes;
  };
  const int64_t of_two = peak(2), of_four = peak(4);
  const std::string between = std::to_string((of_two + of_four) / 2);
  const Result refused = with("--budget " + between);
  INFO(refused.output);
  CHECK(refused.code == 1);
  CHECK(contains(refused.output, "headroom.train.memory"));

  const Result ran_out = with("--unplanned --memory-summary --budget " + between);
  INFO(ran_out.output);
  CHECK(ran_out.code == 1);
  CHECK(contains(ran_out.output, "out of memory: "));
  CHECK(contains(ran_out.output, "are held then, most of it by"));
  CHECK(contains(ran_out.output, "this fits (the same training)"));
  CHECK(contains(ran_out.output, "| Allocated memory "));
  CHECK(contains(ran_out.output, "[headroom.memory.limit]"));

  config.training.split_on_out_of_memory = true;
  const Result in_parts = with("--unplanned --budget " + between);
  INFO(in_parts.output);
  CHECK(in_parts.code == 0);
  CHECK(contains(in_parts.output, "memory ran out: from step 1 on batches of 4 go in parts of 2\n"));
  CHECK(training::load_state(std::filesystem::path(setup.out) / "last.pt").microbatch == 2);
}

TEST_CASE("train plans a run under bfloat16 autocast, too") {
  const Setup setup;
  training::Config config = training::load_config(setup.config);
  config.training.bf16 = true;
  std::ofstream(setup.config) << training::to_json(config);
  const Result result = train(setup.arguments() + " --steps 1");
  INFO(result.output);
  CHECK(result.code == 0);
  CHECK(contains(result.output, "memory:   planned peak "));
}

TEST_CASE("train leaves out a track whose file fails in the middle of training, or stops with --strict") {
  const Setup setup;
  const auto good = std::filesystem::path(setup.data) / "train" / "A - B", bad = good.parent_path() / "C - D";
  std::filesystem::copy(good, bad);
  audio::write_audio(bad / "bass.wav", torch::zeros({2, 22050}), 44100, audio::Encoding::float32);
  std::string bytes = testing::read_bytes(bad / "bass.wav");
  std::fill(bytes.end() - 2 * 22050 * 4, bytes.end(), '\xff');  // NaN, every one
  testing::write_bytes(bad / "bass.wav", bytes);
  const Result result = train(setup.arguments() + " --steps 6");
  INFO(result.output);
  CHECK(result.code == 0);
  CHECK(contains(result.output, "data:     [headroom.audio.file.not_finite] "));
  CHECK(contains(result.output, "bass.wav"));
  CHECK(contains(result.output, "The track is left out"));
  const Result strict = train(setup.arguments() + " --steps 6 --strict --overwrite");
  INFO(strict.output);
  CHECK(strict.code == 1);
  CHECK(contains(strict.output, "[headroom.audio.file.not_finite] "));
}

TEST_CASE("train finishes its step and saves when it is told to stop") {
  for (const int signal : {SIGINT, SIGTERM}) {
    const Setup setup;
    const pid_t child = start(setup.config, setup.data, setup.out, {"--threads", "1", "--steps", "1000000"});
    const std::filesystem::path last = std::filesystem::path(setup.out) / "last.pt";
    for (int wait = 0; wait < 3000 && !std::filesystem::exists(last); ++wait) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    kill(child, signal);
    CHECK(wait_for(child) == 128 + signal);
    const training::TrainingState state = training::load_state(last);
    CHECK(state.step >= 3);
    CHECK(static_cast<int64_t>(state.epoch_losses.size()) == state.step / 3);
    CHECK_FALSE(std::filesystem::exists(std::filesystem::path(setup.out) / "summary.json"));
  }
}

#endif
