#include <torch/torch.h>

#include <map>
#include <memory>
#include <sstream>
#include <string>
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

using Parameters = std::vector<Tensor>;
using Made = std::unique_ptr<optim::Optimizer>;

/// Every optimizer but AdamW, by the names of optimizers_reference.py.
Made make_by_name(const std::string& name, const Parameters& parameters, MomentFormat format = MomentFormat::full) {
  const bool other = name.find(',') != std::string::npos;
  if (name.starts_with("sgd")) {
    const auto options = torch::optim::SGDOptions(0.05).momentum(0.9).weight_decay(0.1).nesterov(other);
    return std::make_unique<optim::Sgd>(parameters, options, format);
  }
  if (name.starts_with("radam")) {
    const auto options = torch::optim::AdamWOptions(0.05).betas({0.8, 0.99}).weight_decay(0.1);
    return std::make_unique<optim::RAdam>(parameters, options, format);
  }
  if (name.starts_with("muon")) {
    const auto options = optim::MuonOptions(0.05).betas({0.8, 0.99}).momentum(0.9).nesterov(other);
    return std::make_unique<optim::Muon>(parameters, options, format);
  }
  const auto options =
      optim::ProdigyOptions(0.9).betas({0.8, 0.99}).weight_decay(0.1).d0(1e-3).d_coef(0.7).safeguard_warmup(other);
  return std::make_unique<optim::Prodigy>(parameters, options, format);
}
const std::vector<std::string> kNames{"sgd", "sgd, Nesterov", "radam", "muon, Nesterov", "prodigy"};

Parameters first_parameters(torch::Dtype type = torch::kDouble) {
  const Tensor matrix = torch::arange(12.0, torch::kDouble).cos().view({4, 3});
  const Tensor vector = 0.3 * torch::arange(5.0, torch::kDouble) - 0.5;
  return {matrix.to(type).requires_grad_(), vector.to(type).requires_grad_()};
}

/// What optimizers_reference.py does.
Tensor trained_parameters(const Parameters& parameters, optim::Optimizer& optimizer) {
  for (int step = 0; step < 20; ++step) {
    for (const Tensor& parameter : parameters) {
      const Tensor wave =
          (1.3 * step + 0.9 * torch::arange(static_cast<double>(parameter.numel()), torch::kDouble)).sin();
      parameter.mutable_grad() =
          (0.7 * parameter.detach().to(torch::kDouble) + wave.view(parameter.sizes())).to(parameter.scalar_type());
    }
    if (step == 12) {
      for (auto& group : optimizer.param_groups()) group.options().set_lr(group.options().get_lr() / 2);
    }
    optimizer.step();
  }
  return torch::cat({parameters[0].detach().flatten(), parameters[1].detach()}).to(torch::kDouble);
}

torch::nn::Sequential small_net() {
  torch::manual_seed(5);
  return torch::nn::Sequential(torch::nn::Linear(48, 96), torch::nn::GELU(), torch::nn::Linear(96, 5));
}

/// Gradients of a regression, the same for the same step.
void differentiate(torch::nn::Sequential& net, int step) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(step));
  const Tensor x = torch::randn({64, 48}, generator, torch::kDouble);
  const Tensor y = x.slice(1, 0, 5).sin() + x.slice(1, 5, 10);
  (net->forward(x.to(torch::kFloat)) - y.to(torch::kFloat)).square().mean().backward();
}

