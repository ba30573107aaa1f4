#pragma once

#include <ATen/Parallel.h>
#include <torch/torch.h>

#include <algorithm>
#include <condition_variable>
#include <csignal>
#include <cstdint>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/memory/meter.hpp"
#include "headroom/training/example.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace headroom::inline v0::training {

/// How far and by how many threads examples are read ahead.
struct PrefetchOptions {
  std::int64_t examples = 8;  ///< that are kept, at most; 0: each is read when it is asked for
  std::int64_t threads = 1;   ///< that read; 0: as with 0 examples
};

namespace detail {

/// What a thread that reads examples has for its own: operators of LibTorch do not spread over further threads, which
/// those of the step need, and signals go to others.
inline void settle_reader_thread() {
  sigset_t all;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, nullptr);
#ifdef _OPENMP
  torch::zeros({1}).add_(1);  // LibTorch sets the number of a thread's threads when the thread first needs it
  static_cast<void>(at::get_num_threads());
  ::omp_set_num_threads(1);  // of this thread alone, unlike at::set_num_threads
#endif
}

}  // namespace detail

/// A source of batches that has its examples read in background threads before they are asked for.
///
///     Prefetch ahead(source, {.examples = 8, .threads = 2});
///     Trainer trainer(model, config, std::ref(ahead));
///
/// Reading begins with the first batch that is asked for and goes on behind the last one. Since an example is a
/// function of its index, a batch has the same bits with any number of threads. Any index may be asked for at any time,
/// as after a resume or when a step is repeated: what was read and still lies ahead is kept.
///
/// Memory: `examples` examples, finished or being read, and what `source` needs beside its result in each thread. What
/// the source throws is thrown where the example is asked for; asked for again, it is read again. The destructor waits
/// for the examples that are being read, one a thread at most.
class Prefetch {
 public:
  /// `source` is called by several threads at once, for one example at a time. Throws headroom.training.prefetch.
  Prefetch(BatchSource source, const PrefetchOptions& options) : source_(std::move(source)), options_(options) {
    require(options.examples >= 0 && options.threads >= 0 && options.threads <= kMostThreads,
            "headroom.training.prefetch", "got ", options.examples, " examples and ", options.threads,
            " threads, expected 0 or more examples and 0 to ", kMostThreads, " threads");
    if (options.examples == 0) return;
    try {
      for (std::int64_t i = 0; i < options.threads; ++i) threads_.emplace_back([this] { read_ahead(); });
    } catch (const std::system_error& error) {
      stop();
      fail("headroom.training.prefetch", "cannot start ", options.threads, " threads: ", error.code().message(),
           "; give fewer, or end other programs");
    } catch (...) {
      stop();
      throw;
    }
  }
  Prefetch(const Prefetch&) = delete;
  Prefetch& operator=(const Prefetch&) = delete;
  ~Prefetch() { stop(); }

  /// Examples first, …, first + count - 1: [B,C,S] and [B,N,C,S]. Throws what the source throws.
  Example operator()(std::int64_t first, std::int64_t count) {
    if (threads_.empty()) return source_(first, count);
    return batch_of(first, count, [this](std::int64_t index) { return take(index); });
  }

 private:
  static constexpr std::int64_t kMostThreads = 256;

  /// What came of reading an example.
  struct Outcome {
    Example example;
    std::exception_ptr error;
  };

  /// Waits for an example and hands it out; those behind it are wanted from now on.
  Example take(std::int64_t index) {
    std::unique_lock lock(mutex_);
    want(index);
    changed_.wait(lock, [&] { return failure_ || (window_.contains(index) && window_.at(index)); });
    if (failure_) std::rethrow_exception(failure_);
    const Outcome outcome = *std::exchange(window_.at(index), std::nullopt);
    want(index + 1);
    if (outcome.error) std::rethrow_exception(outcome.error);
    return outcome.example;
  }

  /// The examples from `first` on are wanted, others no longer.
  void want(std::int64_t first) {
    first_ = first;
    std::erase_if(window_, [&](const auto& entry) { return entry.first < first || entry.first >= first + room(); });
    changed_.notify_all();
  }

  /// The first wanted example that nobody reads or has read.
  std::optional<std::int64_t> next() const {
    if (!first_) return std::nullopt;
    for (std::int64_t index = *first_; index < *first_ + room(); ++index) {
      if (!window_.contains(index)) return index;
    }
    return std::nullopt;
  }

  std::int64_t room() const { return options_.examples; }

  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  /// What a thread does.
  void read_ahead() {
    try {
      detail::settle_reader_thread();
      read_wanted();
    } catch (...) {
      const std::lock_guard lock(mutex_);
      failure_ = std::current_exception();
      changed_.notify_all();
    }
  }

  void read_wanted() {
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [&] { return stopping_ || next(); });
      if (stopping_) return;
      const std::int64_t index = *next();
      window_.emplace(index, std::nullopt);
      lock.unlock();
      std::optional<Outcome> outcome = read(index);
      lock.lock();
      if (const auto entry = window_.find(index); entry != window_.end()) entry->second = std::move(outcome);
      changed_.notify_all();
    }
  }

  Outcome read(std::int64_t index) const {
    const torch::NoGradGuard guard;
    try {
      return {source_(index, 1), nullptr};
    } catch (...) {
      return {{}, std::current_exception()};
    }
  }

  MemoryMeter meter_;  ///< the first meter may not come, nor the last one go, while readers allocate
  BatchSource source_;
  PrefetchOptions options_;
  std::mutex mutex_;
  std::condition_variable changed_;  ///< of what follows
  std::optional<std::int64_t> first_;
  std::map<std::int64_t, std::optional<Outcome>> window_;  ///< of the wanted examples; nothing: being read
  bool stopping_ = false;
  std::exception_ptr failure_;  ///< what ended a thread
  std::vector<std::thread> threads_;
};

}  // namespace headroom::inline v0::training
