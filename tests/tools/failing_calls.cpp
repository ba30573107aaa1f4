// Stands before libc in a tool (LD_PRELOAD) and lets one of its calls fail, as a full disk, a dying one or too little
// memory do.
//
// HEADROOM_FAILING=disk counts calls that change regular files; =memory counts those that get memory for tensors: one
// for each small tensor, and one for each range of the arena of large ones; =places counts what else the program gets
// memory for, itself or through the standard library, threads included: the first time at each place, which is the
// chain of its functions that leads there. HEADROOM_FAIL_FROM=N fails call N (from 1 on) and, with ENOSPC, all after
// it; of those for memory of tensors also the next two, since the arena asks for less and then malloc. With none, calls
// are only counted. HEADROOM_FAIL_WITH=ENOSPC|EIO|short: the error, or a write of half the bytes. HEADROOM_CALLS=FILE
// gets their number, HEADROOM_PLACE=FILE the place that failed: where in the program its function lies.
#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
#include <unwind.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdint>
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

/// The file that an address lies in: a library, or "" for the program. With the place in it, the same in each run.
struct Place {
  std::string_view file;
  std::uintptr_t offset = 0;

  bool in(std::string_view library) const { return file.find(library) != std::string_view::npos; }
};
Place place_of(const void* address) {
  dl_find_object found;
  if (_dl_find_object(const_cast<void*>(address), &found) != 0) return {"unknown"};
  return {found.dlfo_link_map->l_name, reinterpret_cast<std::uintptr_t>(address) - found.dlfo_link_map->l_addr};
}

/// Whether LibTorch's allocator of tensors calls; the libraries below it do not check what they get.
bool is_tensor(const void* caller) { return place_of(caller).in("libc10.so"); }
/// Whether the program calls itself: for its arena of tensors.
bool is_program(const void* caller) { return place_of(caller).file.empty(); }
bool fails_in_memory() { return setting("HEADROOM_FAILING") == "memory" && fails(); }

/// The program's functions that call, up to four of them; none where another library than the standard ones does.
struct Chain {
  std::uint64_t number = 0;  // for all of them
  std::uintptr_t first = 0;
  int length = 0;
};
Chain chain_of_program() {
  Chain chain;
  _Unwind_Backtrace(
      [](_Unwind_Context* frame, void* state) {
        Chain& found = *static_cast<Chain*>(state);
        const Place place = place_of(reinterpret_cast<const void*>(_Unwind_GetIP(frame)));
        if (place.in("libfailing_calls") || place.in("libstdc++") || place.in("libc.so")) return _URC_NO_REASON;
        if (!place.file.empty()) return _URC_END_OF_STACK;
        if (found.length == 0) found.first = place.offset;
        found.number = (found.number ^ place.offset) * 0x9E3779B97F4A7C15U;
        return ++found.length < 4 ? _URC_NO_REASON : _URC_END_OF_STACK;
      },
      &chain);
  return chain;
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

/// Into the file that the environment variable `name` names, if there is one.
void write_number(const char* name, long number) {
  const std::string_view path = setting(name);
  if (path.empty()) return;
  const int file = open(path.data(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
  char text[32];
  const int size = std::snprintf(text, sizeof text, "%ld", number);
  if (HEADROOM_REAL(write)(file, text, static_cast<std::size_t>(size)) != size) std::abort();
  close(file);
}

/// Whether this call for memory is one that fails: the program's, from main on, and the first at its place.
bool in_main = false;
bool fails_at_place() {
  static std::array<std::atomic<std::uint64_t>, 1 << 16> known;
  if (!in_main || setting("HEADROOM_FAILING") != "places") return false;
  const Chain chain = chain_of_program();
  if (chain.length == 0) return false;
  for (std::uint64_t slot = chain.number >> 48;; slot = (slot + 1) % known.size()) {
    std::uint64_t other = 0;
    if (known[slot].compare_exchange_strong(other, chain.number)) break;
    if (other == chain.number) return false;
  }
  if (!fails()) return false;
  write_number("HEADROOM_PLACE", static_cast<long>(chain.first));
  return true;
}

bool is_short() { return setting("HEADROOM_FAIL_WITH") == "short"; }
std::size_t half(std::size_t size) { return (size + 1) / 2; }
int error() { return setting("HEADROOM_FAIL_WITH") == "EIO" ? EIO : ENOSPC; }

int failed() {
  errno = error();
  return -1;
}

using Main = int (*)(int, char**, char**);
Main main_of_program = nullptr;

struct Report {
  ~Report() { write_number("HEADROOM_CALLS", calls); }
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

// What the program starts with; its static variables are made before main
int __libc_start_main(Main program, int count, char** arguments, void (*start)(), void (*end)(), void (*unload)(),
                      void* stack) {
  main_of_program = program;
  const auto start_main = reinterpret_cast<decltype(&__libc_start_main)>(dlsym(RTLD_NEXT, "__libc_start_main"));
  const Main noting = [](int words, char** line, char** environment) {
    in_main = true;
    return main_of_program(words, line, environment);
  };
  return start_main(noting, count, arguments, start, end, unload, stack);
}

// glibc's own, since a search for the function after this one may itself get memory
void* __libc_malloc(size_t size);
void* __libc_calloc(size_t count, size_t size);
void* __libc_realloc(void* memory, size_t size);
void* __libc_memalign(size_t alignment, size_t size);

void* no_memory() {
  errno = ENOMEM;
  return nullptr;
}
void* malloc(size_t size) { return fails_at_place() ? no_memory() : __libc_malloc(size); }
void* calloc(size_t count, size_t size) { return fails_at_place() ? no_memory() : __libc_calloc(count, size); }
void* realloc(void* memory, size_t size) { return fails_at_place() ? no_memory() : __libc_realloc(memory, size); }
int pthread_create(pthread_t* thread, const pthread_attr_t* wishes, void* (*function)(void*), void* argument) noexcept {
  return fails_at_place() ? EAGAIN : HEADROOM_REAL(pthread_create)(thread, wishes, function, argument);
}
void* aligned_alloc(size_t alignment, size_t size) {
  return fails_at_place() ? no_memory() : __libc_memalign(alignment, size);
}

void* mmap(void* address, size_t size, int protection, int flags, int file, off_t offset) noexcept {
  if (file == -1 && is_program(__builtin_return_address(0)) && fails_in_memory()) {
    errno = ENOMEM;
    return MAP_FAILED;
  }
  return HEADROOM_REAL(mmap)(address, size, protection, flags, file, offset);
}
}
