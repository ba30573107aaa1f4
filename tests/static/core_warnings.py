"""Compiles core's tests as a project with many warnings does, and complains of every warning that lies in a header of
core. The headers are ordinary includes; no code is generated.

Usage: core_warnings.py <project folder> <compiler> [<flag>...]; exit code 77 when there is no such compiler.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

# clang's -Wconversion has -Wsign-conversion in it. GCC's has not, and its own would be about the extents of arrays
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion"]

root, compiler, *flags = Path(sys.argv[1]).resolve(), *sys.argv[2:]
if not shutil.which(compiler):
    print(f"skipped: no compiler {compiler}")
    sys.exit(77)

# One unit: what all of them include is read once
units = [*sorted(root.glob("examples/010*.cpp")), *sorted(root.glob("tests/core/*.cpp"))]
command = [compiler, "-std=c++20", "-fsyntax-only", *WARNINGS, *flags, f"-I{root}/include", f"-I{root}/tests",
           "-x", "c++", "-"]
unit = "".join(f'#include "{path}"\n' for path in units)
run = subprocess.run(command, input=unit, capture_output=True, text=True)
found = sorted(set(re.findall(r"^\S*include/headroom/\S+ warning: .*|^.* error: .*", run.stderr, re.MULTILINE)))
print("\n".join(found))
print(f"{compiler} {' '.join(flags)}: {len(units)} units, {len(found)} warnings in core's headers")
sys.exit(bool(found) or run.returncode)
