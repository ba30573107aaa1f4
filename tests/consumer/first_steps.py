"""The programs of "From nothing to running" in docs/010_getting_started.md, built and run by the commands that stand
there.

    first_steps.py CHAPTER FOLDER [--torch TORCH]     without what installs packages; TORCH is LibTorch's folder
    first_steps.py CHAPTER PACKAGE --root ROOT        all commands, in the system ROOT, and how long each took

What CMake is to find beyond the commands, it finds by the environment, as headroom_ROOT.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

INSTALLS = ("apt-get ", "pip ")
PRINTS = {"Eigen": r"largest output [0-9.]+, kernels for [a-z0-9]+",
          "LibTorch": r"stored scores would take 1.00 GiB, forward and backward took [0-9.]+ MiB"}

parser = argparse.ArgumentParser()
parser.add_argument("chapter", type=Path)
parser.add_argument("place", type=Path)
parser.add_argument("--torch", type=Path)
parser.add_argument("--root", type=Path)
options = parser.parse_args()


def programs():
    """For each program: its name, its files, its commands."""
    text = options.chapter.read_text().split("\n## From nothing to running\n")[1].split("\n## ")[0]
    for section in text.split("\n### A program on ")[1:]:
        blocks = dict(re.findall(r"^```(cpp|cmake|sh)\n(.*?)^```", section, re.MULTILINE | re.DOTALL))
        files = {"main.cpp": blocks["cpp"], "CMakeLists.txt": blocks["cmake"]}
        yield section.split("\n")[0], files, blocks["sh"].splitlines()


def run(command, folder):
    """What the command prints in the folder; it must succeed."""
    if options.root:
        inside = "/" + str(folder.relative_to(options.root))
        call = ["chroot", str(options.root), "sh", "-c", f"cd {shlex.quote(inside)} && {command}"]
    else:
        call = ["sh", "-c", command]
    done = subprocess.run(call, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


found = list(programs())
assert [name for name, *_ in found] == list(PRINTS), found
for name, files, commands in found:
    if name == "LibTorch" and not options.root and not options.torch:
        continue
    folder = (options.root / "first" if options.root else options.place) / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file, text in files.items():
        (folder / file).write_text(text)
    if options.root:
        shutil.copy(options.place, folder)
    elif options.torch:
        (folder / "python").mkdir()
        (folder / "python" / "torch").symlink_to(options.torch)
    begin, printed = time.monotonic(), ""
    for command in commands:
        if options.root or not command.startswith(INSTALLS):
            start = time.monotonic()
            printed = run(command, folder)
            print(f"{time.monotonic() - start:6.1f} s  {command}")
    assert re.search(PRINTS[name], printed), printed
    print(f"{time.monotonic() - begin:6.1f} s  in all, {name}: {printed.strip()}")
