#pragma once

#include <cstddef>
#include <vector>

#include "headroom/weights/bytes.hpp"
#include "headroom/weights/pickle.hpp"

namespace headroom::inline v0::weights::detail {

/// Throws headroom.weights.pickle, which is the reader's id, unless `fine`; `what` goes on from "has a pickle that".
template <class... What>
void check_pickle(const ByteReader& reader, bool fine, const What&... what) {
  if (fine) [[likely]]
    return;
  reader.check(false, "has a pickle that ", what..., ", before ", reader.position());
}

/// The stack of the machine. What stands below a mark is out of reach until the mark is gone.
class PickleStack {
 public:
  /// Errors are told by the reader of the program.
  explicit PickleStack(const ByteReader& program) : program_(program) {}

  void push(const PickleValue& value) { values_.push_back(value); }
  void mark() { marks_.push_back(values_.size()); }

  PickleValue& top() {
    check_pickle(program_, values_.size() > (marks_.empty() ? 0 : marks_.back()), "takes more than it made");
    return values_.back();
  }
  PickleValue pop() {
    const PickleValue value = top();
    values_.pop_back();
    return value;
  }
  /// The last `count` values, the first of them first.
  std::vector<PickleValue> pop(std::size_t count) {
    std::vector<PickleValue> values(count);
    for (std::size_t i = count; i-- > 0;) values[i] = pop();
    return values;
  }
  /// What stands above the last mark, which goes with it.
  std::vector<PickleValue> pop_to_mark() {
    check_pickle(program_, !marks_.empty(), "goes back to a mark that it did not set");
    const auto begin = values_.begin() + static_cast<std::ptrdiff_t>(marks_.back());
    std::vector<PickleValue> values(begin, values_.end());
    values_.erase(begin, values_.end());
    marks_.pop_back();
    return values;
  }

 private:
  const ByteReader& program_;
  std::vector<PickleValue> values_;
  std::vector<std::size_t> marks_;
};

}  // namespace headroom::inline v0::weights::detail
