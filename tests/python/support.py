"""What the tests of the Python module share. Ends the test as skipped unless this Python's PyTorch is the LibTorch that
the module was built with; ctest tells its include folder.
"""

import os
import sys
from pathlib import Path

try:
    import torch
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(0)

if include := os.environ.get("HEADROOM_TORCH_INCLUDE"):
    root = Path(torch.__file__).resolve().parent
    if root not in Path(include).resolve().parents:
        print(f"skipped: built with {include}, and this Python has {root}")
        sys.exit(0)


def noise(*shape, dtype=torch.float64, gradient=True):
    """Standard normal numbers, the same whenever a program asks in the same order."""
    return torch.randn(shape, dtype=dtype, generator=_generator, requires_grad=gradient)


def gradients(output, inputs):
    """Gradients of the output times fixed weights, zeros where it does not depend on an input."""
    weights = torch.cos(torch.arange(output.numel(), dtype=torch.float64) * 1.7).view(output.shape).to(output.dtype)
    return torch.autograd.grad(output, inputs, weights, materialize_grads=True)


def largest(x):
    return x.abs().max().item() if x.numel() > 0 else 0.0


_generator = torch.Generator().manual_seed(17)
