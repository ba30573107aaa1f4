#include "headroom/training/dataset.hpp"

#include <array>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <map>
#include <set>
#include <sstream>

#include "headroom/audio/file.hpp"
#include "headroom/audio/resampler.hpp"
#include "headroom/training/statistics.hpp"
#include "support/catch.hpp"
#include "support/files.hpp"

using namespace headroom;
using testing::error_of;
using testing::TemporaryFolder;
using training::Dataset;
using training::DatasetOptions;
using training::Example;

namespace {

const training::AugmentationOptions kPlain = {.gain = {1, 1}, .swap_channels = false, .flip_polarity = false};

const std::vector<std::string> kStems = {"vocals", "drums", "bass", "other"};

// Every sample of the data set is a different number that tells where it is, exact in float.
float code(int track, int stem, int channel, int frame) {
  return static_cast<float>(((track * 5 + stem) * 2 + channel) * 1000 + frame + 1);
}

struct Place {
  int track, stem, channel, frame;
};

Place decode(float value) {
  const int v = static_cast<int>(std::lround(value)) - 1;
  return {v / 10000, v / 2000 % 5, v / 1000 % 2, v % 1000};
}

// Tracks "0", "1", … of the given lengths; "stem" 4 is the mixture, which isn't the sum, like in decoded MUSDB18.
void make_tracks(const TemporaryFolder& folder, const std::vector<int>& lengths) {
  for (int track = 0; track < static_cast<int>(lengths.size()); ++track) {
    const auto path = folder / std::to_string(track);
    std::filesystem::create_directories(path);
    for (int stem = 0; stem < 5; ++stem) {
      const auto ramp = torch::arange(lengths[track], torch::kFloat);
      audio::write_audio(path / ((stem == 4 ? "mixture" : kStems[stem]) + ".wav"),
                         torch::stack({ramp + code(track, stem, 0, 0), ramp + code(track, stem, 1, 0)}), 44100);
    }
  }
}

// Where the stems, and the mixture where it is a file of its own, come from.
std::string origin_of(const Example& example) {
  const torch::Tensor all = torch::cat({example.stems, example.mixture.unsqueeze(0)});  // [5,2,S]
  std::ostringstream text;
  for (int stem = 0; stem < 5; ++stem) {
    const Place place = decode(all[stem][0][0].item<float>());
    const bool is_sum = all[4].equal(all.narrow(0, 0, 4).sum(0));
    if (stem == 4 && is_sum) break;
    text << (stem > 0 ? ", " : "") << (stem == 4 ? "mixture" : kStems[stem]) << " of " << place.track << " from "
         << place.frame / 44100.0 << " s";
  }
  return text.str();
}

std::set<std::string> different(const std::vector<Example>& examples) {
  std::set<std::string> values;
  for (const Example& e : examples) {
    values.insert(std::string(static_cast<const char*>(e.stems.contiguous().data_ptr()), e.stems.nbytes()));
  }
  return values;
}

}  // namespace

TEST_CASE("SplitMix64 gives the published numbers") {
  training::SplitMix64 random(1234567);
  CHECK(random.next() == 6457827717110365317u);
  CHECK(random.next() == 3203168211198807973u);
  CHECK(random.next() == 9817491932198370423u);
}

TEST_CASE("an example that is not remixed is the same segment of all files of a track") {
  const TemporaryFolder folder;
  make_tracks(folder, {20, 40, 30});
  testing::write_bytes(folder / "README", "not a track");
  std::filesystem::create_directories(folder / ".cache");
  const Dataset dataset(folder.path(), {.segment_length = 11});
  CHECK(dataset.size() == 3);
  CHECK(dataset.names() == std::vector<std::string>{"0", "1", "2"});
  std::map<int, std::set<int>> frames;
  for (int i = 0; i < 400; ++i) {
    const Example example = dataset.example(1, i);
    REQUIRE(example.mixture.sizes() == torch::IntArrayRef({2, 11}));
    REQUIRE(example.stems.sizes() == torch::IntArrayRef({4, 2, 11}));
    const Place place = decode(example.mixture[0][0].item<float>());
    const torch::Tensor all = torch::cat({example.stems, example.mixture.unsqueeze(0)});  // [5,2,11]
    for (int stem = 0; stem < 5; ++stem) {
      for (int channel = 0; channel < 2; ++channel) {
        const auto expected = torch::arange(11, torch::kFloat) + code(place.track, stem, channel, place.frame);
        REQUIRE(torch::equal(all[stem][channel], expected));
      }
    }
    frames[place.track].insert(place.frame);
    if (i < 20) CHECK(dataset.origin(1, i) == origin_of(example));
  }
  // Every position is drawn, from the first to the last.
  CHECK(frames[0].size() == 10);
  CHECK(frames[1].size() == 30);
  CHECK(frames[2].size() == 20);
}

