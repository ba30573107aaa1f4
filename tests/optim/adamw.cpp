#include <torch/torch.h>

#include <cmath>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "headroom/memory.hpp"
#include "headroom/optim.hpp"
#include "headroom/plan.hpp"
#include "support/catch.hpp"
#include "support/one_thread.hpp"
#include "support/tensors.hpp"

using namespace headroom;
using optim::MomentFormat;
using torch::Tensor;

namespace {

torch::nn::Sequential perceptron(torch::Dtype dtype = torch::kFloat) {
  torch::manual_seed(5);
  torch::nn::Sequential net(torch::nn::Linear(48, 96), torch::nn::GELU(),
                            torch::nn::LayerNorm(std::vector<int64_t>{96}), torch::nn::Linear(96, 60),
                            torch::nn::GELU(), torch::nn::Linear(60, 5));
  net->to(dtype);
  return net;
}

/// Classes that a random linear map gives to noise.
std::pair<Tensor, Tensor> examples(int64_t step, torch::Dtype dtype = torch::kFloat) {
  const Tensor x =
      torch::randn({64, 48}, at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(step) + 100), dtype);
  const Tensor map = torch::randn({48, 5}, at::make_generator<at::CPUGeneratorImpl>(1), dtype);
  return {x, (x.matmul(map) + x.square().matmul(map)).argmax(1)};
}

Tensor loss_of(torch::nn::Sequential& net, int64_t step, torch::Dtype dtype = torch::kFloat) {
  const auto [x, y] = examples(step, dtype);
  return torch::nn::functional::cross_entropy(net->forward(x), y);
}

torch::optim::AdamWOptions options() { return torch::optim::AdamWOptions(3e-3).weight_decay(0.05).betas({0.9, 0.99}); }

}  // namespace

TEST_CASE("with full moments a step is that of torch::optim::AdamW, bit for bit") {
  for (const auto dtype : {torch::kFloat, torch::kDouble}) {
    auto ours = perceptron(dtype), theirs = perceptron(dtype);
    optim::AdamW optimizer(ours->parameters(), options());
    torch::optim::AdamW reference(theirs->parameters(), options());
    for (int step = 0; step < 12; ++step) {
      if (step == 8) {  // a changed learning rate, as schedules do
        optimizer.param_groups()[0].options().set_lr(1e-4);
        reference.param_groups()[0].options().set_lr(1e-4);
      }
      for (auto* const run : {&optimizer, static_cast<optim::AdamW*>(nullptr)}) {
        auto& net = run != nullptr ? ours : theirs;
        net->zero_grad();
        loss_of(net, step, dtype).backward();
        run != nullptr ? run->step() : reference.step();
      }
    }
    testing::check_equal(ours->parameters(), theirs->parameters());
  }
}

TEST_CASE("groups have their own options, and parameters without gradients are left alone") {
  auto ours = perceptron(), theirs = perceptron();
  const auto groups = [](torch::nn::Sequential& net) {
    std::vector<torch::optim::OptimizerParamGroup> all;
    const auto parameters = net->parameters();
    all.emplace_back(std::vector<Tensor>(parameters.begin(), parameters.begin() + 3),
                     std::make_unique<torch::optim::AdamWOptions>(options().weight_decay(0)));
    all.emplace_back(std::vector<Tensor>(parameters.begin() + 3, parameters.end()),
                     std::make_unique<torch::optim::AdamWOptions>(options().lr(0.1)));
    return all;
  };
  optim::AdamW optimizer(groups(ours));
  torch::optim::AdamW reference(groups(theirs));
  for (auto* const net : {&ours, &theirs}) {
    loss_of(*net, 0).backward();
    (*net)->parameters()[1].mutable_grad().reset();
  }
  const Tensor untouched = ours->parameters()[1].clone();
  optimizer.step();
  reference.step();
  testing::check_equal(ours->parameters(), theirs->parameters());
  CHECK(ours->parameters()[1].equal(untouched));
}

