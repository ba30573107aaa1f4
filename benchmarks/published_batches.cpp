// The planner against what others trained: Music-Source-Separation-Training published the largest batches of
// BS-RoFormer that its authors trained on cards of 48, 24 and 16 GB (docs/bs_roformer_info.md there: mixed precision,
// Adam, no fused attention, dropout 0.1, one stem). Their model is written down here with LibTorch's plain operators,
// as PyTorch ran it, and planned at the published batch, which must fit, and one above, which must not.

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "benchmark.hpp"
#include "headroom/models/bs_roformer.hpp"
#include "headroom/plan.hpp"
#include "headroom/runtime/autocast_state.hpp"

using namespace headroom;
using torch::Tensor;

namespace {

constexpr int64_t kHeads = 8, kHeadDim = 64, kInner = kHeads * kHeadDim;
constexpr double kDropout = 0.1;
const torch::TensorOptions kFloat = torch::kFloat;

/// As dropout is on a GPU.
Tensor drop(const Tensor& x) { return std::get<0>(at::native_dropout(x, kDropout, /*train=*/true)); }

struct Norm : torch::nn::Module {
  explicit Norm(int64_t dim) : scale(std::sqrt(static_cast<double>(dim))) {
    gamma = register_parameter("gamma", torch::ones(dim));
  }
  Tensor forward(const Tensor& x) {
    namespace F = torch::nn::functional;
    return F::normalize(x, F::NormalizeFuncOptions().dim(-1)) * scale * gamma;
  }
  double scale;
  Tensor gamma;
};

struct Attention : torch::nn::Module {
  explicit Attention(int64_t dim)
      : norm(std::make_shared<Norm>(dim)),
        to_qkv(torch::nn::LinearOptions(dim, 3 * kInner).bias(false)),
        to_gates(dim, kHeads),
        to_out(torch::nn::LinearOptions(kInner, dim).bias(false)) {
    register_module("norm", norm), register_module("to_qkv", to_qkv);
    register_module("to_gates", to_gates), register_module("to_out", to_out);
  }

  /// x [N,L,dim]
  Tensor forward(Tensor x) {
    x = norm->forward(x);
    const auto qkv = to_qkv(x).unflatten(-1, {3, kHeads, kHeadDim}).permute({2, 0, 3, 1, 4}).unbind(0);  // [N,H,L,D]
    const Tensor scores =
        torch::einsum("bhid,bhjd->bhij", {rotated(qkv[0]), rotated(qkv[1])}) * (1 / std::sqrt(double{kHeadDim}));
    Tensor out = torch::einsum("bhij,bhjd->bhid", {drop(scores.softmax(-1)), qkv[2]});
    out = out * to_gates(x).transpose(1, 2).unsqueeze(-1).sigmoid();
    return drop(to_out(out.transpose(1, 2).reshape({x.size(0), x.size(1), kInner})));
  }

  /// As rotary_embedding_torch rotates, in float.
  static Tensor rotated(const Tensor& x) {
    const Tensor angles = torch::randn({x.size(-2), kHeadDim}, kFloat);
    const auto halves = x.unflatten(-1, {-1, 2}).unbind(-1);
    const Tensor turned = torch::stack({-halves[1], halves[0]}, -1).flatten(-2);
    return torch::cat({x * angles.cos() + turned * angles.sin()}, -1);
  }

  std::shared_ptr<Norm> norm;
  torch::nn::Linear to_qkv, to_gates, to_out;
};

struct FeedForward : torch::nn::Module {
  explicit FeedForward(int64_t dim) : norm(std::make_shared<Norm>(dim)), widen(dim, 4 * dim), narrow(4 * dim, dim) {
    register_module("norm", norm), register_module("widen", widen), register_module("narrow", narrow);
  }
  Tensor forward(const Tensor& x) { return drop(narrow(drop(torch::gelu(widen(norm->forward(x)))))); }
  std::shared_ptr<Norm> norm;
  torch::nn::Linear widen, narrow;
};

struct PlainRoformer : torch::nn::Module {
  PlainRoformer(int64_t dim, int64_t depth) : final_norm(register_module("final_norm", std::make_shared<Norm>(dim))) {
    const auto add = [this](const auto& module) {
      return register_module("m" + std::to_string(children().size()), module);
    };
    for (int64_t i = 0; i < 2 * depth; ++i) {  // along time, along the bands
      attentions.push_back(add(std::make_shared<Attention>(dim)));
      feed_forwards.push_back(add(std::make_shared<FeedForward>(dim)));
    }
    for (const int64_t bins : models::default_freqs_per_bands()) {
      const int64_t width = 4 * bins;  // stereo, complex
      norms.push_back(add(std::make_shared<Norm>(width)));
      features.push_back(add(torch::nn::Linear(width, dim)));
      hidden.push_back(add(torch::nn::Linear(dim, 4 * dim)));
      masks.push_back(add(torch::nn::Linear(4 * dim, 2 * width)));
    }
  }