TEST_CASE("the accompaniment is in the mixture and among no stems") {
  const TemporaryFolder folder;
  make_tracks(folder, {50, 50});
  for (const double remix : {0.0, 1.0}) {
    const Dataset all(folder.path(), {.segment_length = 5, .remix = remix});
    const Dataset two(
        folder.path(),
        {.segment_length = 5, .stems = {"vocals", "drums"}, .accompaniment = {"bass", "other"}, .remix = remix});
    for (int i = 0; i < 20; ++i) {
      const Example expected = all.example(1, i), found = two.example(1, i);
      CHECK(torch::equal(found.mixture, expected.mixture));
      CHECK(torch::equal(found.stems, expected.stems.narrow(0, 0, 2)));
    }
  }
  std::filesystem::remove(folder / "1/other.wav");
  const auto wanted = [&] {
    Dataset(folder.path(), {.segment_length = 5, .stems = {"bass"}, .accompaniment = {"other"}});
  };
  CHECK(error_of(wanted).id() == "headroom.training.dataset.missing");
}

TEST_CASE("a remixed example takes each stem from its own track and position, with gain, swap and polarity") {
  const TemporaryFolder folder;
  make_tracks(folder, {50, 50, 50});
  const Dataset dataset(folder.path(), {.segment_length = 5, .remix = 1, .augmentation = {.gain = {0.5, 2}}});
  const int count = 500;
  std::map<std::pair<int, int>, int> pairs;
  int swapped = 0, flipped = 0, same_frame = 0;
  double least = 1e9, greatest = 0, sum = 0;
  for (int i = 0; i < count; ++i) {
    const Example example = dataset.example(3, i);
    REQUIRE(torch::equal(example.mixture, example.stems.sum(0)));
    std::array<Place, 4> places{};
    for (int stem = 0; stem < 4; ++stem) {
      const torch::Tensor samples = example.stems[stem];  // [2,5]
      // The ramp rises by the gain a sample.
      const double gain = ((samples[0][4] - samples[0][0]) / 4).item<double>();
      const double other = ((samples[1][4] - samples[1][0]) / 4).item<double>();
      REQUIRE(other == Approx(gain).epsilon(1e-2));
      const double difference = (samples[1][0] - samples[0][0]).item<double>();  // ± 1000 · gain
      const double exact = std::copysign(std::abs(difference) / 1000, gain);
      const Place first = decode(static_cast<float>(samples[0][0].item<double>() / exact));
      const Place second = decode(static_cast<float>(samples[1][0].item<double>() / exact));
      REQUIRE(first.stem == stem);
      REQUIRE(second.stem == stem);
      REQUIRE(first.track == second.track);
      REQUIRE(first.frame == second.frame);
      REQUIRE(first.frame <= 45);
      REQUIRE(first.channel + second.channel == 1);
      places[stem] = first;
      swapped += first.channel;
      flipped += exact < 0;
      least = std::min(least, std::abs(exact));
      greatest = std::max(greatest, std::abs(exact));
      sum += std::abs(exact);
    }
    ++pairs[{places[0].track, places[1].track}];
    same_frame += places[0].frame == places[1].frame;
  }
  CHECK(std::abs(swapped - 2 * count) < 5 * std::sqrt(count));  // 5 standard deviations of a coin
  CHECK(std::abs(flipped - 2 * count) < 5 * std::sqrt(count));
  CHECK(least >= Approx(0.5));
  CHECK(least < 0.51);
  CHECK(greatest <= Approx(2));
  CHECK(greatest > 1.99);
  CHECK(sum / (4 * count) == Approx(1.25).margin(0.05));
  REQUIRE(pairs.size() == 9);  // vocals and drums of any two tracks, all equally often
  for (const auto& [tracks, times] : pairs) {
    CHECK(std::abs(times - count / 9) < 5 * 7);
  }
  CHECK(same_frame < count / 10);  // 1 in 46

  const Dataset plain(folder.path(), {.segment_length = 5, .remix = 1, .augmentation = kPlain});
  for (int i = 0; i < 20; ++i) {
    const torch::Tensor stems = plain.example(3, i).stems;
    for (int stem = 0; stem < 4; ++stem) {
      const Place place = decode(stems[stem][1][0].item<float>());
      CHECK(place.channel == 1);
      CHECK(stems[stem][0][2].item<float>() == code(place.track, stem, 0, place.frame + 2));
    }
  }
}

