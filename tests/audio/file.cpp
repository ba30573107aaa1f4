#include "headroom/audio/file.hpp"

#include <sys/stat.h>

#include <cstring>
#include <thread>

#include "support/catch.hpp"
#include "support/files.hpp"

using namespace headroom;
using audio::AudioReader;
using audio::AudioWriter;
using audio::Encoding;
using testing::error_of;
using testing::TemporaryFolder;

namespace {

std::string bytes_of(std::initializer_list<int> bytes) { return {bytes.begin(), bytes.end()}; }

std::string bytes_of_floats(std::vector<float> values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)};
}

// The samples of a WAV file, after the header of the chunk "data".
std::string data_of(const std::string& wav) { return wav.substr(wav.find("data") + 8); }

}  // namespace

TEST_CASE("integer samples are read as fractions of full scale, one row a channel") {
  const TemporaryFolder folder;
  // frames (1, -32768), (16384, 32767), little-endian
  const std::string data = bytes_of({1, 0, 0, 0x80, 0, 0x40, 0xff, 0x7f});
  testing::write_bytes(folder / "a.wav", testing::wav_bytes(data, 2, 16, 1, 48000));
  AudioReader reader(folder / "a.wav");
  CHECK(reader.frames() == 2);
  CHECK(reader.channels() == 2);
  CHECK(reader.sample_rate() == 48000);
  const auto expected = torch::tensor({{1.f / 32768, 0.5f}, {-1.f, 32767.f / 32768}});
  CHECK(torch::equal(reader.read(100), expected));
  CHECK(reader.read(1).sizes() == torch::IntArrayRef{2, 0});

  testing::write_bytes(folder / "b.wav", testing::wav_bytes(bytes_of({1, 0, 0x80, 0, 0, 0x20}), 1, 24));
  CHECK(torch::equal(audio::read_audio(folder / "b.wav").samples, torch::tensor({{1.f / 8388608 - 1.f, 0.25f}})));
}

TEST_CASE("a reader reads on from any frame in pieces of any size") {
  const TemporaryFolder folder;
  const torch::Tensor samples = torch::rand({2, 150001});  // more than two internal blocks
  audio::write_audio(folder / "x.wav", samples, 44100);
  AudioReader reader(folder / "x.wav");
  std::vector<torch::Tensor> parts;
  for (const int n : {1, 70000, 70000, 70000}) {
    parts.push_back(reader.read(n));
  }
  CHECK(parts[3].size(1) == 10000);
  CHECK(torch::equal(torch::cat(parts, 1), samples));
  CHECK(reader.position() == 150001);
  reader.seek(123);
  CHECK(torch::equal(reader.read(7), samples.narrow(1, 123, 7)));
  CHECK(reader.position() == 130);
  const Error error = error_of([&] { reader.seek(150002); });
  CHECK(error.id() == "headroom.audio.file.position");
  CHECK_THAT(error.what(), Catch::Contains("150002") && Catch::Contains("x.wav"));
}

TEST_CASE("what is read from a file is written back bit by bit in the same encoding") {
  const TemporaryFolder folder;
  std::string all16, some24;
  for (int v = -32768; v <= 32767; ++v) {
    all16 += bytes_of({v & 0xff, v >> 8 & 0xff});
    some24 += bytes_of({v & 0xff, v >> 8 & 0xff, v / 258 & 0xff});
  }
  const std::string floats = bytes_of_floats({0.1f, -0.f, 1e-42f, 1.5f, -3e30f, 0.3333333f});
  const auto round_trip = [&](const std::string& data, int channels, int bits, int format, Encoding encoding) {
    testing::write_bytes(folder / "in.wav", testing::wav_bytes(data, channels, bits, format));
    const audio::Recording recording = audio::read_audio(folder / "in.wav");
    audio::write_audio(folder / "out.wav", recording.samples, recording.sample_rate, encoding);
    return testing::read_bytes(folder / "out.wav");
  };
  const std::string wav16 = round_trip(all16, 2, 16, 1, Encoding::pcm16);
  CHECK((wav16 == testing::wav_bytes(all16, 2, 16)));  // the header too
  CHECK((data_of(round_trip(some24, 1, 24, 1, Encoding::pcm24)) == some24));
  CHECK((data_of(round_trip(floats, 1, 32, 3, Encoding::float32)) == floats));
  CHECK(folder.names().size() == 2);
}

