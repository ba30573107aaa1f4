#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "headroom/weights/bytes.hpp"
#include "headroom/weights/dtype.hpp"
#include "headroom/weights/pickle.hpp"

namespace headroom::inline v0::weights {

namespace detail {

inline bool is_one_of(const PickleGlobal& global, std::string_view module, auto... names) {
  return global.module == module && (... || (global.name == std::string_view(names)));
}

/// Whether a program that names this global is made to harm who loads it in Python.
inline bool runs_commands(const PickleGlobal& global) {
  constexpr std::array<std::string_view, 8> kModules = {"os",  "posix", "nt",     "subprocess",
                                                        "pty", "sys",   "socket", "runpy"};
  return std::ranges::find(kModules, global.module) != kModules.end() ||
         is_one_of(global, "builtins", "eval", "exec", "compile", "open", "__import__", "breakpoint") ||
         is_one_of(global, "__builtin__", "eval", "execfile", "compile", "open", "__import__", "file");
}

/// Runs one program. An instruction makes at most one value and moves values from the stack into at most one container,
/// so that what is kept is bounded by the length of the program, and that by kMostInstructions.
class PickleMachine {
 public:
  PickleMachine(const Source& source, std::uint64_t begin) : reader_(source, "headroom.weights.pickle", begin) {
    made_.bytes = source.bytes;
  }

  Pickle run() {
    for (std::uint64_t count = 0;; ++count) {
      reader_.check(count < kMostInstructions, "has a pickle of more than ", kMostInstructions,
                    " instructions, more than weights need");
      const auto code = static_cast<char>(reader_.number<std::uint8_t>());
      if (code == '.') break;
      const bool known = push_atom(code) || push_number(code) || push_text(code) || remember(code) || rearrange(code) ||
                         build_container(code) || build_object(code);
      check(known, "has an instruction that is none of protocols 2 to 5 or is not read");
    }
    made_.root = pop();
    made_.end = reader_.position();
    return std::move(made_);
  }

 private:
  using Kind = PickleKind;
  static constexpr std::uint64_t kMostInstructions = std::uint64_t{1} << 22;

  // ---- stack ----
  /// Throws headroom.weights.pickle unless `fine`.
  template <class... What>
  void check(bool fine, const What&... what) const {
    if (fine) [[likely]]
      return;
    reader_.check(false, "has a pickle that ", what..., ", before ", reader_.position());
  }
  static PickleValue of(Kind kind) {
    PickleValue value;
    value.kind = kind;
    return value;
  }
  std::size_t floor() const { return marks_.empty() ? 0 : marks_.back(); }
  void push(PickleValue value) { stack_.push_back(value); }
  void push(Kind kind, std::uint64_t index) {
    PickleValue value = of(kind);
    value.index = index;
    push(value);
  }
  PickleValue pop() {
    check(stack_.size() > floor(), "takes more than it made");
    const PickleValue value = stack_.back();
    stack_.pop_back();
    return value;
  }
  PickleValue& top() {
    check(stack_.size() > floor(), "takes more than it made");
    return stack_.back();
  }
  /// What stands above the last mark, which goes with it.
  std::vector<PickleValue> pop_to_mark() {
    check(!marks_.empty(), "goes back to a mark that it did not set");
    const auto begin = stack_.begin() + static_cast<std::ptrdiff_t>(marks_.back());
    std::vector<PickleValue> values(begin, stack_.end());
    stack_.erase(begin, stack_.end());
    marks_.pop_back();
    return values;
  }
  void push_container(Kind kind, std::vector<PickleValue> items) {
    made_.containers.push_back(std::move(items));
    push(kind, made_.containers.size() - 1);
  }
  /// The last `count` values, the first of them first.
  std::vector<PickleValue> pop_values(std::size_t count) {
    std::vector<PickleValue> values(count);
    for (std::size_t i = count; i-- > 0;) values[i] = pop();
    return values;
  }

  // ---- instructions, by what they do; each function returns whether `code` is one of its own ----
  bool push_atom(char code) {
    switch (code) {
      case '\x80':  // the protocol
        check(reader_.number<std::uint8_t>() <= 5, "has a protocol above 5");
        return true;
      case '\x95':  // the length of what follows
        reader_.take(8);
        return true;
      case 'N':
        return push({}), true;
      case '\x88':
        return push_integer(Kind::boolean, 1), true;
      case '\x89':
        return push_integer(Kind::boolean, 0), true;
      default:
        return false;
    }
  }