TEST_CASE("an aligned example is changed where that is wanted: each stem by itself, the rest of the mixture not") {
  const TemporaryFolder folder;
  make_tracks(folder, {50, 50});
  const Dataset plain(folder.path(), {.segment_length = 5, .remix = 0.5, .augmentation = {.gain = {0.5, 2}}});
  DatasetOptions options = plain.options();
  options.augment_aligned = true;
  const Dataset dataset(folder.path(), options);
  std::set<std::string> changes;
  int aligned = 0;
  for (int i = 0; i < 60; ++i) {
    const Example before = plain.example(1, i), after = dataset.example(1, i);
    const torch::Tensor rest = before.mixture - before.stems.sum(0);
    if (rest.abs().max().item<float>() == 0) {  // remixed
      CHECK(torch::equal(after.stems, before.stems));
      CHECK(torch::equal(after.mixture, before.mixture));
      continue;
    }
    ++aligned;
    CHECK(torch::allclose(after.mixture, after.stems.sum(0) + rest, 1e-6, 0.05));
    std::string signs;
    for (int stem = 0; stem < 4; ++stem) {
      const torch::Tensor from = before.stems[stem], to = after.stems[stem];
      const bool swapped = !torch::allclose(to / to[0][0], from / from[0][0], 1e-6);
      const torch::Tensor ratio = to / (swapped ? from.flip(0) : from);
      CHECK(torch::allclose(ratio, ratio[0][0].expand_as(ratio), 1e-6));
      CHECK((ratio[0][0].abs().item<float>() >= 0.5f && ratio[0][0].abs().item<float>() <= 2));
      signs += swapped ? "s" : "-";
      signs += ratio[0][0].item<float>() < 0 ? "n" : "p";
    }
    changes.insert(signs);
    CHECK(dataset.origin(1, i) == plain.origin(1, i));
  }
  CHECK((aligned > 15 && aligned < 45));
  CHECK(changes.size() > 10);
}

TEST_CASE("a stem that a track does not have is silent in an aligned example that is changed") {
  const TemporaryFolder folder;
  make_tracks(folder, {50});
  std::filesystem::remove(folder / "0" / "drums.wav");
  DatasetOptions options{.segment_length = 5,
                         .stems = {"vocals", "drums"},
                         .missing = training::MissingStem::silence,
                         .augmentation = kPlain,
                         .augment_aligned = true};
  options.augmentation.noise = options.augmentation.equalizer = 1;
  const Example example = Dataset(folder.path(), options).example(1, 0);
  CHECK(example.stems[1].equal(torch::zeros({2, 5})));
  options.augment_aligned = false;
  CHECK_FALSE(example.stems[0].equal(Dataset(folder.path(), options).example(1, 0).stems[0]));
}

TEST_CASE("tempo and pitch of an aligned example are the same in all of its files") {
  if (!training::kHasRubberband) return;
  const TemporaryFolder folder;
  const torch::Tensor sound = (400 * torch::randn({2, 12000})).round() / 4096;  // so that sums are exact
  std::filesystem::create_directories(folder / "song");
  for (const char* stem : {"vocals", "drums"}) {
    audio::write_audio(folder / "song" / (stem + std::string(".wav")), sound, 44100);
  }
  audio::write_audio(folder / "song/mixture.wav", 3 * sound, 44100);
  DatasetOptions options{.segment_length = 8000, .stems = {"vocals", "drums"}, .augment_aligned = true};
  options.augmentation = kPlain;
  options.augmentation.tempo = options.augmentation.pitch = 1;
  const Dataset dataset(folder.path(), options);
  for (int i = 0; i < 3; ++i) {
    const Example example = dataset.example(1, i);
    CHECK(torch::equal(example.stems[0], example.stems[1]));
    CHECK(torch::allclose(example.mixture, 3 * example.stems[0], 1e-6, 1e-6));  // the rest is the sound once more
    CHECK(example.stems[0].square().mean().sqrt().item<float>() > 0.05);
  }
  CHECK_FALSE(torch::equal(dataset.example(1, 0).stems, dataset.example(1, 1).stems));
}

TEST_CASE("a data set says which pieces an example is made of") {
  const TemporaryFolder folder;
  make_tracks(folder, {50, 60, 70});
  const Dataset dataset(folder.path(), {.segment_length = 5, .remix = 1, .augmentation = kPlain});
  for (int i = 0; i < 20; ++i) CHECK(dataset.origin(3, i) == origin_of(dataset.example(3, i)));
}

TEST_CASE("remix is a probability") {
  const TemporaryFolder folder;
  make_tracks(folder, {50, 50, 50, 50, 50, 50, 50, 50});
  const Dataset dataset(folder.path(), {.segment_length = 5, .remix = 0.25});
  int remixed = 0;
  for (int i = 0; i < 400; ++i) {
    const Example example = dataset.example(0, i);
    remixed += torch::equal(example.mixture, example.stems.sum(0));  // the files' mixture isn't the sum
  }
  CHECK(std::abs(remixed - 100) < 45);
}

