// Stands before libc in a tool (LD_PRELOAD) and lets one of its calls fail, as a full disk, a dying one or too little
// memory do.
//
// HEADROOM_FAILING=disk counts calls that change regular files; =memory counts those that get memory for tensors: one
// for each small tensor, and one for each range of the arena of large ones. HEADROOM_FAIL_FROM=N fails call N (from 1
// on) and, with ENOSPC, all after it; of those for memory also the next two, since the arena asks for less and then
// malloc. With none, calls are only counted. HEADROOM_FAIL_WITH=ENOSPC|EIO|short: the error, or a write of half the
// bytes. HEADROOM_CALLS=FILE gets their number.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <string_view>

namespace {

std::string_view setting(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

std::atomic<long> calls = 0;

/// Whether this call is one that fails.
bool fails() {
  const std::string_view from = setting("HEADROOM_FAIL_FROM");
  const long call = ++calls, first = from.empty() ? 0 : std::atol(from.data());
  if (setting("HEADROOM_FAILING") == "memory") return first > 0 && call >= first && call < first + 3;
  return first > 0 && (setting("HEADROOM_FAIL_WITH") == "ENOSPC" ? call >= first : call == first);
}

bool fails_on_disk() { return setting("HEADROOM_FAILING") == "disk" && fails(); }

bool is_file(int descriptor) {
  struct stat status {};
  return descriptor > STDERR_FILENO && fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode);
}

/// The file that calls, a library or the program.
std::string_view file_of(const void* caller) {
  Dl_info file;
  return dladdr(caller, &file) != 0 ? file.dli_fname : "";
}
/// Whether LibTorch's allocator of tensors calls; the libraries below it do not check what they get.
bool is_tensor(const void* caller) { return file_of(caller).find("libc10.so") != std::string_view::npos; }
/// Whether the program calls itself: for its arena of tensors.
bool is_program(const void* caller) { return file_of(caller).find(".so") == std::string_view::npos; }
bool fails_in_memory() { return setting("HEADROOM_FAILING") == "memory" && fails(); }

bool is_short() { return setting("HEADROOM_FAIL_WITH") == "short"; }
std::size_t half(std::size_t size) { return (size + 1) / 2; }
int error() { return setting("HEADROOM_FAIL_WITH") == "EIO" ? EIO : ENOSPC; }

int failed() {
  errno = error();
  return -1;
}

/// The function that this library stands before.
template <class Function>
Function* real(Function*, const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}
#define HEADROOM_REAL(function)                             \
  []() {                                                    \
    static const auto found = real(&::function, #function); \
    return found;                                           \
  }()

struct Report {
  ~Report() {
    const std::string_view path = setting("HEADROOM_CALLS");
    if (path.empty()) return;
    const int file = open(path.data(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    char text[32];
    const int size = std::snprintf(text, sizeof text, "%ld", calls.load());
    if (HEADROOM_REAL(write)(file, text, static_cast<std::size_t>(size)) != size) std::abort();
    close(file);
  }
} report;

}  // namespace

extern "C" {

ssize_t write(int descriptor, const void* bytes, size_t size) {
  if (!is_file(descriptor) || !fails_on_disk()) return HEADROOM_REAL(write)(descriptor, bytes, size);
  return is_short() ? HEADROOM_REAL(write)(descriptor, bytes, half(size)) : failed();
}

ssize_t writev(int descriptor, const iovec* parts, int count) {
  if (!is_file(descriptor) || !fails_on_disk()) return HEADROOM_REAL(writev)(descriptor, parts, count);
  return is_short() ? HEADROOM_REAL(write)(descriptor, parts->iov_base, half(parts->iov_len)) : failed();
}

ssize_t pwrite(int descriptor, const void* bytes, size_t size, off_t offset) {
  if (!is_file(descriptor) || !fails_on_disk()) return HEADROOM_REAL(pwrite)(descriptor, bytes, size, offset);
  return is_short() ? HEADROOM_REAL(pwrite)(descriptor, bytes, half(size), offset) : failed();
}

int fsync(int descriptor) { return !is_short() && fails_on_disk() ? failed() : HEADROOM_REAL(fsync)(descriptor); }

int ftruncate(int descriptor, off_t size) noexcept {
  return !is_short() && fails_on_disk() ? failed() : HEADROOM_REAL(ftruncate)(descriptor, size);
}

int fallocate(int descriptor, int mode, off_t offset, off_t size) {
  return !is_short() && fails_on_disk() ? failed() : HEADROOM_REAL(fallocate)(descriptor, mode, offset, size);
}

int rename(const char* from, const char* to) noexcept {
  return !is_short() && fails_on_disk() ? failed() : HEADROOM_REAL(rename)(from, to);
}

int mkdir(const char* path, mode_t mode) noexcept {
  return !is_short() && fails_on_disk() ? failed() : HEADROOM_REAL(mkdir)(path, mode);
}

int posix_memalign(void** memory, size_t alignment, size_t size) noexcept {
  if (is_tensor(__builtin_return_address(0)) && fails_in_memory()) return ENOMEM;
  return HEADROOM_REAL(posix_memalign)(memory, alignment, size);
}

void* mmap(void* address, size_t size, int protection, int flags, int file, off_t offset) noexcept {
  if (file == -1 && is_program(__builtin_return_address(0)) && fails_in_memory()) {
    errno = ENOMEM;
    return MAP_FAILED;
  }
  return HEADROOM_REAL(mmap)(address, size, protection, flags, file, offset);
}
}