  void push_integer(Kind kind, std::int64_t integer) {
    PickleValue value = of(kind);
    value.integer = integer;
    push(value);
  }
  bool push_number(char code) {
    switch (code) {
      case 'K':
        return push_integer(Kind::integer, reader_.number<std::uint8_t>()), true;
      case 'M':
        return push_integer(Kind::integer, reader_.number<std::uint16_t>()), true;
      case 'J':
        return push_integer(Kind::integer, reader_.number<std::int32_t>()), true;
      case '\x8a':
        return push_long(reader_.number<std::uint8_t>()), true;
      case '\x8b':
        return push_long(reader_.number<std::uint32_t>()), true;
      case 'G': {  // big-endian
        std::uint64_t bits = 0;
        for (const std::byte byte : reader_.take(8)) bits = bits << 8 | static_cast<std::uint64_t>(byte);
        PickleValue value = of(Kind::real);
        value.real = std::bit_cast<double>(bits);
        push(value);
        return true;
      }
      default:
        return false;
    }
  }
  /// An integer of any length; one that an int64 does not hold becomes opaque.
  void push_long(std::uint64_t count) {
    const Bytes bytes = reader_.take(count);
    if (count > 8) return push_opaque({"builtins", "int"});
    std::uint64_t bits = count > 0 && (bytes[count - 1] & std::byte{0x80}) != std::byte{0} ? ~std::uint64_t{0} : 0;
    for (std::size_t i = count; i-- > 0;) bits = bits << 8 | static_cast<std::uint64_t>(bytes[i]);
    push_integer(Kind::integer, static_cast<std::int64_t>(bits));
  }

  bool push_text(char code) {
    switch (code) {
      case '\x8c':
      case 'C':
      case 'U':
        return push_text_of(reader_.number<std::uint8_t>()), true;
      case 'X':
      case 'B':
      case 'T':
        return push_text_of(reader_.number<std::uint32_t>()), true;
      case '\x8d':
      case '\x8e':
      case '\x96':
        return push_text_of(reader_.number<std::uint64_t>()), true;
      default:
        return false;
    }
  }
  void push_text_of(std::uint64_t length) {
    PickleValue value = of(Kind::text);
    value.index = reader_.position();
    reader_.take(length);
    check(length <= std::numeric_limits<std::uint32_t>::max(), "has a text of 4 GiB");
    value.length = static_cast<std::uint32_t>(length);
    push(value);
  }

  /// A value gets a number, by which it is fetched again.
  bool remember(char code) {
    switch (code) {
      case 'q':
        return memo_[reader_.number<std::uint8_t>()] = top(), true;
      case 'r':
        return memo_[reader_.number<std::uint32_t>()] = top(), true;
      case '\x94':
        return memo_[static_cast<std::uint32_t>(memo_.size())] = top(), true;
      case 'h':
        return recall(reader_.number<std::uint8_t>()), true;
      case 'j':
        return recall(reader_.number<std::uint32_t>()), true;
      default:
        return false;
    }
  }
  void recall(std::uint32_t number) {
    const auto found = memo_.find(number);
    check(found != memo_.end(), "fetches value ", number, ", which it did not keep");
    push(found->second);
  }

  bool rearrange(char code) {
    switch (code) {
      case '(':
        return marks_.push_back(stack_.size()), true;
      case '0':
        return static_cast<void>(pop()), true;
      case '1':
        return static_cast<void>(pop_to_mark()), true;
      case '2':
        return push(top()), true;
      default:
        return false;
    }
  }

  bool build_container(char code) {
    switch (code) {
      case ')':
        return push_container(Kind::tuple, {}), true;
      case ']':
        return push_container(Kind::list, {}), true;
      case '}':
        return push_container(Kind::dict, {}), true;
      case '\x85':
        return push_container(Kind::tuple, pop_values(1)), true;
      case '\x86':
        return push_container(Kind::tuple, pop_values(2)), true;
      case '\x87':
        return push_container(Kind::tuple, pop_values(3)), true;
      case 't':
        return push_container(Kind::tuple, pop_to_mark()), true;
      case 'l':
        return push_container(Kind::list, pop_to_mark()), true;
      case 'd':
        return push_container(Kind::dict, even(pop_to_mark())), true;
      case 'a':
        return extend(Kind::list, pop_values(1)), true;
      case 'e':
        return extend(Kind::list, pop_to_mark()), true;
      case 's':
        return extend(Kind::dict, pop_values(2)), true;
      case 'u':
        return extend(Kind::dict, even(pop_to_mark())), true;
      case '\x8f':
        return push_opaque({"builtins", "set"}), true;
      case '\x90':
        return extend(Kind::opaque, pop_to_mark()), true;
      case '\x91':
        return pop_to_mark(), push_opaque({"builtins", "frozenset"}), true;
      default:
        return false;
    }
  }
  std::vector<PickleValue> even(std::vector<PickleValue> items) const {
    check(items.size() % 2 == 0, "has a dict with a key without value");
    return items;
  }
  /// Adds to the container on top; what is added to an opaque value is dropped.
  void extend(Kind kind, std::vector<PickleValue> items) {
    const PickleValue& container = top();
    if (container.kind == Kind::opaque) return;
    check(container.kind == kind, "adds elements to what has none");
    std::vector<PickleValue>& present = made_.containers[container.index];
    present.insert(present.end(), items.begin(), items.end());
  }

