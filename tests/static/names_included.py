"""Each name of LibTorch or the standard library that a header uses stands in its namespace in a file that it includes.

Usage: names_included.py <project folder> <include folder>...

The folders are LibTorch's and the compiler's. This is what the compiler would say of each header alone, within seconds
instead of ten for each: headers_alone.py, which compiles them after the precompiled header, cannot see it. A name that
some included file mentions and does not declare, or includes under a condition, goes unseen here;
HEADROOM_HEADERS_ALONE=full makes headers_alone.py compile every header without the precompiled one.
"""

import re
import sys
from functools import cache
from pathlib import Path

root = Path(sys.argv[1])
folders = [root / "include", *map(Path, sys.argv[2:])]
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include(?:_next)?[ \t]*(?:"(.+?)"|<(.+?)>)', re.MULTILINE)
NAME = re.compile(r"(?<![\w:])(?:torch|at|c10|std)(?:::\w+)+")
TOKEN = re.compile(r"\bnamespace\s+([\w:\s]*)(?:\[\[.*?\]\]\s*)?\{|([{}])|(\w+)")
UNREAD = re.compile(r'//.*|/\*[\s\S]*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\])\'')
# Namespaces whose names are seen in another one too
SEEN_FROM = {"torch": ("torch", "at", "c10"), "at": ("at", "c10")}


@cache
def text_of(path):
    return path.read_text(errors="replace")


@cache
def found(name, beside):
    for folder in (beside, *folders) if beside else folders:
        if (folder / name).is_file():
            return (folder / name).resolve()
    return None


@cache
def includes(path):
    inner = [found(quoted or angled, path.parent if quoted else None)
             for quoted, angled in INCLUDE.findall(text_of(path))]
    return [file for file in inner if file]


@cache
def words(path):
    return frozenset(re.findall(r"\w+", text_of(path)))


@cache
def names_in(path):
    """The words of a file, each after the name of the namespace that it stands in."""
    names, scopes = set(), [""]
    for opened, brace, word in TOKEN.findall(UNREAD.sub(" ", text_of(path))):
        if word:
            names.add(scopes[-1] + word)
        elif brace == "{":
            scopes.append(scopes[-1])
        elif brace == "}":
            scopes = scopes[:-1] or [""]
        else:
            inner = "".join(part + "::" for part in opened.replace("inline", "").replace(" ", "").split("::") if part)
            scopes.append(scopes[-1] + inner)
    return frozenset(names)


def spellings(name):
    """What a file may declare for a qualified name to be known: itself or a class in front of it."""
    first, *rest = name.split("::")
    for namespace in SEEN_FROM.get(first, (first,)):
        for length in range(1, len(rest) + 1):
            *within, last = rest[:length]
            yield "::".join([namespace, *within, last])
            yield "::".join([namespace, *within, last.removeprefix("k")])  # kFloat is made of Float by a macro


def mentions(file, name):
    if name.startswith("std::"):  # a namespace that macros open and close
        return name.split("::")[1] in words(file)
    return not names_in(file).isdisjoint(spellings(name))


def files_behind(header):
    behind, open_files = set(), [header]
    while open_files:
        for file in includes(open_files.pop()):
            if file not in behind:
                behind.add(file)
                open_files.append(file)
    return behind


problems = []
headers = sorted((root / "include").glob("headroom/**/*.hpp"))
for header in headers:
    code = re.sub(r'//.*|"(?:\\.|[^"\\])*"', "", text_of(header))
    missing = set(NAME.findall(code))
    for file in files_behind(header.resolve()):
        missing = {name for name in missing if not mentions(file, name)}
    problems += [f"{header.relative_to(root)}: nothing that it includes mentions {name}" for name in sorted(missing)]
print("\n".join(problems))
print(f"{len(headers)} headers, {len(problems)} names that nothing included mentions")
sys.exit(bool(problems))
