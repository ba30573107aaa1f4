#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <sys/mman.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "headroom/plan/kernels/probe.hpp"

namespace headroom::inline v0::detail {

/// A matrix without elements of its own.
struct MatrixLayout {
  std::vector<int64_t> sizes, strides;
  auto operator<=>(const MatrixLayout&) const = default;
};

/// What oneDNN asks for beside the result when it multiplies matrices of bfloat16 or half on this machine's CPU: copies
/// in blocks, as many as suit the processor, the sizes and the threads. It does not say before it is called. So it is
/// called, on memory that nobody touches, and stopped when it asks: nothing is computed.
class ProductWorkspace {
 public:
  /// `name`: aten::mm, aten::addmm, aten::bmm or aten::baddbmm; the right factor follows the left one.
  static int64_t bytes(std::string_view name, const at::Tensor& left, const at::Tensor& right) {
    // Where a product of this size asks for nothing, another library computes it, and asking would be computing
    const auto asks = [](c10::ScalarType type) {
      const MatrixLayout square{{64, 64}, {64, 1}};
      return ask("aten::mm", type, square, square) > 0;
    };
    static const bool for_bfloat16 = asks(at::kBFloat16), for_half = asks(at::kHalf);
    const bool is_asked = left.scalar_type() == at::kHalf ? for_half : for_bfloat16;
    if (!is_asked || left.dim() < 2 || right.dim() < 2 || left.numel() == 0 || right.numel() == 0) return 0;
    static std::mutex mutex;
    static auto& known =
        *new std::map<std::tuple<std::string, c10::ScalarType, MatrixLayout, MatrixLayout, int>, int64_t>;
    const MatrixLayout a{left.sizes().vec(), left.strides().vec()}, b{right.sizes().vec(), right.strides().vec()};
    const std::scoped_lock lock(mutex);
    const auto [entry, is_new] =
        known.try_emplace({std::string(name), left.scalar_type(), a, b, at::get_num_threads()}, 0);
    if (is_new) entry->second = ask(name, left.scalar_type(), a, b);
    return entry->second;
  }

 private:
  /// Zeros that take no memory before they are written to.
  class Untouched {
   public:
    explicit Untouched(int64_t bytes)
        : bytes_(static_cast<size_t>(bytes)),
          data_(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
    ~Untouched() {
      if (*this) munmap(data_, bytes_);
    }
    Untouched(const Untouched&) = delete;
    Untouched& operator=(const Untouched&) = delete;

    explicit operator bool() const { return data_ != MAP_FAILED; }
    at::Tensor view(const MatrixLayout& layout, c10::ScalarType type) const {
      return at::from_blob(data_, layout.sizes, layout.strides, at::TensorOptions(type));
    }

   private:
    size_t bytes_;
    void* data_;
  };
  static int64_t bytes_of(const MatrixLayout& layout) {
    int64_t last = 0;
    for (size_t d = 0; d < layout.sizes.size(); ++d) last += (layout.sizes[d] - 1) * layout.strides[d];
    return (last + 1) * 2;
  }

  static int64_t ask(std::string_view name, c10::ScalarType type, const MatrixLayout& a, const MatrixLayout& b) {
    const int64_t rows = a.sizes[a.sizes.size() - 2], columns = b.sizes.back();
    const MatrixLayout c = a.sizes.size() == 2
                               ? MatrixLayout{{rows, columns}, {columns, 1}}
                               : MatrixLayout{{a.sizes[0], rows, columns}, {rows * columns, columns, 1}};
    const Untouched left(bytes_of(a)), right(bytes_of(b)), result(bytes_of(c));
    if (!left || !right || !result) return 0;
    KernelProbe probe;
    const auto multiply = [&] {
      at::Tensor out = result.view(c, type);
      const at::Tensor x = left.view(a, type), y = right.view(b, type);
      if (name == "aten::mm") at::mm_out(out, x, y);
      if (name == "aten::addmm") out.addmm_(x, y);
      if (name == "aten::bmm") at::bmm_out(out, x, y);
      if (name == "aten::baddbmm") out.baddbmm_(x, y);
      return std::vector<at::Tensor>();
    };
    try {
      const AllocationScript script = probe.record(multiply, [](size_t, int64_t) { return true; });
      return script.bytes.empty() ? 0 : script.bytes[0];
    } catch (const c10::Error&) {  // factors that do not fit: the step will be told
      return 0;
    }
  }
};

}  // namespace headroom::inline v0::detail