TEST_CASE("integer encodings round to nearest and clip, and the writer counts what it clipped") {
  const TemporaryFolder folder;
  const float step = 1.f / 32768;
  const auto samples = torch::tensor({{1.4f * step, 1.6f * step, -1.6f * step, 1.f, -1.f, 7.f, -1.5f}});
  AudioWriter writer(folder / "a.wav", {1, 44100, Encoding::pcm16}, 7);
  writer.write(samples);
  CHECK(writer.clipped() == 3);
  writer.close();
  const auto expected = torch::tensor({{1.f, 2.f, -2.f, 32767.f, -32768.f, 32767.f, -32768.f}}) * step;
  CHECK(torch::equal(audio::read_audio(folder / "a.wav").samples, expected));
}

TEST_CASE("a writer takes pieces of any floating dtype and layout, and equal samples make equal files") {
  const TemporaryFolder folder;
  const torch::Tensor samples = torch::randint(-100, 100, {2, 1000}).to(torch::kFloat) / 128;
  AudioWriter writer(folder / "a.wav", {2, 44100, Encoding::float32}, 1000);
  writer.write(samples.narrow(1, 0, 300).to(torch::kDouble));
  writer.write(samples.narrow(1, 300, 0));
  writer.write(samples.t().contiguous().t().narrow(1, 300, 700).set_requires_grad(true));
  CHECK(writer.written() == 1000);
  CHECK_FALSE(std::filesystem::exists(folder / "a.wav"));
  writer.close();
  audio::write_audio(folder / "b.wav", samples, 44100);
  CHECK((testing::read_bytes(folder / "a.wav") == testing::read_bytes(folder / "b.wav")));
  CHECK(torch::equal(audio::read_audio(folder / "a.wav").samples, samples));
  audio::write_audio(folder / "none.wav", torch::zeros({2, 0}), 44100);
  CHECK(data_of(testing::read_bytes(folder / "none.wav")).empty());
}

TEST_CASE("a file of more than 4 GiB is RF64, a smaller one is plain WAV") {
  const TemporaryFolder folder;
  std::error_code ignored;
  if (std::filesystem::space(folder.path(), ignored).available < (std::uintmax_t{5} << 30)) {
    WARN("skipped: needs 5 GiB of free disk for the writer to agree");
    return;
  }
  const auto magic = [&](std::int64_t frames) {
    AudioWriter writer(folder / "long.wav", {2, 44100, Encoding::float32}, frames);
    return testing::read_bytes(folder / folder.names().at(0)).substr(0, 4);  // the temporary file's header
  };
  CHECK(magic((std::int64_t{1} << 29) - 1000) == "RIFF");
  CHECK(magic((std::int64_t{1} << 29) + 1000) == "RF64");
  CHECK(folder.names().empty());
}

TEST_CASE("a writer that is not closed, fails, or gets too little leaves the old file and nothing else") {
  const TemporaryFolder folder;
  testing::write_bytes(folder / "a.wav", "precious");
  const torch::Tensor samples = torch::zeros({2, 100});
  const auto untouched = [&] {
    return testing::read_bytes(folder / "a.wav") == "precious" && folder.names() == std::vector<std::string>{"a.wav"};
  };
  {
    AudioWriter writer(folder / "a.wav", {}, 100);
    writer.write(samples);
    CHECK(folder.names().size() == 2);
    AudioWriter moved = std::move(writer);
    CHECK(folder.names().size() == 2);
  }
  CHECK(untouched());
  Error error = error_of([&] {
    AudioWriter writer(folder / "a.wav", {}, 101);
    writer.write(samples);
    writer.close();
  });
  CHECK(error.id() == "headroom.audio.file.incomplete");
  CHECK_THAT(error.what(), Catch::Contains("got 100 frames") && Catch::Contains("expected 101"));
  CHECK(untouched());
  error = error_of([&] { audio::write_audio(folder / "a.wav", samples.clone().fill_(NAN), 44100); });
  CHECK(error.id() == "headroom.audio.file.not_finite");
  CHECK(untouched());

  // Replacing a folder is refused by the system at the last moment.
  std::filesystem::create_directories(folder / "folder.wav/inside");
  error = error_of([&] { audio::write_audio(folder / "folder.wav", samples, 44100); });
  CHECK(error.id() == "headroom.audio.file.write");
  CHECK_THAT(error.what(), Catch::Contains("folder.wav"));
  CHECK(folder.names().size() == 2);

  AudioWriter closed(folder / "b.wav", {}, 100);
  closed.write(samples);
  closed.close();
  error = error_of([&] { closed.write(samples); });
  CHECK(error.id() == "headroom.audio.file.samples");
  CHECK_THAT(error.what(), Catch::Contains("closed"));
  CHECK(error_of([&] { closed.close(); }).id() == "headroom.audio.file.samples");
}