/// optimizers_reference.py
const std::map<std::string, std::vector<double>> kExpected{
    {"sgd",
     {-0.302242678859601, -0.151108044538568, 0.14239975622252, 0.306562785351931, 0.187388719132115,
      -0.107492367900167, -0.306315948014952, -0.223535678014788, 0.0675058656499024, 0.299915348531686,
      0.258107819180372, -0.0225409807794891, 0.176083407846124, 0.0849625587581868, -0.0221912414382358,
      -0.136683662280877, -0.244266651509125}},
    {"sgd, Nesterov",
     {-0.199395582060032, -0.102726608951986, 0.0919643766261211, 0.201438240699869, 0.121307713236347,
      -0.0751609684769631, -0.204101901779964, -0.142542032024427, 0.0551889675042982, 0.205692627896929,
      0.166332401410123, -0.0303999106072644, 0.146841014872374, 0.0681532251046791, -0.0271749061762183,
      -0.119405940489809, -0.191146260595038}},
    {"radam",
     {0.669991623596298, 0.313515159994597, -0.332288275671003, -0.688699827297141, -0.40036356936174,
      0.257417350515803, 0.696150857629122, 0.489917442086199, -0.167608206435757, -0.686986245392393,
      -0.577434812659064, 0.0635627139545083, -0.390868332824767, -0.205661334553435, 0.0289481020651166,
      0.294472153633615, 0.552515381415904}},
    {"muon",
     {0.785770218671207, 0.507030479996043, -0.241779698508279, -0.819382647017141, -0.562912417061549,
      0.220090341284928, 0.832284278796332, 0.605302451381559, -0.180977417821427, -0.826330356222098,
      -0.626282755743234, 0.125685257089799, -0.229360083125672, -0.15459214112385, 0.00310267051026221,
      0.167427550942845, 0.332737062877948}},
    {"muon, Nesterov",
     {0.796182903242191, 0.477264657865874, -0.307077112165378, -0.831241916161734, -0.549914383140122,
      0.238404187995496, 0.833168252964843, 0.618612186459668, -0.147527285292598, -0.806494320243921,
      -0.664760599049708, 0.0602845723645642, -0.229360083125672, -0.15459214112385, 0.00310267051026221,
      0.167427550942845, 0.332737062877948}},
    {"prodigy",
     {0.735004571123196, 0.445469672152954, -0.250338512829115, -0.715119267257865, -0.521706658194063,
      0.123003830431817, 0.676219441806292, 0.576460305125847, 0.0013180762703925, -0.619002312770748,
      -0.611206185611254, -0.111563825523416, -0.250987586496891, -0.0362653099303748, 0.0895051317791899,
      0.200735393590251, 0.406387950687965}},
    {"prodigy, safeguard",
     {0.838245120406498, 0.466480298223888, -0.324923896125805, -0.828349538616633, -0.552126185125203,
      0.205554620194015, 0.803540519434013, 0.628226800328595, -0.0836877274295428, -0.757064769284814,
      -0.696088756693549, -0.0322425793828846, -0.381341290770931, -0.128706711321653, 0.0972123540097614,
      0.309044110226755, 0.554062601223934}},
};

}  // namespace

TEST_CASE("20 steps of SGD, RAdam, Muon and Prodigy are those of PyTorch and prodigyopt") {
  for (const auto& [name, values] : kExpected) {
    CAPTURE(name);
    const Tensor expected = torch::tensor(values, torch::kDouble);
    const auto error = [&, &name = name](torch::Dtype type) {
      const Parameters parameters = first_parameters(type);
      return (trained_parameters(parameters, *make_by_name(name, parameters)) - expected).abs().max().item<double>();
    };
    CHECK(error(torch::kDouble) < 1e-12);
    CHECK(error(torch::kFloat) < 1e-5);
    CHECK(error(torch::kBFloat16) < 0.1);
  }
}

TEST_CASE("a step of SGD is that of torch::optim::SGD, bit for bit") {
  for (const double momentum : {0.0, 0.9}) {
    for (const bool nesterov : {false, momentum > 0}) {
      const auto options = torch::optim::SGDOptions(0.1).momentum(momentum).weight_decay(0.01).nesterov(nesterov);
      auto ours = small_net(), theirs = small_net();
      optim::Sgd optimizer(ours->parameters(), options);
      torch::optim::SGD reference(theirs->parameters(), options);
      for (int step = 0; step < 5; ++step) {
        ours->zero_grad(), theirs->zero_grad();
        differentiate(ours, step), differentiate(theirs, step);
        optimizer.step(), reference.step();
      }
      testing::check_equal(ours->parameters(), theirs->parameters());
    }
  }
  const Tensor weight = torch::ones({3}, torch::requires_grad());
  CHECK(optim::Sgd({weight}, torch::optim::SGDOptions(1)).state_for(weight).moments.empty());
}

