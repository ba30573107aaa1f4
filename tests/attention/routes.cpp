// The routes by which LibTorch 2.13 stores L x L scores on the CPU without a word, and headroom's answer to each.
// Two of the thirteen exist only in Python: nn.MultiheadAttention(need_weights=True) and eager FlexAttention.

#include <torch/version.h>

#include "headroom/memory.hpp"
#include "support/attention_requests.hpp"

using namespace headroom;
using namespace headroom::testing;

namespace {

constexpr int64_t kHeads = 2, kLength = 1536, kDim = 8;
constexpr int64_t kScores = kLength * kLength;  // of one head

using Forward = std::function<Tensor(const std::vector<Tensor>& inputs)>;

struct Seen {
  int64_t forward, backward;   // largest single allocations
  std::vector<Tensor> values;  // output and gradients
};

/// Runs `forward` on leaves and differentiates the sum of squares of its output.
Seen watch(const std::vector<Tensor>& inputs, const Forward& forward, bool gradients = true) {
  std::vector<Tensor> leaves;
  for (const Tensor& x : inputs) leaves.push_back(x.detach().requires_grad_());
  Seen seen{};
  const MemoryMeter meter;
  Tensor output;
  seen.forward = *meter.measure([&] { output = forward(leaves); }).largest;
  if (gradients) {
    seen.backward =
        *meter.measure([&] { seen.values = torch::autograd::grad({output.square().sum()}, leaves); }).largest;
  }
  seen.values.push_back(output.detach());
  return seen;
}

/// LibTorch stores scores, headroom does not ask for L² bytes in either pass, and both compute the same.
void check_route(const std::vector<Tensor>& inputs, const Forward& by_torch, const Forward& by_headroom,
                 bool gradients = true) {
  // Two threads, whatever the machine has: their workspace is allocated as one block
  struct TwoThreads {
    int before = torch::get_num_threads();
    TwoThreads() { torch::set_num_threads(2); }
    ~TwoThreads() { torch::set_num_threads(before); }
  } const threads;
  const Seen stored = watch(inputs, by_torch, gradients), tiled = watch(inputs, by_headroom, gradients);
  if (TORCH_VERSION_MINOR < 14) CHECK(stored.forward >= kScores * 4);  // 2.14 stores none on routes 3 and 7
  CHECK(tiled.forward < kScores);
  CHECK(tiled.backward < kScores);
  REQUIRE(stored.values.size() == tiled.values.size());
  for (size_t i = 0; i < stored.values.size(); ++i) {
    REQUIRE(stored.values[i].sizes() == tiled.values[i].sizes());
    CHECK(largest(stored.values[i] - tiled.values[i]) <= 2e-5 * std::max(1.0, largest(stored.values[i])));
  }
}

Tensor scaled_dot_product(const std::vector<Tensor>& x, const std::optional<Tensor>& mask = {}, bool gqa = false) {
  return torch::scaled_dot_product_attention(x[0], x[1], x[2], mask, 0.0, false, std::nullopt, gqa);
}
Tensor plain_attention(const std::vector<Tensor>& x) { return attention(x[0], x[1], x[2]); }

std::vector<Tensor> inputs_of(at::IntArrayRef q, at::IntArrayRef k, at::IntArrayRef v) {
  torch::manual_seed(1);
  return {torch::randn(q), torch::randn(k), torch::randn(v)};
}
std::vector<Tensor> plain_inputs() {
  const std::vector<int64_t> shape{1, kHeads, kLength, kDim};
  return inputs_of(shape, shape, shape);
}

}  // namespace

TEST_CASE("LibTorch's fused attention itself does not store scores") {
  const Seen fused = watch(plain_inputs(), [](const auto& x) { return scaled_dot_product(x); });
  CHECK(std::max(fused.forward, fused.backward) < kScores * 4);
}

TEST_CASE("route 1: dropout") {
  const auto dropped = [](AttentionBackend backend) {
    return [backend](const std::vector<Tensor>& x) {
      torch::manual_seed(5);
      return attention(x[0], x[1], x[2], AttentionOptions().dropout(0.2).backend(backend));
    };
  };
  // Other weights are dropped by LibTorch, so that the values to agree with are those of the stored reference
  check_route(plain_inputs(), dropped(AttentionBackend::reference), dropped(AttentionBackend::automatic));
  const Seen stored = watch(plain_inputs(), [](const auto& x) {
    return torch::scaled_dot_product_attention(x[0], x[1], x[2], {}, /*dropout_p=*/0.2);
  });
  CHECK(stored.forward >= kScores * 4);
}

TEST_CASE("route 2: a mask with a gradient, even where none is asked for") {
  std::vector<Tensor> inputs = plain_inputs();
  inputs.push_back(torch::randn({kLength}));  // learned, one number a key
  const auto by_torch = [](const auto& x) { return scaled_dot_product(x, x[3].view({1, 1, 1, -1})); };
  const auto by_headroom = [](const auto& x) { return attention(x[0], x[1], x[2], AttentionOptions().bias(x[3])); };
  check_route(inputs, by_torch, by_headroom);
  const torch::NoGradGuard no_grad;
  check_route(inputs, by_torch, by_headroom, /*gradients=*/false);
}

