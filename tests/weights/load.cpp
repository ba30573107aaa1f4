#include "headroom/weights/load.hpp"

#include <torch/torch.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/files.hpp"
#include "weights/archive.hpp"

using namespace headroom;
using namespace headroom::testing;

namespace {

/// The module of tests/weights/make_files.py, as a field of which wrappers make "0.weight" and so on.
struct LayerImpl : torch::nn::SequentialImpl {
  explicit LayerImpl(int64_t width = 4) : SequentialImpl(torch::nn::Linear(3, width), torch::nn::BatchNorm1d(width)) {}
};
TORCH_MODULE(Layer);

/// Type, shape and all bits.
bool same(const torch::Tensor& a, const torch::Tensor& b) {
  const auto bytes = [](const torch::Tensor& x) { return x.contiguous().reshape(-1).view(torch::kByte); };
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         (a.numel() == 0 || torch::equal(bytes(a), bytes(b)));
}
bool same(const weights::TensorMap& a, const weights::TensorMap& b) {
  return a.size() == b.size() && std::ranges::equal(a, b, [](const auto& x, const auto& y) {
           return x.first == y.first && same(x.second, y.second);
         });
}
weights::TensorMap copies(const torch::nn::Module& module) {
  weights::TensorMap tensors = weights::tensors_of(module);
  for (auto& [name, tensor] : tensors) tensor = tensor.detach().clone();
  return tensors;
}

/// Runs a script of this folder with the Python that LibTorch came with.
int run_python(const std::string& script, const std::string& arguments) {
  return std::system(
      (std::string(HEADROOM_TORCH_PYTHON " " HEADROOM_WEIGHT_SCRIPTS "/") + script + " " + arguments).c_str());
}

}  // namespace

TEST_CASE("tensors of each format are equal bit for bit, and views of one storage share memory") {
  const weights::TensorMap plain = weights::load_tensors(kWeightFiles / "state.safetensors");
  CHECK(plain.size() == 23);
  for (const char* name : {"state.pt", "legacy.pt"}) {
    const weights::TensorMap tensors = weights::load_tensors(kWeightFiles / name);
    INFO(name);
    CHECK(same(tensors, plain));
    CHECK(tensors.at("shared.transposed").data_ptr() == tensors.at("shared.whole").data_ptr());
    CHECK(tensors.at("shared.expanded").stride(0) == 0);
    CHECK(tensors.at("dtype.bfloat16").scalar_type() == torch::kBFloat16);
  }
}

TEST_CASE("a tensor of a file outlives it, and writing to it leaves the file alone") {
  const TemporaryFolder folder;
  const auto path = folder / "state.pt";
  std::filesystem::copy(kWeightFiles / "state.pt", path);
  torch::Tensor tensor = weights::load_tensors(path).at("shared.whole");
  const torch::Tensor before = tensor.clone();
  tensor.add_(1);
  CHECK(same(weights::load_tensors(path).at("shared.whole"), before));
  std::filesystem::remove(path);
  CHECK(torch::allclose(tensor, before + 1));
}

TEST_CASE("tensors are written and read again, of any layout, type and alignment") {
  const TemporaryFolder folder;
  const auto path = folder / "a.safetensors";
  const torch::Tensor base = torch::randn({5, 7});
  const weights::TensorMap tensors = {{"transposed", base.t()},
                                      {"expanded", base[0].expand({2, 7})},
                                      {"scalar", torch::tensor(2.0)},
                                      {"empty", torch::empty({3, 0})},
                                      {"flags", torch::tensor({true, false, true})},
                                      {"conjugate", torch::randn({3}, torch::kComplexFloat).conj()},
                                      {"unsigned", torch::arange(3).to(torch::kUInt16)},
                                      {"eight bits", base.to(torch::kFloat8_e4m3fn)},
                                      {"parameter", torch::randn({2}).requires_grad_()}};
  weights::save_tensors(path, tensors, {{"format", "pt"}});
  weights::TensorMap expected = tensors;
  expected["conjugate"] = tensors.at("conjugate").resolve_conj();
  CHECK(same(weights::load_tensors(path), expected));

  // A header whose length no writer pads puts each element at an odd address
  std::string file = read_bytes(path);
  file.insert(file.begin() + 8 + static_cast<unsigned char>(file[0]) + 256 * static_cast<unsigned char>(file[1]), ' ');
  file[0] = static_cast<char>(file[0] + 1);
  write_bytes(path, file);
  CHECK(same(weights::load_tensors(path), expected));

  const auto id = [&](const weights::TensorMap& wrong) {
    return error_of([&] { weights::save_tensors(path, wrong); }).id();
  };
  CHECK(id({{"a", torch::Tensor()}}) == "headroom.weights.dtype");
  CHECK(id({{"a", torch::zeros({1}, torch::kComplexDouble)}}) == "headroom.weights.dtype");
  CHECK(id({{"__metadata__", base}}) == "headroom.weights.names");
}

