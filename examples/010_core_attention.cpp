// core alone: attention on Eigen matrices, no LibTorch. Row-major or column-major (stride 1 along the length), mixed as
// you like: every matrix is read and written where it lies, and the scores, a 2000 x 3000 matrix, never exist.

#include <Eigen/Core>
#include <headroom/core.hpp>
#include <iostream>

namespace core = headroom::core;

using ColumnMajor = Eigen::MatrixXf;
using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Attention of any Eigen matrices; lse is the log-sum-exp of each query's scores.
template <class Matrix>
Matrix attend(const auto& q, const auto& k, const auto& v, Eigen::VectorXd& lse) {
  Matrix output(q.rows(), v.cols());
  lse.resize(q.rows());
  core::attention_forward<float>({.q = core::matrix_view(q),
                                  .k = core::matrix_view(k),
                                  .v = core::matrix_view(v),
                                  .output = core::matrix_view(output),
                                  .lse = core::matrix_view(lse)});
  return output;
}

/// Attention of a layer whose heads are blocks of columns of q, k and v [length, heads * dim].
Eigen::MatrixXf multihead_attention(const Eigen::MatrixXf& q, const Eigen::MatrixXf& k, const Eigen::MatrixXf& v,
                                    Eigen::Index heads) {
  Eigen::MatrixXf output(q.rows(), v.cols());
  core::attention_forward<float>({.q = core::matrix_view(q, heads),
                                  .k = core::matrix_view(k, heads),
                                  .v = core::matrix_view(v, heads),
                                  .output = core::matrix_view(output, heads)});
  return output;
}

int main() {
  const ColumnMajor q = ColumnMajor::Random(2000, 16), k = ColumnMajor::Random(3000, 16),
                    v = ColumnMajor::Random(3000, 16);
  Eigen::VectorXd lse;
  const ColumnMajor output = attend<ColumnMajor>(q, k, v, lse);
  const RowMajor same = attend<RowMajor>(RowMajor(q), RowMajor(k), RowMajor(v), lse);
  const RowMajor mixed = attend<RowMajor>(q, RowMajor(k), v, lse);
  std::cout << "row-major, column-major and mixed give " << (output == same && output == mixed ? "the same" : "other")
            << " bits\n";

  Eigen::VectorXd lse_of_second;
  const ColumnMajor two_heads = multihead_attention(q, k, v, 2);
  const ColumnMajor second = attend<ColumnMajor>(q.rightCols(8), k.rightCols(8), v.rightCols(8), lse_of_second);
  std::cout << "a block of columns is " << (two_heads.rightCols(8) == second ? "a head" : "something else") << '\n';

  // the definition, for the first query
  const Eigen::VectorXf scores = k * q.row(0).transpose() / 4;
  const Eigen::VectorXf weights = (scores.array() - static_cast<float>(lse(0))).exp();
  const float difference = (v.transpose() * weights - output.row(0).transpose()).cwiseAbs().maxCoeff();
  std::cout << "weights sum to " << weights.sum() << ", the output differs by "
            << (difference < 1e-5F ? "nothing but rounding" : "too much") << '\n';
}