TEST_CASE("an example depends on the seed and its index alone") {
  const TemporaryFolder folder;
  make_tracks(folder, {500, 700, 900});
  const Dataset dataset(folder.path(), {.segment_length = 5, .remix = 0.5});
  const Dataset again(folder.path(), {.segment_length = 5, .remix = 0.5});
  const Example late = again.example(7, 41);
  const Example batch = dataset.batch(7, 40, 3);
  REQUIRE(batch.mixture.sizes() == torch::IntArrayRef({3, 2, 5}));
  REQUIRE(batch.stems.sizes() == torch::IntArrayRef({3, 4, 2, 5}));
  CHECK(torch::equal(batch.mixture[1], late.mixture));
  CHECK(torch::equal(batch.stems[1], late.stems));
  CHECK_FALSE(torch::equal(batch.stems[0], late.stems));

  // Neither neighbouring indices nor neighbouring seeds, nor seed + i and index - i, repeat each other.
  std::vector<Example> examples;
  for (std::uint64_t seed = 0; seed < 12; ++seed) {
    for (std::int64_t index = 0; index < 12; ++index) {
      examples.push_back(dataset.example(seed, index));
    }
  }
  CHECK(different(examples).size() > 140);  // of 144; a track has 496 positions and more
}

TEST_CASE("tracks are drawn equally often or by their number of segments") {
  const TemporaryFolder folder;
  make_tracks(folder, {20, 110});  // 10 and 100 positions for 11 samples
  const auto share_of_first = [&](training::TrackDraw draw) {
    const Dataset dataset(folder.path(), {.segment_length = 11, .draw = draw});
    int first = 0;
    std::set<int> frames;
    for (int i = 0; i < 1100; ++i) {
      const Place place = decode(dataset.example(0, i).mixture[0][0].item<float>());
      first += place.track == 0;
      frames.insert(place.track * 1000 + place.frame);
    }
    CHECK(*frames.begin() == 0);
    CHECK(*frames.rbegin() == 1099);
    CHECK(frames.size() > 105);
    return first;
  };
  CHECK(std::abs(share_of_first(training::TrackDraw::uniform) - 550) < 85);
  CHECK(std::abs(share_of_first(training::TrackDraw::by_length) - 100) < 48);
}

TEST_CASE("a data set says which file it can't use and what to do") {
  const auto error_after = [](const auto& change, const DatasetOptions& options = {.segment_length = 10}) {
    const TemporaryFolder folder;
    make_tracks(folder, {20, 20});
    change(folder);
    return error_of([&] { Dataset(folder.path(), options); });
  };
  Error error = error_after([](const TemporaryFolder& f) { std::filesystem::remove(f / "1/drums.wav"); });
  CHECK(error.id() == "headroom.training.dataset.missing");
  CHECK_THAT(error.what(), Catch::Contains("1/drums.wav") && Catch::Contains("add it or remove"));
  error = error_after([](const TemporaryFolder& f) {
    audio::write_audio(f / "1/bass.wav", torch::zeros({2, 19}), 44100);
  });
  CHECK(error.id() == "headroom.training.dataset.differs");
  CHECK_THAT(error.what(),
             Catch::Contains("1/bass.wav") && Catch::Contains("19 frames") && Catch::Contains("20 frames"));
  error = error_after([](const TemporaryFolder& f) {
    audio::write_audio(f / "1/bass.wav", torch::zeros({1, 20}), 44100);
  });
  CHECK(error.id() == "headroom.training.dataset.differs");
  CHECK_THAT(error.what(), Catch::Contains("has 1 channels") && Catch::Contains("expected 2 channels"));
  error = error_after([](const TemporaryFolder& f) {
    audio::write_audio(f / "1/other.wav", torch::zeros({2, 20}), 48000);
  });
  CHECK(error.id() == "headroom.audio.file.sample_rate");
  CHECK_THAT(error.what(), Catch::Contains("1/other.wav"));
  error = error_after([](const TemporaryFolder& f) { testing::write_bytes(f / "0/vocals.wav", "?"); });
  CHECK(error.id() == "headroom.audio.file.format");
  error = error_after([](const TemporaryFolder&) {}, {.segment_length = 21});
  CHECK(error.id() == "headroom.training.dataset.short");
  CHECK_THAT(error.what(), Catch::Contains("/0\" has 20 frames") && Catch::Contains("shorten segment_length"));
  error = error_after([](const TemporaryFolder& f) {
    std::filesystem::remove_all(f / "0");
    std::filesystem::remove_all(f / "1");
  });
  CHECK(error.id() == "headroom.training.dataset.empty");
  error = error_of([] { Dataset("/no/such/folder", {}); });
  CHECK(error.id() == "headroom.training.dataset.empty");
  CHECK_THAT(error.what(), Catch::Contains("No such file or directory"));
  CHECK_THAT(error_of([] { Dataset(__FILE__, {}); }).what(), Catch::Contains("Not a directory"));

  for (const DatasetOptions& options :
       std::vector<DatasetOptions>{{.segment_length = 0},
                                   {.segment_length = 5, .channels = 0},
                                   {.segment_length = 5, .stems = {}},
                                   {.segment_length = 5, .stems = {"../1/vocals"}},
                                   {.segment_length = 5, .remix = 1.5},
                                   {.segment_length = 5, .augmentation = {.gain = {2, 1}}}}) {
    CHECK(error_after([](const TemporaryFolder&) {}, options).id() == "headroom.training.dataset.options");
  }
  const TemporaryFolder folder;
  make_tracks(folder, {20});
  const Dataset dataset(folder.path(), {.segment_length = 10});
  CHECK(error_of([&] { dataset.batch(0, 0, 0); }).id() == "headroom.training.dataset.options");
}

