// The train program as its users meet it: what it says and returns for wrong inputs, and what it leaves behind.
#ifdef HEADROOM_TRAIN

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "headroom/audio/file.hpp"
#include "headroom/training/plan.hpp"
#include "headroom/training/state.hpp"
#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/tiny_separator.hpp"

using namespace headroom;
using headroom::testing::contains;
using headroom::testing::TemporaryFolder;

namespace {

struct Result {
  int code;
  std::string output;
};

Result train(const std::string& arguments) {
  const std::string command = std::string(HEADROOM_TRAIN) + " --threads 1 " + arguments + " 2>&1";
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

}  // namespace

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
        {"headroom.training.state.structure", checkpoint,
         "differs: embed.weight is [8, 4] Float, expected [16, 4] Float"});
  std::filesystem::resize_file(checkpoint, std::filesystem::file_size(checkpoint) / 2);
  fails(setup.arguments() + " --resume " + checkpoint, 1, {"headroom.training.state.corrupt", checkpoint});
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

TEST_CASE("train finishes its step and saves when it is told to stop") {
  for (const int signal : {SIGINT, SIGTERM}) {
    const Setup setup;
    const pid_t child = fork();
    if (child == 0) {
      if (std::freopen("/dev/null", "w", stdout) == nullptr) _exit(3);
      execl(HEADROOM_TRAIN, "train", "--config", setup.config.c_str(), "--data", setup.data.c_str(), "--out",
            setup.out.c_str(), "--threads", "1", "--steps", "1000000", nullptr);
      _exit(4);
    }
    const std::filesystem::path last = std::filesystem::path(setup.out) / "last.pt";
    for (int wait = 0; wait < 3000 && !std::filesystem::exists(last); ++wait) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    kill(child, signal);
    int status = 0;
    waitpid(child, &status, 0);
    REQUIRE(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 128 + signal);
    const training::TrainingState state = training::load_state(last);
    CHECK(state.step >= 3);
    CHECK(static_cast<int64_t>(state.epoch_losses.size()) == state.step / 3);
    CHECK_FALSE(std::filesystem::exists(std::filesystem::path(setup.out) / "summary.json"));
  }
}

#endif
