#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <map>
#include <ostream>
#include <span>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "headroom/weights/file.hpp"
#include "headroom/weights/safetensors_writer.hpp"
#include "support/catch.hpp"
#include "support/files.hpp"
#include "weights/archive.hpp"

// The readers of weight files, on bytes in memory and without tensors.

using namespace headroom;
using namespace headroom::testing;
using weights::Contents;
using weights::DType;
using weights::Source;
using weights::TensorRecord;

namespace {

weights::Bytes bytes_of_text(const std::string& text) { return std::as_bytes(std::span(text.data(), text.size())); }
Contents read(const std::string& bytes, std::string_view key = "") {
  return weights::read_contents({bytes_of_text(bytes), "weights.file"}, key);
}

/// The elements of a tensor one after the other, the last axis innermost.
std::string elements(const std::string& file, const TensorRecord& tensor) {
  std::vector<std::int64_t> index(tensor.shape.size());
  std::string values;
  if (weights::is_empty(tensor.shape)) return values;
  for (;;) {
    std::int64_t place = 0;
    for (std::size_t axis = 0; axis < index.size(); ++axis) place += index[axis] * tensor.strides[axis];
    const std::size_t size = bytes_of(tensor.dtype);
    values += file.substr(tensor.begin + static_cast<std::size_t>(place) * size, size);
    std::size_t axis = index.size();
    while (axis > 0 && ++index[axis - 1] == tensor.shape[axis - 1]) index[--axis] = 0;
    if (axis == 0) return values;
  }
}

/// What a file holds, as text: name, type, shape and the bits of all elements of each tensor.
std::string listing(const std::string& file, const Contents& contents) {
  std::ostringstream text;
  for (const TensorRecord& tensor : contents.tensors) {
    text << tensor.name << " " << names_of(tensor.dtype).safetensors << " [";
    for (const std::int64_t size : tensor.shape) text << size << " ";
    text << "] ";
    for (const unsigned char byte : elements(file, tensor)) text << static_cast<int>(byte) << " ";
    text << "\n";
  }
  return text.str();
}
std::string listing(const std::string& name) {
  const std::string file = read_bytes(kWeightFiles / name);
  return listing(file, read(file));
}

void check_error(const std::string& file, const std::string& id, const std::string& part) {
  const Error error = error_of([&] { read(file); });
  INFO(error.what());
  CHECK(error.id() == "headroom.weights." + id);
  CHECK(contains(error.what(), part));
  CHECK(contains(error.what(), "weights.file"));
}

/// Whatever a file is, it is refused, or its tensors are in it.
bool is_read_or_refused(const std::string& file) {
  try {
    return std::ranges::all_of(read(file).tensors, [&](const TensorRecord& tensor) {
      return tensor.begin <= file.size() && tensor.bytes <= file.size() - tensor.begin;
    });
  } catch (const Error&) {
    return true;
  }
}

}  // namespace

TEST_CASE("every format that PyTorch has written holds the same bits") {
  const std::string plain = listing("state.safetensors");
  CHECK(std::ranges::count(plain, '\n') == 23);
  for (const char* name : {"state.pt", "legacy.pt", "protocol3.pt", "protocol4.pt", "protocol5.pt"}) {
    INFO(name);
    CHECK(listing(name) == plain);
  }
  const auto metadata = read(read_bytes(kWeightFiles / "state.safetensors")).metadata;
  CHECK(metadata.at("made by") == "make_files.py");
  CHECK(metadata.at("é \"\\\n") == "\u00fc\U0001d11e");
}

TEST_CASE("a state dict is found below the usual keys, among whatever else a checkpoint holds") {
  const std::string plain = listing("layer.safetensors");
  for (const char* key : {"state", "state_dict", "model", "model_state_dict", "ema"}) {
    INFO(key);
    CHECK(listing("under_" + std::string(key) + ".ckpt") == plain);
  }
  CHECK(listing("nested.ckpt") == plain);
  const std::string two = torch_file(pickle_dict(
      {{"ema", pickle_dict({{"a", pickle_tensor({})}})}, {"model", pickle_dict({{"b", pickle_tensor({})}})}}));
  CHECK(read(two).tensors.at(0).name == "b");
  CHECK(read(two, "ema").tensors.at(0).name == "a");
  CHECK(contains(error_of([&] { read(two, "optimizer"); }).what(), "no dict \"optimizer\"; it has \"ema\", \"model\""));
}

