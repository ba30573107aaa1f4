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

#include "headroom/io/number.hpp"
#include "headroom/weights/bytes.hpp"
#include "headroom/weights/dtype.hpp"
#include "headroom/weights/pickle.hpp"
#include "headroom/weights/pickle_opcode.hpp"
#include "headroom/weights/pickle_stack.hpp"

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
      const auto code = static_cast<Op>(reader_.number<std::uint8_t>());
      if (code == Op::stop) break;
      const bool known = push_atom(code) || push_number(code) || push_text(code) || remember(code) || rearrange(code) ||
                         build_container(code) || build_object(code);
      check(known, "has an instruction that is none of protocols 2 to 5 or is not read");
    }
    made_.root = stack_.pop();
    made_.end = reader_.position();
    return std::move(made_);
  }

 private:
  using Kind = PickleKind;
  using Op = PickleOpcode;
  static constexpr std::uint64_t kMostInstructions = std::uint64_t{1} << 22;

  template <class... What>
  void check(bool fine, const What&... what) const {
    check_pickle(reader_, fine, what...);
  }
  void push_container(Kind kind, std::vector<PickleValue> items) {
    made_.containers.push_back(std::move(items));
    push_index(kind, made_.containers.size() - 1);
  }
  void push_index(Kind kind, std::uint64_t index) {
    PickleValue value = PickleValue::of(kind);
    value.index = index;
    stack_.push(value);
  }

  // ---- instructions, by what they do; each function returns whether `code` is one of its own ----
  bool push_atom(Op code) {
    switch (code) {
      case Op::proto:  // the protocol
        check(reader_.number<std::uint8_t>() <= 5, "has a protocol above 5");
        return true;
      case Op::frame:  // the length of what follows
        reader_.take(8);
        return true;
      case Op::none:
        return stack_.push({}), true;
      case Op::newtrue:
        return push_integer(Kind::boolean, 1), true;
      case Op::newfalse:
        return push_integer(Kind::boolean, 0), true;
      default:
        return false;
    }
  }

  void push_integer(Kind kind, std::int64_t integer) {
    PickleValue value = PickleValue::of(kind);
    value.integer = integer;
    stack_.push(value);
  }
  bool push_number(Op code) {
    switch (code) {
      case Op::binint1:
        return push_integer(Kind::integer, reader_.number<std::uint8_t>()), true;
      case Op::binint2:
        return push_integer(Kind::integer, reader_.number<std::uint16_t>()), true;
      case Op::binint:
        return push_integer(Kind::integer, reader_.number<std::int32_t>()), true;
      case Op::long1:
        return push_long(reader_.number<std::uint8_t>()), true;
      case Op::long4:
        return push_long(reader_.number<std::uint32_t>()), true;
      case Op::binfloat: {  // big-endian
        std::uint64_t bits = 0;
        for (const std::byte byte : reader_.take(8)) bits = bits << 8 | static_cast<std::uint64_t>(byte);
        PickleValue value = PickleValue::of(Kind::real);
        value.real = std::bit_cast<double>(bits);
        stack_.push(value);
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

  bool push_text(Op code) {
    switch (code) {
      case Op::short_binunicode:
      case Op::short_binbytes:
      case Op::short_binstring:
        return push_text_of(reader_.number<std::uint8_t>()), true;
      case Op::binunicode:
      case Op::binbytes:
      case Op::binstring:
        return push_text_of(reader_.number<std::uint32_t>()), true;
      case Op::binunicode8:
      case Op::binbytes8:
      case Op::bytearray8:
        return push_text_of(reader_.number<std::uint64_t>()), true;
      default:
        return false;
    }
  }
  void push_text_of(std::uint64_t length) {
    PickleValue value = PickleValue::of(Kind::text);
    value.index = reader_.position();
    reader_.take(length);
    check(length <= std::numeric_limits<std::uint32_t>::max(), "has a text of 4 GiB");
    value.length = static_cast<std::uint32_t>(length);
    stack_.push(value);
  }

  /// A value gets a number, by which it is fetched again.
  bool remember(Op code) {
    switch (code) {
      case Op::binput:
        return memo_[reader_.number<std::uint8_t>()] = stack_.top(), true;
      case Op::long_binput:
        return memo_[reader_.number<std::uint32_t>()] = stack_.top(), true;
      case Op::memoize:
        return memo_[static_cast<std::uint32_t>(memo_.size())] = stack_.top(), true;
      case Op::binget:
        return recall(reader_.number<std::uint8_t>()), true;
      case Op::long_binget:
        return recall(reader_.number<std::uint32_t>()), true;
      default:
        return false;
    }
  }
  void recall(std::uint32_t number) {
    const auto found = memo_.find(number);
    check(found != memo_.end(), "fetches value ", number, ", which it did not keep");
    stack_.push(found->second);
  }

  bool rearrange(Op code) {
    switch (code) {
      case Op::mark:
        return stack_.mark(), true;
      case Op::pop:
        return static_cast<void>(stack_.pop()), true;
      case Op::pop_mark:
        return static_cast<void>(stack_.pop_to_mark()), true;
      case Op::dup:
        return stack_.push(stack_.top()), true;
      default:
        return false;
    }
  }

  bool build_container(Op code) {
    switch (code) {
      case Op::empty_tuple:
        return push_container(Kind::tuple, {}), true;
      case Op::empty_list:
        return push_container(Kind::list, {}), true;
      case Op::empty_dict:
        return push_container(Kind::dict, {}), true;
      case Op::tuple1:
        return push_container(Kind::tuple, stack_.pop(1)), true;
      case Op::tuple2:
        return push_container(Kind::tuple, stack_.pop(2)), true;
      case Op::tuple3:
        return push_container(Kind::tuple, stack_.pop(3)), true;
      case Op::tuple:
        return push_container(Kind::tuple, stack_.pop_to_mark()), true;
      case Op::list:
        return push_container(Kind::list, stack_.pop_to_mark()), true;
      case Op::dict:
        return push_container(Kind::dict, even(stack_.pop_to_mark())), true;
      case Op::append:
        return extend(Kind::list, stack_.pop(1)), true;
      case Op::appends:
        return extend(Kind::list, stack_.pop_to_mark()), true;
      case Op::setitem:
        return extend(Kind::dict, stack_.pop(2)), true;
      case Op::setitems:
        return extend(Kind::dict, even(stack_.pop_to_mark())), true;
      case Op::empty_set:
        return push_opaque({"builtins", "set"}), true;
      case Op::additems:
        return extend(Kind::opaque, stack_.pop_to_mark()), true;
      case Op::frozenset:
        return stack_.pop_to_mark(), push_opaque({"builtins", "frozenset"}), true;
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
    const PickleValue& container = stack_.top();
    if (container.kind == Kind::opaque) return;
    check(container.kind == kind, "adds elements to what has none");
    std::vector<PickleValue>& present = made_.containers[container.index];
    present.insert(present.end(), items.begin(), items.end());
  }

  // ---- objects ----
  bool build_object(Op code) {
    switch (code) {
      case Op::global: {
        const std::string_view module = reader_.line();
        return push_global({module, reader_.line()}), true;
      }
      case Op::stack_global: {
        const auto names = stack_.pop(2);
        check(names[0].kind == Kind::text && names[1].kind == Kind::text, "has a name that is no text");
        return push_global({made_.text(names[0]), made_.text(names[1])}), true;
      }
      case Op::reduce:
      case Op::newobj: {  // a function or class, and the arguments it would be called with
        const auto call = stack_.pop(2);
        return construct(call[0], call[1]), true;
      }
      case Op::newobj_ex: {  // with arguments by name
        const auto call = stack_.pop(3);
        return push_opaque(global_of(call[0])), true;
      }
      case Op::build:
        return static_cast<void>(stack_.pop()), static_cast<void>(stack_.top()),
               true;  // attributes, which none here has
      case Op::binpersid:
        return push_storage(stack_.pop()), true;
      default:
        return false;
    }
  }

  void push_global(const PickleGlobal& global) {
    require(!runs_commands(global), "headroom.weights.pickle", reader_.source().name, " would run ",
            in_quotes(global.module), " ", in_quotes(global.name),
            " when Python loads it, which no weights need: do not open it with Python, get the weights elsewhere");
    made_.globals.push_back(global);
    push_index(Kind::global, made_.globals.size() - 1);
  }
  void push_opaque(const PickleGlobal& global) {
    made_.globals.push_back(global);
    push_index(Kind::opaque, made_.globals.size() - 1);
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
    if (is_one_of(global, "fractions", "Fraction") && push_fraction(given)) return;
    const bool is_first_argument =
        is_one_of(global, "torch._utils", "_rebuild_parameter", "_rebuild_parameter_with_state") ||
        is_one_of(global, "torch", "Size") ||
        is_one_of(global, "torch.jit._pickle", "restore_type_tag", "build_intlist", "build_doublelist",
                  "build_boollist", "build_tensorlist");
    if (is_first_argument && !given.empty()) return stack_.push(given[0]);
    push_opaque(global);
  }

  /// ("39/5"), or (39, 5): a number. False where it is something else.
  bool push_fraction(const std::vector<PickleValue>& given) {
    PickleValue value = PickleValue::of(Kind::real);
    std::int64_t numerator = 0, denominator = 1;
    if (given.size() == 1 && given[0].kind == Kind::text) {
      const std::string_view text = made_.text(given[0]);
      const std::size_t slash = text.find('/');
      const auto above = io::parse_number<std::int64_t>(text.substr(0, slash));
      const auto below =
          slash == text.npos ? std::optional<std::int64_t>(1) : io::parse_number<std::int64_t>(text.substr(slash + 1));
      if (!above || !below) return false;
      numerator = *above;
      denominator = *below;
    } else if (given.size() == 2 && given[0].kind == Kind::integer && given[1].kind == Kind::integer) {
      numerator = given[0].integer;
      denominator = given[1].integer;
    } else {
      return false;
    }
    if (denominator <= 0) return false;
    value.real = static_cast<double>(numerator) / static_cast<double>(denominator);
    stack_.push(value);
    return true;
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
    push_index(Kind::storage, made_.storages.size() - 1);
  }

  /// (storage, offset, shape, strides, …)
  void push_tensor(const std::vector<PickleValue>& given) {
    const auto is_list = [](const PickleValue& value) { return value.kind == Kind::tuple || value.kind == Kind::list; };
    check(given.size() >= 4 && given[0].kind == Kind::storage && given[1].kind == Kind::integer && is_list(given[2]) &&
              is_list(given[3]),
          "has a tensor without storage, offset, shape or strides");
    made_.tensors.push_back({given[0].index, given[1].integer, given[2], given[3]});
    push_index(Kind::tensor, made_.tensors.size() - 1);
  }

  ByteReader reader_;
  Pickle made_;
  PickleStack stack_{reader_};
  std::unordered_map<std::uint32_t, PickleValue> memo_;
};

}  // namespace detail

/// Runs the pickle program that begins at `begin`. Throws headroom.weights.pickle where it is damaged, names a function
/// that runs commands, or is longer than weights need.
inline Pickle read_pickle(const Source& source, std::uint64_t begin = 0) {
  return detail::PickleMachine(source, begin).run();
}

}  // namespace headroom::inline v0::weights