TEST_CASE("FLAC keeps every bit of integers, has its limits, and is whole or not at all on a full disk") {
  const TemporaryFolder folder;
  for (const auto& [encoding, steps] : {std::pair{Encoding::flac16, 32768}, {Encoding::flac24, 8388608}}) {
    const torch::Tensor samples = torch::randint(-steps, steps, {3, 100000}).to(torch::kFloat) / steps;
    audio::write_audio(folder / "a.flac", samples, 96000, encoding);
    const audio::Recording back = audio::read_audio(folder / "a.flac");
    CHECK(back.sample_rate == 96000);
    CHECK(torch::equal(back.samples, samples));
    const std::string bytes = testing::read_bytes(folder / "a.flac");
    CHECK(bytes.substr(0, 4) == "fLaC");
    audio::write_audio(folder / "a.flac", samples, 96000, encoding);
    CHECK((testing::read_bytes(folder / "a.flac") == bytes));

    std::vector<std::string> ids;
    {  // from the header alone to all but the last bytes, which libsndfile writes when it closes the file
      for (const std::size_t limit : {std::size_t{30}, std::size_t{100000}, bytes.size() - 1}) {
        const testing::FileSizeLimit few(limit);
        const Error error = error_of([&] { audio::write_audio(folder / "a.flac", samples, 96000, encoding); });
        ids.push_back(error.id());
      }
    }
    CHECK(ids == std::vector<std::string>(3, "headroom.audio.file.write"));
    CHECK((testing::read_bytes(folder / "a.flac") == bytes));
    CHECK(folder.names().size() == 1);
  }
  AudioWriter writer(folder / "b.flac", {1, 44100, Encoding::flac16}, 3);
  writer.write(torch::tensor({{2.f, -2.f, 0.5f}}));
  CHECK(writer.clipped() == 2);
  writer.close();
  const Error error = error_of([&] { AudioWriter(folder / "c.flac", {9, 44100, Encoding::flac16}, 1); });
  CHECK(error.id() == "headroom.audio.file.options");
  CHECK_THAT(error.what(), Catch::Contains("with 9 channels, expected at most 8 in FLAC"));
}

