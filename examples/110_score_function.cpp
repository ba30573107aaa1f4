// A score function of one's own: what becomes of a score before the softmax, written once as if for one pair of a query
// and a key. The kernel inlines it into its loop over tiles, finds the derivative by itself, and sums the gradient of
// the table that the function looks up.

#include <cmath>
#include <headroom/attention.hpp>
#include <iostream>

int main() {
  torch::manual_seed(1);
  const auto make = [] { return torch::randn({1, 4, 1024, 32}).requires_grad_(); };  // [batch, heads, length, head dim]
  const torch::Tensor q = make(), k = make(), v = make();
  const torch::Tensor by_octave = torch::randn({4, 12}).requires_grad_();  // learned: [heads, octaves]

  // Tokens are bands of frequency: how much one band listens to another depends on the logarithm of their distance
  const auto octaves = [](auto score, auto at, auto table) {
    const auto octave = log(1 + abs(at.distance)) / std::log(2.0);
    return 30 * tanh(score / 30) + table(at.head, floor(octave + 0.0005));  // the logarithm is rounded
  };
  const torch::Tensor output = headroom::attention(q, k, v, {}, headroom::ScoreFunction(octaves, by_octave));
  output.square().sum().backward();
  std::cout << "gradient of the table, one row a head:\n" << by_octave.grad() << '\n';

  // The same by LibTorch: scores, octaves and weights are stored, 1024 x 1024 each
  const torch::Tensor place = torch::arange(1024), distance = (place.unsqueeze(1) - place).abs();
  const torch::Tensor octave = distance.add(1).to(torch::kDouble).log2().floor().to(torch::kLong);
  const torch::Tensor scores = (torch::matmul(q, k.transpose(-2, -1)) / std::sqrt(32.0) / 30).tanh() * 30;
  const torch::Tensor bias = by_octave.index_select(1, octave.flatten()).view({4, 1024, 1024});
  const torch::Tensor expected = torch::matmul(torch::softmax(scores + bias, -1), v);
  std::cout << "largest difference to LibTorch: " << (output - expected).abs().max().item<double>() << '\n';
}
