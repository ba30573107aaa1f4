"""What the object of an instruction set defines under a name that others may define too is in a namespace of that set:
the linker takes one definition of each name, and one with wider vectors ends a program on a processor without them.
Data may have any name.

Usage: symbols.py <nm> <instruction set> <object>
"""

import subprocess
import sys

nm, name, path = sys.argv[1:]
listed = subprocess.run([nm, "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
symbols = [line[17:].split(" ", 1) for line in listed.splitlines()]
functions = [symbol for kind, symbol in symbols if kind in "TWwuiI"]
others = [f for f in functions if f"::{name}::" not in f]
print("\n".join(others) or f"{len(functions)} functions, all of {name}")
sys.exit(bool(others) or not functions)