TEST_CASE("a matrix made orthogonal has the singular vectors of before and singular values about 1") {
  for (const auto& [rows, columns] : {std::pair{7, 4}, std::pair{4, 7}, std::pair{5, 5}}) {
    torch::manual_seed(1);
    const Tensor matrix = torch::randn({rows, columns}, torch::kDouble);
    const Tensor result = optim::orthogonalised(matrix, 5);
    const auto [u, s, v] = torch::linalg_svd(matrix, false);
    const Tensor values = u.t().mm(result).mm(v.t());
    CHECK((values - values.diag().diag()).abs().max().item<double>() < 1e-12);
    CHECK(values.diag().min().item<double>() > 0.6);
    CHECK(values.diag().max().item<double>() < 1.3);
  }
}

TEST_CASE("optimizers train with narrow moments as with full ones") {
  const testing::OneThread one_thread;
  for (const std::string& name : kNames) {
    std::map<MomentFormat, double> losses;
    for (const auto format : {MomentFormat::full, MomentFormat::bf16, MomentFormat::eight_bit}) {
      Tensor weight = torch::zeros({64, 64}, torch::requires_grad());
      torch::manual_seed(3);
      const Tensor target = torch::randn({64, 64});
      const Made optimizer = make_by_name(name, {weight}, format);
      for (auto& group : optimizer->param_groups())
        group.options().set_lr(name == "prodigy" ? 1 : name.starts_with("muon") ? 0.05 : 0.02);
      for (int step = 0; step < 100; ++step) {
        const Tensor noise = 0.1 * torch::randn({64, 64});
        weight.mutable_grad() = weight.detach() - target + noise;
        optimizer->step();
      }
      losses[format] = (weight.detach() - target).square().mean().item<double>();
    }
    CAPTURE(name, losses[MomentFormat::full], losses[MomentFormat::bf16], losses[MomentFormat::eight_bit]);
    CHECK(losses[MomentFormat::full] < 0.5);  // from 1
    CHECK(losses[MomentFormat::bf16] == Approx(losses[MomentFormat::full]).epsilon(0.05).margin(0.01));
    CHECK(losses[MomentFormat::eight_bit] == Approx(losses[MomentFormat::full]).epsilon(0.05).margin(0.01));
  }
}

