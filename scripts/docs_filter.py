#!/usr/bin/env python3
"""Prints a chapter as Doxygen reads it: formulas in its own marks, headings with the names that links use, and links to
files that are no pages of the site as plain code. Doxygen calls it for each Markdown file (docs/Doxyfile)."""

import re
import sys
from pathlib import Path


def name_of(file, heading):
    """What `FILE#heading` is called on the site: unique over all pages."""
    slug = re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
    return f"page_{re.sub(r'[^a-z0-9]', '_', Path(file).stem.lower())}-{slug}"


def link(match, file):
    text, target = match[1], match[2]
    path, _, anchor = target.partition("#")
    if target.startswith("http") or path.endswith(".png"):
        return match[0]
    if anchor:
        return f"[{text}](#{name_of(path or file, anchor)})"
    return match[0] if path.endswith(".md") else f"{text} (`{path.removeprefix('../')}`)"


def chapter_lines(text, file):
    code = False
    for line in text.splitlines():
        code ^= line.startswith("```")
        if not code and not line.startswith("```"):
            line = re.sub(r"^(#+) (.+)$", lambda m: f"{m[0]} {{#{name_of(file, m[2])}}}", line)
            parts = re.split(r"(`+[^`]*`+)", line)  # what stands in code stays
            for i in range(0, len(parts), 2):
                parts[i] = re.sub(r"\$\$(.+?)\$\$", r"\\f[\1\\f]", parts[i])
                parts[i] = re.sub(r"\$([^$]+?)\$", r"\\f$\1\\f$", parts[i])
            line = "".join(parts)
        yield line


def chapter(text, file):
    text = "\n".join(chapter_lines(text, file)) + "\n"
    # Links last: their text may hold code and go over the end of a line
    pieces = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", lambda match: link(match, file), pieces[i])
    return "".join(pieces)


if __name__ == "__main__":
    file = sys.argv[1]
    sys.stdout.write(chapter(Path(file).read_text(), file))
