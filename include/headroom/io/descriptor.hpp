#pragma once

#include <unistd.h>

#include <utility>

namespace headroom::inline v0::io::detail {

/// A file descriptor that is closed at the end of the scope; -1 stands for none.
class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int number) : number_(number) {}
  Descriptor(Descriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(number_, other.number_);
    return *this;
  }
  ~Descriptor() { close(); }

  int number() const { return number_; }

  /// Closes it if it is open; 0, or -1 with errno when that brings an error of writing to light.
  int close() noexcept { return number_ < 0 ? 0 : ::close(std::exchange(number_, -1)); }

 private:
  int number_ = -1;
};

}  // namespace headroom::inline v0::io::detail
