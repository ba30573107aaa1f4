#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "headroom/weights/bytes.hpp"
#include "headroom/weights/dtype.hpp"

// A pickle is a program for a stack machine that builds Python objects. This one builds numbers, fractions among them,
// texts, tuples, lists, dicts, storages and tensors. Whatever else a program asks for, it gets an opaque value, which
// remembers the name of the class or function that Python would have called. Nothing is called.

namespace headroom::inline v0::weights {

enum class PickleKind : std::uint8_t {
  none,
  boolean,
  integer,
  real,
  text,
  tuple,
  list,
  dict,
  storage,
  tensor,
  global,
  opaque
};

/// A value on the stack of the machine. What does not fit into it is kept in Pickle, and `index` is its place there;
/// values with the same index are one object.
struct PickleValue {
  PickleKind kind = PickleKind::none;
  std::uint32_t length = 0;  ///< of a text, in bytes
  union {
    std::int64_t integer = 0;  ///< also of a boolean
    double real;
    std::uint64_t index;  ///< of a text: where it begins in the file
  };

  static PickleValue of(PickleKind kind) {
    PickleValue value;
    value.kind = kind;
    return value;
  }
};

/// Name of a class or function, such as {"collections", "OrderedDict"}.
struct PickleGlobal {
  std::string_view module, name;
};

/// Elements of a tensor by the key that tells where they are in the file.
struct PickleStorage {
  std::string_view key;
  DType dtype = DType::f32;
  std::int64_t elements = 0;
};

struct PickleTensor {
  std::uint64_t storage = 0;   ///< its place in Pickle::storages
  std::int64_t offset = 0;     ///< of the first element, in elements
  PickleValue shape, strides;  ///< tuples or lists of integers
};

/// What a program has built.
struct Pickle {
  PickleValue root;
  std::vector<std::vector<PickleValue>>
      containers;                     ///< of tuples, lists and dicts; of a dict key, value, key, value, …
  std::vector<PickleGlobal> globals;  ///< of globals and opaque values
  std::vector<PickleStorage> storages;
  std::vector<PickleTensor> tensors;
  std::uint64_t end = 0;  ///< of the program in the file
  Bytes bytes = {};       ///< of the file

  std::string_view text(const PickleValue& value) const {
    return {reinterpret_cast<const char*>(bytes.data()) + value.index, value.length};
  }
  const std::vector<PickleValue>& items(const PickleValue& value) const { return containers[value.index]; }
  std::string global(const PickleValue& value) const {
    return std::string(globals[value.index].module) + "." + std::string(globals[value.index].name);
  }
};

}  // namespace headroom::inline v0::weights
