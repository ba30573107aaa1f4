// The code of the chapters in docs/: each block stands here word for word (tests/static/readme.py) with what it leaves
// out around it, so that it is known to compile. What the examples have is not repeated, and nothing here is run.

#include <headroom/audio/file.hpp>
#include <headroom/audio/separate_file.hpp>
#include <headroom/audio/writer.hpp>
#include <headroom/headroom.hpp>
#include <headroom/training.hpp>
#include <iostream>

// What a block makes is for its reader
#pragma GCC diagnostic ignored "-Wunused-variable"
#pragma GCC diagnostic ignored "-Wunused-but-set-variable"

using torch::Tensor;

// Lines are broken as in the chapters
// clang-format off

namespace attention_chapter {

using namespace headroom;

Tensor polar(const Tensor& q, const Tensor& k, const Tensor& v, int64_t length, int64_t kv_heads, int64_t head_dim) {
  const auto table = headroom::nn::polar_table(length, head_dim);                     // cosines and sines, [length, 2D]
  const auto phase = torch::zeros({kv_heads, head_dim}).requires_grad_();             // one for each head of k
  const auto output = headroom::attention(q, k, v, AttentionOptions().polar(table).polar_phase(phase));
  return output;
}

void layer_request(const Tensor& tokens, const Tensor& lengths) {
  nn::SelfAttention layer(nn::SelfAttentionOptions(384, 8).kv_heads(2).head_dim(64).request(AttentionOptions().causal(true)));
  auto request = layer->options.request();
  layer->forward(tokens, -2, request.key_lengths(lengths));
}

}  // namespace attention_chapter

namespace memory_chapter {

using namespace headroom;

struct NetImpl : torch::nn::Module {
  torch::nn::Conv1d convolution{register_module("convolution", torch::nn::Conv1d(2, 2, 3))};
  Tensor forward(const Tensor& x) { return convolution(x); }
};
TORCH_MODULE(Net);

void measure(Net& model, const Tensor& x) {
  MemoryMeter meter;                                  // the CPU; MemoryMeter(torch::kCUDA) reads an accelerator
  const MemoryReport report = meter.measure([&] { model->forward(x).sum().backward(); });
  std::cout << format_bytes(report.added_peak())      // bytes needed on top of what was live before
            << " in " << report.allocations << " allocations, the largest " << format_bytes(*report.largest) << "\n";
}

void within_a_budget(Net& model, const Tensor& x, torch::optim::Optimizer& optimizer) {
  optimizer.zero_grad();  // gradients that are there would be copied
  const int64_t size = run_within({.bytes = int64_t{8} << 30}, *model, halvings(x.size(0)), [&](int64_t size) {
    for (const Tensor& part : x.split(size)) (model(part).square().mean() * part.size(0) / x.size(0)).backward();
  });
  optimizer.step();
}

void planned() {
  const Plan plan = headroom::plan([] {
    Net net;
    name_modules(*net);                     // the plan knows who asks: "layers.3.attention"
    torch::optim::AdamW optimizer(net->parameters());
    for (int step = 0; step < 2; ++step) {  // the optimizer's state comes with the first step
      optimizer.zero_grad();
      net->forward(torch::randn({8, 2, 44100})).square().mean().backward();
      const Phase phase("optimizer");
      optimizer.step();
    }
  }, device_profile("rtx-4090-24gb"));
  print_plan(std::cout, plan);
  std::cout << explain(plan);               // if it does not fit: what asks, who holds the rest
}

void buckets(const training::Config& config, const DeviceProfile& device) {
  const training::BucketPlan all = training::plan_buckets(config, {{8, 132300}, {4, 264600}, {2, 529200}}, device);
}

}  // namespace memory_chapter

namespace recomputation_chapter {

using namespace headroom;

void three_ways(const Tensor& x, torch::nn::Linear block, nn::EncoderOptions options) {
  Tensor y = checkpoint([&](const Tensor& t) { return block(t); }, x);       // a call
  Checkpointed<nn::FeedForward> layer(nn::FeedForwardOptions(384, {1536}));  // or a module, for good
  options.gradient_checkpointing("tiled+offload");                           // or an encoder, by a policy
}

void fitted() {
  const auto choice = fit_policy([](const StackPolicy& policy) {
    nn::Encoder encoder(nn::EncoderOptions(192, 12, {768}, 12).gradient_checkpointing(policy));
    encoder->forward(torch::randn({2, 2048, 192})).square().mean().backward();
  }, 12, device_profile("rtx-4090-24gb"));  // its policy and its plan; none: not even the leanest fits
}

void offloaded() {
  SavedTensorHooks offload([](const Tensor& x) -> Unpack {
    return [host = x.cpu(), device = x.device()] { return host.to(device); };
  });
}

}  // namespace recomputation_chapter