TEST_CASE("a disk that fills up while writing is an error that names the file, and leaves no temporary file") {
  const TemporaryFolder folder;
  testing::write_bytes(folder / "a.wav", "precious");
  std::vector<Error> errors;
  {
    const testing::FileSizeLimit limit(100'000);
    for (const auto encoding : {Encoding::float32, Encoding::pcm16}) {
      for (const std::int64_t frames : {12500 - 5, 200000}) {  // the header alone does not fit, or nearly nothing does
        const std::int64_t n = encoding == Encoding::pcm16 ? 2 * frames : frames;
        errors.push_back(error_of([&] {
          audio::write_audio(folder / "a.wav", torch::zeros({2, n}), 44100, encoding);
        }));
      }
    }
  }
  for (const Error& error : errors) {
    CHECK(error.id() == "headroom.audio.file.write");
    CHECK_THAT(error.what(), Catch::Contains("a.wav") && Catch::Contains("room on the disk"));
  }
  CHECK(folder.names() == std::vector<std::string>{"a.wav"});
  CHECK(testing::read_bytes(folder / "a.wav") == "precious");

  const Error error = error_of([&] { AudioWriter(folder / "a.wav", {}, std::int64_t{1} << 55); });
  CHECK(error.id() == "headroom.audio.file.full");
  CHECK_THAT(error.what(), Catch::Contains("needs 288230376151711744 bytes") && Catch::Contains("free some room"));
  CHECK(folder.names() == std::vector<std::string>{"a.wav"});
}

TEST_CASE("the writer refuses shapes, dtypes and folders that can't be right") {
  const TemporaryFolder folder;
  AudioWriter writer(folder / "a.wav", {2, 44100, Encoding::float32}, 10);
  for (const torch::Tensor& samples :
       {torch::zeros({1, 5}), torch::zeros({10}), torch::zeros({2, 5}, torch::kInt), torch::zeros({2, 11})}) {
    CHECK(error_of([&] { writer.write(samples); }).id() == "headroom.audio.file.samples");
  }
  CHECK(writer.written() == 0);
  const Error error = error_of([&] { AudioWriter(folder / "no/such/a.wav", {}, 1); });
  CHECK(error.id() == "headroom.audio.file.write");
  CHECK_THAT(error.what(), Catch::Contains("no/such\"; create it first"));
  CHECK(error_of([&] { AudioWriter(folder / "b.wav", {.channels = 0}, 1); }).id() == "headroom.audio.file.options");
  CHECK(error_of([&] { audio::write_audio(folder / "b.wav", torch::zeros({4}), 1); }).id() ==
        "headroom.audio.file.samples");
}

TEST_CASE("the reader says what is wrong with a file, and where") {
  const TemporaryFolder folder;
  const auto error_reading = [&](const std::string& bytes) {
    testing::write_bytes(folder / "a.wav", bytes);
    const Error error = error_of([&] { audio::read_audio(folder / "a.wav"); });
    CHECK_THAT(error.what(), Catch::Contains("a.wav"));
    return error;
  };
  CHECK(error_of([&] { AudioReader(folder / "none.wav"); }).id() == "headroom.audio.file.missing");
  const Error is_folder = error_of([&] { AudioReader(folder.path()); });
  CHECK(is_folder.id() == "headroom.audio.file.missing");
  CHECK_THAT(is_folder.what(), Catch::Contains("it is a folder"));
  CHECK_THAT(error_of([&] { AudioReader("/dev/null"); }).what(), Catch::Contains("it is a device"));
  CHECK(error_reading("").id() == "headroom.audio.file.empty");
  CHECK(error_reading(testing::wav_bytes("", 2, 16)).id() == "headroom.audio.file.empty");
  CHECK(error_reading("<html>not found</html>").id() == "headroom.audio.file.format");

  const std::string whole = testing::wav_bytes(std::string(4000, 'x'), 2, 16);
  const Error truncated = error_reading(whole.substr(0, 2000));
  CHECK(truncated.id() == "headroom.audio.file.truncated");
  CHECK_THAT(truncated.what(), Catch::Contains("has 2000 bytes, its header says 4044"));
  std::string piped = whole;
  piped.replace(4, 4, 4, '\xff').replace(40, 4, 4, '\xff');  // as ffmpeg leaves it in a pipe
  testing::write_bytes(folder / "piped.wav", piped);
  CHECK(AudioReader(folder / "piped.wav").frames() == 1000);

  std::vector<float> values(2 * 100000, 0.5f);
  values[2 * 88200 + 1] = std::numeric_limits<float>::quiet_NaN();
  Error error = error_reading(testing::wav_bytes(bytes_of_floats(values), 2, 32, 3));
  CHECK(error.id() == "headroom.audio.file.not_finite");
  CHECK_THAT(error.what(), Catch::Contains("frame 88200 (2 s), channel 1"));
  values[3] = -std::numeric_limits<float>::infinity();
  error = error_reading(testing::wav_bytes(bytes_of_floats(values), 2, 32, 3));
  CHECK_THAT(error.what(), Catch::Contains("frame 1 (") && Catch::Contains("channel 1"));
}

namespace {

// 10001 frames of 16 bits and one channel, written by libsndfile in one of its formats.
std::string bytes_in_format(const TemporaryFolder& folder, int format, const torch::Tensor& samples) {
  SF_INFO info{};
  info.channels = 1;
  info.samplerate = 48000;
  info.format = format;
  const std::string path = (folder / "made").string();
  SNDFILE* file = sf_open(path.c_str(), SFM_WRITE, &info);
  REQUIRE(file != nullptr);
  sf_writef_float(file, samples.contiguous().data_ptr<float>(), samples.numel());
  sf_close(file);
  return testing::read_bytes(path);
}

}  // namespace

TEST_CASE("a file of any kind that is cut is refused, one that is whole is read") {
  const TemporaryFolder folder;
  const torch::Tensor samples = torch::arange(10001).remainder(1000) / 1024.;  // [T]
  constexpr int k16 = SF_FORMAT_PCM_16;
  for (const int format : {SF_FORMAT_WAV | k16, SF_FORMAT_WAVEX | SF_FORMAT_PCM_24, SF_ENDIAN_BIG | SF_FORMAT_WAV | k16,
                           SF_FORMAT_RF64 | k16, SF_FORMAT_W64 | k16, SF_FORMAT_AIFF | k16, SF_FORMAT_AU | k16,
                           SF_FORMAT_CAF | k16, SF_FORMAT_FLAC | k16, SF_FORMAT_OGG | SF_FORMAT_VORBIS}) {
    INFO(std::hex << format);
    const std::string whole = bytes_in_format(folder, format, samples);
    testing::write_bytes(folder / "a", whole);
    CHECK(audio::read_audio(folder / "a").samples.size(1) == 10001);
    for (const double share : {0.5, 0.999}) {
      testing::write_bytes(folder / "a", whole.substr(0, static_cast<std::size_t>(share * whole.size())));
      const Error error = error_of([&] { audio::read_audio(folder / "a"); });
      CHECK(error.id() == "headroom.audio.file.truncated");
    }
    testing::write_bytes(folder / "a", whole + "TAG" + std::string(125, ' '));  // as taggers append to anything
    const int kind = format & SF_FORMAT_TYPEMASK;
    if (kind == SF_FORMAT_W64 || kind == SF_FORMAT_OGG) {  // libsndfile would take the tag for sound
      CHECK(error_of([&] { AudioReader(folder / "a"); }).id() == "headroom.audio.file.length");
    } else {
      CHECK(audio::read_audio(folder / "a").samples.size(1) == 10001);
    }
  }
  const std::string voc = bytes_in_format(folder, SF_FORMAT_VOC | k16, samples);
  testing::write_bytes(folder / "a", voc.substr(0, voc.size() / 2));
  CHECK_THAT(error_of([&] { AudioReader(folder / "a"); }).what(),
             Catch::Contains("does not tell when its end is missing"));
}

TEST_CASE("files behind each other in one are refused: libsndfile reads the first") {
  const TemporaryFolder folder;
  const torch::Tensor samples = torch::rand({480000}) - 0.5;  // noise, so that compressed files are large, too
  constexpr int kMp3 = 0x230000 | 0x82;                       // SF_FORMAT_MPEG_LAYER_III, since libsndfile 1.1
  constexpr int k16 = SF_FORMAT_PCM_16;
  for (const int format : {SF_FORMAT_WAV | k16, SF_ENDIAN_BIG | SF_FORMAT_WAV | k16, SF_FORMAT_RF64 | k16,
                           SF_FORMAT_W64 | k16, SF_FORMAT_AIFF | k16, SF_FORMAT_AU | k16, SF_FORMAT_CAF | k16,
                           SF_FORMAT_FLAC | k16, SF_FORMAT_OGG | SF_FORMAT_VORBIS, kMp3}) {
    INFO(std::hex << format);
    const std::string whole = bytes_in_format(folder, format, samples);
    testing::write_bytes(folder / "a", whole);
    const std::int64_t frames = AudioReader(folder / "a").frames();
    CHECK(frames >= 480000);
    testing::write_bytes(folder / "a", whole + whole);
    CHECK(error_of([&] { AudioReader(folder / "a"); }).id() == "headroom.audio.file.length");
  }
}

TEST_CASE("what follows the last frame of a FLAC stream is a tag, too little to matter, or refused") {
  const TemporaryFolder folder;
  const torch::Tensor samples = torch::rand({480000}) - 0.5;
  const std::string whole = bytes_in_format(folder, SF_FORMAT_FLAC | SF_FORMAT_PCM_16, samples);
  const std::string junk(100'000, 'x'), zeros(100'000, '\0');
  for (const std::string& behind : {junk, zeros, whole.substr(whole.size() / 2), whole.substr(2000)}) {
    testing::write_bytes(folder / "a", whole + behind);
    const Error error = error_of([&] { AudioReader(folder / "a"); });
    CHECK(error.id() == "headroom.audio.file.length");
  }
  for (const std::string& behind : {std::string(), "APETAGEX" + junk, "ID3" + zeros, junk.substr(0, 40'000)}) {
    testing::write_bytes(folder / "a", whole + behind);
    CHECK(AudioReader(folder / "a").frames() == 480000);
  }
  // One frame, whose number takes one byte; and one so short that it says so itself
  for (const std::int64_t frames : {4096, 100, 1}) {
    const std::string small = bytes_in_format(folder, SF_FORMAT_FLAC | SF_FORMAT_PCM_16, samples.narrow(0, 0, frames));
    testing::write_bytes(folder / "a", small);
    CHECK(AudioReader(folder / "a").frames() == frames);
    testing::write_bytes(folder / "a", small + junk);
    CHECK(error_of([&] { AudioReader(folder / "a"); }).id() == "headroom.audio.file.length");
  }
}

TEST_CASE("an Ogg file with a page that is damaged or missing is refused, wherever it is") {
  const TemporaryFolder folder;
  const std::string whole = bytes_in_format(folder, SF_FORMAT_OGG | SF_FORMAT_VORBIS, torch::rand({200000}) - 0.5);
  std::vector<std::size_t> pages;
  for (std::size_t at = whole.find("OggS"); at != whole.npos; at = whole.find("OggS", at + 4)) pages.push_back(at);
  REQUIRE(pages.size() > 5);
  const std::size_t end = pages.size() - 2;
  for (const std::size_t page : {std::size_t{2}, std::size_t{3}, end}) {
    std::string flipped = whole;
    flipped[(pages[page] + pages[page + 1]) / 2] ^= 1;
    testing::write_bytes(folder / "a", flipped);
    const Error error = error_of([&] { AudioReader(folder / "a"); });
    CHECK(error.id() == "headroom.audio.file.damaged");
    CHECK_THAT(error.what(), Catch::Contains("at byte " + std::to_string(pages[page]) + " "));
    testing::write_bytes(folder / "a", whole.substr(0, pages[page]) + whole.substr(pages[page + 1]));
    CHECK(error_of([&] { AudioReader(folder / "a"); }).id() == "headroom.audio.file.damaged");
  }
}

TEST_CASE("sizes that the header does not know or that are wrong are read whole or refused") {
  const TemporaryFolder folder;
  const std::string whole = testing::wav_bytes(std::string(200000, 'x'), 2, 16);
  const auto with_sizes = [&](const std::string& riff, const std::string& data) {
    std::string bytes = whole;
    testing::write_bytes(folder / "a.wav", bytes.replace(4, 4, riff).replace(40, 4, data));
    return AudioReader(folder / "a.wav").frames();
  };
  const std::string zero(4, '\0'), all(4, '\xff'), sox = bytes_of({0, 0xf0, 0xff, 0x7f});
  CHECK(with_sizes(all, all) == 50000);                                 // ffmpeg into a pipe
  CHECK(with_sizes(bytes_of({0x24, 0xf0, 0xff, 0x7f}), sox) == 50000);  // sox into a pipe
  CHECK(with_sizes(whole.substr(4, 4), sox) == 50000);
  // Never finished; libsndfile may know what to do
  Error unfinished("", "");
  std::int64_t frames = 50000;
  try {
    frames = with_sizes(zero, zero);
  } catch (const Error& error) {
    unfinished = error;
  }
  CHECK((frames == 50000 && (unfinished.id().empty() || unfinished.id() == "headroom.audio.file.length")));
  CHECK(error_of([&] {
          with_sizes(whole.substr(4, 4), bytes_of({0, 0, 0x10, 0}));
        }).id() == "headroom.audio.file.truncated");  // more samples than the file has
  CHECK(error_of([&] { with_sizes(whole.substr(4, 4), bytes_of({0, 1, 0, 0})); }).id() == "headroom.audio.file.length");

  // 6.7 h whose sizes of 32 bits began again at 0: no disk is needed for what is not written
  testing::write_bytes(folder / "a.wav", testing::wav_bytes(std::string(40000, 'x'), 2, 16));
  std::filesystem::resize_file(folder / "a.wav", (std::uintmax_t{1} << 32) + 40044);
  const Error wrapped = error_of([&] { AudioReader(folder / "a.wav"); });
  CHECK(wrapped.id() == "headroom.audio.file.length");
  CHECK_THAT(wrapped.what(), Catch::Contains("has 4295007340 bytes, its header speaks of 40044"));
}

TEST_CASE("the first bytes of a file alone are no audio, whatever they begin as") {
  const TemporaryFolder folder;
  for (const char* name : {"RIFF", "RIFX", "RF64", "BW64", "riff\x2e\x91\xcf\x11", "FORM", ".snd", "dns.", "caff",
                           "OggS", "fLaC", "ID3", "\xff\xfb"}) {
    for (std::size_t size = 4; size <= 64; ++size) {
      std::string bytes = name;
      bytes.resize(size, '\1');
      testing::write_bytes(folder / "a", bytes);
      const Error error = error_of([&] { AudioReader(folder / "a"); });
      INFO(name << ", " << size << " bytes: " << error.what());
      CHECK(audio::is_file_error(error));
    }
  }
}

TEST_CASE("a FLAC frame of a block size that is reserved is not the last one") {
  const audio::detail::FlacStream stream{.block = 4096, .frame_bytes = 100, .total = 4096};
  // Number 0, 4096 samples as code 12, and the checksum
  std::string frame = bytes_of({0xff, 0xf8, 0xc9, 0x18, 0});
  frame += static_cast<char>(audio::detail::flac_header_checksum(frame));
  CHECK(audio::detail::is_last_flac_frame(frame, stream));
  frame[2] = 0x09;
  frame.back() = static_cast<char>(audio::detail::flac_header_checksum(std::string_view(frame).substr(0, 5)));
  CHECK_FALSE(audio::detail::is_last_flac_frame(frame, stream));
}

TEST_CASE("what FLAC's metadata say of their length is believed once it is there") {
  const TemporaryFolder folder;
  const std::string whole = bytes_in_format(folder, SF_FORMAT_FLAC | SF_FORMAT_PCM_16, torch::zeros({1, 5000}));
  const std::string number = bytes_of({0, 0, 0, 3}), little = bytes_of({3, 0, 0, 0});
  const auto file_with = [&](char type, const std::string& content, char size_above = 0) {
    constexpr size_t kFirstBlocks = 42;  // the name and STREAMINFO
    const std::string header{type, size_above, '\0', static_cast<char>(content.size())};
    testing::write_bytes(folder / "a.flac",
                         whole.substr(0, kFirstBlocks) + header + content + whole.substr(kFirstBlocks));
    return (folder / "a.flac").string();
  };
  const auto picture = [&](const std::string& kind, const std::string& data) {
    return number + kind + "png" + number + "abc" + std::string(16, '\0') + data + "xyz";
  };
  CHECK(audio::AudioReader(file_with(6, picture(number, number))).frames() == 5000);
  const std::string huge = bytes_of({6, 6, 6, 0});  // 96 MiB
  for (const std::string& file : {picture(huge, number), picture(number, huge)}) {
    const Error error = error_of([&] { audio::AudioReader(file_with(6, file)); });
    CHECK(error.id() == "headroom.audio.file.truncated");
  }
  for (const std::string& tags : {little + "abc" + huge, huge, little + "abc" + bytes_of({1, 0, 0, 0}) + huge}) {
    const Error error = error_of([&] { audio::AudioReader(file_with(4, tags)); });
    CHECK(error.id() == "headroom.audio.file.truncated");
  }
  const Error error = error_of([&] { audio::AudioReader(file_with(1, "padding", 100)); });
  CHECK(error.id() == "headroom.audio.file.truncated");
}

TEST_CASE("tags in front of a file, which libsndfile passes over, hide nothing of what is wrong with it") {
  const TemporaryFolder folder;
  const std::string tag = "ID3" + bytes_of({3, 0, 0, 0, 0, 1, 72}) + std::string(200, '\0');
  const auto reader_of = [&](const std::string& bytes) {
    testing::write_bytes(folder / "a", tag + tag + bytes);
    return AudioReader(folder / "a");
  };
  const torch::Tensor samples = torch::rand({480000}) - 0.5;
  for (const int format : {SF_FORMAT_WAV, SF_FORMAT_AIFF, SF_FORMAT_AU, SF_FORMAT_FLAC}) {
    INFO(std::hex << format);
    const std::string whole = bytes_in_format(folder, format | SF_FORMAT_PCM_16, samples);
    CHECK(reader_of(whole).frames() == 480000);
    CHECK(error_of([&] { reader_of(whole + whole); }).id() == "headroom.audio.file.length");
    if (format == SF_FORMAT_FLAC) continue;  // whose reader sees the end come too soon
    const Error cut = error_of([&] { reader_of(whole.substr(0, whole.size() / 2)); });
    CHECK(cut.id() == "headroom.audio.file.truncated");
    CHECK_THAT(cut.what(), Catch::Contains("its header says " + std::to_string(2 * tag.size() + whole.size())));
  }
  std::string flac = bytes_in_format(folder, SF_FORMAT_FLAC | SF_FORMAT_PCM_16, samples);
  flac.insert(42, bytes_of({6, 0, 0, 8, 0, 0, 0, 3, 6, 6, 6, 0}));  // a picture of 96 MiB
  CHECK(error_of([&] { reader_of(flac); }).id() == "headroom.audio.file.truncated");
}

TEST_CASE("a file can come out of a pipe") {
  const TemporaryFolder folder;
  const std::string pipe = (folder / "pipe").string(), wav = testing::wav_bytes(std::string(400000, 'x'), 2, 16);
  REQUIRE(mkfifo(pipe.c_str(), 0600) == 0);
  std::thread writer([&] { testing::write_bytes(pipe, wav); });
  CHECK(audio::read_audio(pipe).samples.size(1) == 100000);
  writer.join();
  const Error error = error_of([&] { AudioReader reader(pipe); });
  CHECK_THAT(error.what(), Catch::Contains("it is a pipe that nobody writes to"));
  const testing::TemporaryFilesIn nowhere(folder / "none");
  CHECK_THAT(error_of([&] { AudioReader reader(pipe); }).what(),
             Catch::Contains("its copy in the folder for temporary files: No such file or directory"));
}

TEST_CASE("a FLAC file is read like WAV, and one that ends early is refused") {
  const TemporaryFolder folder;
  SF_INFO info{};
  info.channels = 1;
  info.samplerate = 22050;
  info.format = SF_FORMAT_FLAC | SF_FORMAT_PCM_16;
  const torch::Tensor samples = torch::randint(-32768, 32767, {1, 50000}).to(torch::kFloat) / 32768;
  SNDFILE* flac = sf_open((folder / "a.flac").string().c_str(), SFM_WRITE, &info);
  REQUIRE(flac != nullptr);
  std::vector<short> values(50000);
  for (int i = 0; i < 50000; ++i) {
    values[i] = static_cast<short>(samples[0][i].item<float>() * 32768);
  }
  sf_writef_short(flac, values.data(), 50000);
  sf_close(flac);
  const audio::Recording recording = audio::read_audio(folder / "a.flac");
  CHECK(recording.sample_rate == 22050);
  CHECK(torch::equal(recording.samples, samples));
  const Error rate = error_of([&] { audio::require_sample_rate(AudioReader(folder / "a.flac"), 44100); });
  CHECK(rate.id() == "headroom.audio.file.sample_rate");
  CHECK_THAT(rate.what(), Catch::Contains("has 22050 Hz, expected 44100; convert it: sox INPUT -r 44100 OUTPUT.wav"));

  const std::string bytes = testing::read_bytes(folder / "a.flac");
  testing::write_bytes(folder / "b.flac", bytes.substr(0, bytes.size() / 2));
  const Error error = error_of([&] { audio::read_audio(folder / "b.flac"); });
  CHECK(error.id() == "headroom.audio.file.truncated");
  CHECK_THAT(error.what(), Catch::Contains("b.flac") && Catch::Contains("its header says 50000"));
}