  /// mixture, target [B,2,S] -> loss
  Tensor forward(const Tensor& mixture, const Tensor& target) {
    const int64_t batch = mixture.size(0);
    const Tensor window = torch::hann_window(2048, kFloat);
    const auto spectrum_of = [&](const Tensor& x, int64_t n_fft, int64_t hop, const Tensor& w) {
      return torch::stft(x.flatten(0, 1), n_fft, hop, w.size(0), w, true, "reflect", false, true, true);
    };
    const Tensor spectrum = torch::view_as_real(spectrum_of(mixture, 2048, 512, window)).unflatten(0, {batch, 2});
    const Tensor merged = spectrum.transpose(1, 2).flatten(1, 2).contiguous();  // [B,F·C,T,2]
    Tensor x = band_split(merged.transpose(1, 2).flatten(-2));                  // [B,T,K,dim]
    for (size_t i = 0; i < attentions.size(); ++i) {
      const bool over_time = i % 2 == 0;
      if (over_time) x = x.transpose(1, 2);
      const int64_t rows = x.size(1), length = x.size(2);
      Tensor t = x.reshape({batch * rows, length, -1});
      t = attentions[i]->forward(t) + t;
      t = feed_forwards[i]->forward(t) + t;
      x = t.view({batch, rows, length, -1});
      if (over_time) x = x.transpose(1, 2);
    }
    const Tensor mask =
        torch::view_as_complex(estimate(final_norm->forward(x)).to(torch::kFloat).unflatten(-1, {-1, 2}));
    const Tensor masked = torch::view_as_complex(merged) * mask.transpose(1, 2);
    const Tensor by_channel = masked.unflatten(1, {-1, 2}).transpose(1, 2).flatten(0, 1);  // [B·C,F,T]
    const Tensor stems = inverse(by_channel, window).unflatten(0, {batch, 2});
    const Tensor aligned = target.narrow(-1, 0, stems.size(-1));
    Tensor loss = torch::l1_loss(stems, aligned);
    for (const int64_t length : {4096, 2048, 1024, 512, 256}) {
      const Tensor w = torch::hann_window(length, kFloat);
      const int64_t n_fft = std::max<int64_t>(length, 2048);
      loss = loss + torch::l1_loss(spectrum_of(stems, n_fft, 147, w), spectrum_of(aligned, n_fft, 147, w));
    }
    return loss;
  }

 private:
  Tensor band_split(const Tensor& bins) {  // [B,T,F·C·2]
    std::vector<Tensor> tokens;
    int64_t first = 0;
    for (size_t k = 0; k < norms.size(); ++k) {
      const int64_t width = norms[k]->gamma.size(0);
      tokens.push_back(features[k](norms[k]->forward(bins.narrow(-1, first, width))));
      first += width;
    }
    return torch::stack(tokens, -2);
  }
  Tensor estimate(const Tensor& x) {
    const auto by_band = x.unbind(-2);
    std::vector<Tensor> all;
    for (size_t k = 0; k < masks.size(); ++k) all.push_back(torch::glu(masks[k](torch::tanh(hidden[k](by_band[k])))));
    return torch::cat(all, -1);
  }
  /// torch.istft, which asks for a value of its envelope that a plan has not.
  static Tensor inverse(const Tensor& spectrum, const Tensor& window) {
    const int64_t frames = spectrum.size(-1);
    const Tensor pieces = torch::fft_irfft(spectrum.transpose(1, 2), 2048) * window;
    const Tensor sum = at::unfold_backward(pieces, {spectrum.size(0), 2048 + (frames - 1) * 512}, 1, 2048, 512);
    return sum.narrow(1, 1024, (frames - 1) * 512) / torch::empty({(frames - 1) * 512}, kFloat);
  }

