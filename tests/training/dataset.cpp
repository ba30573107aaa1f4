#include "headroom/training/dataset.hpp"

#include <cstdlib>
#include <iostream>
#include <map>
#include <set>

#include "support/catch.hpp"
#include "support/files.hpp"

using namespace headroom;
using testing::error_of;
using testing::TemporaryFolder;
using training::Example;
using training::MusdbDataset;
using training::MusdbOptions;

namespace {

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

std::set<std::string> different(const std::vector<Example>& examples) {
  std::set<std::string> values;
  for (const Example& e : examples) {
    values.insert(std::string(static_cast<const char*>(e.stems.contiguous().data_ptr()), e.stems.nbytes()));
  }
  return values;
}

}  // namespace

TEST_CASE("SplitMix64 gives the published numbers") {
  training::detail::SplitMix64 random(1234567);
  CHECK(random.next() == 6457827717110365317u);
  CHECK(random.next() == 3203168211198807973u);
  CHECK(random.next() == 9817491932198370423u);
}

TEST_CASE("an example that is not remixed is the same segment of all files of a track") {
  const TemporaryFolder folder;
  make_tracks(folder, {20, 40, 30});
  testing::write_bytes(folder / "README", "not a track");
  std::filesystem::create_directories(folder / ".cache");
  const MusdbDataset dataset(folder.path(), {.segment_length = 11});
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
    const MusdbDataset all(folder.path(), {.segment_length = 5, .remix = remix});
    const MusdbDataset two(
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
    MusdbDataset(folder.path(), {.segment_length = 5, .stems = {"bass"}, .accompaniment = {"other"}});
  };
  CHECK(error_of(wanted).id() == "headroom.training.dataset.missing");
}

TEST_CASE("a remixed example takes each stem from its own track and position, with gain, swap and polarity") {
  const TemporaryFolder folder;
  make_tracks(folder, {50, 50, 50});
  const MusdbDataset dataset(folder.path(), {.segment_length = 5, .remix = 1, .gain = {0.5, 2}});
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

  const MusdbDataset plain(
      folder.path(), {.segment_length = 5, .remix = 1, .gain = {1, 1}, .swap_channels = false, .flip_polarity = false});
  for (int i = 0; i < 20; ++i) {
    const torch::Tensor stems = plain.example(3, i).stems;
    for (int stem = 0; stem < 4; ++stem) {
      const Place place = decode(stems[stem][1][0].item<float>());
      CHECK(place.channel == 1);
      CHECK(stems[stem][0][2].item<float>() == code(place.track, stem, 0, place.frame + 2));
    }
  }
}

TEST_CASE("remix is a probability") {
  const TemporaryFolder folder;
  make_tracks(folder, {50, 50, 50, 50, 50, 50, 50, 50});
  const MusdbDataset dataset(folder.path(), {.segment_length = 5, .remix = 0.25});
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
  const MusdbDataset dataset(folder.path(), {.segment_length = 5, .remix = 0.5});
  const MusdbDataset again(folder.path(), {.segment_length = 5, .remix = 0.5});
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
    const MusdbDataset dataset(folder.path(), {.segment_length = 11, .draw = draw});
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
  const auto error_after = [](const auto& change, const MusdbOptions& options = {.segment_length = 10}) {
    const TemporaryFolder folder;
    make_tracks(folder, {20, 20});
    change(folder);
    return error_of([&] { MusdbDataset(folder.path(), options); });
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
  error = error_of([] { MusdbDataset("/no/such/folder", {}); });
  CHECK(error.id() == "headroom.training.dataset.empty");
  CHECK_THAT(error.what(), Catch::Contains("No such file or directory"));
  CHECK_THAT(error_of([] { MusdbDataset(__FILE__, {}); }).what(), Catch::Contains("Not a directory"));

  for (const MusdbOptions& options : std::vector<MusdbOptions>{{.segment_length = 0},
                                                               {.segment_length = 5, .channels = 0},
                                                               {.segment_length = 5, .stems = {}},
                                                               {.segment_length = 5, .stems = {"../1/vocals"}},
                                                               {.segment_length = 5, .remix = 1.5},
                                                               {.segment_length = 5, .gain = {2, 1}}}) {
    CHECK(error_after([](const TemporaryFolder&) {}, options).id() == "headroom.training.dataset.options");
  }
  const TemporaryFolder folder;
  make_tracks(folder, {20});
  const MusdbDataset dataset(folder.path(), {.segment_length = 10});
  CHECK(error_of([&] { dataset.batch(0, 0, 0); }).id() == "headroom.training.dataset.options");
}

TEST_CASE("a data set leaves out what is no track and tracks that are short, and makes mixtures that are missing") {
  const TemporaryFolder folder;
  make_tracks(folder, {20, 9, 20});
  std::filesystem::create_directories(folder / "__MACOSX/0");
  testing::write_bytes(folder / "__MACOSX/0/._vocals.wav", "?");
  std::filesystem::remove(folder / "2/mixture.wav");
  const MusdbDataset dataset(folder.path(), {.segment_length = 10});
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

TEST_CASE("a real MUSDB18 track: the stems add up to the mixture but for the coding error") {
  const char* given = std::getenv("HEADROOM_SAMPLE_DATA");
  const std::filesystem::path root =
      given != nullptr ? given : std::filesystem::path(__FILE__) / "../../../../shared/data/musdb18-sample";
  if (!std::filesystem::is_directory(root.lexically_normal() / "train")) {
    std::cout << "skipped: set HEADROOM_SAMPLE_DATA to a folder in the MUSDB18-HQ layout\n";
    return;
  }
  const MusdbDataset dataset(root.lexically_normal() / "train", {.segment_length = 5 * 44100});
  const Example example = dataset.batch(0, 0, 1);
  REQUIRE(example.stems.sizes() == torch::IntArrayRef({1, 4, 2, 5 * 44100}));
  const double difference = (example.mixture - example.stems.sum(1)).square().mean().item<double>();
  const double mixture = example.mixture.square().mean().item<double>();
  CHECK(mixture > 1e-3);
  CHECK(10 * std::log10(difference / mixture) == Approx(-31.6).margin(3));
}
