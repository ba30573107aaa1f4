#include "support/files.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <ostream>

#include "headroom/io.hpp"
#include "support/catch.hpp"

using namespace headroom;
using headroom::testing::contains;
using headroom::testing::error_of;
using headroom::testing::read_bytes;
using headroom::testing::TemporaryFolder;
using headroom::testing::write_bytes;

namespace {

constexpr auto kId = "headroom.test.write";

/// What a child process that runs `f` ends with, as waitpid tells it.
template <class F>
int status_of(F&& f) {
  const pid_t child = fork();
  if (child == 0) {
    f();
    _exit(7);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status;
}

}  // namespace

TEST_CASE("a number is the whole text, finite and within its type") {
  CHECK(io::parse_number<double>("-2.5e3") == -2500);
  CHECK(io::parse_number<int64_t>("9223372036854775807") == std::numeric_limits<int64_t>::max());
  for (const char* text : {"", " 1", "1 ", "+1", "1x", "nan", "inf", "-infinity", "1e999", "0x10", "1,5"}) {
    INFO(text);
    CHECK_FALSE(io::parse_number<double>(text));
  }
  for (const char* text : {"", "1.0", "1e3", "9223372036854775808", "99999999999999999999", "-9223372036854775809"}) {
    INFO(text);
    CHECK_FALSE(io::parse_number<int64_t>(text));
  }
  CHECK_FALSE(io::parse_number<int>("2147483648"));
}

TEST_CASE("an atomic file follows links, takes over what a killed process left, and belongs to one at a time") {
  const TemporaryFolder folder;
  const auto path = folder / "a", link = folder / "link";
  write_bytes(path, "old");
  write_bytes(folder / "a.partial", "left by a process that was killed");
  std::filesystem::create_symlink("a", link);
  {
    io::AtomicFile file(link, kId);
    CHECK(contains(error_of([&] { io::write_file(path, kId, {"x"}); }).what(), "another process is writing it"));
    CHECK(::write(file.descriptor(), "new", 3) == 3);
    file.finish();
    CHECK(read_bytes(path) == "old");
    file.publish();
  }
  CHECK(read_bytes(path) == "new");
  CHECK(std::filesystem::is_symlink(link));
  CHECK(folder.names().size() == 2);
  CHECK_THROWS_AS(io::write_file(path, kId, [](std::ostream& out) { out << "half", throw std::runtime_error("stop"); }),
                  std::runtime_error);
  CHECK(read_bytes(path) == "new");
  CHECK(folder.names().size() == 2);

  std::filesystem::create_symlink("to itself", folder / "to itself");
  for (const std::filesystem::path& wrong : {folder.path(), folder / "no/a", path / "b", folder / "to itself"}) {
    CHECK_FALSE(io::why_not_writable(wrong).empty());
    CHECK(error_of([&] { io::write_file(wrong, kId, {"x"}); }).id() == kId);
  }
  io::write_file("/dev/null", kId, {"x"});

  // The longest name that there can be, one that differs from it in its last letter, and one that is too long
  const std::string longest(255, 'n');
  {
    const io::AtomicFile one(folder / longest, kId), other(folder / (longest.substr(1) + "m"), kId);
    CHECK(folder.names().size() == 5);
  }
  io::write_file(folder / longest, kId, {"x"});
  CHECK(read_bytes(folder / longest) == "x");
  CHECK(contains(error_of([&] { io::write_file(folder / (longest + "n"), kId, {"x"}); }).what(), "too long"));
  CHECK(std::filesystem::is_character_file("/dev/null"));
}

TEST_CASE("a signal that ends the process removes temporary files") {
  const TemporaryFolder folder;
  const int ended = status_of([&] {
    io::handle_stop_signals(io::OnStop::end);
    const io::AtomicFile first(folder / "a", kId), second(folder / "b", kId);
    std::raise(SIGTERM);
  });
  CHECK((WIFSIGNALED(ended) && WTERMSIG(ended) == SIGTERM));
  CHECK(folder.names().empty());
  const int noted = status_of([&] {
    std::signal(SIGHUP, SIG_IGN);  // as below nohup
    io::handle_stop_signals(io::OnStop::finish_first);
    io::AtomicFile file(folder / "a", kId);
    std::raise(SIGHUP);
    if (io::stop_signal() != 0) _exit(1);
    std::raise(SIGINT);
    std::raise(SIGPIPE);  // what is printed on the way to the end meets the same closed pipe
    if (io::stop_signal() != SIGINT) _exit(2);
    std::raise(SIGTERM);
  });
  CHECK((WIFSIGNALED(noted) && WTERMSIG(noted) == SIGTERM));
  CHECK(folder.names().empty());
}

TEST_CASE("a folder is one process's until it ends") {
  const TemporaryFolder folder;
  int ready[2], done[2];
  REQUIRE((pipe(ready) == 0 && pipe(done) == 0));
  const pid_t child = fork();
  if (child == 0) {
    const io::FolderLock lock(folder.path(), kId);
    char wait = 0;
    _exit(::write(ready[1], "x", 1) == 1 && ::read(done[0], &wait, 1) == 1 ? 0 : 1);
  }
  char answer = 0;
  REQUIRE(::read(ready[0], &answer, 1) == 1);
  CHECK(error_of([&] { io::FolderLock(folder.path(), kId); }).id() == kId);
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  CHECK_NOTHROW(io::FolderLock(folder.path(), kId));
  CHECK(folder.names().empty());
}

TEST_CASE("closed standard descriptors are opened, so that no file becomes one of them") {
  const TemporaryFolder folder;
  const int status = status_of([&] {
    for (const int number : {0, 1, 2}) ::close(number);
    io::open_standard_descriptors();
    const io::AtomicFile file(folder / "a", kId);
    _exit(file.descriptor() > 2 ? 0 : 1);
  });
  CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 0));
}