TEST_CASE("a disk that is full leaves the old file and nothing else") {
  const TemporaryFolder folder;
  const auto path = folder / "a.safetensors";
  weights::save_tensors(path, {{"a", torch::ones({3})}});
  const std::string before = read_bytes(path);
  const Error error = [&] {
    const testing::FileSizeLimit limit(100'000);
    return error_of([&] { weights::save_tensors(path, {{"a", torch::ones({100'000})}}); });
  }();
  CHECK(error.id() == "headroom.weights.write");
  CHECK(contains(error.what(), "Check the room on the disk"));
  CHECK(read_bytes(path) == before);
  CHECK(folder.names().size() == 1);
}

TEST_CASE("a module takes weights of any wrapper, container and floating type") {
  const weights::TensorMap plain = weights::load_tensors(kWeightFiles / "layer.safetensors");
  for (const char* name : {"layer.safetensors", "under_ema.ckpt", "nested.ckpt", "prefixed.ckpt", "half.pth"}) {
    INFO(name);
    Layer layer;
    const weights::LoadReport report = weights::load_weights(*layer, kWeightFiles / name);
    CHECK((report.complete() && report.loaded.size() == 7));
    const bool is_half = std::string(name) == "half.pth";
    for (const auto& [key, tensor] : weights::tensors_of(*layer)) {
      CHECK(same(tensor.detach(), is_half && tensor.is_floating_point()
                                      ? plain.at(key).to(torch::kHalf).to(torch::kFloat)
                                      : plain.at(key)));
      CHECK(tensor.requires_grad() == (!key.starts_with("1.running") && !key.starts_with("1.num")));
    }
  }
  Layer wide;
  wide->to(torch::kDouble);
  CHECK(weights::load_weights(*wide, kWeightFiles / "layer.safetensors").complete());
  CHECK(same(wide->parameters()[0].detach(), plain.at("0.weight").to(torch::kDouble)));
}

TEST_CASE("weights that do not fit change nothing, and the error says what is what") {
  const TemporaryFolder folder;
  const auto path = folder / "a.safetensors";
  weights::TensorMap tensors = weights::load_tensors(kWeightFiles / "layer.safetensors");
  tensors["0.wieght"] = tensors.extract("0.weight").mapped();
  tensors["1.bias"] = torch::zeros({5});
  tensors["1.num_batches_tracked"] = torch::tensor(1.5);
  tensors["head.weight"] = torch::zeros({1});
  tensors["model.0.bias"] = torch::zeros({4});  // "0.bias" is in the file by its own name
  weights::save_tensors(path, tensors);
  Layer layer;
  const weights::TensorMap before = copies(*layer);
  const Error error = error_of([&] { weights::load_weights(*layer, path); });
  INFO(error.what());
  CHECK(error.id() == "headroom.weights.mismatch");
  for (const char* part :
       {"a.safetensors does not fit this module: of its 7 tensors 4 fit, 1 are missing and 2 have another shape or "
        "type; 3",
        "\n  missing in the file: \"0.weight\", is it \"0.wieght\"?", "\n  not in the module: \"head.weight\"",
        "\n  not in the module: \"model.0.bias\"", "1.bias is Float [5] in the file, expected Float [4]",
        "1.num_batches_tracked is Float [] in the file, expected Long []"}) {
    CHECK(contains(error.what(), part));
  }
  CHECK(same(copies(*layer), before));

  const weights::LoadReport report = weights::load_weights(*layer, path, {.allow_partial = true});
  CHECK(report.loaded == std::vector<std::string>{"0.bias", "1.running_mean", "1.running_var", "1.weight"});
  CHECK(report.missing == std::vector<std::string>{"0.weight"});
  CHECK(report.unexpected == std::vector<std::string>{"0.wieght", "head.weight", "model.0.bias"});
  CHECK(report.parts.size() == 1);
  CHECK(report.misfits.size() == 1);
  CHECK(same(layer->named_parameters()["1.bias"].detach(), torch::zeros({4})));
  CHECK(same(layer->named_parameters()["0.weight"].detach(), before.at("0.weight")));
  CHECK(same(layer->named_parameters()["0.bias"].detach(), tensors.at("0.bias")));

  torch::nn::Linear other(2, 2);
  CHECK(error_of([&] { weights::load_weights(*other, path, {.allow_partial = true}); }).id() ==
        "headroom.weights.mismatch");

  // What is asked for already is not advised
  torch::nn::BatchNorm1d norm(torch::nn::BatchNorm1dOptions(3).affine(false));
  weights::save_tensors(path, {{"running_mean", torch::zeros({4})}});
  const auto advised = [&](bool allowed) {
    const Error misfit = error_of([&] { weights::load_weights(*norm, path, {.allow_partial = allowed}); });
    return contains(misfit.what(), "allow a partial load");
  };
  CHECK(advised(false));
  CHECK_FALSE(advised(true));
}

TEST_CASE("of a buffer with other sizes nothing is loaded") {
  const TemporaryFolder folder;
  const auto path = folder / "a.safetensors";
  weights::save_tensors(path, {{"weight", torch::full({5}, 2.0)}, {"running_mean", torch::full({5}, 2.0)}});
  torch::nn::BatchNorm1d norm(4);
  const weights::LoadReport report = weights::load_weights(*norm, path, {.allow_partial = true});
  REQUIRE(report.parts.size() == 1);
  CHECK(report.parts[0].name == "weight");
  REQUIRE(report.misfits.size() == 1);
  CHECK(report.misfits[0].name == "running_mean");
  CHECK(same(norm->weight.detach(), torch::full({4}, 2.0)));
  CHECK(same(norm->running_mean, torch::zeros({4})));
}

TEST_CASE("of a tensor with other sizes the part that both have is loaded, and the rest stays as it was") {
  const TemporaryFolder folder;
  const auto path = folder / "a.safetensors";
  weights::TensorMap tensors = {{"weight", torch::randn({5, 2})}, {"bias", torch::randn({5, 1})}};
  weights::save_tensors(path, tensors);
  torch::nn::Linear layer(3, 4);
  const weights::TensorMap before = copies(*layer);
  CHECK(error_of([&] { weights::load_weights(*layer, path); }).id() == "headroom.weights.mismatch");
  CHECK(same(copies(*layer), before));

  const weights::LoadReport report = weights::load_weights(*layer, path, {.allow_partial = true});
  torch::Tensor expected = before.at("weight").clone();
  expected.narrow(1, 0, 2).copy_(tensors.at("weight").narrow(0, 0, 4));
  CHECK(same(layer->weight.detach(), expected));
  CHECK(same(layer->bias.detach(), before.at("bias")));  // with another number of axes nothing is common
  CHECK((layer->weight.is_leaf() && layer->weight.requires_grad()));
  CHECK_FALSE(report.complete());
  CHECK(report.loaded.empty());
  const std::string text = to_string(report);
  INFO(text);
  CHECK(contains(text, "loaded in part: \"weight is Float [5, 2] in the file, expected Float [4, 3]\""));
  CHECK(contains(text, "other shape or type: \"bias is Float [5, 1] in the file, expected Float [4]\""));
}

TEST_CASE("a report shows the first names only") {
  weights::LoadReport report;
  for (int i = 0; i < 1000; ++i) report.missing.push_back("layer." + std::to_string(i));
  const std::string text = to_string(report);
  CHECK(std::ranges::count(text, '\n') == 21);
  CHECK(contains(text, "… and 980 more"));
}

TEST_CASE("what LibTorch pickles is read too, with bytes behind the archive") {
  const TemporaryFolder folder;
  Layer layer;
  c10::Dict<std::string, torch::Tensor> model;
  for (const auto& [name, tensor] : copies(*layer)) model.insert(name, tensor);
  c10::impl::GenericDict content(c10::StringType::get(), c10::AnyType::get());
  content.insert("config", "{}");
  content.insert("step", 3);
  content.insert("losses", c10::List<double>(std::vector<double>{0.5, 0.25}));
  content.insert("model", model);
  const std::vector<char> archive = torch::pickle_save(content);
  write_bytes(folder / "last.pt", std::string(archive.data(), archive.size()) + std::string(24, 'x'));
  CHECK(same(weights::load_tensors(folder / "last.pt"), copies(*layer)));
}

#ifdef HEADROOM_TORCH_PYTHON
TEST_CASE("files of the PyTorch that is installed are read, and its safetensors package reads ours") {
  const TemporaryFolder folder;
  REQUIRE(run_python("make_files.py", folder.path()) == 0);
  const weights::TensorMap plain = weights::load_tensors(folder / "state.safetensors");
  CHECK(same(weights::load_tensors(folder / "state.pt"), plain));
  CHECK(same(weights::load_tensors(folder / "legacy.pt"), plain));
  CHECK(same(weights::load_tensors(folder / "under_state.ckpt"), weights::load_tensors(folder / "layer.safetensors")));

  weights::save_tensors(folder / "ours.safetensors", plain, {{"format", "pt"}});
  const std::string files = (folder / "ours.safetensors").string() + " " + (folder / "theirs.safetensors").string();
  const int status = run_python("check_safetensors.py", (folder / "state.pt").string() + " " + files);
  if (WEXITSTATUS(status) == 77) {
    WARN("skipped: this Python has no package safetensors");
    return;
  }
  REQUIRE(status == 0);
  CHECK(same(weights::load_tensors(folder / "theirs.safetensors"), plain));
  CHECK(read_bytes(folder / "theirs.safetensors") == read_bytes(folder / "ours.safetensors"));
}
#endif