TEST_CASE("a step in the backward pass gives the bits of one after it, and gradients go as they come") {
  const auto format = GENERATE(MomentFormat::full, MomentFormat::bf16, MomentFormat::eight_bit);
  auto ours = perceptron(), theirs = perceptron();
  optim::AdamW optimizer(ours->parameters(), options(), format), reference(theirs->parameters(), options(), format);
  MemoryMeter meter;
  {
    int seen = 0;
    const optim::InBackward in_backward(optimizer, [&](const Tensor& parameter) {
      CHECK(parameter.grad().defined());
      ++seen;
    });
    for (int step = 0; step < 5; ++step) {
      loss_of(theirs, step).backward();
      reference.step();
      reference.zero_grad();
      loss_of(ours, step).backward();
      for (const Tensor& parameter : ours->parameters()) CHECK_FALSE(parameter.grad().defined());
    }
    CHECK(seen == 5 * static_cast<int>(ours->parameters().size()));
  }
  testing::check_equal(ours->parameters(), theirs->parameters());
  loss_of(ours, 9).backward();  // the hooks are gone
  CHECK(ours->parameters()[0].grad().defined());
  const Error error = testing::error_of([&] { optim::InBackward again(optimizer); });
  CHECK(error.id() == "headroom.optim.in_backward");
}

TEST_CASE("a step in the backward pass never holds all gradients") {
  const auto peak = [](bool in_backward) {
    torch::nn::Sequential net;
    for (int i = 0; i < 8; ++i) net->push_back(torch::nn::Linear(torch::nn::LinearOptions(128, 128).bias(false)));
    optim::AdamW optimizer(net->parameters());
    std::optional<optim::InBackward> hooks;
    if (in_backward) hooks.emplace(optimizer);
    const MemoryMeter meter;
    const auto step = [&] {
      net->forward(torch::ones({1, 128})).sum().backward();
      if (!in_backward) optimizer.step();
      optimizer.zero_grad();
    };
    step();  // makes the state
    return meter.measure(step).added_peak();
  };
  constexpr int64_t kWeight = 128 * 128 * 4;
  CHECK(peak(false) > 8 * kWeight);
  CHECK(peak(true) < 3 * kWeight);  // a gradient, what AdamW divides by, activations
}

TEST_CASE("every allocation of a step may fail: continued, it gives the bits of a step that was never disturbed") {
  const testing::OneThread one_thread;
  const auto format = GENERATE(MomentFormat::full, MomentFormat::bf16, MomentFormat::eight_bit);
  const auto dtype = GENERATE(torch::kFloat, torch::kBFloat16, torch::kDouble);
  auto undisturbed = perceptron(dtype);
  optim::AdamW reference(undisturbed->parameters(), options(), format);
  loss_of(undisturbed, 0, dtype).backward();
  MemoryMeter meter;
  int64_t allocations = 0, held = 0;
  for (int step = 0; step < 2; ++step) {
    const MemoryReport report = meter.measure([&] { reference.step(); });
    if (step == 0) allocations = report.allocations;
    held += report.held();
  }
  CHECK(allocations > 30);
  for (int64_t spared = 0; spared < allocations; ++spared) {
    CAPTURE(spared);
    auto net = perceptron(dtype);
    optim::AdamW optimizer(net->parameters(), options(), format);
    loss_of(net, 0, dtype).backward();
    const int64_t before = meter.live();
    meter.fail_allocation(spared);
    REQUIRE_THROWS_AS(optimizer.step(), c10::OutOfMemoryError);
    optimizer.continue_step();
    optimizer.step();
    testing::check_equal(net->parameters(), undisturbed->parameters());
    CHECK(meter.live() - before == held);
  }
}

