#include <cstdio>

#include "headroom/core/attention.hpp"

int main() {
  namespace core = headroom::core;
  // Every key has the value 1/100: so has every output
  const Eigen::MatrixXf q = Eigen::MatrixXf::Random(100, 16), v = Eigen::MatrixXf::Constant(100, 16, 0.01F);
  Eigen::MatrixXf output(100, 16);
  core::attention_forward<float>({.q = core::matrix_view(q),
                                  .k = core::matrix_view(q),
                                  .v = core::matrix_view(v),
                                  .output = core::matrix_view(output)});
  std::printf("sum of the outputs: %.4f; kernels: %s\n", static_cast<double>(output.col(3).sum()),
              core::instruction_set());
}
