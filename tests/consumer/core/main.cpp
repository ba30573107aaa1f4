#include <iostream>

#include "headroom/core/error.hpp"

int main() {
  try {
    headroom::require(false, "headroom.core.example", "got ", 3, ", expected ", 4);
  } catch (const headroom::Error& error) {
    std::cout << "core: " << std::string(error.what()).substr(error.id().size() + 3);
  }
#ifdef _OPENMP
  std::cout << "; threads on\n";
#else
  std::cout << "; threads off\n";
#endif
}
