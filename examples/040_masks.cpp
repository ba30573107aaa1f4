// Who sees whom, one request a mask. With equal scores and the unit matrix as values the output is the matrix of
// weights, so that masks can be looked at. Keys that nobody sees are not computed, and no mask is stored but the last.

#include <headroom/attention.hpp>
#include <iostream>

using headroom::AttentionOptions;

constexpr int64_t kLength = 12;

void show(const char* name, const AttentionOptions& options) {
  const torch::Tensor q = torch::zeros({1, 1, kLength, 4}), v = torch::eye(kLength).view({1, 1, kLength, kLength});
  const torch::Tensor seen = headroom::attention(q, q, v, options)[0][0] > 0;  // [queries, keys]
  std::cout << name << ": " << seen.sum().item<int64_t>() << " of " << seen.numel() << " pairs\n";
  for (int64_t query = 0; query < kLength; ++query) {
    for (int64_t key = 0; key < kLength; ++key) std::cout << (seen[query][key].item<bool>() ? " #" : " .");
    std::cout << '\n';
  }
}

int main() {
  show("causal", AttentionOptions().causal(true));
  show("sliding window", AttentionOptions().window(headroom::AttentionWindow{2, 1}));
  show("key lengths", AttentionOptions().key_lengths(torch::tensor({7})));  // one length for each element of the batch

  // three sequences of 3, 5 and 4, one after the other in one tensor: no padding
  const torch::Tensor starts = torch::tensor({0, 3, 8, 12});
  show("packed sequences", AttentionOptions().sequence_starts(starts));
  show("packed sequences, causal", AttentionOptions().sequence_starts(starts).causal(true));

  // one element for each block of 4 queries and 4 keys; blocks that are false are skipped
  const torch::Tensor blocks = torch::tensor({1, 0, 1, 0, 1, 0, 1, 0, 1}, torch::kBool).view({3, 3});
  show("block-sparse", AttentionOptions().block_mask(blocks).block_size(4));

  const torch::Tensor any = torch::arange(kLength).unsqueeze(1) % (torch::arange(kLength) + 1) == 0;
  show("whatever you like", AttentionOptions().mask(any));
}