TEST_CASE("the bytes of the state are those that are promised, and are planned") {
  struct Expected {
    MomentFormat format;
    double bytes;
  };
  for (const auto& [format, bytes] : {Expected{MomentFormat::full, 8}, Expected{MomentFormat::bf16, 4},
                                      Expected{MomentFormat::eight_bit, 2 * (1 + 4.0 / optim::kMomentBlock)}}) {
    const auto train = [format = format] {
      torch::nn::Linear net(torch::nn::LinearOptions(300, 200).bias(false));  // not a whole number of blocks
      optim::AdamW optimizer(net->parameters(), {}, format);
      for (int step = 0; step < 2; ++step) {
        optimizer.zero_grad();
        net->forward(torch::ones({3, 300})).sum().backward();
        const Phase phase("optimizer");
        optimizer.step();
      }
    };
    CAPTURE(static_cast<int>(format));
    const Plan planned = plan(train, this_machine());
    CHECK(planned.peak_bytes == MemoryMeter().measure(train).added_peak());
    torch::nn::Linear net(torch::nn::LinearOptions(300, 200).bias(false));
    optim::AdamW optimizer(net->parameters(), {}, format);
    net->forward(torch::ones({3, 300})).sum().backward();
    const int64_t held = MemoryMeter().measure([&] { optimizer.step(); }).held();
    const int64_t tables = format == MomentFormat::eight_bit ? 2 * (256 + 255 + 255) * 4 : 0;
    CHECK(static_cast<double>(held - tables) == Approx(60'000 * bytes).margin(2 * (4 + optim::kMomentBlock)));
    CHECK(planned.parts[static_cast<size_t>(MemoryUse::optimizer)] >= held);
  }
}

TEST_CASE("small tensors keep full moments where others have 8 bits") {
  const Tensor small = torch::ones({optim::kSmallestEightBit - 1}), large = torch::ones({optim::kSmallestEightBit});
  optim::AdamW optimizer({small, large}, {}, MomentFormat::eight_bit);
  CHECK(optimizer.state_for(small).moments.at("exp_avg").values.scalar_type() == torch::kFloat);
  CHECK(optimizer.state_for(large).moments.at("exp_avg").values.scalar_type() == torch::kByte);
  CHECK(optimizer.state_for(large).moments.at("exp_avg_sq").scales.numel() ==
        optim::kSmallestEightBit / optim::kMomentBlock);
}

TEST_CASE("8-bit codes: the published values, the nearest of them, a scale for each block") {
  // Ends and steps of the code as bitsandbytes makes it: create_dynamic_map(signed, 7, 8)
  const auto with_sign = optim::detail::dynamic_values(true), without = optim::detail::dynamic_values(false);
  CHECK(with_sign[0] == Approx(-0.99296875));
  CHECK(with_sign[127] == 0.0f);
  CHECK(with_sign[128] == Approx(5.5e-7));
  CHECK(with_sign[255] == 1.0f);
  CHECK(without[0] == 0.0f);
  CHECK(without[1] == Approx(3.25e-7));
  CHECK(without[254] == Approx(0.996484375));
  CHECK(std::is_sorted(with_sign.begin(), with_sign.end()));

  torch::manual_seed(2);
  const Tensor x = torch::randn({3, 400}) * torch::logspace(-6, 0, 1200).view({3, 400});
  for (const bool is_signed : {true, false}) {
    const Tensor values = is_signed ? x : x.square();
    const optim::DynamicCode code(is_signed, values);
    const optim::StoredMoment moment = optim::quantise(values, code);
    const Tensor back = optim::dequantise(moment, code, values.sizes());
    CHECK(back.sizes() == values.sizes());
    CHECK(moment.scales.numel() == 5);
    const Tensor blocks = torch::constant_pad_nd(values.view({-1}), {0, 80}).view({5, 256});
    CHECK(moment.scales.equal(blocks.abs().amax(1)));
    // Independent search for the nearest value, in double; squares that are not zero get no zero
    Tensor all = torch::tensor(std::vector<float>(with_sign.begin(), with_sign.end())).to(torch::kDouble);
    if (!is_signed)
      all = torch::tensor(std::vector<float>(without.begin() + 1, without.end())).square().to(torch::kDouble);
    const Tensor parts = (blocks.to(torch::kDouble) / moment.scales.to(torch::kDouble).unsqueeze(1)).view({-1, 1});
    const Tensor nearest = std::get<0>((parts - all.view({1, -1})).abs().min(1)).view({-1}).slice(0, 0, 1200);
    const Tensor error = (back - values).view({-1}).to(torch::kDouble).abs();
    const Tensor scale = moment.scales.to(torch::kDouble).repeat_interleave(256).slice(0, 0, 1200);
    CHECK((error / scale - nearest).abs().max().item<double>() < 1e-6);
  }
  const Tensor zeros = torch::zeros({256});
  for (const bool is_signed : {true, false}) {
    const optim::DynamicCode code(is_signed, zeros);
    for (const double position : {0.01, 0.5, 0.99}) {
      CHECK(optim::dequantise(optim::quantise(zeros, code, position), code, {256}).equal(zeros));
    }
  }
}

TEST_CASE("8-bit codes are right on average: over many steps an element has the mean of the two it lies between") {
  torch::manual_seed(4);
  const Tensor x = (torch::randn({8, 256}) * torch::logspace(-3, 0, 8).unsqueeze(1)).view({-1});
  for (const bool is_signed : {true, false}) {
    const Tensor values = is_signed ? x : x.square() + 1e-6;
    const optim::DynamicCode code(is_signed, values);
    Tensor sum = torch::zeros_like(values);
    constexpr int kSteps = 1000;
    for (int step = 1; step <= kSteps; ++step) {
      sum += optim::dequantise(optim::quantise(values, code, optim::rounding_position(step)), code, values.sizes());
    }
    const Tensor scale = values.view({8, 256}).abs().amax(1, true).expand({8, 256}).reshape({-1});
    // Codes are up to 0.007 (squares: 0.014) of the scale apart; a fixed rounding is off by up to half of that
    const Tensor expected = torch::maximum(values, code.values[0] * scale);  // there is no code for -1
    CHECK(((sum / kSteps - expected).abs() / scale).max().item<double>() < 1e-4);
  }
}

TEST_CASE("whatever the types of parameters and state, moments are those of double arithmetic up to what they store") {
  const auto dtype = GENERATE(torch::kFloat, torch::kDouble, torch::kBFloat16, torch::kHalf);
  const auto format = GENERATE(MomentFormat::full, MomentFormat::bf16, MomentFormat::eight_bit);
  CAPTURE(dtype, static_cast<int>(format));
  Tensor parameter = torch::zeros({optim::kSmallestEightBit}, dtype).requires_grad_();
  optim::AdamW optimizer({parameter}, torch::optim::AdamWOptions(1e-4), format);
  double average = 0, square = 0;
  const auto step = [&](double g) {
    g = torch::tensor(g, dtype).item<double>();
    average = 0.9 * average + 0.1 * g;
    square = 0.999 * square + 0.001 * g * g;
    parameter.mutable_grad() = torch::full_like(parameter, g);
    optimizer.step();
  };
  // A second moment that decays by 0.1 % a step, which 16 bits don't tell from nothing
  for (int i = 0; i < 200; ++i) step(1);
  for (int i = 0; i < 2000; ++i) step(1e-3);
  const auto& state = optimizer.state_for(parameter);
  const auto value = [&](const optim::StoredMoment& moment, bool is_signed) {
    if (!moment.scales.defined()) return moment.values.to(torch::kDouble).mean().item<double>();
    return optim::dequantise(moment, optim::DynamicCode(is_signed, parameter), parameter.sizes()).mean().item<double>();
  };
  CHECK(square == Approx(0.0245).epsilon(0.01));
  CHECK(value(state.moments.at("exp_avg_sq"), false) == Approx(square).epsilon(0.02));
  CHECK(value(state.moments.at("exp_avg"), true) == Approx(average).epsilon(0.02));

  // No gradient: no step, not 0 / 0
  Tensor still = torch::ones({optim::kSmallestEightBit}, dtype).requires_grad_();
  optim::AdamW idle({still}, torch::optim::AdamWOptions(1e-3).weight_decay(0), format);
  for (int i = 0; i < 3; ++i) {
    still.mutable_grad() = torch::zeros_like(still);
    idle.step();
  }
  CHECK(still.equal(torch::ones_like(still)));
}

TEST_CASE("a second moment in 8 bits follows one that decays beside one that does not") {
  Tensor parameter = torch::zeros({optim::kSmallestEightBit}, torch::requires_grad());
  optim::AdamW optimizer({parameter}, {}, MomentFormat::eight_bit);
  Tensor gradient = torch::ones_like(parameter);
  for (int i = 0; i < 2200; ++i) {
    if (i == 200) gradient.slice(0, 0, gradient.numel(), 2).fill_(1e-3);
    parameter.mutable_grad() = gradient;
    optimizer.step();
  }
  const optim::DynamicCode code(false, parameter);
  const Tensor square =
      optim::dequantise(optimizer.state_for(parameter).moments.at("exp_avg_sq"), code, parameter.sizes());
  CHECK(square[0].item<double>() == Approx(0.0245).epsilon(0.15));
  CHECK(square[1].item<double>() == Approx(0.8893).epsilon(0.01));
}

TEST_CASE("with 8 bits no step is larger than exact moments allow, whatever the gradients in a block") {
  constexpr double kRate = 1e-3;
  const auto largest_step = [&](const auto& gradient_of, int steps, const auto& inspect) {
    Tensor parameter = torch::zeros({optim::kSmallestEightBit}, torch::requires_grad());
    optim::AdamW optimizer({parameter}, torch::optim::AdamWOptions(kRate).weight_decay(0), MomentFormat::eight_bit);
    double largest = 0;
    for (int i = 0; i < steps; ++i) {
      const Tensor before = parameter.detach().clone();
      parameter.mutable_grad() = gradient_of(i);
      optimizer.step();
      largest = std::max(largest, (parameter.detach() - before).abs().nan_to_num(0).max().template item<double>());
    }
    inspect(parameter.detach());
    return largest / kRate;
  };
  const auto nothing = [](const Tensor&) {};
  Tensor gradient = torch::zeros({optim::kSmallestEightBit});
  SECTION("a small gradient beside a large one, then none") {
    gradient[0] = 1;
    gradient[1] = 1e-4;
    CHECK(largest_step([&](int i) { return i < 50 ? gradient : torch::zeros_like(gradient); }, 100, nothing) < 1.7);
  }
  SECTION("an element whose gradients end while others go on comes to rest") {
    gradient.fill_(1);
    const auto of = [&](int i) {
      Tensor g = gradient.clone();
      g[1] = i < 50 ? 1e-2 : 0;
      return g;
    };
    double at_rest = 0;
    std::ignore = largest_step(of, 300, [&](const Tensor& p) { at_rest = p[1].item<double>(); });
    std::ignore = largest_step(
        of, 600, [&](const Tensor& p) { CHECK(p[1].item<double>() == Approx(at_rest).margin(0.1 * kRate)); });
  }
  SECTION("gradients of all magnitudes") {
    torch::manual_seed(6);
    const Tensor magnitudes = torch::logspace(-12, 4, optim::kSmallestEightBit);
    CHECK(largest_step([&](int) { return torch::randn_like(magnitudes) * magnitudes; }, 200, nothing) < 7.3);
  }
  SECTION("a gradient that is not finite spoils its own parameter and no other") {
    const double bad = GENERATE(static_cast<double>(NAN), static_cast<double>(INFINITY));
    torch::manual_seed(6);
    const auto of = [&](int i) {
      Tensor g = torch::ones_like(gradient);
      if (i == 10) g[5] = bad;
      return g;
    };
    std::ignore = largest_step(of, 20, [](const Tensor& p) {
      CHECK(p.isnan().sum().template item<int64_t>() == 1);
      CHECK(p[6].template item<double>() == Approx(-20 * kRate).epsilon(0.05));
    });
  }
}

TEST_CASE("the optimizer is saved and loaded: training goes on bit for bit, options of groups included") {
  const auto format = GENERATE(MomentFormat::full, MomentFormat::bf16, MomentFormat::eight_bit);
  const auto groups = [](torch::nn::Sequential& net, double decay) {
    std::vector<torch::optim::OptimizerParamGroup> all;
    const auto p = net->parameters();
    all.emplace_back(std::vector<Tensor>(p.begin(), p.begin() + 3),
                     std::make_unique<torch::optim::AdamWOptions>(options().weight_decay(decay)));
    all.emplace_back(std::vector<Tensor>(p.begin() + 3, p.end()),
                     std::make_unique<torch::optim::AdamWOptions>(options().lr(decay)));
    return all;
  };
  const auto train = [](optim::AdamW& optimizer, torch::nn::Sequential& net, int first, int last) {
    for (int step = first; step < last; ++step) {
      optimizer.zero_grad();
      loss_of(net, step).backward();
      net->parameters()[1].mutable_grad().reset();  // AdamW knows nothing of it
      optimizer.step();
    }
  };
  auto net = perceptron();
  optim::AdamW optimizer(groups(net, 0.01), {}, format);
  train(optimizer, net, 0, 5);
  std::stringstream file;
  torch::save(optimizer, file);

  auto other = perceptron();
  {
    const torch::NoGradGuard guard;
    for (size_t i = 0; i < net->parameters().size(); ++i) other->parameters()[i].copy_(net->parameters()[i]);
  }
  optim::AdamW resumed(groups(other, 0.02), {}, format);
  torch::load(resumed, file);
  CHECK(resumed.param_groups()[1].options().get_lr() == 0.01);
  CHECK(resumed.state().size() == net->parameters().size() - 1);
  train(optimizer, net, 5, 10);
  train(resumed, other, 5, 10);
  testing::check_equal(other->parameters(), net->parameters());

  const auto refused = [&](auto& into, const char* why) {
    std::stringstream again(file.str());
    const Error error = testing::error_of([&] { torch::load(into, again); });
    CHECK(error.id() == "headroom.optim.state");
    CHECK(testing::contains(error.what(), why));
  };
  optim::AdamW formatted(groups(other, 0.01), {},
                         format == MomentFormat::full ? MomentFormat::bf16 : MomentFormat::full);
  refused(formatted, "stored in the format");
  optim::AdamW together(other->parameters(), {}, format);
  refused(together, "2 groups of parameters, this one 1");
  auto turned = groups(other, 0.01);
  std::swap(turned[0], turned[1]);
  optim::AdamW swapped(turned, {}, format);
  refused(swapped, "group 0 of the saved optimizer has 3 parameters");
  torch::nn::Sequential wide(torch::nn::Linear(96, 48), torch::nn::LayerNorm(std::vector<int64_t>{96}),
                             torch::nn::Linear(60, 96), torch::nn::Linear(5, 60));
  optim::AdamW reshaped(groups(wide, 0.01), {}, format);
  refused(reshaped, "parameter 0 is [48, 96], the saved one [96, 48]");
  CHECK(reshaped.state().empty());

  std::stringstream foreign;
  torch::optim::AdamW theirs(other->parameters());
  torch::save(theirs, foreign);
  CHECK(testing::error_of([&] { torch::load(resumed, foreign); }).id() == "headroom.optim.state");
}

TEST_CASE("rounding to bfloat16 is right on average: an average decays that plain rounding would hold") {
  constexpr int kSteps = 3000;
  const Tensor start = torch::linspace(0.5, 2, 1000);
  Tensor dithered = start.to(torch::kBFloat16), plain = dithered.clone();
  for (int step = 1; step <= kSteps; ++step) {
    dithered = optim::round_to_bf16(dithered.to(torch::kFloat) * 0.999f, step);
    plain = (plain.to(torch::kFloat) * 0.999f).to(torch::kBFloat16);
  }
  const Tensor expected = start * std::pow(0.999, kSteps);  // a twentieth
  CHECK((plain.to(torch::kFloat) / start).min().item<double>() > 0.9);
  // Never further than to a neighbour
  const Tensor x = torch::randn({5000});
  const Tensor once = optim::round_to_bf16(x, 77).to(torch::kFloat);
  CHECK(((once - x).abs() <= x.abs() * (1.0 / 128)).all().item<bool>());
  CHECK(optim::round_to_bf16(x, 77).equal(optim::round_to_bf16(x, 77)));
  CHECK_FALSE(optim::round_to_bf16(x, 78).equal(optim::round_to_bf16(x, 77)));
}

TEST_CASE("narrow moments train as well as full ones") {
  const testing::OneThread one_thread;
  std::map<MomentFormat, double> losses;
  for (const auto format : {MomentFormat::full, MomentFormat::bf16, MomentFormat::eight_bit}) {
    auto net = perceptron();
    optim::AdamW optimizer(net->parameters(), options(), format);
    for (int step = 0; step < 400; ++step) {
      optimizer.zero_grad();
      loss_of(net, step).backward();
      optimizer.step();
    }
    const torch::NoGradGuard guard;
    for (int step = 1000; step < 1020; ++step) losses[format] += loss_of(net, step).item<double>() / 20;
  }
  CAPTURE(losses[MomentFormat::full], losses[MomentFormat::bf16], losses[MomentFormat::eight_bit]);
  CHECK(losses[MomentFormat::full] < 0.8);  // from 1.6, that of guessing
  CHECK(losses[MomentFormat::bf16] == Approx(losses[MomentFormat::full]).epsilon(0.03));
  CHECK(losses[MomentFormat::eight_bit] == Approx(losses[MomentFormat::full]).epsilon(0.03));
}

TEST_CASE("what AdamW does not offer says so") {
  const Tensor weight = torch::ones({3}, torch::requires_grad());
  CHECK(testing::error_of([&] { optim::AdamW({weight}, torch::optim::AdamWOptions().amsgrad(true)); }).id() ==
        "headroom.optim.amsgrad");
  const Tensor table = torch::ones({4, 3}, torch::requires_grad());
  optim::AdamW optimizer({table});
  torch::embedding(table, torch::zeros({2}, torch::kLong), -1, false, /*sparse=*/true).sum().backward();
  CHECK(testing::error_of([&] { optimizer.step(); }).id() == "headroom.optim.sparse");
  CHECK(optim::moment_format("8bit") == MomentFormat::eight_bit);
  CHECK(testing::error_of([] { optim::moment_format("int8"); }).id() == "headroom.optim.format");
}
