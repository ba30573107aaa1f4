"""The single header of core is the same program as core's headers: a compiler's preprocessor makes the same text of
both. Made twice, it has the same bytes.

Usage: single_header.py <project folder> <compiler> [<flag>...]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

root, compiler, *flags = Path(sys.argv[1]).resolve(), *sys.argv[2:]


def preprocessed(include, folder):
    command = [compiler, "-std=c++20", "-fopenmp", "-E", "-P", *flags, f"-I{folder}", "-x", "c++", "-"]
    text = subprocess.run(command, input=f"#include <{include}>\n", capture_output=True, text=True, check=True).stdout
    return [line for line in text.splitlines() if line.strip()]


with tempfile.TemporaryDirectory() as folder:
    first, second = Path(folder) / "headroom_core.hpp", Path(folder) / "again.hpp"
    for target in (first, second):
        subprocess.run([sys.executable, root / "scripts" / "single_header.py", target], check=True)
    problems = []
    if first.read_bytes() != second.read_bytes():
        problems.append("two runs of scripts/single_header.py differ")
    if '#include "' in first.read_text():
        problems.append("the single header includes a file of the project")
    alone, apart = preprocessed("headroom_core.hpp", folder), preprocessed("headroom/core.hpp", root / "include")
    if alone != apart:
        line = next((a for a, b in zip(alone, apart) if a != b), "the end")
        problems.append(f"the single header is another program than the headers, from here on: {line}")
print("\n".join(problems) or f"{len(alone)} lines after the preprocessor, the same from both")
sys.exit(bool(problems))
