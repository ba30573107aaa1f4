"""Umbrella headers (include/headroom/*.hpp) hold includes only and name every header of their folder. Those that a
program includes by itself because of what they link are installed with headroom::training.

Usage: umbrellas.py <project folder>
"""

import re
import sys
from pathlib import Path

# Headers that a program includes by itself, each for the reason given.
OPT_IN = {
    "attention/register_ops.hpp": "registers operators when it is included: for one unit of a program",
    **dict.fromkeys((f"audio/{name}.hpp" for name in (
        "file", "format", "reader", "recording_level", "resampler", "separate_file", "sound_file", "stem_files",
        "writer")),
        "needs libsndfile or libsoxr, which headroom::headroom does not link"),
}


def problems(include):
    for umbrella in sorted(include.glob("*.hpp")):
        name = umbrella.relative_to(include.parent)
        included = set()
        for number, line in enumerate(umbrella.read_text().splitlines(), 1):
            match = re.fullmatch(r'#include "headroom/(.+)"', line)
            if match:
                included.add(match[1])
            elif line.strip() and line != "#pragma once" and not line.startswith("//"):
                yield f"{name}:{number}: an umbrella header holds includes only: {line}"
        if umbrella.stem == "headroom":
            expected = {header.name for header in include.glob("*.hpp")} - {umbrella.name}
        else:
            expected = {header.relative_to(include).as_posix() for header in include.glob(f"{umbrella.stem}/*.hpp")}
        for missing in sorted(expected - included - OPT_IN.keys()):
            yield f"{name}: does not include headroom/{missing}"
    for folder in sorted(path for path in include.iterdir() if path.is_dir()):
        if not folder.with_suffix(".hpp").exists():
            yield f"headroom/{folder.name}: has no umbrella headroom/{folder.name}.hpp"


def problems_of_targets(build_file):
    if not build_file.exists():
        return
    [names] = re.findall(r"training_audio ([\w ]+)\)", build_file.read_text())
    installed = {f"audio/{name}.hpp" for name in names.split()}
    for header in sorted(installed ^ {name for name in OPT_IN if name.startswith("audio/")}):
        yield f"CMakeLists.txt: training_headers and tests/static/umbrellas.py disagree whether {header} is one"


root = Path(sys.argv[1])
found = [*problems(root / "include" / "headroom"), *problems_of_targets(root / "CMakeLists.txt")]
print("\n".join(found))
sys.exit(bool(found))
