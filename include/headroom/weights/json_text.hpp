#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "headroom/weights/bytes.hpp"

namespace headroom::inline v0::weights {

/// Reads the little of JSON that a safetensors header is made of: the caller knows what comes next and asks for it, so
/// there is no tree and no recursion. Throws headroom.weights.safetensors for anything else.
class JsonText {
 public:
  /// `text` is UTF-8. Errors are told by `source`, a reader of the file.
  JsonText(std::string_view text, const ByteReader& source) : text_(text), source_(source) {}

  /// Whether `symbol` is next, which is then passed.
  bool accept(char symbol) {
    skip_space();
    const bool there = position_ < text_.size() && text_[position_] == symbol;
    position_ += there;
    return there;
  }
  void expect(char symbol) { check(accept(symbol), std::string("'") + symbol + "'"); }
  bool at_end() {
    skip_space();
    return position_ == text_.size();
  }

  /// A string, its escapes resolved.
  std::string string() {
    expect('"');
    std::string value;
    for (;;) {
      const char c = next();
      if (c == '"') return value;
      check(static_cast<unsigned char>(c) >= 0x20, "no control character within a string");
      c == '\\' ? append_escaped(value) : value.push_back(c);
    }
  }

  /// A whole number without sign that an int64 holds.
  std::int64_t integer() {
    skip_space();
    const std::size_t start = position_;
    std::int64_t value = 0;
    while (position_ < text_.size() && text_[position_] >= '0' && text_[position_] <= '9') {
      const bool overflows = __builtin_mul_overflow(value, std::int64_t{10}, &value) ||
                             __builtin_add_overflow(value, std::int64_t{text_[position_] - '0'}, &value);
      check(!overflows, "a number below 2^63");
      ++position_;
    }
    const std::size_t digits = position_ - start;
    check(digits == 1 || (digits > 1 && text_[start] != '0'), "a whole number");
    return value;
  }

  /// Calls `element` before each element of a list or member of an object, up to `close`; the opening is passed
  /// already.
  template <class F>
  void each_up_to(char close, F&& element) {
    if (accept(close)) return;
    do {
      element();
    } while (accept(','));
    expect(close);
  }

  /// Throws unless `fine`: at this place of the header `expected` should be.
  void check(bool fine, std::string_view expected) const {
    if (fine) [[likely]]
      return;
    source_.check(false, "has ", position_ < text_.size() ? in_quotes(text_.substr(position_, 12)) : "its end", " at ",
                  position_, " of its header, expected ", expected);
  }

 private:
  char next() {
    check(position_ < text_.size(), "the end of a string");
    return text_[position_++];
  }
  void skip_space() {
    while (position_ < text_.size() && std::string_view(" \t\r\n").find(text_[position_]) != std::string_view::npos) {
      ++position_;
    }
  }
  std::uint32_t four_digits() {
    std::uint32_t value = 0;
    for (int i = 0; i < 4; ++i) {
      constexpr std::string_view kDigits = "0123456789abcdef";
      const char c = next();
      const std::size_t digit = kDigits.find(c >= 'A' && c <= 'F' ? static_cast<char>(c - 'A' + 'a') : c);
      check(digit != kDigits.npos, "four hexadecimal digits");
      value = value * 16 + static_cast<std::uint32_t>(digit);
    }
    return value;
  }
  void append_escaped(std::string& value) {
    constexpr std::string_view kLetters = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
    const char c = next();
    if (const std::size_t letter = kLetters.find(c); letter != kLetters.npos) {
      value.push_back(kMeanings[letter]);
      return;
    }
    check(c == 'u', "an escape that JSON has");
    std::uint32_t code = four_digits();
    if (code >= 0xd800 && code < 0xdc00) {  // the first of a pair
      check(next() == '\\' && next() == 'u', "the second of two surrogates");
      const std::uint32_t second = four_digits();
      check(second >= 0xdc00 && second < 0xe000, "the second of two surrogates");
      code = 0x10000 + ((code - 0xd800) << 10) + (second - 0xdc00);
    }
    check(code < 0xd800 || code >= 0xe000, "the first of two surrogates");
    append_utf8(value, code);
  }
  static void append_utf8(std::string& value, std::uint32_t code) {
    const auto add = [&](std::uint32_t byte) { value.push_back(static_cast<char>(byte)); };
    if (code < 0x80) return add(code);
    if (code < 0x800) return add(0xc0 | code >> 6), add(0x80 | (code & 0x3f));
    if (code < 0x10000) return add(0xe0 | code >> 12), add(0x80 | (code >> 6 & 0x3f)), add(0x80 | (code & 0x3f));
    add(0xf0 | code >> 18), add(0x80 | (code >> 12 & 0x3f)), add(0x80 | (code >> 6 & 0x3f)), add(0x80 | (code & 0x3f));
  }

  std::string_view text_;
  const ByteReader& source_;
  std::size_t position_ = 0;
};

}  // namespace headroom::inline v0::weights
