"""Every C++ and Python block of README.md and of the page for its readers stands word for word, up to indentation, in a
program under examples/ that the tests compile or run.

Usage: readme.py <project folder>; exit code 77 when there is no README.md.
"""

import re
import sys
from pathlib import Path
from textwrap import dedent

root = Path(sys.argv[1])
pages = [page for page in (root / "README.md", root / "docs" / "005_which_reader.md") if page.exists()]
if not pages:
    print("skipped: no README.md")
    sys.exit(77)

programs = [*sorted(root.glob("examples/**/*.[ch]pp")), *sorted(root.glob("examples/**/*.py"))]
examples = [path.read_text().splitlines() for path in programs]


def stands_in(block, lines):
    size = len(block)
    return any(dedent("\n".join(lines[i : i + size])).splitlines() == block for i in range(len(lines) - size + 1))


found = []
for page in pages:
    for match in re.finditer(r"^```(?:cpp|c\+\+|python)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        block = dedent(match[1]).splitlines()
        if not any(stands_in(block, lines) for lines in examples):
            found.append(f"{page.name}: no program under examples/ has this block:\n{match[1]}")
print("\n".join(found))
sys.exit(bool(found))