TEST_CASE("route 3: inputs that are not 4-D") {
  const std::vector<int64_t> three{kHeads, kLength, kDim}, five{1, 1, kHeads, kLength, kDim};
  for (const auto& shape : {three, five}) {
    check_route(
        inputs_of(shape, shape, shape), [](const auto& x) { return scaled_dot_product(x); }, plain_attention);
  }
}

TEST_CASE("route 4: a 3-D mask") {
  const Tensor bias = torch::randn({kHeads, 1, kLength});
  check_route(
      plain_inputs(), [&](const auto& x) { return scaled_dot_product(x, bias); },
      [&](const auto& x) { return attention(x[0], x[1], x[2], AttentionOptions().bias(bias)); });
}

TEST_CASE("route 5: Dv != Dq") {
  check_route(
      inputs_of({1, kHeads, kLength, kDim}, {1, kHeads, kLength, kDim}, {1, kHeads, kLength, 5}),
      [](const auto& x) { return scaled_dot_product(x); }, plain_attention);
}

TEST_CASE("route 6: batches that share keys") {
  check_route(
      inputs_of({2, kHeads, kLength, kDim}, {1, kHeads, kLength, kDim}, {1, kHeads, kLength, kDim}),
      [](const auto& x) { return scaled_dot_product(x); }, plain_attention);
}

TEST_CASE("route 7: heads that differ without enable_gqa, or between k and v") {
  check_route(
      inputs_of({1, 4, kLength, kDim}, {1, 1, kLength, kDim}, {1, 1, kLength, kDim}),
      [](const auto& x) { return scaled_dot_product(x); }, plain_attention);
  // k and v of different heads: the fewer ones are repeated, which is small beside scores
  check_route(
      inputs_of({1, 4, kLength, kDim}, {1, 4, kLength, kDim}, {1, 2, kLength, kDim}),
      [](const auto& x) { return scaled_dot_product(x, {}, /*gqa=*/true); },
      [](const auto& x) { return attention(x[0], x[1], x[2].repeat_interleave(2, 1)); });
}

TEST_CASE("route 8: a stride other than 1 in the last dimension") {
  const auto transposed = [](const std::vector<Tensor>& x) {
    return std::vector<Tensor>{x[0].transpose(2, 3), x[1].transpose(2, 3), x[2].transpose(2, 3)};
  };
  const std::vector<int64_t> shape{1, kHeads, kDim, kLength};
  check_route(
      inputs_of(shape, shape, shape), [&](const auto& x) { return scaled_dot_product(transposed(x)); },
      [&](const auto& x) { return plain_attention(transposed(x)); });
}

TEST_CASE("route 9: sequences of different lengths, and the fused kernel switched off") {
  // A nested tensor of [H,L,D] each, beside the same sequences packed one after the other
  const int64_t lengths[] = {kLength, 700};
  const std::vector<int64_t> shape{1, kHeads, lengths[0] + lengths[1], kDim};
  const Tensor starts = torch::tensor({int64_t{0}, lengths[0], lengths[0] + lengths[1]});
  const auto sequence = [&](const Tensor& x, int64_t i) {
    return x[0].narrow(1, i == 0 ? 0 : lengths[0], lengths[i]);  // [H,L,D]
  };
  const auto nested = [&](const Tensor& x) {
    return at::_nested_tensor_from_tensor_list({sequence(x, 0), sequence(x, 1)});
  };
  check_route(
      inputs_of(shape, shape, shape),
      [&](const auto& x) {
        const auto parts = scaled_dot_product({nested(x[0]), nested(x[1]), nested(x[2])}).unbind();
        return torch::cat({parts[0], parts[1]}, 1).unsqueeze(0);
      },
      [&](const auto& x) { return attention(x[0], x[1], x[2], AttentionOptions().sequence_starts(starts)); });

  const bool fused = at::globalContext().userEnabledFlashSDP();
  at::globalContext().setSDPUseFlash(false);
  check_route(
      plain_inputs(), [](const auto& x) { return scaled_dot_product(x); }, plain_attention);
  at::globalContext().setSDPUseFlash(fused);
}

TEST_CASE("route 10: torch::nn::MultiheadAttention") {
  torch::manual_seed(2);
  const int64_t width = kHeads * kDim;
  torch::nn::MultiheadAttention layer(torch::nn::MultiheadAttentionOptions(width, kHeads));
  check_route(
      {torch::randn({kLength, 1, width})},
      [&](const auto& x) { return std::get<0>(layer->forward(x[0], x[0], x[0], {}, /*need_weights=*/false)); },
      [&](const auto& x) {
        const Tensor projected = torch::linear(x[0], layer->in_proj_weight, layer->in_proj_bias);  // [L,1,3·E]
        const auto qkv = projected.view({kLength, 1, 3, kHeads, kDim}).permute({2, 1, 3, 0, 4}).unbind();
        const Tensor output = plain_attention(qkv);  // [1,H,L,D]
        return layer->out_proj->forward(output.permute({2, 0, 1, 3}).reshape({kLength, 1, width}));
      });
}

TEST_CASE("route 13: a bool mask with the fused kernel, which keeps a copy in float") {
  const Tensor mask = torch::rand({kLength, kLength}) > 0.5;
  check_route(
      plain_inputs(), [&](const auto& x) { return scaled_dot_product(x, mask); },
      [&](const auto& x) { return attention(x[0], x[1], x[2], AttentionOptions().mask(mask)); });
}