TEST_CASE("the bytes of every optimizer's state are those that are promised, and are planned") {
  for (const std::string& name : kNames) {
    const double others = name == "prodigy" ? 8 : 0;
    for (const auto& [format, bytes] : {std::pair{MomentFormat::full, 4.0}, std::pair{MomentFormat::bf16, 2.0},
                                        std::pair{MomentFormat::eight_bit, 1 + 4.0 / optim::kMomentBlock}}) {
      const auto train = [&, format = format] {
        torch::nn::Linear net(torch::nn::LinearOptions(300, 200));  // not a whole number of blocks
        const Made optimizer = make_by_name(name, net->parameters(), format);
        for (int step = 0; step < 2; ++step) {
          optimizer->zero_grad();
          net->forward(torch::ones({3, 300})).sum().backward();
          const Phase phase("optimizer");
          optimizer->step();
        }
      };
      CAPTURE(name, static_cast<int>(format));
      const Plan planned = plan(train, this_machine(), {.value = 1});
      CHECK(planned.peak_bytes == MemoryMeter().measure(train).added_peak());
      torch::nn::Linear net(torch::nn::LinearOptions(300, 200).bias(false));
      const Made optimizer = make_by_name(name, net->parameters(), format);
      net->forward(torch::ones({3, 300})).sum().backward();
      const int64_t held = MemoryMeter().measure([&] { optimizer->step(); }).held();
      const int moments = name == "radam" || name == "prodigy" ? 2 : 1;
      const int64_t tables = format == MomentFormat::eight_bit ? moments * (256 + 255 + 255) * 4 : 0;
      CHECK(static_cast<double>(held - tables) ==
            Approx(60'000 * (moments * bytes + others)).margin(moments * (4 + optim::kMomentBlock)));
    }
  }
}

TEST_CASE("every allocation of any optimizer's step may fail: continued, it gives the bits of one never disturbed") {
  const testing::OneThread one_thread;
  for (const std::string& name : kNames) {
    for (const auto format : {MomentFormat::full, MomentFormat::eight_bit}) {
      auto undisturbed = small_net();
      const Made reference = make_by_name(name, undisturbed->parameters(), format);
      differentiate(undisturbed, 0);
      MemoryMeter meter;
      const int64_t allocations = meter.measure([&] { reference->step(); }).allocations;
      reference->step();
      for (int64_t spared = 0; spared < allocations; ++spared) {
        CAPTURE(name, static_cast<int>(format), spared);
        auto net = small_net();
        const Made optimizer = make_by_name(name, net->parameters(), format);
        differentiate(net, 0);
        meter.fail_allocation(spared);
        REQUIRE_THROWS_AS(optimizer->step(), c10::OutOfMemoryError);
        optimizer->continue_step();
        optimizer->step();
        testing::check_equal(net->parameters(), undisturbed->parameters());
      }
    }
  }
}

TEST_CASE("any optimizer steps in the backward pass, but for Prodigy, which says why not") {
  for (const std::string& name : kNames) {
    auto ours = small_net(), theirs = small_net();
    const Made optimizer = make_by_name(name, ours->parameters()), reference = make_by_name(name, theirs->parameters());
    if (name == "prodigy") {
      const Error error = testing::error_of([&] { optim::InBackward in_backward(*optimizer); });
      CHECK(error.id() == "headroom.optim.in_backward");
      CHECK(testing::contains(error.what(), "Prodigy looks at all gradients before it updates the first parameter"));
      continue;
    }
    const optim::InBackward in_backward(*optimizer);
    for (int step = 0; step < 4; ++step) {
      reference->zero_grad();
      differentiate(theirs, step);
      reference->step();
      differentiate(ours, step);
    }
    testing::check_equal(ours->parameters(), theirs->parameters());
  }
}

TEST_CASE("every optimizer is saved and loaded: training goes on bit for bit") {
  for (const std::string& name : kNames) {
    for (const auto format : {MomentFormat::full, MomentFormat::bf16, MomentFormat::eight_bit}) {
      CAPTURE(name, static_cast<int>(format));
      const auto train = [](optim::Optimizer& optimizer, torch::nn::Sequential& net, int first, int last) {
        for (int step = first; step < last; ++step) {
          optimizer.zero_grad();
          differentiate(net, step);
          optimizer.step();
        }
      };
      auto net = small_net(), other = small_net();
      const Made optimizer = make_by_name(name, net->parameters(), format),
                 resumed = make_by_name(name, other->parameters(), format);
      train(*optimizer, net, 0, 4);
      std::stringstream file;
      torch::save(*optimizer, file);
      {
        const torch::NoGradGuard guard;
        for (size_t i = 0; i < net->parameters().size(); ++i) other->parameters()[i].copy_(net->parameters()[i]);
      }
      torch::load(*resumed, file);
      train(*optimizer, net, 4, 8);
      train(*resumed, other, 4, 8);
      testing::check_equal(other->parameters(), net->parameters());

      std::stringstream again(file.str());
      optim::AdamW foreign(other->parameters(), {}, format);
      const Error error = testing::error_of([&] { torch::load(foreign, again); });
      CHECK(error.id() == "headroom.optim.state");
      CHECK(testing::contains(error.what(), "holds no state of this version of headroom::optim::AdamW"));
    }
  }
}

TEST_CASE("moments that an optimizer does not keep are not dropped in silence") {
  const Parameters parameters = first_parameters();
  optim::Sgd with(parameters, torch::optim::SGDOptions(0.05).momentum(0.9)), without(parameters, 0.05);
  trained_parameters(parameters, with);
  std::stringstream file;
  torch::save(with, file);
  const Error error = testing::error_of([&] { torch::load(without, file); });
  CHECK(error.id() == "headroom.optim.state");
  CHECK(testing::contains(error.what(), "of parameter 0 there are 1 saved moments, this optimizer keeps 0"));
}
