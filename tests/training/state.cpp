#include "headroom/training/state.hpp"

#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <fstream>
#include <sstream>
#include <thread>

#include "headroom/io/room.hpp"
#include "headroom/training/load_model.hpp"
#include "headroom/training/saved_states.hpp"
#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/tiny_separator.hpp"

using namespace headroom;
using namespace headroom::training;
using headroom::testing::contains;
using headroom::testing::error_of;
using headroom::testing::read_bytes;
using headroom::testing::TemporaryFolder;
using headroom::testing::TinySeparator;
using headroom::testing::write_bytes;

namespace {

TrainingState example_state() {
  return {.config = "{\"a\": 1}",
          .step = 1234567890123,
          .epoch_losses = {0.5, 0.1},
          .unfinished_loss = 0.3,
          .best_metric = "training loss",
          .best_score = 0.1,
          .random = random_state(),
          .model = {{"a.weight", torch::arange(6.0).view({2, 3})}, {"scale", torch::tensor(2, torch::kLong)}},
          .optimizer = {{"a.weight.exp_avg", torch::full({2, 3}, -1.5)}}};
}

}  // namespace

TEST_CASE("a state comes back from its file as it was") {
  const TemporaryFolder folder;
  TrainingState state = example_state();
  const torch::Tensor large = torch::randn({100'000});
  state.model["view"] = large.slice(0, 10, 13);
  state.model["transposed"] = torch::arange(6.0).view({2, 3}).t();
  save_state(folder / "a.pt", state);
  CHECK(std::filesystem::file_size(folder / "a.pt") < 50'000);  // the view did not take its storage along
  const TrainingState back = load_state(folder / "a.pt");
  CHECK(back.config == state.config);
  CHECK(back.step == state.step);
  CHECK(back.epoch_losses == state.epoch_losses);
  CHECK(back.unfinished_loss == state.unfinished_loss);
  CHECK(back.best_metric == state.best_metric);
  CHECK(back.best_score == state.best_score);
  CHECK(back.random.equal(state.random));
  REQUIRE(back.model.size() == 4);
  for (const auto& [name, tensor] : state.model) {
    CHECK(back.model.at(name).equal(tensor));
    CHECK(back.model.at(name).scalar_type() == tensor.scalar_type());
  }
  CHECK(back.optimizer.at("a.weight.exp_avg").equal(state.optimizer.at("a.weight.exp_avg")));
  CHECK(folder.names().size() == 1);
}

TEST_CASE("a saved state that is truncated, damaged or something else is named and refused") {
  const TemporaryFolder folder;
  save_state(folder / "good.pt", example_state());
  const std::string good = read_bytes(folder / "good.pt");
  const auto refused = [&](const std::string& bytes) {
    write_bytes(folder / "bad.pt", bytes);
    const Error error = error_of([&] { load_state(folder / "bad.pt"); });
    CHECK(error.id() == "headroom.training.state.corrupt");
    CHECK(contains(error.what(), (folder / "bad.pt").string()));
    return std::string(error.what());
  };
  for (const std::size_t size : {std::size_t(0), std::size_t(1), std::size_t(24), good.size() / 2, good.size() - 1}) {
    CHECK(contains(refused(good.substr(0, size)), "has no end mark"));
  }
  CHECK(contains(refused(good.substr(100)), "should hold " + std::to_string(good.size() - 24) + " bytes"));
  for (const std::size_t position : {std::size_t(0), good.size() / 2, good.size() - 25, good.size() - 1}) {
    std::string changed = good;
    changed[position] ^= 1;
    CHECK(contains(refused(changed), "does not match its checksum"));
  }
  CHECK(contains(refused("RIFF" + std::string(1000, 'x')), "it is truncated or no saved state"));
  CHECK(error_of([&] { load_state(folder / "none.pt"); }).id() == "headroom.training.state.read");
  CHECK(error_of([&] { load_state(folder.path()); }).id() == "headroom.training.state.read");
}

TEST_CASE("a large file that is no saved state, a pipe and a loop of links are refused at once") {
  const TemporaryFolder folder;
  write_bytes(folder / "video.mkv", "x");
  std::filesystem::resize_file(folder / "video.mkv", 2'500'000'000);  // takes no room on the disk
  const auto resident = [] {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_maxrss;
  };
  const auto before = resident();
  const Error large = error_of([&] { load_state(folder / "video.mkv"); });
  CHECK(large.id() == "headroom.training.state.corrupt");
  CHECK(contains(large.what(), "(2500000000 bytes) has no end mark"));
  CHECK(resident() - before < 100'000);  // KiB
  REQUIRE(mkfifo((folder / "pipe").c_str(), 0600) == 0);
  CHECK(error_of([&] { load_state(folder / "pipe"); }).id() == "headroom.training.state.read");
  std::filesystem::create_symlink("loop", folder / "loop");
  const Error loop = error_of([&] { load_state(folder / "loop"); });
  CHECK(loop.id() == "headroom.training.state.read");
  CHECK(contains(loop.what(), "Too many levels of symbolic links"));
}

TEST_CASE("a file with an end mark whose archive is something else is refused without LibTorch's words") {
  const TemporaryFolder folder;
  const auto refused = [&](const std::string& archive) {
    const training::detail::Trailer trailer{.size = archive.size(), .checksum = io::detail::fnv1a(archive)};
    write_bytes(folder / "a.pt", archive + std::string(reinterpret_cast<const char*>(&trailer), sizeof trailer));
    const Error error = error_of([&] { load_state(folder / "a.pt"); });
    INFO(error.what());
    CHECK(error.id() == "headroom.training.state.corrupt");
    CHECK(contains(error.what(), "is not laid out as this version writes it: "));
    CHECK(contains(error.what(), "; use another saved state"));
    for (const char* alien : {"report", "PyTorch", ".cpp", "frame #", "\n"}) CHECK_FALSE(contains(error.what(), alien));
  };
  const auto saved = [](const c10::IValue& value) {
    const std::vector<char> bytes = torch::pickle_save(value);
    return std::string(bytes.begin(), bytes.end());
  };
  refused("no archive at all");
  refused(saved(c10::IValue(3)));
  c10::impl::GenericDict content(c10::StringType::get(), c10::AnyType::get());
  refused(saved(content));
  content.insert("config", 3);
  refused(saved(content));
  std::string broken = saved(content);
  broken.replace(broken.find("config"), 6, "\x80\x80\x80\x80\x80\x80");
  refused(broken);
}

TEST_CASE("a disk that is full leaves the old saved state and no temporary file") {
  const TemporaryFolder folder;
  const auto path = folder / "a.pt";
  write_bytes(path, "old");
  const Error error = [&] {
    const testing::FileSizeLimit limit(1000);
    return error_of([&] { write_atomically(path, {std::string(900, 'a'), std::string(900, 'b')}); });
  }();
  CHECK(error.id() == "headroom.training.state.write");
  CHECK(contains(error.what(), path.string() + ": File too large"));
  CHECK(read_bytes(path) == "old");
  CHECK(folder.names().size() == 1);
  const Error missing = error_of([&] { write_atomically(folder / "no/a.pt", {"x"}); });
  CHECK(missing.id() == "headroom.training.state.write");
  CHECK(contains(missing.what(), "No such file or directory"));
  write_bytes(path.string() + ".partial", "left by a process that was killed");
  write_atomically(path, {"n", "ew"});
  CHECK(read_bytes(path) == "new");
  CHECK(folder.names().size() == 1);
}

TEST_CASE("a process killed while it writes leaves one of its saved states whole") {
  const TemporaryFolder folder;
  const auto path = folder / "a.pt";
  const std::string a(300'000, 'a'), b(200'000, 'b');
  write_atomically(path, {a});
  for (int round = 0; round < 20; ++round) {
    const pid_t child = fork();
    if (child == 0) {
      for (;;) {
        write_atomically(path, {b});
        write_atomically(path, {a});
      }
    }
    std::this_thread::sleep_for(std::chrono::microseconds(1000 + 517 * round));
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    const std::string now = read_bytes(path);
    CHECK((now == a || now == b));
  }
}

TEST_CASE("tensors of another structure are refused with every difference, and nothing is changed") {
  TinySeparator small(6), wide(7);
  TensorMap source = tensors_of(*wide);
  source.erase("last.bias");
  source["extra"] = torch::ones({2});
  source["scale"] = torch::ones({1}, torch::kDouble);
  const TensorMap target = tensors_of(*small);
  const torch::Tensor norm = small->norm->weight.clone();
  const Error error = error_of([&] { copy_tensors(source, target, "x.pt"); });
  CHECK(error.id() == "headroom.training.state.structure");
  CHECK(contains(error.what(), "x.pt does not fit this model"));
  CHECK(contains(error.what(), "missing in the file: \"last.bias\""));
  CHECK(contains(error.what(), "not in the module: \"extra\""));
  CHECK(contains(error.what(), "first.weight is Float [7, 2, 9] in the file, expected Float [6, 2, 9]"));
  CHECK(contains(error.what(), "scale is Double [1] in the file, expected Float [1]"));
  CHECK(small->norm->weight.equal(norm));
  TinySeparator other(6);
  copy_tensors(tensors_of(*other), target, "y");
  for (const auto& [name, tensor] : tensors_of(*other)) {
    CHECK(target.at(name).equal(tensor));
  }
}

TEST_CASE("load_model gives the saved model ready for inference") {
  const TemporaryFolder folder;
  const Config config = parse_config(R"({
    "model": {"n_fft": 64, "hop_length": 32, "n_layers": 1, "emb_dim": 8, "n_heads": 2, "ffn_hidden_dim": [16],
              "attention": "reference"},
    "audio": {"stems": ["vocals", "rest"]},
    "training": {"segment_length": 4096, "batch_size": 1}})",
                                     "test");
  const auto options = model_options(config);
  CHECK(options.attention() == AttentionBackend::reference);
  CHECK(options.stems() == 2);
  CHECK(options.ffn_hidden_dim() == std::vector<int64_t>{16});
  models::TimeFrequencyTransformer model(options);
  const TrainingState state{
      .config = to_json(config), .step = 3, .random = random_state(), .model = tensors_of(*model), .optimizer = {}};
  save_state(folder / "m.pt", state);
  LoadedModel loaded = load_model(folder / "m.pt");
  CHECK(loaded.config.audio.stems == config.audio.stems);
  CHECK_FALSE(loaded.model->is_training());
  const torch::Tensor mixture = torch::randn({1, 2, 300});
  const torch::Tensor stems = loaded.model(mixture);
  CHECK_FALSE(stems.requires_grad());
  CHECK(stems.equal(model->forward(mixture)));

  // Weights alone, with their configuration in the metadata or beside them
  save_weights(folder / "m.safetensors", state);
  CHECK(load_model(folder / "m.safetensors").model(mixture).equal(stems));
  const auto plain = folder / "plain.safetensors", beside = folder / "config.json";
  weights::save_tensors(plain, state.model);
  write_bytes(beside, state.config);
  const Error error = error_of([&] { load_model(plain); });
  CHECK(error.id() == "headroom.training.no_config");
  CHECK(contains(error.what(), "give the one that was published with it as well, --config FILE"));
  for (const auto& weights : {plain, folder / "m.safetensors", folder / "m.pt"}) {
    LoadedModel again = load_model({.weights = weights, .config = beside});
    CHECK_FALSE(again.model->is_training());
    CHECK(again.model(mixture).equal(stems));
  }
}

TEST_CASE("the last states are kept, the younger first, of each step one") {
  const TemporaryFolder folder;
  TrainingConfig training;
  training.checkpoints_kept = 3;
  TrainingState state = example_state();
  const auto save = [&](SavedStates& saved, int64_t step) {
    state.step = step;
    saved.save_last(state, 0);
  };
  const auto steps = [&] {
    std::vector<int64_t> found;
    for (int64_t age = 0; std::filesystem::exists(folder / last_state_name(age)); ++age) {
      found.push_back(load_state(folder / last_state_name(age)).step);
    }
    return found;
  };
  SavedStates saved(folder.path(), training, 0);
  for (int64_t step = 1; step <= 5; ++step) save(saved, step);
  CHECK(steps() == std::vector<int64_t>{5, 4, 3});
  state.best_score = 9;
  save(saved, 5);
  CHECK(steps() == std::vector<int64_t>{5, 4, 3});
  CHECK(load_state(folder / "last.pt").best_score == 9);
  {
    // What cannot be written leaves all as it was
    const testing::FileSizeLimit limit(std::filesystem::file_size(folder / "last.safetensors") + 100);
    CHECK(error_of([&] { save(saved, 6); }).id() == "headroom.training.state.write");
  }
  CHECK(steps() == std::vector<int64_t>{5, 4, 3});
  // Killed after the names were given and before the new state had its own
  std::filesystem::remove(folder / "last-1.pt");
  std::filesystem::create_hard_link(folder / "last.pt", folder / "last-1.pt");
  SavedStates again(folder.path(), training, 0);
  save(again, 7);
  CHECK(steps() == std::vector<int64_t>{7, 5, 3});
  training.checkpoints_kept = 1;
  SavedStates one(folder.path(), training, 0);
  save(one, 8);
  CHECK(steps() == std::vector<int64_t>{8});
  CHECK(folder.names().size() == 2);  // and its weights
  for (const char* name :
       {"last-0.pt", "last-.pt", "last-x.pt", "last-1.pt.damaged", "best.pt", "last-01.pt", "last--1.pt"}) {
    CHECK_FALSE(age_of_state(name));
  }
  CHECK(age_of_state("last-12.pt") == 12);
}

TEST_CASE("a damaged state is told, with the check that failed, and the one before it is used") {
  const TemporaryFolder folder;
  TrainingConfig training;
  training.checkpoints_kept = 4;
  TrainingState state = example_state();
  SavedStates saved(folder.path(), training, 0);
  for (state.step = 1; state.step <= 4; ++state.step) saved.save_last(state, 0);
  state.step = 2;
  saved.save_best(state);
  const auto damage = [&](const char* name) {
    std::string bytes = read_bytes(folder / name);
    bytes[bytes.size() / 2] ^= 4;
    write_bytes(folder / name, bytes);
  };
  CHECK(find_state(folder.path()).state.step == 4);
  CHECK(find_state(folder.path()).notices.empty());

  damage("last.pt");
  const FoundState third = find_state(folder.path());
  CHECK(third.path == folder / "last-1.pt");
  CHECK(third.state.step == 3);
  REQUIRE(third.notices.size() == 2);
  CHECK(contains(third.notices[0], (folder / "last.pt").string()));
  CHECK(contains(third.notices[0], "does not match its checksum"));
  CHECK(contains(third.notices[1], "last-1.pt, of step 3, is used instead"));
  CHECK(std::filesystem::exists(folder / "last.pt.damaged"));
  CHECK(find_state(folder / "last.pt").state.step == 3);  // there is none by this name any more
  SavedStates resumed(folder.path(), training, 0);
  state.step = 5;
  resumed.save_last(state, 0);
  CHECK(load_state(folder / "last-1.pt").step == 3);

  std::filesystem::resize_file(folder / "last-1.pt", 1000);
  const FoundState second = find_state(folder / "last-1.pt");
  CHECK(second.state.step == 2);
  CHECK(contains(second.notices.at(0), "has no end mark"));
  damage("last-2.pt");
  damage("last-3.pt");
  damage("last.pt");
  CHECK(find_state(folder.path()).path == folder / "best.pt");
  damage("best.pt");
  CHECK(error_of([&] { find_state(folder / "best.pt"); }).id() == "headroom.training.state.corrupt");
  CHECK(error_of([&] { find_state(folder.path()); }).id() == "headroom.training.state.corrupt");
  CHECK(std::filesystem::exists(folder / "best.pt"));
  state.step = 6;
  resumed.save_last(state, 0);
  damage("last.pt");
  const Error none = error_of([&] { find_state(folder.path()); });
  CHECK(none.id() == "headroom.training.state.corrupt");
  CHECK(contains(none.what(), "none of the 2 saved states beside " + folder.path().string() + " is whole"));
  CHECK(std::filesystem::exists(folder / "last.pt"));
  const TemporaryFolder empty;
  CHECK(error_of([&] { find_state(empty.path()); }).id() == "headroom.training.state.read");
}

TEST_CASE("a folder without room for a file, or for all of them, says why") {
  const TemporaryFolder folder;
  CHECK(io::why_no_room(folder.path(), {.all = 1000, .largest_file = 1000}).empty());
  CHECK(contains(io::why_no_room(folder.path(), {.all = std::uint64_t{1} << 60}), "it has room for "));
  CHECK(contains(io::why_no_room(folder / "none", {}), "No such file"));
  const testing::FileSizeLimit limit(1000);
  CHECK(contains(io::why_no_room(folder.path(), {.all = 1001, .largest_file = 1001}), "File too large"));
  CHECK(folder.names().empty());
}