namespace sound_chapter {

void transforms(const Tensor& mixture, const Tensor& mask, const Eigen::VectorXf& samples) {
  headroom::audio::Stft stft(headroom::audio::StftOptions().n_fft(2048).hop(441));
  torch::Tensor spectrum = stft(mixture);                            // [B,C,S] -> [B,C,F,T]
  torch::Tensor stem = stft->inverse(spectrum * mask, mixture.size(-1));  // [B,C,S]

  headroom::core::Stft<float> plain({.n_fft = 2048, .hop = 441});
  Eigen::MatrixXcf frames = plain.forward(samples);                  // [F,T], a frame is a column
  Eigen::VectorXf back = plain.inverse(frames, samples.size());
}

void accumulated(const std::function<bool(Tensor&, Tensor&)>& next_block) {
  Tensor reference, estimate;
  headroom::audio::NsdrAccumulator accumulator;
  while (next_block(reference, estimate)) {
    headroom::audio::add(accumulator, reference, estimate);  // tensors; accumulator.add(…) takes Eigen matrices and maps
  }
  double decibels = accumulator.value();
}

}  // namespace sound_chapter

namespace files_chapter {

using namespace headroom;

void audio_files() {
  using namespace headroom;
  const audio::Recording song = audio::read_audio("song.flac");               // samples [C,T], sample_rate
  audio::write_audio("copy.wav", song.samples, song.sample_rate, audio::Encoding::pcm24);

  audio::AudioReader reader("song.flac");                                     // piece by piece
  audio::AudioWriter writer("out.wav", {.channels = reader.channels()}, reader.frames());
  while (reader.position() < reader.frames()) {
    writer.write(reader.read(65536));
  }
  writer.close();
}

void separation(const Tensor& mixture, models::TimeFrequencyTransformer model) {
  const torch::Tensor stems = audio::separate(mixture, model, {.segments = {.length = 441000, .overlap = 0.25}});  // [N,C,T]
  const auto files = audio::one_file_a_stem({"vocals.wav", "drums.wav", "bass.wav", "other.wav"});
  audio::separate_file(audio::AudioReader("song.mp3"), {files, 44100}, model, {});
}

void segments() {
  audio::SeparatorOptions options{.segments = core::like_msst(352800, 4), .batch = 4, .stems = 1, .bf16 = true};
  options.segments.window = core::SegmentWindow::hann();
  options.test_time = {.shifts = 5, .augment = true};
}

void ensembles(const Tensor& mixture, models::BsRoformer roformer, models::TimeFrequencyTransformer transformer) {
  const audio::Ensemble ensemble{
      .members = {{audio::segment_model(roformer), {.segments = core::like_msst(352800, 2), .stems = 1}, {"vocals"}},
                  {audio::segment_model(transformer), {.stems = 4}, {"vocals", "drums", "bass", "other"}}},
      .combination = {core::Statistic::max, core::Domain::spectrum}};
  const torch::Tensor stems = audio::separate(mixture, ensemble);   // [N,C,T] of ensemble.stems()
}

}  // namespace files_chapter

namespace training_chapters {

using namespace headroom;

void step_in_backward(torch::nn::Linear model, const Tensor& x, const std::function<Tensor(const Tensor&)>& loss) {
  optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(3e-4), optim::MomentFormat::eight_bit);
  const optim::InBackward in_backward(optimizer);
  loss(model(x)).backward();  // the step is in it
}

void data(uint64_t seed, int64_t first_index) {
  const training::Dataset dataset("musdb18hq/train", {.segment_length = 441000, .remix = 1});
  const training::Example batch = dataset.batch(seed, first_index, 4);  // mixture [B,C,S], stems [B,N,C,S]
  training::Prefetch ahead([&](int64_t first, int64_t count) { return dataset.batch(seed, first, count); },
                           {.examples = 8, .threads = 1});              // a source for Trainer, read in advance
}

}  // namespace training_chapters

