#pragma once

#include <ATen/DimVector.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "headroom/checkpoint/saved_tensors.hpp"
#include "headroom/runtime/dry_run.hpp"

namespace headroom::inline v0::detail {

/// x where its elements fill its memory without gaps, else a copy for which they do.
inline at::Tensor dense(const at::Tensor& x) { return x.is_non_overlapping_and_dense() ? x : x.contiguous(); }

/// Tensors of an accelerator, kept in pinned memory of the host. Copies run on a stream of their own beside the
/// computation: on the way out two at most, so that no more than two tensors wait for their release; on the way back
/// the tensor that was kept before the one that is asked for, which backward will ask for next.
class HostCopies : public std::enable_shared_from_this<HostCopies> {
 public:
  Unpack keep(const at::Tensor& given) {
    const std::scoped_lock lock(mutex_);
    const at::Tensor x = dense(given);
    auto entry = std::make_shared<Entry>(x);
    if (!is_dry(x)) {
      const c10::impl::VirtualGuardImpl device(x.device().type());
      const c10::Stream copies = stream(x.device());
      c10::Event computed(x.device().type());
      computed.record(device.getStream(x.device()));
      computed.block(copies);
      {
        const c10::StreamGuard on_copies(copies);
        entry->host.copy_(x, /*non_blocking=*/true);
      }
      device.recordDataPtrOnStream(x.storage().data_ptr(), copies);  // its memory is not used again before
      entry->arrived.emplace(x.device().type()).record(copies);
      leaving_.push_back(entry);
      if (leaving_.size() > 2) {
        leaving_.front()->arrived->synchronize();
        leaving_.pop_front();
      }
    }
    order_.push_back(entry);
    return [self = shared_from_this(), entry] { return self->bring_back(*entry); };
  }

 private:
  struct Entry {
    explicit Entry(const at::Tensor& x)
        : device(x.device()), options(x.options()), sizes(x.sizes()), strides(x.strides()) {
      if (!is_dry(x)) host = at::empty_strided(sizes, strides, options.device(at::kCPU).pinned_memory(true));
    }
    c10::Device device;
    at::TensorOptions options;
    at::DimVector sizes, strides;
    at::Tensor host;                    // undefined in a dry run, whose device has none of it
    at::Tensor back;                    // on its way to the device, or there
    std::optional<c10::Event> arrived;  // of the last copy
  };

  at::Tensor bring_back(Entry& entry) {
    const std::scoped_lock lock(mutex_);
    start(entry);
    const at::Tensor x = std::exchange(entry.back, {});
    if (entry.host.defined()) {
      const c10::impl::VirtualGuardImpl device(entry.device.type());
      const c10::Stream compute = device.getStream(entry.device);
      entry.arrived->block(compute);
      device.recordDataPtrOnStream(x.storage().data_ptr(), compute);
    }
    while (!order_.empty()) {
      const auto last = order_.back().lock();
      if (last != nullptr && last.get() != &entry) {
        start(*last);
        break;
      }
      order_.pop_back();
    }
    return x;
  }

  void start(Entry& entry) {
    if (entry.back.defined()) return;
    if (!entry.host.defined()) {
      entry.back = at::empty_strided(entry.sizes, entry.strides, entry.options);
      return;
    }
    const c10::Stream copies = stream(entry.device);
    const c10::StreamGuard on_copies(copies);
    entry.back = at::empty_strided(entry.sizes, entry.strides, entry.options);
    entry.back.copy_(entry.host, /*non_blocking=*/true);
    entry.arrived->record(copies);
  }

  c10::Stream stream(c10::Device device) {
    const auto known = streams_.find(device.index());
    if (known != streams_.end()) return known->second;
    const c10::impl::VirtualGuardImpl guard(device.type());
    return streams_.emplace(device.index(), guard.getStreamFromGlobalPool(device)).first->second;
  }

  std::mutex mutex_;
  std::map<c10::DeviceIndex, c10::Stream> streams_;
  std::deque<std::shared_ptr<Entry>> leaving_;
  std::vector<std::weak_ptr<Entry>> order_;
};

}  // namespace headroom::inline v0::detail
