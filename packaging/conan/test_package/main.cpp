#include <headroom/core/nsdr.hpp>
#include <iostream>

int main() {
  headroom::core::NsdrAccumulator score;
  const Eigen::MatrixXf track = Eigen::MatrixXf::Ones(2, 100);
  score.add(track, 0.5F * track);
  std::cout << "nSDR " << score.value() << " dB\n";
}
