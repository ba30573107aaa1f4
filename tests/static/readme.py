"""Every C++ and Python block of README.md and of the chapters stands word for word, up to indentation, in a program
under examples/, tests/docs/ or tests/python/ that the tests compile or run. (tests/consumer/first_steps.py takes the
programs of "From nothing to running" from the chapter itself.)

Usage: readme.py <project folder>; exit code 77 when there is no README.md.
"""

import re
import sys
from pathlib import Path
from textwrap import dedent

root = Path(sys.argv[1])
pages = [page for page in (root / "README.md", *sorted(root.glob("docs/*.md"))) if page.exists()]
if not pages:
    print("skipped: no README.md")
    sys.exit(77)

programs = [path for folder in ("examples", "tests/docs", "tests/python") for kind in ("cpp", "hpp", "py")
            for path in sorted(root.glob(f"{folder}/**/*.{kind}"))]
examples = [path.read_text().splitlines() for path in programs]


def stands_in(block, lines):
    size = len(block)
    return any(dedent("\n".join(lines[i : i + size])).splitlines() == block for i in range(len(lines) - size + 1))


found = []
for page in pages:
    text = re.sub(r"^## From nothing to running$.*?(?=^## )", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for match in re.finditer(r"^```(?:cpp|c\+\+|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        block = dedent(match[1]).splitlines()
        if not any(stands_in(block, lines) for lines in examples):
            found.append(f"{page.name}: no program under examples/, tests/docs/ or tests/python/ has this block:\n"
                         f"{match[1]}")
print("\n".join(found))
sys.exit(bool(found))