TEST_CASE("archives in each style that the format allows") {
  const std::string object = pickle_dict({{"a", pickle_tensor({.offset = 1, .shape = {2}, .strides = {2}})}});
  const std::string trailer(24, 'x');
  for (const ZipStyle& style :
       {ZipStyle{}, ZipStyle{.zip64 = true}, ZipStyle{.flags = 0}, ZipStyle{.behind = trailer}}) {
    const std::string file = torch_file(object, style);
    const TensorRecord tensor = read(file).tensors.at(0);
    CHECK(elements(file, tensor) == "efghmnop");
    CHECK((tensor.begin - file.find("abcdef") == 4 && tensor.bytes == 12));
  }
}

TEST_CASE("of a key that comes twice the last value holds") {
  const std::string file =
      torch_file(pickle_dict({{"a", pickle_tensor({})}, {"a", pickle_tensor({.shape = {1}, .strides = {1}})}}));
  CHECK(read(file).tensors.size() == 1);
  CHECK(read(file).tensors[0].shape == std::vector<std::int64_t>{1});
}

TEST_CASE("a safetensors file that breaks a rule of the format is refused with the rule") {
  const std::string eight = "12345678";
  const auto tensor = [](const std::string& text) { return "{\"a\":{" + text + "}}"; };
  const std::string good = tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])");
  const std::string padded = safetensors_file(good + "  ", eight);
  CHECK(elements(padded, read(padded).tensors.at(0)) == eight);
  CHECK(read(safetensors_file("{}", "")).tensors.empty());
  CHECK(read(safetensors_file(tensor(R"("dtype":"F32","shape":[0,4],"data_offsets":[0,0])"), "")).tensors.size() == 1);

  const std::pair<std::string, std::string> headers[] = {
      {"{\"a\":", "expected '{'"},
      {"{\"a\":{}", "does not say of tensor \"a\""},
      {"{\"a\"  [", "expected ':'"},
      {good + "}", "expected the end of the header"},
      {"{\"a\":" + std::string(5000, '['), "expected '{'"},
      {tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0,8],)"), "expected '\"'"},
      {tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1)"), "once more, or besides"},
      {tensor(R"("dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8])"), "once more, or besides"},
      {tensor(R"("dtype":"Q4","shape":[2],"data_offsets":[0,8])"), "dtype \"Q4\", which is not known"},
      {tensor(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])"), "expected 12 bytes"},
      {tensor(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"), "expected a whole number"},
      {tensor(R"("dtype":"F32","shape":[02],"data_offsets":[0,8])"), "expected a whole number"},
      {tensor(R"("dtype":"F32","shape":[2.0],"data_offsets":[0,8])"), "expected ']'"},
      {tensor(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])"), "in bytes 8 to 0"},
      {tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0,8,8])"), "at most 2 numbers"},
      {tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0])"), "does not say"},
      {tensor(R"("dtype":"F32","shape":[4],"data_offsets":[0,16])"), "ends before tensor \"a\" does"},
      {tensor(R"("dtype":"F32","shape":[1],"data_offsets":[4,8])"), "where the one before ends"},
      {tensor(R"("dtype":"F32","shape":[1],"data_offsets":[0,4])"), "4 bytes that belong to no tensor"},
      {tensor(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8])"), "expected 0 bytes"},
      {tensor(R"("dtype":"F32","shape":[0,4294967296,4294967296],"data_offsets":[0,0])"), "by its dtype and shape"},
      {tensor(R"("dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,8])"), "below 2^63"},
      {tensor(R"("dtype":"U8","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],"data_offsets":[0,1])"), "at most 16"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
       "where the one before ends"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
       "two tensors \"a\""},
      {R"({"__metadata__":{},"__metadata__":{}})", "two __metadata__"},
      {R"({"__metadata__":{"a":"1","a":"2"}})", "two texts \"a\""},
      {R"({"__metadata__":{"a":1}})", "expected '\"'"},
      {R"({"__metadata__":{"a":"\ud800"}})", "second of two surrogates"},
      {R"({"__metadata__":{"a":"\udc00"}})", "first of two surrogates"},
      {R"({"__metadata__":{"a":"\u00g0"}})", "four hexadecimal digits"},
      {R"({"__metadata__":{"a":"\x"}})", "an escape that JSON has"},
      {R"({"__metadata__":{"a":")", "the end of a string"},
      {"{\"__metadata__\":{\"a\":\"\n\"}}", "no control character"},
      {"{\"__metadata__\":{\"a\":\"\xed\xa0\x80\"}}", "no UTF-8"},
      {"{\"__metadata__\":{\"a\":\"\xc0\xaf\"}}", "no UTF-8"},
      {"{\"__metadata__\":{\"a\":\"\xf4\x90\x80\x80\"}}", "no UTF-8"}};
  for (const auto& [header, part] : headers) check_error(safetensors_file(header, eight), "safetensors", part);
  check_error(little(100'000'001, 8) + std::string(100, '{'), "safetensors", "expected at most 100;");
  check_error(little(~std::uint64_t{0}, 8) + "{}", "safetensors", "expected at most 2");
}

