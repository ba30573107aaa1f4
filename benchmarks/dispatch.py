"""What choosing the instruction set at run time costs: attention with plain flags and headroom::kernels, in multiples
of the time of the same program compiled header-only with -march=native. Both run in turns; the shortest run of each
counts.

Usage: dispatch.py <build folder> [--rounds N] [--json FILE]      compiles the two programs first, in a minute
"""

import argparse
import json
import re
import subprocess
from pathlib import Path

PROGRAMS = ("dispatch_plain", "dispatch_native")


def seconds_of(program):
    """The instruction set, and the seconds by (type, length, pass)."""
    lines = [line.split(",") for line in subprocess.check_output([program], text=True).splitlines()]
    return lines[0][1], {tuple(line[:3]): float(line[3]) for line in lines[1:]}


parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
parser.add_argument("build", type=Path)
parser.add_argument("--rounds", type=int, default=8)
parser.add_argument("--json", type=Path)
arguments = parser.parse_args()
subprocess.run(["cmake", "--build", arguments.build, "--target", *PROGRAMS], check=True)

best, sets = {program: {} for program in PROGRAMS}, {}
for _ in range(arguments.rounds):
    for program in PROGRAMS:
        sets[program], seconds = seconds_of(arguments.build / "benchmarks" / program)
        for case, value in seconds.items():
            best[program][case] = min(value, best[program].get(case, value))

print(f"headroom::kernels took {sets['dispatch_plain']}, -march=native is {sets['dispatch_native']}")
print(f"{'':32}{'plain, ms':>12}{'native, ms':>12}{'ratio':>8}")
rows = []
for case, native in best["dispatch_native"].items():
    plain = best["dispatch_plain"][case]
    rows.append({"type": case[0], "length": int(case[1]), "pass": case[2], "plain_seconds": plain,
                 "native_seconds": native})
    print(f"{case[0]}, L = {case[1]}, {case[2]}".ljust(32) +
          f"{1e3 * plain:12.3f}{1e3 * native:12.3f}{plain / native:8.3f}")
if arguments.json:
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    report = {"processor": processor and processor[1], "instruction_sets": sets, "rows": rows}
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