TEST_CASE("a data set leaves out what is no track and tracks that are short, and makes mixtures that are missing") {
  const TemporaryFolder folder;
  make_tracks(folder, {20, 9, 20});
  std::filesystem::create_directories(folder / "__MACOSX/0");
  testing::write_bytes(folder / "__MACOSX/0/._vocals.wav", "?");
  std::filesystem::remove(folder / "2/mixture.wav");
  const Dataset dataset(folder.path(), {.segment_length = 10});
  CHECK(dataset.names() == std::vector<std::string>{"0", "2"});
  REQUIRE(dataset.notices().size() == 2);
  CHECK(dataset.notices()[0] == "1 is left out: it has 9 frames, a segment has 10");
  CHECK(dataset.notices()[1] == "__MACOSX is left out: none of the files of a track is in it");
  int summed = 0;
  for (int i = 0; i < 20; ++i) {
    const Example example = dataset.example(0, i);
    const bool second = decode(example.stems[0][0][0].item<float>()).track == 2;
    CHECK(torch::equal(example.mixture, example.stems.sum(0)) == second);
    summed += second;
  }
  CHECK(summed > 0);
  CHECK(summed < 20);
}

namespace {

// A file of `frames` samples that rise from `first` in the left channel; the right one has them negated.
void make_ramp(const std::filesystem::path& path, float first, int frames = 20,
               audio::Encoding encoding = audio::Encoding::float32) {
  std::filesystem::create_directories(path.parent_path());
  const torch::Tensor ramp = torch::arange(frames, torch::kFloat) + first;
  audio::write_audio(path, torch::stack({ramp, -ramp}) / 32768, 44100, encoding);
}

// Which ramps the stems of the first examples begin with, in thousands.
std::vector<std::set<int>> ramps_of(const Dataset& dataset, int examples = 60) {
  std::vector<std::set<int>> ramps(dataset.options().stems.size());
  for (int i = 0; i < examples; ++i) {
    const torch::Tensor stems = dataset.example(0, i).stems;
    for (std::size_t k = 0; k < ramps.size(); ++k) {
      const double first = stems[static_cast<int64_t>(k)][0][0].item<double>() * 32768;
      ramps[k].insert(first == 0 ? 0 : static_cast<int>(std::lround(std::floor(first / 1000))));
    }
  }
  return ramps;
}

using Ramps = std::vector<std::set<int>>;

}  // namespace

TEST_CASE("a stem may be any file that is read: the extension is found") {
  const TemporaryFolder folder;
  make_ramp(folder / "a/vocals.flac", 1000, 20, audio::Encoding::flac16);
  make_ramp(folder / "a/drums.wav", 2000);
  make_ramp(folder / "a/drums.flac", 3000, 20, audio::Encoding::flac16);  // the WAV file comes first
  make_ramp(folder / ".b/vocals.wav", 4000);
  make_ramp(folder / "a/.vocals.wav", 5000);
  const Dataset dataset(folder.path(), {.segment_length = 5, .stems = {"vocals", "drums"}});
  CHECK(dataset.names() == std::vector<std::string>{"a"});
  const Example example = dataset.piece(0, 3, 5);
  CHECK(torch::equal(example.stems[0][0] * 32768, torch::arange(1003, 1008, torch::kFloat)));
  CHECK(torch::equal(example.stems[1][1] * 32768, -torch::arange(2003, 2008, torch::kFloat)));
  CHECK(torch::equal(example.mixture, example.stems.sum(0)));
}

