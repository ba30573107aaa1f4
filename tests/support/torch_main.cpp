#define CATCH_CONFIG_RUNNER
#include <torch/torch.h>

#include "support/catch.hpp"

int main(int argc, char** argv) {
  // LibTorch's first call of exp, log or sqrt: threads that make it at once may get half the digits
  torch::exp(torch::zeros({1}));
  return Catch::Session().run(argc, argv);
}