  // ---- objects ----
  bool build_object(char code) {
    switch (code) {
      case 'c': {
        const std::string_view module = reader_.line();
        return push_global({module, reader_.line()}), true;
      }
      case '\x93': {
        const auto names = pop_values(2);
        check(names[0].kind == Kind::text && names[1].kind == Kind::text, "has a name that is no text");
        return push_global({made_.text(names[0]), made_.text(names[1])}), true;
      }
      case 'R':
      case '\x81': {  // a function or class, and the arguments it would be called with
        const auto call = pop_values(2);
        return construct(call[0], call[1]), true;
      }
      case '\x92': {  // with arguments by name
        const auto call = pop_values(3);
        return push_opaque(global_of(call[0])), true;
      }
      case 'b':
        return static_cast<void>(pop()), static_cast<void>(top()), true;  // attributes, which none here has
      case 'Q':
        return push_storage(pop()), true;
      default:
        return false;
    }
  }

  void push_global(const PickleGlobal& global) {
    require(!runs_commands(global), "headroom.weights.pickle", reader_.source().name, " would run ",
            in_quotes(global.module), " ", in_quotes(global.name),
            " when Python loads it, which no weights need: do not open it with Python, get the weights elsewhere");
    made_.globals.push_back(global);
    push(Kind::global, made_.globals.size() - 1);
  }
  void push_opaque(const PickleGlobal& global) {
    made_.globals.push_back(global);
    push(Kind::opaque, made_.globals.size() - 1);
  }
  PickleGlobal global_of(const PickleValue& value) const {
    check(value.kind == Kind::global || value.kind == Kind::opaque, "calls what is no function");
    return made_.globals[value.index];
  }

  void construct(const PickleValue& callee, const PickleValue& arguments) {
    const PickleGlobal global = global_of(callee);
    if (callee.kind == Kind::opaque || arguments.kind != Kind::tuple) return push_opaque(global);
    const std::vector<PickleValue>& given = made_.items(arguments);
    if (is_one_of(global, "torch._utils", "_rebuild_tensor_v2", "_rebuild_tensor")) return push_tensor(given);
    if (is_one_of(global, "collections", "OrderedDict") && given.empty()) return push_container(Kind::dict, {});
    const bool is_first_argument =
        is_one_of(global, "torch._utils", "_rebuild_parameter", "_rebuild_parameter_with_state") ||
        is_one_of(global, "torch", "Size") ||
        is_one_of(global, "torch.jit._pickle", "restore_type_tag", "build_intlist", "build_doublelist",
                  "build_boollist", "build_tensorlist");
    if (is_first_argument && !given.empty()) return push(given[0]);
    push_opaque(global);
  }

  /// ("storage", class, key, device, number of elements)
  void push_storage(const PickleValue& identifier) {
    check(identifier.kind == Kind::tuple, "has a storage without description");
    const std::vector<PickleValue>& parts = made_.items(identifier);
    check(parts.size() >= 5 && parts[0].kind == Kind::text && made_.text(parts[0]) == "storage" &&
              parts[1].kind == Kind::global && parts[2].kind == Kind::text && parts[4].kind == Kind::integer &&
              parts[4].integer >= 0,
          "has a storage without type, key or size");
    const PickleGlobal& type = made_.globals[parts[1].index];
    const auto dtype = type.module == "torch" ? dtype_called(&DTypeNames::torch_storage, type.name) : std::nullopt;
    check(dtype.has_value(), "has a storage of type ", in_quotes(type.name), ", which is not read");
    check(parts.size() < 6 || parts[5].kind == Kind::none,
          "has a storage that is a view of another, which is not read");
    made_.storages.push_back({made_.text(parts[2]), *dtype, parts[4].integer});
    push(Kind::storage, made_.storages.size() - 1);
  }

  /// (storage, offset, shape, strides, …)
  void push_tensor(const std::vector<PickleValue>& given) {
    const auto is_list = [](const PickleValue& value) { return value.kind == Kind::tuple || value.kind == Kind::list; };
    check(given.size() >= 4 && given[0].kind == Kind::storage && given[1].kind == Kind::integer && is_list(given[2]) &&
              is_list(given[3]),
          "has a tensor without storage, offset, shape or strides");
    made_.tensors.push_back({given[0].index, given[1].integer, given[2], given[3]});
    push(Kind::tensor, made_.tensors.size() - 1);
  }

  ByteReader reader_;
  Pickle made_;
  std::vector<PickleValue> stack_;
  std::vector<std::size_t> marks_;
  std::unordered_map<std::uint32_t, PickleValue> memo_;
};

}  // namespace detail

/// Runs the pickle program that begins at `begin`. Throws headroom.weights.pickle where it is damaged, names a function
/// that runs commands, or is longer than weights need.
inline Pickle read_pickle(const Source& source, std::uint64_t begin = 0) {
  return detail::PickleMachine(source, begin).run();
}

}  // namespace headroom::inline v0::weights