TEST_CASE("folders of stems and CSV tables are for remixed examples") {
  const TemporaryFolder folder;
  for (const int i : {1, 2, 3}) make_ramp(folder / ("set/vocals/v" + std::to_string(i) + ".wav"), 1000.f * i);
  make_ramp(folder / "set/drums/any, name.wav", 7000);
  make_ramp(folder / "set/drums/.hidden.wav", 9000);
  testing::write_bytes(folder / "set/drums/cover.jpg", "?");
  training::DatasetOptions options{
      .segment_length = 5, .stems = {"vocals", "drums"}, .remix = 1, .augmentation = kPlain};
  CHECK(ramps_of(Dataset(folder / "set", options)) == Ramps{{1, 2, 3}, {7}});

  testing::write_bytes(
      folder / "list.csv",
      "instrum,path\nvocals,set/vocals/v2.wav\r\n\npiano,set/no.wav\ndrums,\"set/drums/any, name.wav\"");
  CHECK(ramps_of(Dataset(folder / "list.csv", options)) == Ramps{{2}, {7}});
  testing::write_bytes(folder / "older.csv", "path,type\n" + (folder / "set/vocals/v3.wav").string() +
                                                 ",vocals\n\"set/drums/any, name.wav\",drums\n");
  CHECK(ramps_of(Dataset(folder / "older.csv", options)) == Ramps{{3}, {7}});

  options.stems = {"vocals", "piano"};
  CHECK_THAT(error_of([&] { Dataset(folder / "set", options); }).what(),
             Catch::Contains("headroom.training.dataset.missing") && Catch::Contains("has the stem piano"));
  options.missing = training::MissingStem::silence;
  CHECK(ramps_of(Dataset(folder / "set", options)) == Ramps{{1, 2, 3}, {0}});
  options.remix = 0.5;
  CHECK(error_of([&] { Dataset(folder / "set", options); }).id() == "headroom.training.dataset.loose");
  const auto list_error = [&](const std::string& text) {
    testing::write_bytes(folder / "bad.csv", text);
    const Error error = error_of([&] { Dataset(folder / "bad.csv", options); });
    CHECK(error.id() == "headroom.training.dataset.list");
    return std::string(error.what());
  };
  CHECK_THAT(list_error("vocals,a.wav\n"), Catch::Contains("expected a first line \"instrum,path\""));
  CHECK_THAT(list_error("instrum,path\nvocals,a,b.wav\n"), Catch::Contains("3 cells in line 2"));
  CHECK_THAT(list_error("instrum,path\nvocals,a.wav\n"), Catch::Contains("a.wav\" in line 2"));
  CHECK_THAT(list_error("instrum,path\nvocals," + std::string(5000, 'a') + "\n"),  // a name that no file can have
             Catch::Contains("in line 2, where no file is"));
}

TEST_CASE("a track that lacks a stem is an error, or left out, or silent there") {
  const TemporaryFolder folder;
  make_ramp(folder / "a/vocals.wav", 1000);
  make_ramp(folder / "a/drums.wav", 2000);
  make_ramp(folder / "b/vocals.wav", 3000);
  make_ramp(folder / "c/mixture.wav", 4000);
  training::DatasetOptions options{.segment_length = 5, .stems = {"vocals", "drums"}, .augmentation = kPlain};
  CHECK(error_of([&] { Dataset(folder.path(), options); }).id() == "headroom.training.dataset.missing");
  options.missing = training::MissingStem::leave_out;
  const Dataset left_out(folder.path(), options);
  CHECK(left_out.names() == std::vector<std::string>{"a"});
  CHECK(left_out.notices() ==
        std::vector<std::string>{"b is left out: there is no drums in it", "c is left out: there is no vocals in it"});
  options.missing = training::MissingStem::silence;
  const Dataset silent(folder.path(), options);
  CHECK(silent.names() == std::vector<std::string>{"a", "b"});
  CHECK(silent.notices() == std::vector<std::string>{"c is left out: none of the stems is in it"});
  CHECK(ramps_of(silent) == Ramps{{1, 3}, {0, 2}});
  options.remix = 1;  // what is not there is not drawn
  CHECK(ramps_of(Dataset(folder.path(), options)) == Ramps{{1, 3}, {2}});
}

TEST_CASE("a track with a damaged file is left out where that is wanted") {
  const TemporaryFolder folder;
  make_tracks(folder, {20, 20});
  std::filesystem::resize_file(folder / "0/bass.wav", std::filesystem::file_size(folder / "0/bass.wav") - 8);
  training::DatasetOptions options{.segment_length = 5};
  CHECK(error_of([&] { Dataset(folder.path(), options); }).id() == "headroom.audio.file.truncated");
  options.leave_out_damaged = true;
  const Dataset dataset(folder.path(), options);
  CHECK(dataset.names() == std::vector<std::string>{"1"});
  REQUIRE(dataset.notices().size() == 1);
  CHECK_THAT(dataset.notices()[0], Catch::StartsWith("0 is left out: ") && Catch::Contains("0/bass.wav"));
}

