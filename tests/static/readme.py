"""Every C++ block of README.md stands word for word, up to indentation, in a program under examples/ that is compiled.

Usage: readme.py <project folder>; exit code 77 when there is no README.md.
"""

import re
import sys
from pathlib import Path
from textwrap import dedent

root = Path(sys.argv[1])
readme = root / "README.md"
if not readme.exists():
    print("skipped: no README.md")
    sys.exit(77)

examples = [path.read_text().splitlines() for path in sorted(root.glob("examples/**/*.[ch]pp"))]


def stands_in(block, lines):
    size = len(block)
    return any(dedent("\n".join(lines[i : i + size])).splitlines() == block for i in range(len(lines) - size + 1))


found = []
for match in re.finditer(r"^```(?:cpp|c\+\+)\n(.*?)^```", readme.read_text(), re.MULTILINE | re.DOTALL):
    block = dedent(match[1]).splitlines()
    if not any(stands_in(block, lines) for lines in examples):
        found.append(f"README.md: no program under examples/ has this block:\n{match[1]}")
print("\n".join(found))
sys.exit(bool(found))