namespace models_chapter {

void weight_files(torch::nn::Linear model) {
  using namespace headroom;
  weights::load_weights(*model, "model_bs_roformer_ep_317.ckpt");             // from a published file into a module
  weights::save_tensors("model.safetensors", weights::tensors_of(*model));    // for Python, without a pickle
  const weights::TensorMap tensors = weights::load_tensors("model.safetensors");
}

using namespace headroom;

void roformer(const Tensor& mixture) {
  models::BsRoformerOptions options;  // of viperx's ep_317
  options.dim(512).depth(12).time_transformer_depth(1).freq_transformer_depth(1).stft_hop_length(441);
  models::BsRoformer model(options);
  weights::load_weights(*model, "model_bs_roformer_ep_317_sdr_12.9755.ckpt");
  const torch::Tensor stems = model->forward(mixture);  // [B,2,S] -> [B,1,2,S]
}

void newer_roformer() {
  models::BsRoformerOptions options;  // BSRoformer(dim = 384, depth = 12, …, use_pope = True) there
  options.zero_dc(false).dim(384).depth(12).time_transformer_depth(1).freq_transformer_depth(1);
  options.num_residual_streams(4).add_value_residual(true).use_pope(true);
}

void demucs(const Tensor& mixture) {
  models::HTDemucsOptions options;  // of htdemucs, 41,984,456 parameters
  options.bottom_channels(512).dconv_mode(3).segment(343980);
  models::HTDemucs model(options);
  weights::load_weights(*model, "955717e8-8726e21a.th");
  const torch::Tensor stems = model->forward(mixture);  // [B,2,S] -> [B,4,2,S]: drums, bass, other, vocals
}

}  // namespace models_chapter

namespace evaluation_chapter {

void bsseval(const Eigen::MatrixXf& stems) {
  const auto each_block = [&](auto&& take) { take(stems, stems); };
  const headroom::core::BssOptions options{.sources = 4, .channels = 2, .window = 44100, .hop = 44100};
  headroom::core::BssCorrelations correlations(options);
  each_block([&](auto& references, auto& estimates) { correlations.add(references, estimates); });  // [8, n] each
  headroom::core::BssFrames frames{headroom::core::BssFilters(correlations)};
  each_block([&](auto& references, auto& estimates) { frames.add(references, estimates); });
  auto vocals = headroom::core::median_scores(frames.finish(), 0);                                  // none: always silent
}

void all_scores(const std::vector<headroom::core::TrackBlock>& blocks_of_the_track) {
  const headroom::core::TrackOptions options{.sources = 4, .channels = 2, .metrics = {"nsdr", "sir", "log_wmse"}};
  auto scores = headroom::core::score_track(options, [&](auto&& on_block) {
    for (auto& block : blocks_of_the_track) on_block(block);  // core::TrackBlock: references, estimates, mixture
  });
  std::optional<double> sir = scores.metrics.at("sir")[0];    // of the first stem, or nothing
}

}  // namespace evaluation_chapter

namespace functions_chapter {

using namespace headroom;

struct Dilated {  // every fourth key up to 512 away
  template <class Scalar>
  core::LaneMask<Scalar> operator()(const core::ScorePlace<Scalar>& at) const {
    return abs(at.distance) <= 512 && at.distance == 4 * floor(at.distance / 4);
  }
  core::Seen block(int64_t, int64_t, core::KeyRange queries, core::KeyRange keys) const {
    const bool apart = keys.end - 1 + 512 < queries.begin || queries.end - 1 + 512 < keys.begin;
    return apart ? core::Seen::none : core::Seen::some;
  }
};

void masked(const Tensor& q, const Tensor& k, const Tensor& v) {
  headroom::attention(q, k, v, headroom::AttentionOptions().mask_function(Dilated{}));
}

}  // namespace functions_chapter

namespace errors_page {

void caught() {
  try {
    headroom::nn::SelfAttention layer(headroom::nn::SelfAttentionOptions(16, 3));
  } catch (const headroom::Error& error) {
    std::cerr << error.what() << '\n';  // [headroom.nn.attention.heads] 3 heads do not divide the width 16; …
  }
}

}  // namespace errors_page
