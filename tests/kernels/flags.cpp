// One program of units that are compiled with different flags, and of headroom::kernels.

#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/attention_run.hpp"
#include "headroom/core/attention/choose_kernels.hpp"
#include "headroom/core/attention/reference.hpp"
#include "kernels/unit.hpp"
#include "support/catch.hpp"

using namespace headroom;
using namespace headroom::testing;
using core::Index;

namespace {

constexpr Index kHeads = 2, kLength = 203, kDim = 24, kSize = kHeads * kLength * kDim;

std::vector<float> numbers(unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(kSize);
  for (float& e : x) e = normal(generator);
  return x;
}
std::vector<Eigen::bfloat16> narrow(const std::vector<float>& x) { return {x.begin(), x.end()}; }

/// What one unit computed; every unit is given the same.
struct Results {
  std::vector<float> output, grad_q, grad_k, grad_v;
  std::vector<double> lse;
  std::vector<Eigen::bfloat16> narrow_output;
  std::string instruction_set;

  explicit Results(Attend* attend)
      : output(kSize), grad_q(kSize), grad_k(kSize), grad_v(kSize), lse(kHeads * kLength), narrow_output(kSize) {
    const std::vector<float> q = numbers(1), k = numbers(2), v = numbers(3), grad = numbers(4);
    const auto narrow_q = narrow(q), narrow_k = narrow(k), narrow_v = narrow(v);
    instruction_set = attend({kHeads, kLength, kDim, q.data(), k.data(), v.data(), grad.data(), output.data(),
                              grad_q.data(), grad_k.data(), grad_v.data(), lse.data(), narrow_q.data(), narrow_k.data(),
                              narrow_v.data(), narrow_output.data()});
  }
  bool operator==(const Results& other) const {
    const auto same = [](const auto& x, const auto& y) {
      return std::memcmp(x.data(), y.data(), x.size() * sizeof(x[0])) == 0;
    };
    return same(output, other.output) && same(grad_q, other.grad_q) && same(grad_k, other.grad_k) &&
           same(grad_v, other.grad_v) && same(lse, other.lse) && same(narrow_output, other.narrow_output);
  }
};

struct Unit {
  const char* name;
  Attend* attend;
  bool runs_here;
};
const std::vector<Unit>& units() {
#if defined(__x86_64__)
  static const std::vector<Unit> all{
      {"plain", attend_plain, true},
      {"avx2", attend_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {"avx512f", attend_avx512f, __builtin_cpu_supports("avx512f") != 0},
      {"native", attend_native, true}};
#else
  static const std::vector<Unit> all{{"plain", attend_plain, true}, {"native", attend_native, true}};
#endif
  return all;
}

}  // namespace

TEST_CASE("units with different flags in one program compute what is right", "[kernels]") {
  const std::vector<float> q = numbers(1), k = numbers(2), v = numbers(3), grad = numbers(4);
  std::vector<float> output(kSize), grad_q(kSize), grad_k(kSize), grad_v(kSize);
  std::vector<double> lse(kHeads * kLength);
  const auto view = [](auto& x) { return core::dense_view(x.data(), 1, kHeads, kLength, kDim); };
  const auto lse_view = core::dense_view(lse.data(), 1, kHeads, kLength, 1);
  core::attention_forward_reference<float>({view(q), view(k), view(v), view(output), lse_view}, {}, core::CausalMask{});
  core::attention_backward_reference<float>({.q = view(q),
                                             .k = view(k),
                                             .v = view(v),
                                             .output = view(std::as_const(output)),
                                             .lse = lse_view,
                                             .grad_output = view(grad),
                                             .grad_q = view(grad_q),
                                             .grad_k = view(grad_k),
                                             .grad_v = view(grad_v)},
                                            {}, core::CausalMask{});
  for (const Unit& unit : units()) {
    if (!unit.runs_here) continue;
    const Results result(unit.attend);
    CAPTURE(unit.name, result.instruction_set);
    CHECK(deviation(result.output, output).maximum < 1e-5);
    CHECK(deviation(result.lse, lse).maximum < 1e-5);
    CHECK(deviation(result.grad_q, grad_q).maximum < 1e-5);
    CHECK(deviation(result.grad_k, grad_k).maximum < 1e-5);
    CHECK(deviation(result.grad_v, grad_v).maximum < 1e-5);
    CHECK(deviation(result.narrow_output, output).maximum < 0.1);
  }
}

TEST_CASE("headroom::kernels has the bits of a unit with the same instruction set", "[kernels]") {
  const Results program(attend_program);
  const char* const wanted = std::getenv("HEADROOM_ISA");
  if (wanted != nullptr) CHECK(program.instruction_set == wanted);
  for (const Unit& unit : units()) {
    if (!unit.runs_here) continue;
    const Results result(unit.attend);
    CAPTURE(unit.name, result.instruction_set, program.instruction_set);
    if (result.instruction_set == program.instruction_set) CHECK(result == program);
  }
}

TEST_CASE("the widest kernels that run here are chosen, or those that are named", "[kernels]") {
  using core::detail::AttentionKernels, core::detail::KernelChoice;
  const AttentionKernels sse2{"sse2", 4, nullptr, nullptr}, avx2{"avx2", 8, nullptr, nullptr},
      avx512{"avx512", 16, nullptr, nullptr};
  const std::vector<KernelChoice> choices{{&sse2, true}, {&avx2, true}, {&avx512, false}};
  CHECK(core::detail::choose_kernels(choices, "").instruction_set == std::string("avx2"));
  CHECK(core::detail::choose_kernels(choices, "sse2").instruction_set == std::string("sse2"));
  CHECK_THROWS_WITH(core::detail::choose_kernels(std::vector<KernelChoice>{{&avx512, false}}, ""),
                    Catch::Contains("no instruction set that headroom::kernels was compiled for"));
  CHECK_THROWS_WITH(core::detail::choose_kernels(choices, "avx512"),
                    "[headroom.core.instruction_set] HEADROOM_ISA is avx512, which this processor does not have; leave "
                    "it out or name one of sse2, avx2");
  CHECK_THROWS_WITH(
      core::detail::choose_kernels(choices, "avx3"),
      "[headroom.core.instruction_set] HEADROOM_ISA is avx3, for which no kernels were compiled; leave it "
      "out or name one of sse2, avx2");
}
