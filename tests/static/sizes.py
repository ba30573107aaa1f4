"""What a reader has to hold in mind at once: a header has at most 400 lines, a function 60, and in core/ five
parameters. More want a named struct; outside of core/ LibTorch's own signatures have more.

Usage: sizes.py <project folder>
"""

import re
import sys
from pathlib import Path

HEADER_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 5
NO_FUNCTION = {"if", "for", "while", "switch", "catch", "return", "requires", "decltype", "sizeof", "alignas",
               "noexcept"}
COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|R"(\w*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'', re.S)
# What may stand between the parameters of a function and its body
TRAILER = re.compile(r"(?:\s|const\b|noexcept(?:\([^()]*\))?|override\b|final\b|&&?|__attribute__\(\([^()]*\)\)|"
                     r"->[\w:<>,\s*&\[\]]+|requires [\w:<>,\s&|]+|"
                      r":\s*(?:[\w:<>]+\s*(?:\([^;]*?\)|\{[^;]*?\})\s*,?\s*)+)*\Z", re.S)


def blank(text):
    """The same text, of the same lines, without comments and the contents of strings."""
    return COMMENT_OR_STRING.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


def matching(text, at):
    """The place of the bracket that belongs to the one at `at`."""
    depth = 0
    while at < len(text):
        depth += {"(": 1, ")": -1, "{": 1, "}": -1, "[": 1, "]": -1}.get(text[at], 0)
        if depth == 0:
            return at
        at += 1
    return -1


def split(parameters):
    """Parameters of a list, commas inside of brackets and of template arguments left alone."""
    depth, parts, part = 0, [], ""
    for i, c in enumerate(parameters):
        depth += (c in "([{<") - (c in ")]}" or (c == ">" and parameters[i - 1] != "-"))
        if c == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += c
    return [p for p in [*parts, part] if p.strip()]


def functions(text):
    """(name, first line, lines, parameters) of each function that has a body, lambdas left to the one around them."""
    end_of_last = 0
    for m in re.finditer(r"([~\w]+|operator[^\s\w(]{1,3}|operator\(\))\s*\(", text):
        name, opening = m[1], m.end() - 1
        if m.start() < end_of_last or name in NO_FUNCTION:
            continue
        closing = matching(text, opening)
        body = text.find("{", closing)
        while body >= 0 and not TRAILER.match(text[closing + 1 : body]) and ":" in text[closing + 1 : body] \
                and not re.search(r"[;}]", text[closing + 1 : body]):
            body = text.find("{", body + 1)  # a member that is initialised with braces
        if closing < 0 or body < 0 or not TRAILER.match(text[closing + 1 : body]):
            continue
        before = text[: m.start()].rstrip()
        if before.endswith((".", "->", "=", "(", ",", "return", "!", "&&", "||")):
            continue  # a call
        end = matching(text, body)
        line, lines = text.count("\n", 0, m.start()) + 1, text.count("\n", m.start(), end) + 1
        yield name, line, lines, split(text[opening + 1 : closing])
        end_of_last = end


def problems(include):
    for header in sorted(include.glob("**/*.hpp")):
        name, text = header.relative_to(include.parent), header.read_text()
        lines = text.count("\n")
        if lines > HEADER_LINES:
            yield f"{name}: {lines} lines, more than {HEADER_LINES}"
        for function, line, length, parameters in functions(blank(text)):
            if length > FUNCTION_LINES:
                yield f"{name}:{line}: {function} has {length} lines, more than {FUNCTION_LINES}"
            if len(parameters) > PARAMETERS and name.parts[1] == "core":
                yield f"{name}:{line}: {function} has {len(parameters)} parameters, more than {PARAMETERS}"


if __name__ == "__main__":
    found = list(problems(Path(sys.argv[1]) / "include/headroom"))
    print("\n".join(found))
    sys.exit(bool(found))
