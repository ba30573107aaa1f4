#!/usr/bin/env python3
"""Runs scripts/gpu_check.sh with the programs of a build folder: without a GPU every part that needs one is reported as
skipped, none as failed. With one there is nothing to test here. Where PyTorch's side of train_step fails, ours is
reported.

check.py BUILD_FOLDER
"""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

build = pathlib.Path(sys.argv[1])
source = pathlib.Path(__file__).resolve().parents[2]
if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0:
    sys.exit(0)
with tempfile.TemporaryDirectory() as folder:
    programs, out = pathlib.Path(folder, "programs"), pathlib.Path(folder, "out")
    programs.mkdir()
    for name in ("tests/gpu_tests", "benchmarks/gpu_plan", "benchmarks/gpu_policies", "benchmarks/gpu_attention",
                 "benchmarks/train_step"):
        (programs / pathlib.Path(name).name).symlink_to(build / name)
    parts = ["tests", "plan", "policies", "step", "attention"]
    run = subprocess.run([source / "scripts/gpu_check.sh", "--programs", programs, "--out", out, "--minutes", "2",
                          "--parts", " ".join(parts)], capture_output=True, text=True,
                         env=os.environ | {"HEADROOM_PYTHON": sys.executable})
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((out / "gpu_check.json").read_text())
    results = {part["name"]: part["result"] for part in report["parts"]}
    assert results == {name: "skipped" for name in ("tests", "plan", "policies", "step", "attention")}, run.stdout
    assert report["build_seconds"] == 0
    assert "there is no cuda here" in (out / "gpu_check.log").read_text() or \
        "was not built for cuda" in (out / "gpu_check.log").read_text()
    report = pathlib.Path(folder, "step.json")
    run = subprocess.run([build / "benchmarks/train_step", source / "examples/configs/demo.json", "--segment", "11025",
                          "--steps", "2", "--rounds", "2", "--python", shutil.which("false"), "--json", report],
                         capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.count("[headroom.benchmarks.python] failed: ") == 1, run.stderr
    written = json.loads(report.read_text())
    assert [row["implementation"] for row in written["rows"]] == ["headroom"] and len(written["failures"]) == 1, written
wrong = subprocess.run([source / "scripts/gpu_check.sh", "--nonsense"], capture_output=True, text=True)
assert wrong.returncode == 2 and "--bundle DIR" in wrong.stderr, wrong.stderr
