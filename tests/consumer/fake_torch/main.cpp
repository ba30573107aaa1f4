#include <torch/torch.h>

const char*& device();

int main() {
  print(std::string(device()) + " registered, " + (_GLIBCXX_USE_CXX11_ABI ? "new" : "old") + " std::string");
}
