"""The wheel: built by this Python, installed into a folder, used from outside the checkout, with each instruction set.

Usage: python_wheel.py SOURCE FOLDER SET...    SETs are instruction sets that this processor has
"""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

source, folder, sets = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
if missing := [name for name in ("torch", "scikit_build_core", "pip") if importlib.util.find_spec(name) is None]:
    print(f"skipped: this Python has no {', '.join(missing)}")
    sys.exit(0)

PROGRAM = """
import headroom, torch
torch.manual_seed(1)
inputs = [torch.randn(2, 3, 70, 24, requires_grad=True) for _ in range(3)]
weights = torch.randn(2, 3, 70, 24)
def run(attention):
    output = attention(*inputs)
    return output, *torch.autograd.grad(output, inputs, weights)
with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
    theirs = run(lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
ours = run(lambda q, k, v: headroom.attention(q, k, v, causal=True))
for a, b in zip(ours, theirs):
    torch.testing.assert_close(a, b)
print(headroom.__file__, headroom.instruction_set())
"""


def call(*command, **environment):
    """The exit status of the command, run outside the checkout, and what it printed."""
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


def pip(*arguments):
    status, text = call(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments,
                        CMAKE_BUILD_PARALLEL_LEVEL="2")
    assert status == 0, text


def use(site, **environment):
    return call(sys.executable, "-c", PROGRAM, PYTHONPATH=str(site), **environment)


shutil.rmtree(folder, ignore_errors=True)
folder.mkdir(parents=True)
pip("wheel", str(source), "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", "made")
[wheel] = (folder / "made").iterdir()
version = importlib.metadata.version("torch").split(".")[:2]
platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
assert wheel.name.endswith(f"-py3-none-{platform}.whl"), wheel.name  # of no Python version
with zipfile.ZipFile(wheel) as files:
    names = {name for name in files.namelist() if ".dist-info/" not in name}
    expected = ("__init__.py", "_built_for.py", "memory.py", "libheadroom_ops.so")
    assert names == {f"headroom/{name}" for name in expected}, names
    [metadata] = (files.read(name).decode() for name in files.namelist() if name.endswith(".dist-info/METADATA"))
    assert f"Requires-Dist: torch=={'.'.join(version)}.*" in metadata, metadata
    library = files.read("headroom/libheadroom_ops.so")
    for here in (source, Path(importlib.util.find_spec("torch").origin).resolve().parent):
        assert str(here).encode() not in library, f"the library holds paths of this machine: {here}"

site = folder / "site"
pip("install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
for name in ("", *sets):
    status, text = use(site, HEADROOM_ISA=name)
    assert status == 0, text
    file, used = text.split()
    assert Path(file).is_relative_to(site), f"{file} is not in {site}"
    assert used == name or not name and used in sets, f"asked for '{name}', got {used}"
    print(f"HEADROOM_ISA={name}: {used}")
status, text = use(site, HEADROOM_ISA="mmx")
assert status != 0 and "[headroom.core.instruction_set] HEADROOM_ISA is mmx" in text, text

# As another version of PyTorch would meet it
built_for = site / "headroom" / "_built_for.py"
built_for.write_text('TORCH = "1.9"\n')
status, text = use(site)
assert status != 0 and "ImportError: [headroom.python.torch] this headroom was built for PyTorch 1.9.*" in text, text
print("OK")
