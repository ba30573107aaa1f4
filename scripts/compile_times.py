#!/usr/bin/env python3
"""Measures what a unit of a program costs to compile: seconds of processor time and the compiler's largest memory, for
one unit that includes an umbrella header, kernels compiled elsewhere, and units that use attention. And what a build
took.

  scripts/compile_times.py [--torch FOLDER] [--compiler g++] [--flags "-O3"] [--json FILE] [--only core ...]
  scripts/compile_times.py --build build/release    the steps that Ninja noted down there: all of them, and the longest
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ATTEND = "torch::Tensor f(torch::Tensor q) { return headroom::attention(q, q, q); }"
# As programs with both compiled elsewhere
SEPARATE = "#define HEADROOM_SEPARATE_KERNELS\n#define HEADROOM_SEPARATE_TRAINING\n"
UMBRELLAS = sorted(path.name for path in (ROOT / "include" / "headroom").glob("*.hpp"))
UNITS = {  # name: (needs LibTorch, text)
    "core.hpp, attention used": (False, "#include <headroom/core.hpp>\nnamespace c = headroom::core;\n"
        "void f(const Eigen::MatrixXf& q, Eigen::MatrixXf& o) {\n"
        "  c::attention_forward<float>({.q = c::matrix_view(q), "
        ".k = c::matrix_view(q), .v = c::matrix_view(q), .output = c::matrix_view(o)});\n}"),
    "torch/torch.h alone": (True, "#include <torch/torch.h>"),
    "attention.hpp, used": (True, "#include <headroom/attention.hpp>\n" + ATTEND),
    "attention.hpp, used, kernels elsewhere": (True, SEPARATE + "#include <headroom/attention.hpp>\n" + ATTEND),
    **{name: (name != "core.hpp", SEPARATE + f"#include <headroom/{name}>") for name in UMBRELLAS},
}


def torch_includes(folder):
    folders = [folder] if folder else sorted(ROOT.glob(".venv/lib/python3*/site-packages/torch"))
    if not folders:
        return None
    include = Path(folders[0]) / "include"
    return [f"-isystem{include}", f"-isystem{include}/torch/csrc/api/include"]


def measure(command, text):
    """(processor seconds, MB) of one compilation."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "unit.cpp"
        source.write_text(text + "\n")
        process = subprocess.Popen([*command, "-c", source, "-o", Path(folder) / "unit.o"])
        _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            raise SystemExit(f"the compiler failed at:\n{text}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def build_times(folder):
    """Prints how long Ninja's steps took, by its log: the last time of each, those that ccache cut short included."""
    steps = {}
    for line in (Path(folder) / ".ninja_log").read_text().splitlines()[1:]:
        begin, end, _, output, command = line.split("\t")
        steps[command] = ((int(end) - int(begin)) / 1000, output)
    print(f"{sum(seconds for seconds, _ in steps.values()):8.1f} s  {len(steps)} steps, one after the other")
    for seconds, output in sorted(steps.values(), reverse=True)[:15]:
        print(f"{seconds:8.1f} s  {output}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help="LibTorch's folder; default: that of .venv")
    parser.add_argument("--compiler", default="g++")
    parser.add_argument("--flags", default="-O3")
    parser.add_argument("--only", nargs="+", default=[""], help="units whose name begins so")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--build", help="a build folder of Ninja's: print what its steps took instead")
    options = parser.parse_args()
    if options.build:
        return build_times(options.build)
    torch = torch_includes(options.torch)
    command = [options.compiler, "-std=c++20", *options.flags.split(), f"-I{ROOT}/include",
               "-isystem/usr/include/eigen3"]
    figures = {}
    print(f"{'unit':42} {'seconds':>8} {'MB':>7}")
    for name, (needs_torch, text) in UNITS.items():
        if not name.startswith(tuple(options.only)):
            continue
        if needs_torch and torch is None:
            print(f"{name:42} no LibTorch: name its folder with --torch")
            continue
        seconds, megabytes = measure(command + (torch if needs_torch else []), text)
        figures[name] = {"seconds": round(seconds, 2), "megabytes": round(megabytes)}
        print(f"{name:42} {seconds:8.1f} {megabytes:7.0f}", flush=True)
    if options.json:
        result = {"compiler": options.compiler, "flags": options.flags, "units": figures}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
