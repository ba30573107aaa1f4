// Keys that come in pieces, from a disk or another machine: attention over each piece, merged by the log-sum-exp of its
// scores. The result is that over all keys, which never have to be in memory together.

#include <headroom/attention.hpp>
#include <iostream>

using torch::Tensor;

/// The i-th piece of 1000 keys or values, [1, 4, 1000, 32].
Tensor piece(int64_t i) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(i));
  return torch::randn({1, 4, 1000, 32}, generator);
}

int main() {
  torch::manual_seed(0);
  const Tensor q = torch::randn({1, 4, 500, 32});

  headroom::AttentionResult sum = headroom::attention_with_lse(q, piece(0), piece(1));  // {output, lse}
  for (int64_t i = 1; i < 8; ++i) {
    sum = headroom::merge_attention({sum, headroom::attention_with_lse(q, piece(2 * i), piece(2 * i + 1))});
  }

  std::vector<Tensor> keys, values;
  for (int64_t i = 0; i < 8; ++i) keys.push_back(piece(2 * i)), values.push_back(piece(2 * i + 1));
  const auto whole = headroom::attention_with_lse(q, torch::cat(keys, 2), torch::cat(values, 2));
  const double difference = (sum.output - whole.output).abs().max().item<double>();
  std::cout << "8 pieces of 1000 keys differ from all 8000 by "
            << (difference < 1e-5 ? "nothing but rounding" : "too much") << ": " << difference << '\n';
}
