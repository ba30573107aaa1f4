#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "headroom/checkpoint/host_copies.hpp"
#include "headroom/checkpoint/saved_tensors.hpp"
#include "headroom/core/error.hpp"
#include "headroom/io/temporary_folder.hpp"
#include "headroom/runtime/dry_run.hpp"

namespace headroom::inline v0 {

/// Where the inputs of checkpoints are kept until backward.
enum class CheckpointStorage {
  memory,   ///< where they are
  bf16,     ///< rounded to bfloat16: half the bytes, and gradients as of inputs rounded to 8 bits
  offload,  ///< tensors of an accelerator in pinned host memory, those of the CPU in a file; bit for bit
};

namespace detail {

/// A tensor in a file of its own, which has no name and is gone with this object. The file is mapped a window at a time
/// to be written and read, so that it never counts as memory of the process.
class TensorFile {
 public:
  /// Throws headroom.checkpoint.offload.
  explicit TensorFile(const at::Tensor& x) : bytes_(static_cast<std::int64_t>(x.nbytes())) {
    const std::string folder = io::temporary_folder().string();
    std::string path = folder + "/headroom_checkpoint_XXXXXX";
    file_ = ::mkstemp(path.data());
    require(file_ >= 0, "headroom.checkpoint.offload", "cannot make a file for a checkpoint in ", folder, ": ",
            std::strerror(errno), "; set TMPDIR to a folder that can be written to");
    ::unlink(path.c_str());
    // Space is taken now: a full disk under a mapping would end the process by a signal
    const int error = bytes_ == 0 ? 0 : ::posix_fallocate(file_, 0, bytes_);
    if (error != 0) ::close(file_);
    require(error == 0, "headroom.checkpoint.offload", "cannot put a checkpoint of ", bytes_, " bytes into ", folder,
            ": ", std::strerror(error),
            "; free space there, set TMPDIR to another folder, or keep checkpoints in memory");
    for_each_window(PROT_WRITE, [&](std::byte* window, std::int64_t at, std::int64_t size) {
      std::memcpy(window, static_cast<const std::byte*>(x.const_data_ptr()) + at, size);
    });
  }
  ~TensorFile() { ::close(file_); }
  TensorFile(const TensorFile&) = delete;
  TensorFile& operator=(const TensorFile&) = delete;

  void read(const at::Tensor& x) const {
    for_each_window(PROT_READ, [&](const std::byte* window, std::int64_t at, std::int64_t size) {
      std::memcpy(static_cast<std::byte*>(x.mutable_data_ptr()) + at, window, size);
    });
  }

 private:
  template <class Copy>
  void for_each_window(int access, Copy&& copy) const {
    constexpr std::int64_t kWindow = 4 << 20;
    for (std::int64_t at = 0; at < bytes_; at += kWindow) {
      const std::int64_t size = std::min(kWindow, bytes_ - at);
      void* const window = ::mmap(nullptr, size, access | PROT_READ, MAP_SHARED, file_, at);
      require(window != MAP_FAILED, "headroom.checkpoint.offload", "cannot map ", size,
              " bytes of a checkpoint's file: ", std::strerror(errno), "; keep checkpoints in memory");
      copy(static_cast<std::byte*>(window), at, size);
      ::munmap(window, size);
    }
  }

  std::int64_t bytes_;
  int file_ = -1;
};

inline Unpack keep_in_file(const at::Tensor& given) {
  const at::Tensor x = dense(given);
  const auto file = is_dry(x) ? nullptr : std::make_shared<const TensorFile>(x);
  return [file, sizes = x.sizes().vec(), strides = x.strides().vec(), options = x.options()] {
    const at::Tensor read = at::empty_strided(sizes, strides, options);
    if (file != nullptr) file->read(read);
    return read;
  };
}

inline Unpack keep_as_bf16(const at::Tensor& x) {
  if (x.scalar_type() != at::kFloat && x.scalar_type() != at::kDouble) return keep(x);
  return [rounded = x.to(at::kBFloat16), type = x.scalar_type()] { return rounded.to(type); };
}

}  // namespace detail

/// How a storage keeps the inputs of checkpoints. Integers and tensors of 16 bits are never rounded.
inline Pack checkpoint_pack(CheckpointStorage storage) {
  switch (storage) {
    case CheckpointStorage::bf16:
      return &detail::keep_as_bf16;
    case CheckpointStorage::offload:
      return [host = std::make_shared<detail::HostCopies>()](const at::Tensor& x) {
        return compute_device(x).is_cpu() ? detail::keep_in_file(x) : host->keep(x);
      };
    default:
      return &detail::keep;
  }
}

}  // namespace headroom::inline v0
