// core alone: attention on Eigen matrices, no LibTorch. Keys as in column-major code (stride 1 along the length),
// values row-major: both are read where they lie, and the scores, a 2000 x 3000 matrix, never exist.

#include <Eigen/Core>
#include <headroom/core.hpp>
#include <iostream>

namespace core = headroom::core;

int main() {
  using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const Eigen::MatrixXf q = Eigen::MatrixXf::Random(2000, 16), k = Eigen::MatrixXf::Random(3000, 16);
  const RowMajor v = RowMajor::Random(3000, 16);
  RowMajor output(2000, 16);
  Eigen::VectorXd lse(2000);
  core::attention_forward(core::matrix_view(q), core::matrix_view(k), core::matrix_view(v), core::matrix_view(output),
                          core::matrix_view(lse));

  // the definition, for the first query
  const Eigen::VectorXf scores = k * q.row(0).transpose() / 4;
  const Eigen::VectorXf weights = (scores.array() - static_cast<float>(lse(0))).exp();
  const float difference = (v.transpose() * weights - output.row(0).transpose()).cwiseAbs().maxCoeff();
  std::cout << "weights sum to " << weights.sum() << ", the output differs by "
            << (difference < 1e-5F ? "nothing but rounding" : "too much") << '\n';
}
