"""Every error id that include/ uses has a section in docs/errors.md (a line `### headroom.module.what`), and vice
versa.

Usage: errors.py <project folder>; exit code 77 when there is no docs/errors.md.
"""

import re
import sys
from pathlib import Path

root = Path(sys.argv[1])
listed = root / "docs" / "errors.md"
if not listed.exists():
    print("skipped: no docs/errors.md")
    sys.exit(77)

ID = r"headroom(?:\.[a-z0-9_]+){2,}"
used = {}
for header in sorted(root.glob("include/**/*.hpp")):
    code = re.sub(r"//.*", "", header.read_text())
    for identifier in re.findall(rf'"({ID})"', code):
        used.setdefault(identifier, header.relative_to(root))
documented = re.findall(rf"^### ({ID})\s*$", listed.read_text(), re.MULTILINE)

found = [f"{used[i]}: {i} is not in docs/errors.md" for i in sorted(used.keys() - set(documented))]
found += [f"docs/errors.md: nothing throws {i}" for i in sorted(set(documented) - used.keys())]
found += [f"docs/errors.md: {i} is listed twice" for i in sorted(set(documented)) if documented.count(i) > 1]
print("\n".join(found))
sys.exit(bool(found))