  std::shared_ptr<Norm> final_norm;
  std::vector<std::shared_ptr<Attention>> attentions;
  std::vector<std::shared_ptr<FeedForward>> feed_forwards;
  std::vector<std::shared_ptr<Norm>> norms;
  std::vector<torch::nn::Linear> features, hidden, masks;
};

struct Cell {
  int64_t chunk, dim, depth;
  std::vector<int64_t> batches;  ///< on 48, 24 and 16 GB; 0: none
};
const std::vector<Cell> kPublished = {
    {131584, 128, 6, {10, 5, 3}}, {131584, 256, 6, {8, 4, 2}},  {131584, 384, 6, {7, 3, 2}},
    {131584, 512, 6, {6, 3, 2}},  {131584, 256, 12, {4, 2, 1}}, {263168, 128, 6, {4, 2, 1}},
    {263168, 256, 6, {3, 1, 1}},  {352800, 128, 6, {2, 1, 0}},  {352800, 384, 12, {1, 0, 0}},
    {352800, 512, 12, {0, 0, 0}},
};

/// Two steps in mixed precision.
Plan plan_of(const Cell& cell, int64_t batch, const DeviceProfile& device) {
  return plan(
      [&] {
        PlainRoformer model(cell.dim, cell.depth);
        torch::optim::Adam optimizer(model.parameters());
        const Tensor mixture = torch::randn({batch, 2, cell.chunk}), target = torch::randn({batch, 2, cell.chunk});
        for (int step = 0; step < 2; ++step) {
          optimizer.zero_grad();
          Tensor loss;
          {
            const headroom::detail::AutocastGuard autocast(device.device().type(), torch::kHalf);
            loss = model.forward(mixture, target);
          }
          loss.backward();
          optimizer.step();
        }
      },
      device, {.value = 1});
}

}  // namespace

int main(int argc, char** argv) {
  benchmarks::Benchmark benchmark("published_batches",
                                  "Plans of the largest batches of BS-RoFormer that others trained, and of one more");
  return benchmark.run(argc, argv, [&] {
    int agree = 0, all = 0;
    for (const Cell& cell : kPublished) {
      size_t card = 0;
      for (const char* name : {"a6000-48gb", "rtx-4090-24gb", "rtx-4080-16gb"}) {
        const DeviceProfile device = device_profile(name);
        const int64_t trained = cell.batches[card++];
        std::printf("%7lld %4lld/%-2lld %-14s", static_cast<long long>(cell.chunk), static_cast<long long>(cell.dim),
                    static_cast<long long>(cell.depth), name);
        benchmarks::Row row{
            {"chunk", cell.chunk}, {"dim", cell.dim}, {"depth", cell.depth}, {"device", name}, {"trained", trained}};
        for (const int64_t batch : {trained, trained + 1}) {
          if (batch == 0) continue;
          const Plan needed = plan_of(cell, batch, device);
          const bool agrees = needed.fits == (batch == trained);
          agree += agrees, ++all;
          std::printf("  batch %2lld: %6.2f of %5.2f GiB, %s%s", static_cast<long long>(batch),
                      static_cast<double>(needed.peak_bytes) / (1 << 30),
                      static_cast<double>(device.usable_bytes()) / (1 << 30), needed.fits ? "fits" : "does not fit",
                      agrees ? "" : " (!)");
          const std::string which = batch == trained ? "trained" : "one_more";
          row.push_back({which + "_peak_bytes", needed.peak_bytes});
          row.push_back({which + "_reserved_bytes", needed.reserved_bytes});
          row.push_back({which + "_fits", needed.fits});
        }
        std::printf("\n");
        std::fflush(stdout);
        row.push_back({"usable_bytes", device.usable_bytes()});
        benchmark.add_row(row);
      }
    }
    std::printf("%d of %d plans agree with what was trained\n", agree, all);
    benchmark.note("agree", int64_t{agree});
    benchmark.note("plans", int64_t{all});
  });
}
