#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <csignal>

#include "headroom/io/atomic_file.hpp"

namespace headroom::inline v0::io {

/// Opens those of the descriptors 0, 1 and 2 that are closed, so that no file gets one of them and what a library
/// prints ends up in it. To be called before anything is opened.
inline void open_standard_descriptors() noexcept {
  for (int descriptor = 0; descriptor <= 2; ++descriptor) {
    if (::fcntl(descriptor, F_GETFD) < 0) static_cast<void>(::open("/dev/null", O_RDWR) == descriptor);
  }
}

namespace detail {

inline volatile std::sig_atomic_t stop_signal = 0;

/// Removes temporary files and ends the process as if nobody had handled the signal.
inline void end_by(int signal) {
  discard_temporary_files();
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

/// Takes note of the first signal. SIGPIPE comes again with whatever is printed on the way to the end.
inline void note_and_end_by_next(int signal) {
  if (stop_signal != 0 && signal == SIGPIPE) return;
  if (stop_signal != 0) end_by(signal);
  stop_signal = signal;
}

}  // namespace detail

/// What a program does when it is told to stop.
enum class OnStop {
  end,          ///< end at once
  finish_first  ///< go on; the program asks stop_signal(). A second signal ends it at once
};

/// Handles the signals that ask a program to end, in a way that leaves no temporary files: SIGHUP, SIGINT, SIGQUIT,
/// SIGTERM, and SIGPIPE, which comes when nobody reads any more what is printed. SIGHUP and SIGPIPE stay ignored where
/// they are, as below nohup. SIGXFSZ is ignored: a file that may not grow is an error of the write then.
inline void handle_stop_signals(OnStop reaction) {
  std::signal(SIGXFSZ, SIG_IGN);
  for (const int signal : {SIGHUP, SIGINT, SIGPIPE, SIGQUIT, SIGTERM}) {
    struct sigaction before {};
    ::sigaction(signal, nullptr, &before);
    if (before.sa_handler == SIG_IGN && (signal == SIGHUP || signal == SIGPIPE)) continue;
    struct sigaction action {};
    action.sa_handler = reaction == OnStop::end ? detail::end_by : detail::note_and_end_by_next;
    action.sa_flags = SA_RESTART | SA_NODEFER;
    ::sigaction(signal, &action, nullptr);
  }
}

/// The first signal that came since handle_stop_signals(OnStop::finish_first), 0 where none did. A program that ends
/// for it returns 128 + this.
inline int stop_signal() noexcept { return detail::stop_signal; }

}  // namespace headroom::inline v0::io
