"""Includes point one way: each folder of include/headroom uses only the folders and libraries below it. What includes
internals of LibTorch includes the check of its version. And no header asks the standard library whether a number is
finite, which a project that compiles it with -ffast-math asks in vain.

Usage: includes.py <project folder>
"""

import re
import sys
from pathlib import Path

FOLDERS = {
    "core": {"core"},
    "io": {"core", "io"},
    "runtime": {"core", "runtime"},
    "attention": {"core", "runtime", "attention"},
    "checkpoint": {"core", "io", "runtime", "checkpoint"},
    "memory": {"core", "runtime", "memory"},
    "plan": {"core", "runtime", "checkpoint", "memory", "plan"},
    "optim": {"core", "runtime", "optim"},
    "audio": {"core", "io", "runtime", "audio"},
    "nn": {"core", "runtime", "attention", "checkpoint", "nn"},
    "weights": {"core", "io", "weights"},
    "models": {"core", "runtime", "attention", "checkpoint", "audio", "nn", "weights", "models"},
    "training": {
        "core", "io", "runtime", "attention", "checkpoint", "memory", "plan", "optim", "audio", "nn", "weights",
        "models", "training"
    },
}
STANDARD = re.compile(r"[a-z_0-9]+|immintrin\.h|omp\.h|(sys/[a-z]+|unistd|fcntl|malloc|poll)\.h")
EIGEN = re.compile(r"(unsupported/)?Eigen/.+")
TORCH = re.compile(r"(torch|ATen|c10)/.+")
TORCH_INTERNALS = re.compile(
    r"torch/csrc/autograd/(graph_task|engine|function_hook|functions/accumulate_grad|saved_variable_hooks)\.h|"
    r"c10/core/(CachingDeviceAllocator|AllocatorConfig)\.h|c10/core/impl/LocalDispatchKeySet\.h|"
    r"ATen/core/dispatch/Dispatcher\.h|ATen/ops/\w+_native\.h")
TORCH_VERSION = '#include "headroom/runtime/torch_version.hpp"\n'
TRAINING = re.compile(r"nlohmann/.+|s(ndfile|oxr)\.h|yaml-cpp/.+|rubberband/.+")
# Headers of the target headroom::training that live in another folder.
TRAINING_HEADERS = {
    f"audio/{name}.hpp" for name in ("format", "reader", "resampler", "sound_file", "writer")
}


def problems(include):
    for header in sorted(include.glob("*/**/*.hpp")):
        name = header.relative_to(include)
        folder = name.parts[0]
        text = header.read_text()
        if folder not in FOLDERS:
            yield f"headroom/{name}: the folder {folder} has no rule in tests/static/includes.py"
            continue
        if text.splitlines()[:1] != ["#pragma once"]:
            yield f"headroom/{name}: the first line is not #pragma once"
        for asked in re.findall(r"\bstd::(?:isfinite|isnan|isinf|isnormal|fpclassify)\b", text):
            yield f"headroom/{name}: {asked} is left out under -ffast-math; see core/finite.hpp"
        libraries = [STANDARD, EIGEN]
        if folder not in ("core", "io"):
            libraries.append(TORCH)
        if folder == "training" or name.as_posix() in TRAINING_HEADERS:
            libraries.append(TRAINING)
        for quoted, angled in re.findall(r'^\s*#\s*include\s+(?:"(.+?)"|<(.+?)>)', text, re.MULTILINE):
            if angled:
                allowed = any(library.fullmatch(angled) for library in libraries)
            else:
                own = re.fullmatch(r"headroom/(\w+)(/.+)?\.hpp", quoted)
                below = own and own[1] in FOLDERS[folder] and quoted != f"headroom/{folder}.hpp"
                allowed = below and (include.parent / quoted).exists()
            if not allowed:
                yield f"headroom/{name}: must not include {quoted or angled}"
            if TORCH_INTERNALS.fullmatch(angled) and TORCH_VERSION not in text:
                yield f"headroom/{name}: {angled} asks for headroom/runtime/torch_version.hpp"


found = list(problems(Path(sys.argv[1]) / "include" / "headroom"))
print("\n".join(found))
sys.exit(bool(found))
