#!/usr/bin/env python3
"""Measures what a unit of a program costs to compile: seconds of processor time and the compiler's largest memory, for
one unit of each umbrella header, with attention used or only included.

  scripts/compile_times.py [--torch FOLDER] [--compiler g++] [--flags "-O3"] [--json FILE] [--only core ...]
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ATTEND = "torch::Tensor f(torch::Tensor q) { return headroom::attention(q, q, q); }"
SEPARATE = "#define HEADROOM_SEPARATE_KERNELS\n"
UNITS = {  # name: (needs LibTorch, text)
    "core.hpp": (False, "#include <headroom/core.hpp>"),
    "core.hpp, attention used": (False, "#include <headroom/core.hpp>\nnamespace c = headroom::core;\n"
        "void f(const Eigen::MatrixXf& q, Eigen::MatrixXf& o) {\n  c::attention_forward<float>({.q = c::matrix_view(q), "
        ".k = c::matrix_view(q), .v = c::matrix_view(q), .output = c::matrix_view(o)});\n}"),
    "torch/torch.h alone": (True, "#include <torch/torch.h>"),
    "attention.hpp": (True, "#include <headroom/attention.hpp>"),
    "attention.hpp, used": (True, "#include <headroom/attention.hpp>\n" + ATTEND),
    "attention.hpp, used, kernels elsewhere": (True, SEPARATE + "#include <headroom/attention.hpp>\n" + ATTEND),
    "memory.hpp": (True, "#include <headroom/memory.hpp>"),
    "checkpoint.hpp": (True, "#include <headroom/checkpoint.hpp>"),
    "nn.hpp, kernels elsewhere": (True, SEPARATE + "#include <headroom/nn.hpp>"),
    "plan.hpp, kernels elsewhere": (True, SEPARATE + "#include <headroom/plan.hpp>"),
    "headroom.hpp, kernels elsewhere": (True, SEPARATE + "#include <headroom/headroom.hpp>"),
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help="LibTorch's folder; default: that of .venv")
    parser.add_argument("--compiler", default="g++")
    parser.add_argument("--flags", default="-O3")
    parser.add_argument("--only", nargs="+", default=[""], help="units whose name begins so")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch = torch_includes(options.torch)
    command = [options.compiler, "-std=c++20", *options.flags.split(), f"-I{ROOT}/include", "-isystem/usr/include/eigen3"]
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
        options.json.write_text(json.dumps({"compiler": options.compiler, "flags": options.flags, "units": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
