#!/usr/bin/env python3
"""Writes core as one header: headroom/core.hpp with everything of headroom that it includes, each header once, in the
order in which a compiler reads them. The same sources give the same bytes.

  scripts/single_header.py [FILE]     default: single_include/headroom_core.hpp
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = re.compile(r'#include "(headroom/.+)"\n')


def inlined(header, seen):
    """The lines of `header` with its own includes in place; nothing the second time."""
    if header in seen:
        return
    seen.add(header)
    for line in (ROOT / "include" / header).read_text().splitlines(keepends=True):
        if match := INCLUDE.fullmatch(line):
            yield from inlined(match[1], seen)
        elif line != "#pragma once\n":
            yield line


def single_header():
    version = re.search(r"project\(headroom VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text())[1]
    licence = "".join(f"// {line}".rstrip() + "\n" for line in (ROOT / "LICENSE").read_text().splitlines())
    body = "".join(inlined("headroom/core.hpp", set()))
    body = re.sub(r"\n{3,}", "\n\n", body).lstrip("\n")
    head = f"// headroom::core {version} in one file, made by scripts/single_header.py.\n//\n"
    return f"{head}{licence}#pragma once\n\n{body}"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "single_include" / "headroom_core.hpp"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(single_header())
    print(f"{target}: {target.stat().st_size} bytes")
