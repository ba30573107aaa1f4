"""What docs/120_design.md and CONTRIBUTING.md name in code type exists: files and folders, targets and presets, and
identifiers, which the library's headers must mention.

Usage: names_in_docs.py <project folder>; exit code 77 when there is no docs/120_design.md.
"""

import re
import sys
from pathlib import Path

root = Path(sys.argv[1])
pages = [page for page in (root / "docs/120_design.md", root / "CONTRIBUTING.md") if page.exists()]
if not pages:
    print("skipped: no docs/120_design.md")
    sys.exit(77)

PLACES = [root, root / "include/headroom"]
headers = " ".join(path.read_text() for path in root.glob("include/**/*.hpp"))
builds = " ".join(path.read_text() for pattern in ("CMake*", "tests/CMakeLists.txt", "tests/*/CMakeLists.txt",
                                                   "examples/CMakeLists.txt", "cmake/*") for path in root.glob(pattern))


def exists(name):
    if "/" in name:
        return any((place / name).exists() for place in PLACES)
    words = re.findall(r"[A-Za-z_]\w+", re.sub(r"\(.*\)|\[.*\]", "", name))
    return all(re.search(rf"\b{word}\b", headers + builds) for word in words)


found = []
for page in pages:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for name in re.findall(r"`([^`\n]+)`", text):
        if name.startswith(("-", "#", "std::", "ctest", "static:")) or " --" in name or ' "' in name:
            continue  # an option, a command line
        first = name.split(" ")[0]
        if not exists(first if "/" in first else name):
            found.append(f"{page.relative_to(root)}: nothing is called {name}")
print("\n".join(found))
sys.exit(bool(found))
