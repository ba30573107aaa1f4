"""Compiles each header by itself, with the flags of one unit of the build.

Usage: headers_alone.py <compile_commands.json> <compiler> <target> <header>...

<target> is the one whose flags are taken. When it has a precompiled header (torch/torch.h), a header is checked after
it, so a missing LibTorch or standard include goes unseen there; a missing headroom include does not. With
HEADROOM_HEADERS_ALONE=full in the environment it is left out: 8 to 18 s a header. Either way a unit ends at a failing
assertion: the compiler stops there, before it instantiates all that LibTorch left pending (8 s a unit).
"""

import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

END = "the header compiles alone"
database, compiler, target, *headers = sys.argv[1:]
entry = next(e for e in json.loads(Path(database).read_text()) if f"/{target}.dir/" in e["command"].split(" -o ")[1])
command = shlex.split(entry["command"])
command = command[command.index(compiler) : command.index("-o")]
uses_torch = "-include" in command
if uses_torch and os.environ.get("HEADROOM_HEADERS_ALONE") == "full":
    place = command.index("-include")
    del command[place : place + 2]


def complaint(header):
    unit = f'#include "{header}"\n'
    if uses_torch:
        unit += f'static_assert(false, "{END}");\n'
    run = subprocess.run(
        [*command, "-fsyntax-only", "-Wfatal-errors", "-x", "c++", "-"],
        cwd=entry["directory"], input=unit, capture_output=True, text=True,
    )
    ended_well = END in run.stderr if uses_torch else run.returncode == 0
    return "" if ended_well else f"{header} does not compile alone:\n{run.stderr}"


with ThreadPoolExecutor(2) as pool:
    found = [text for text in pool.map(complaint, headers) if text]
print("\n".join(found))
print(f"{len(headers)} headers, {len(found)} do not compile alone")
sys.exit(bool(found))