TEST_CASE("rare stems are heard as often as others where they are drawn first") {
  const TemporaryFolder folder;
  for (int i = 1; i <= 9; ++i) make_ramp(folder / (std::to_string(i) + "/vocals.wav"), 1000.f * i);
  make_ramp(folder / "9/flute.wav", 20000);
  training::DatasetOptions options{
      .segment_length = 5, .stems = {"vocals", "flute"}, .missing = training::MissingStem::silence};
  const auto flutes = [&](training::TrackDraw draw) {
    options.draw = draw;
    const Dataset dataset(folder.path(), options);
    int count = 0;
    for (int i = 0; i < 900; ++i) count += dataset.example(0, i).stems[1].abs().sum().item<double>() > 0;
    return count;
  };
  CHECK(std::abs(flutes(training::TrackDraw::uniform) - 100) < 50);
  CHECK(std::abs(flutes(training::TrackDraw::by_stem) - 500) < 75);  // 1/2 and a ninth of the other half
}

TEST_CASE("several roots are drawn from by their weights, or as one") {
  const TemporaryFolder folder;
  make_ramp(folder / "one/a/vocals.wav", 1000);
  make_ramp(folder / "two/vocals/b.wav", 2000);
  for (int i = 3; i <= 6; ++i) make_ramp(folder / ("three/" + std::to_string(i) + "/vocals.wav"), 1000.f * i);
  training::DatasetOptions options{.segment_length = 5, .stems = {"vocals"}, .remix = 1, .augmentation = kPlain};
  const std::vector<std::filesystem::path> roots = {folder / "one", folder / "two", folder / "three"};
  const auto counts = [&] {
    const Dataset dataset(roots, options);
    CHECK(dataset.size() == 6);
    std::array<int, 3> of{};
    for (int i = 0; i < 600; ++i) {
      ++of[std::min(3, static_cast<int>(dataset.example(0, i).stems[0][0][0].item<double>() * 32.768)) - 1];
    }
    return of;
  };
  std::array<int, 3> found = counts();
  CHECK(std::abs(found[0] - 100) < 46);
  CHECK(std::abs(found[1] - 100) < 46);
  options.weights = {3, 1, 2};
  found = counts();
  CHECK(std::abs(found[0] - 300) < 62);
  CHECK(std::abs(found[1] - 100) < 46);
  options.remix = 0;  // the second root has no tracks
  const Dataset aligned(roots, options);
  CHECK(ramps_of(aligned) == Ramps{{1, 3, 4, 5, 6}});
  for (const auto& weights : {std::vector<double>{1, 1}, std::vector<double>{1, 1, 0}}) {
    options.weights = weights;
    CHECK(error_of([&] { Dataset(roots, options); }).id() == "headroom.training.dataset.options");
  }
  CHECK(error_of([] { Dataset(std::vector<std::filesystem::path>{}, {}); }).id() ==
        "headroom.training.dataset.options");
}

TEST_CASE("a piece of a file at another rate is that of the whole file, resampled") {
  const TemporaryFolder folder;
  const int64_t frames = 60000;
  torch::manual_seed(1);
  const torch::Tensor noise = torch::randn({2, frames}) * 0.1;
  std::filesystem::create_directories(folder / "a");
  for (const int rate : {48000, 22050, 96000}) {
    audio::write_audio(folder / "a/vocals.wav", noise, rate);
    const training::DatasetOptions options{.segment_length = 5000, .stems = {"vocals"}};
    CHECK(error_of([&] { Dataset(folder.path(), options); }).id() == "headroom.audio.file.sample_rate");
    const Dataset dataset(folder.path(), {.segment_length = 5000, .stems = {"vocals"}, .convert = true});
    audio::Resampler resampler(2, rate, 44100);
    const torch::Tensor begin = resampler.push(noise), whole = torch::cat({begin, resampler.finish()}, 1);
    const int64_t length = dataset.tracks()[0].frames;
    CHECK(length == whole.size(1));
    for (const int64_t first : {int64_t{0}, int64_t{1}, int64_t{12345}, length - 5000}) {
      const torch::Tensor piece = dataset.piece(0, first, 5000).stems[0];
      const double error = (piece - whole.narrow(1, first, 5000)).abs().max().item<double>();
      INFO(rate << " Hz from " << first);
      CHECK(error < 2e-7);
    }
  }
}