TEST_CASE("other files are told by what they begin with") {
  check_error("", "format", "0 bytes");
  check_error("<!DOCTYPE html><html>", "format", "a web page");
  check_error(zip_file({{"word/document.xml", "x"}}), "format", "without a data.pkl");
  check_error(zip_file({{"a/data.pkl", pickled("}")}, {"a/byteorder", "big"}}), "format", "big-endian");
  const Error missing = error_of([] { weights::open_weights("no/such.file"); });
  CHECK((missing.id() == "headroom.weights.read" && contains(missing.what(), "no such file")));
  const TemporaryFolder folder;
  write_bytes(folder / "empty", "");
  for (const std::filesystem::path& path : {folder / "empty", folder.path()}) {
    CHECK(error_of([&] { weights::open_weights(path); }).id() == "headroom.weights.read");
  }
}

TEST_CASE("a zip archive that is damaged or not stored is refused") {
  const std::string object = pickle_dict({{"a", pickle_tensor({})}});
  const std::string good = torch_file(object);
  check_error(torch_file(object, {.method = 8}), "zip", "compressed or encrypted");
  check_error(torch_file(object, {.flags = 1}), "zip", "compressed or encrypted");
  check_error(torch_file(object, {.behind = std::string(70'000, 'x')}), "zip", "without the directory at its end");
  check_error(zip_file({{"a/data.pkl", ""}, {"a/data.pkl", ""}}), "zip", "two members \"a/data.pkl\"");
  const auto changed = [&](const std::string& before, std::size_t offset, const std::string& bytes) {
    std::string file = good;
    return file.replace(file.rfind(before) + offset, bytes.size(), bytes);
  };
  check_error(changed("PK\1\2", 42, little(0xfffffff0, 4)), "zip", "ends before byte 4294967280");
  check_error(changed("PK\1\2", 42, little(1, 4)), "zip", "no header of \"archive/version\"");
  check_error(changed("PK\1\2", 42, little(0, 4)), "zip", "something else at 0");
  check_error(changed("PK\1\2", 20, little(0x0ffffff0, 4) + little(0x0ffffff0, 4)), "zip", "ends within");
  check_error(changed("PK\5\6", 16, little(7, 4)), "zip", "something else in the place of its directory");
  check_error(changed("PK\5\6", 10, little(9, 2)), "zip", "something else in the place of its directory");
}

TEST_CASE("a pickle that does what no pickle may is refused") {
  const auto check_pickle = [](const std::string& object, const std::string& part) {
    check_error(torch_file(object), "pickle", part);
  };
  check_pickle("0", "takes more than it made");
  check_pickle("(0", "takes more than it made");
  check_pickle("N(0", "takes more than it made");
  check_pickle("", "takes more than it made");
  check_pickle("t", "mark that it did not set");
  check_pickle("h\5", "fetches value 5");
  check_pickle("i", "none of protocols 2 to 5");
  check_pickle("\x80\x09", "protocol above 5");
  check_pickle("X\xff\xff\xff\xff", "ends within the 4294967295 bytes");
  check_pickle("\x8d\xff\xff\xff\xff\xff\xff\xff\xff", "ends within");
  check_pickle("cposix", "ends within the line");
  check_pickle("}(Nu", "key without value");
  check_pickle("]NNs", "adds elements to what has none");
  check_pickle("N)R", "calls what is no function");
  check_pickle("NN\x93", "a name that is no text");
  check_pickle("NQ", "storage without description");
  check_pickle(")Q", "storage without type");
  check_pickle("ctorch._utils\n_rebuild_tensor_v2\n)R", "tensor without storage");
  check_pickle(pickle_tensor({.type = "QInt8Storage"}), "type \"QInt8Storage\", which is not read");
  check_pickle(pickle_tensor({.elements = -1}), "storage without type, key or size");
  check_pickle(std::string(5'000'000, ')'), "more than 4194304 instructions");
  for (const char* global : {"posix\nsystem\n", "os\npopen\n", "builtins\neval\n", "subprocess\nPopen\n"}) {
    check_pickle(std::string("c") + global + pickle_tuple({pickle_text("true")}) + "R", "do not open it with Python");
  }
  check_pickle(pickle_text("builtins") + pickle_text("exec") + "\x93", "\"builtins\" \"exec\"");
}

TEST_CASE("nesting of any depth, and a list within itself, is no burden") {
  const std::string deep = std::string(200'000, ']') + std::string(199'999, 'a');
  check_error(torch_file(deep), "state_dict", "does not hold a dict");
  const std::string in_itself = "]q\1h\1a0}q\2(" + pickle_text("model") + "h\2u";
  check_error(torch_file(in_itself), "state_dict", "no tensors");
}

TEST_CASE("what a checkpoint has beside its weights is read as JSON, fractions as numbers, classes as their names") {
  const auto members = [](const std::string& object, const std::vector<std::string>& names) {
    const std::string file = torch_file(object);
    return weights::read_torch_members({bytes_of_text(file), "weights.file"}, names).value_or("none");
  };
  const std::string fraction = "cfractions\nFraction\n";
  const std::string options = pickle_dict(
      {{"segment", fraction + pickle_tuple({pickle_text("39/5")}) + "R"},
       {"newer", fraction + pickle_tuple_of({39, 5}) + "R"},
       {"whole", fraction + pickle_tuple({pickle_text("-7")}) + "R"},
       {"broken", fraction + pickle_tuple({pickle_text("1/0")}) + "R"},
       {"list",
        pickle_tuple({"N", "\x88", pickle_integer(-3), "G\x3f\xe0" + std::string(6, '\0'), pickle_text("a\"b")})},
       {"class", "cdemucs.htdemucs\nHTDemucs\n"},
       {"object", "cargparse\nNamespace\n)R"},
       {"infinite", "G\x7f\xf0" + std::string(6, '\0')},
       {"tensor", pickle_tensor({})}});
  CHECK(members(pickle_dict({{"kwargs", options}, {"state", "}"}}), {"kwargs"}) ==
        R"({"kwargs":{"broken":"<fractions.Fraction>","class":"demucs.htdemucs.HTDemucs","infinite":null,)"
        R"("list":[null,true,-3,0.5,"a\"b"],"newer":7.8,"object":"<argparse.Namespace>","segment":7.8,)"
        R"("tensor":"<tensor>","whole":-7.0}})");
  const std::string keys = pickle_dict({{"a", pickle_integer(1)}, {"\xff", "N"}, {"a", pickle_text("\xff")}});
  CHECK(members(pickle_dict({{"kwargs", keys}}), {"kwargs"}) == R"({"kwargs":{"a":null}})");
  CHECK(members(pickle_dict({{"kwargs", "}"}}), {"klass", "kwargs"}) == "none");
  CHECK(members("]", {"kwargs"}) == "none");
  CHECK_FALSE(weights::read_torch_members({bytes_of_text("text"), "weights.file"}, {"kwargs"}).has_value());
  const auto refused = [&](const std::string& value) {
    return error_of([&] { members(pickle_dict({{"kwargs", value}}), {"kwargs"}); });
  };
  CHECK(contains(refused("]q\1h\1a").what(), "more than 16 deep"));
  CHECK(contains(refused("](" + std::string(100'000, 'N') + "e").what(), "more than 65536 items and bytes"));
  std::string repeated = "](" + pickle_text(std::string(10'000, '\xff')) + "q\1";
  for (int i = 0; i < 10; ++i) repeated += "h\1";
  CHECK(contains(refused(repeated + "e").what(), "more than 65536 items and bytes"));
  CHECK(refused("]q\1h\1a").id() == "headroom.weights.pickle");
}

TEST_CASE("a tensor that its storage does not hold is refused") {
  const auto check_tensor = [](const PickledTensor& tensor, const std::string& part) {
    check_error(torch_file(pickle_dict({{"layer.weight", pickle_tensor(tensor)}})), "tensor", part);
    check_error(torch_file(pickle_dict({{"layer.weight", pickle_tensor(tensor)}})), "tensor", "\"layer.weight\"");
  };
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  check_tensor({.offset = 1}, "beyond its storage of 6 elements");
  check_tensor({.offset = -1}, "beyond its storage");
  check_tensor({.offset = kMost}, "beyond its storage");
  check_tensor({.strides = {4, 1}}, "beyond its storage");
  check_tensor({.strides = {-3, 1}}, "beyond its storage");
  check_tensor({.strides = {kMost, kMost}}, "beyond its storage");
  check_tensor({.shape = {kMost, 3}, .strides = {0, 1}}, "impossible shape");
  check_tensor({.shape = {-2, 3}}, "impossible shape");
  check_tensor({.shape = {2}}, "other dimensions than strides");
  check_tensor({.shape = std::vector<std::int64_t>(17, 1)}, "more than 16 dimensions");
  check_tensor({.elements = 7}, "should have 7 elements under \"0\" and has 24 bytes");
  check_tensor({.elements = kMost}, "should have 9223372036854775807 elements");
  check_tensor({.type = "DoubleStorage"}, "has 24 bytes");
  check_tensor({.key = "../../etc/passwd"}, "which is not in the file");
  check_error(torch_file(pickle_dict({{"a", "ctorch._utils\n_rebuild_qtensor\n)R"}})), "tensor",
              "\"torch._utils._rebuild_qtensor\", which is not read");
}

TEST_CASE("what is no state dict is told with what is there") {
  check_error(read_bytes(kWeightFiles / "whole_model.pt"), "state_dict", "torch.nn.modules.container.Sequential");
  check_error(read_bytes(kWeightFiles / "list.pt"), "state_dict", "does not hold a dict");
  check_error(read_bytes(kWeightFiles / "no_tensors.pt"), "state_dict", "there are: \"epoch\", \"config\"");
  check_error(read_bytes(kWeightFiles / "sparse.pt"), "tensor", "_rebuild_sparse_tensor");
  check_error(read_bytes(kWeightFiles / "attack.pt"), "pickle", "\"posix\" \"system\"");
}

TEST_CASE("a file that ends early or has one wrong byte is refused, or read within its bounds") {
  for (const char* name : {"nested.ckpt", "layer.safetensors", "legacy.pt"}) {
    const std::string whole = read_bytes(kWeightFiles / name);
    for (std::size_t length = 0; length < whole.size(); length += 3) {
      CHECK_THROWS_AS(read(whole.substr(0, length)), Error);
    }
    for (std::size_t place = 0; place < whole.size(); place += 3) {
      std::string file = whole;
      file[place] = static_cast<char>(file[place] ^ (place % 2 == 0 ? 0x01 : 0xff));
      if (!is_read_or_refused(file)) FAIL(name << " with byte " << place << " changed");
    }
  }
}

TEST_CASE("a written safetensors file is in order, aligned, and replaces another when it is whole") {
  const TemporaryFolder folder;
  const auto path = folder / "a.safetensors";
  const std::vector<weights::TensorHeader> headers = {{"bytes", DType::u8, {3}},
                                                      {"z \"\n", DType::f64, {1}},
                                                      {"half", DType::bf16, {2, 1}},
                                                      {"none", DType::f32, {0, 9}}};
  const auto write = [&](std::size_t i, std::ostream& stream) {
    stream << std::string(*weights::data_bytes(headers[i].shape, weights::bytes_of(headers[i].dtype)),
                          static_cast<char>('a' + i));
  };
  weights::write_safetensors(path, headers, {{"format", "pt"}, {"who", "\u00fc"}}, write);
  const std::string file = read_bytes(path);
  const Contents contents = read(file);
  CHECK(file.ends_with("bbbbbbbbccccaaa"));
  CHECK((file.size() - 15) % 8 == 0);
  CHECK(contents.metadata.at("who") == "\u00fc");
  CHECK(contents.tensors.size() == 4);
  CHECK(contents.tensors[3].name == "z \"\n");
  CHECK(contents.tensors[1].shape == std::vector<std::int64_t>{2, 1});

  const auto fails = [&](const std::vector<weights::TensorHeader>& wrong, std::map<std::string, std::string> metadata) {
    return error_of([&] { weights::write_safetensors(path, wrong, metadata, write); }).id() == "headroom.weights.names";
  };
  CHECK(fails({{"a", DType::f32, {}}, {"a", DType::f32, {}}}, {}));
  CHECK(fails({{"__metadata__", DType::f32, {}}}, {}));
  CHECK(fails({{"\xff", DType::f32, {}}}, {}));
  CHECK(fails({}, {{"a", "\xff"}}));
  CHECK(read_bytes(path) == file);
  CHECK(error_of([&] { weights::write_safetensors(folder / "no/a", headers, {}, write); }).id() ==
        "headroom.weights.write");
}
