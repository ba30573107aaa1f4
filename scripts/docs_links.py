#!/usr/bin/env python3
"""Follows every link between the pages of a site: docs_links.py FOLDER names those that lead nowhere: a page, or a
place in a chapter. (Doxygen's own links within its lists are left alone: some lead to what it left out.)"""

import re
import sys
from pathlib import Path
from urllib.parse import unquote

folder = Path(sys.argv[1])
pages = {path.name: path.read_text(errors="replace") for path in folder.glob("*.html")}
names = {page: set(re.findall(r'(?:id|name)="([^"]+)"', text)) for page, text in pages.items()}
dead = set()
for page, text in pages.items():
    for target in re.findall(r'(?:href|src)="([^"]+)"', text):
        if re.match(r"[a-z]+:|//", target):
            continue
        file, _, anchor = unquote(target).partition("#")
        file = file or page
        if not (folder / file).exists() or (anchor.startswith("page_") and anchor not in names[file]):
            dead.add(f"{page}: {target}")
print("\n".join(sorted(dead)) or f"{len(pages)} pages, every link leads somewhere")
sys.exit(bool(dead))