TEST_CASE("a data set tells how long it is, what is clipped and what is silent") {
  const TemporaryFolder folder;
  const auto write = [&](const std::string& name, const torch::Tensor& samples) {
    std::filesystem::create_directories((folder / name).parent_path());
    audio::write_audio(folder / name, samples.expand({2, -1}), 44100);
  };
  const int64_t frames = 441000;
  torch::Tensor half = torch::zeros({1, frames});  // silent in its first half
  half.narrow(1, frames / 2, frames / 2).fill_(0.01);
  write("a/vocals.wav", half);
  write("a/drums.wav", torch::full({1, frames}, -1.0));
  write("b/vocals.wav", torch::full({1, frames}, 0.0009));
  write("b/drums.wav", torch::full({1, frames}, 0.999));
  const Dataset dataset(folder.path(), {.segment_length = 100, .stems = {"vocals", "drums"}});
  const training::DatasetStatistics statistics = training::statistics_of(dataset);
  CHECK(statistics.tracks == 2);
  CHECK(statistics.hours == Approx(20.0 / 3600));
  REQUIRE(statistics.stems.size() == 2);
  CHECK(statistics.stems[0].silent == Approx(0.75));
  CHECK(statistics.stems[0].clipped == 0);
  CHECK(statistics.stems[1].silent == 0);
  CHECK(statistics.stems[1].clipped == 1);
  CHECK(training::describe(dataset) ==
        std::vector<std::string>{"2 tracks, 0.00556 hours",
                                 "vocals: 2 files; of 2 looked at, 0 with samples at full scale, 75 % silent",
                                 "drums: 2 files; of 2 looked at, 1 with samples at full scale, 0 % silent"});
}

TEST_CASE("a remixed stem may be the mean of several segments") {
  const TemporaryFolder folder;
  for (const int value : {1, 2, 4}) {
    std::filesystem::create_directories(folder / std::to_string(value));
    audio::write_audio(folder / std::to_string(value) / "vocals.wav", torch::full({2, 20}, 1.0 * value), 44100);
  }
  training::DatasetOptions options{.segment_length = 5, .stems = {"vocals"}, .remix = 1, .augmentation = kPlain};
  const auto values = [&](std::vector<double> mixup) {
    options.augmentation.mixup = std::move(mixup);
    const Dataset dataset(folder.path(), options);
    std::map<double, int> counts;
    for (int i = 0; i < 900; ++i) ++counts[dataset.example(0, i).mixture[1][4].item<double>()];
    return counts;
  };
  const std::map<double, int> one = values({}), two = values({1}), some = values({0, 0.5});
  CHECK(one.size() == 3);
  REQUIRE(two.size() == 6);  // means of two of 1, 2, 4
  CHECK(std::abs(two.at(1.5) - 200) < 65);
  CHECK(std::abs(two.at(4) - 100) < 48);
  CHECK(std::abs(some.at(1.5) - 100) < 48);  // half as often
  options.augmentation.gain = {0.5, 0.5};
  CHECK(values({1}).begin()->first == 0.5);
}

TEST_CASE("mono for stereo and stereo for mono are taken where that is wanted") {
  const TemporaryFolder folder;
  make_ramp(folder / "a/vocals.wav", 1000);
  audio::write_audio(folder / "a/drums.wav", torch::full({1, 20}, 0.5), 44100);
  training::DatasetOptions options{.segment_length = 5, .stems = {"vocals", "drums"}};
  const Error error = error_of([&] { Dataset(folder.path(), options); });
  CHECK(error.id() == "headroom.training.dataset.differs");
  CHECK_THAT(error.what(), Catch::Contains("set data.convert"));
  options.convert = true;
  CHECK(torch::equal(Dataset(folder.path(), options).piece(0, 0, 5).stems[1], torch::full({2, 5}, 0.5)));
  options.channels = 1;
  CHECK(torch::equal(Dataset(folder.path(), options).piece(0, 0, 5).stems[0], torch::zeros({1, 5})));
  options.channels = 3;
  CHECK(error_of([&] { Dataset(folder.path(), options); }).id() == "headroom.training.dataset.differs");
}

TEST_CASE("a real MUSDB18 track: the stems add up to the mixture but for the coding error") {
  const char* given = std::getenv("HEADROOM_SAMPLE_DATA");
  const std::filesystem::path root =
      given != nullptr ? given : std::filesystem::path(__FILE__) / "../../../../shared/data/musdb18-sample";
  if (!std::filesystem::is_directory(root.lexically_normal() / "train")) {
    std::cout << "skipped: set HEADROOM_SAMPLE_DATA to a folder in the MUSDB18-HQ layout\n";
    return;
  }
  const Dataset dataset(root.lexically_normal() / "train", {.segment_length = 5 * 44100});
  const Example example = dataset.batch(0, 0, 1);
  REQUIRE(example.stems.sizes() == torch::IntArrayRef({1, 4, 2, 5 * 44100}));
  const double difference = (example.mixture - example.stems.sum(1)).square().mean().item<double>();
  const double mixture = example.mixture.square().mean().item<double>();
  CHECK(mixture > 1e-3);
  CHECK(10 * std::log10(difference / mixture) == Approx(-31.6).margin(3));
}
