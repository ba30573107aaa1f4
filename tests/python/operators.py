"""torch.ops.headroom: what PyTorch demands of operators, gradients, compilation, randomness, errors, the process."""

import re
import subprocess
import sys
import unittest
from pathlib import Path

from support import gradients, largest, noise

import headroom
import torch

LIBRARY = Path(headroom.__file__).with_name("libheadroom_ops.so")
BACKENDS = ["tiled", "chunked", "fused", "reference"]


def inputs(queries=(2, 4, 7, 6), keys=(2, 4, 9, 6), values=(2, 4, 9, 5), **kind):
    return noise(*queries, **kind), noise(*keys, **kind), noise(*values, **kind)


def transposed(*shape):
    """[B, H, L, D] as a view of [B, L, H, D], as projections are split into heads."""
    return noise(shape[0], shape[2], shape[1], shape[3]).detach().requires_grad_().transpose(1, 2)


def hides_some(*shape):
    return noise(*shape, gradient=False) > -0.5


SEED = torch.tensor(5)
STARTS, KEY_STARTS = torch.tensor([0, 3, 3, 7]), torch.tensor([0, 4, 6, 9])
ROTARY = torch.polar(torch.ones(12, 3, dtype=torch.float64), torch.arange(36, dtype=torch.float64).view(12, 3))
ANGLES = torch.arange(72, dtype=torch.float64).view(12, 6) / 7
POLAR = torch.cat([ANGLES.cos(), ANGLES.sin()], -1)

REQUESTS = {
    "plain": (inputs(), {}),
    "causal": (inputs(), {"causal": True, "query_offset": 2}),
    "window": (inputs(), {"window_left": 3, "window_right": 1, "scale": 0.7}),
    "window and global keys": (inputs(), {"window_left": 1, "window_right": 0, "global_keys": 2}),
    "aligned bottom right": (inputs(), {"sequence_starts": STARTS, "key_sequence_starts": KEY_STARTS, "causal": True,
                                        "alignment": "bottom_right"}),
    "key lengths": (inputs(), {"key_lengths": torch.tensor([9, 0])}),
    "sequences": (inputs(), {"sequence_starts": STARTS, "key_sequence_starts": KEY_STARTS}),
    "mask": (inputs(), {"mask": hides_some(2, 1, 7, 9)}),
    "hidden": (inputs(), {"hidden": hides_some(9)}),
    "block mask": (inputs(), {"block_mask": hides_some(4, 2, 3), "block_size": 4}),
    "bias": (inputs(), {"bias": noise(4, 7, 9)}),
    "bias of keys": (inputs(), {"bias": noise(2, 1, 1, 9)}),
    "all that is added": (inputs(), {"relative_bias": noise(4, 9), "alibi_slopes": noise(4, 1), "sink": noise(4),
                                     "softcap": 1.5}),
    "rotary": (inputs(), {"rotary": ROTARY}),
    "polar": (inputs(keys=(2, 2, 9, 6), values=(2, 2, 9, 5)), {"polar": POLAR, "polar_phase": noise(2, 6)}),
    "polar without phases": (inputs(), {"polar": POLAR, "query_offset": 3, "causal": True}),
    "dropout": (inputs(), {"dropout": 0.4, "seed": SEED}),
    "grouped heads": (inputs(keys=(2, 2, 9, 6), values=(2, 2, 9, 5)), {}),
    "keys of one batch": (inputs(keys=(1, 4, 9, 6), values=(1, 4, 9, 5)), {"causal": True}),
    "three dimensions": (inputs((4, 7, 6), (4, 9, 6), (4, 9, 5)), {"bias": noise(7, 9)}),
    "five dimensions": (inputs((2, 3, 4, 7, 6), (2, 1, 2, 9, 6), (2, 1, 2, 9, 5)), {"mask": hides_some(7, 9)}),
    "split heads": ((transposed(2, 4, 7, 6), transposed(2, 4, 9, 6), transposed(2, 4, 9, 5)), {}),
    "features apart": (tuple(x.detach().mT.contiguous().mT.requires_grad_() for x in inputs()), {"causal": True}),
}
NARROW = {
    f"{dtype}": (inputs(dtype=dtype), {"causal": True, "bias": noise(7, 9, dtype=dtype)})
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}


def forward_operator(arguments, options):
    return torch.ops.headroom.attention_forward(*arguments, **options)


def leaves(arguments, options):
    return [x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor) and x.requires_grad]


class Operators(unittest.TestCase):
    def check(self, operator, arguments, options):
        results = torch.library.opcheck(operator, arguments, options, raise_exception=False)
        self.assertEqual({name: str(result) for name, result in results.items()},
                         dict.fromkeys(["test_schema", "test_autograd_registration", "test_faketensor",
                                        "test_aot_dispatch_dynamic"], "SUCCESS"))

    def test_opcheck(self):
        for name, (arguments, options) in (REQUESTS | NARROW).items():
            with self.subTest(name):
                self.check(torch.ops.headroom.attention.default, arguments, options)
        for name in ("bias", "all that is added", "split heads", "dropout"):
            arguments, options = REQUESTS[name]
            self.check(torch.ops.headroom.attention_with_lse.default, arguments, options)
            self.check(torch.ops.headroom.attention_forward.default, arguments, options)

    def test_opcheck_of_other_backends(self):
        for name in ("bias", "grouped heads", "five dimensions", "features apart", "torch.bfloat16"):
            arguments, options = (REQUESTS | NARROW)[name]
            self.check(torch.ops.headroom.attention.default, arguments, options | {"backend": "chunked"})
        self.check(torch.ops.headroom.attention.default, REQUESTS["split heads"][0], {"backend": "fused"})
        self.check(torch.ops.headroom.attention.default, REQUESTS["keys of one batch"][0],
                   {"backend": "fused", "bias": noise(2, 4, 7, 9)})

    def test_opcheck_of_backward(self):
        for name in ("all that is added", "polar", "five dimensions", "split heads", "torch.bfloat16"):
            arguments, options = (REQUESTS | NARROW)[name]
            output, lse = forward_operator(arguments, options)
            given = [x.detach() for x in (torch.ones_like(output), torch.ones_like(lse), output, lse, *arguments)]
            for wanted in ([True] * 8, [True, False, True, False, True, False, False, True]):
                results = torch.library.opcheck(
                    torch.ops.headroom.attention_backward.default, given,
                    {key: x.detach() if isinstance(x, torch.Tensor) else x for key, x in options.items()}
                    | {"wanted": wanted},
                    test_utils=["test_schema", "test_faketensor"])
                self.assertEqual(set(results.values()), {"SUCCESS"})

    def test_gradients(self):
        def run(*_):
            output, lse = torch.ops.headroom.attention_with_lse(*arguments, **options)
            return output, lse.masked_fill(lse == -torch.inf, 0)

        for name, (arguments, options) in REQUESTS.items():
            with self.subTest(name):
                self.assertTrue(torch.autograd.gradcheck(run, leaves(arguments, options), fast_mode=True))

    def test_backends_agree(self):
        for name, (arguments, options) in REQUESTS.items():
            with self.subTest(name):
                inputs = leaves(arguments, options)
                expected = torch.ops.headroom.attention(*arguments, **options, backend="reference")
                expected = [expected, *gradients(expected, inputs)]
                for backend in ("tiled", "chunked"):
                    output = torch.ops.headroom.attention(*arguments, **options, backend=backend)
                    for ours, exact in zip([output, *gradients(output, inputs)], expected):
                        self.assertLess(largest(ours - exact), 1e-13)

    def test_polar_positions_are_those_of_the_formula(self):
        q, k, v = inputs()
        phase = noise(4, 6)
        ours = headroom.attention(q, k, v, polar=POLAR, polar_phase=phase)
        angles = (ANGLES[:9] + phase.unsqueeze(1)).unsqueeze(-3) - ANGLES[:7].unsqueeze(1)  # [H,Lq,Lk,D]
        soft_q, soft_k = (torch.nn.functional.softplus(x) for x in (q, k))
        scores = torch.einsum("bhid,bhjd,hijd->bhij", soft_q, soft_k, angles.cos()) / 6**0.5
        plain = scores.softmax(-1) @ v
        for found, expected in zip([ours, *gradients(ours, (q, k, v, phase))],
                                   [plain, *gradients(plain, (q, k, v, phase))]):
            self.assertLess(largest(found - expected), 1e-13)

    def test_only_what_is_wanted(self):
        q, k, v = inputs()
        bias = noise(7, 9)
        given = gradients(headroom.attention(q, k, v, bias=bias), [q, k, v, bias])
        for x, expected in zip((q, k, v, bias), given):
            alone = [y if y is x else y.detach() for y in (q, k, v, bias)]
            output = headroom.attention(*alone[:3], bias=alone[3])
            self.assertTrue(torch.equal(gradients(output, [x])[0], expected))
        self.assertFalse(headroom.attention(q.detach(), k.detach(), v.detach()).requires_grad)
        with torch.no_grad():
            self.assertFalse(headroom.attention(q, k, v).requires_grad)
        with torch.inference_mode():
            self.assertTrue(torch.equal(headroom.attention(q, k, v, bias=bias),
                                        headroom.attention(q.detach(), k, v, bias=bias).detach()))

    def test_log_sum_exp(self):
        q, k, v = inputs(dtype=torch.float32)
        output, lse = headroom.attention(q, k, v, return_lse=True)
        self.assertEqual((lse.dtype, lse.shape), (torch.float32, q.shape[:-1]))
        exact = (q.double() @ k.double().mT / 6**0.5).logsumexp(-1)
        self.assertLess(largest(lse - exact), 1e-6)
        weights = torch.autograd.grad(lse.sum(), v, allow_unused=True, materialize_grads=True)[0]
        self.assertEqual(largest(weights), 0)

    def test_second_derivatives(self):
        q, k, v = inputs()
        gradient, = torch.autograd.grad(headroom.attention(q, k, v).sum(), q, create_graph=True)
        with self.assertRaisesRegex(RuntimeError, r"\[headroom.attention.double_backward\]"):
            gradient.sum().backward()
        self.assertTrue(torch.autograd.gradgradcheck(lambda *x: headroom.attention(*x, backend="reference"), (q, k, v),
                                                     fast_mode=True))


class Dropout(unittest.TestCase):
    def test_same_seed_same_weights(self):
        q, k, v = inputs()

        def run(**options):
            return headroom.attention(q, k, v, dropout=0.5, **options)

        torch.manual_seed(3)
        first, second = run(), run()
        torch.manual_seed(3)
        self.assertTrue(torch.equal(run(), first))
        self.assertFalse(torch.equal(first, second))
        self.assertTrue(torch.equal(run(seed=7), run(seed=torch.tensor(7))))
        self.assertFalse(torch.equal(run(seed=7), run(seed=8)))

    def test_share_and_gain(self):
        length = 512
        q, k = torch.zeros(1, 1, length, 4), torch.zeros(1, 1, length, 4)
        v = torch.eye(length).view(1, 1, length, length)
        weights = headroom.attention(q, k, v, dropout=0.25, seed=1) * length  # 0 or 1 / (1 - 0.25)
        kept = weights > 0
        self.assertLess(largest(weights[kept] - 1 / 0.75), 1e-5)
        # 2^18 weights: a standard deviation is 0.00085
        self.assertLess(abs(kept.float().mean().item() - 0.75), 0.005)

    def test_recomputation(self):
        q, k, v = inputs()

        def run(*x):
            return headroom.attention(*x, dropout=0.5).sin()

        torch.manual_seed(3)
        expected = gradients(run(q, k, v), (q, k, v))
        torch.manual_seed(3)
        recomputed = gradients(torch.utils.checkpoint.checkpoint(run, q, k, v, use_reentrant=False), (q, k, v))
        for ours, stored in zip(recomputed, expected):
            self.assertTrue(torch.equal(ours, stored))


class Compilation(unittest.TestCase):
    def setUp(self):
        torch.compiler.reset()

    def test_model(self):
        def model(q, k, v, bias):
            output, lse = headroom.attention(q.sin(), k, v, bias=bias, window=(4, 4), return_lse=True)
            return output.cos() * lse.unsqueeze(-1)

        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        arguments = (*inputs(), noise(7, 9))
        expected, output = model(*arguments), compiled(*arguments)
        self.assertTrue(torch.equal(output, expected))
        for ours, eager in zip(gradients(output, arguments), gradients(expected, arguments)):
            self.assertLess(largest(ours - eager), 1e-14)

    def test_lengths_that_change(self):
        compiled = torch.compile(
            lambda q, k, v: headroom.attention(q, k, v, causal=True, query_offset=k.size(-2) - q.size(-2)),
            backend="aot_eager", fullgraph=True, dynamic=True)
        for queries, keys in ((5, 9), (6, 7), (17, 40)):
            q, k, v = inputs((1, 2, queries, 4), (1, 2, keys, 4), (1, 2, keys, 4))
            expected = headroom.attention(q, k, v, causal=True, query_offset=keys - queries)
            self.assertTrue(torch.equal(compiled(q, k, v), expected))

    def test_dropout_is_drawn_anew(self):
        def model(x):
            return headroom.attention(x, x, x, dropout=0.5)

        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        x = noise(1, 2, 7, 4)
        torch.manual_seed(3)
        first, second = compiled(x), compiled(x)
        self.assertFalse(torch.equal(first, second))
        torch.manual_seed(3)
        self.assertTrue(torch.equal(model(x), first))

    def test_meta_tensors(self):
        q, k, v = (x.to("meta") for x in inputs(keys=(1, 2, 9, 6), values=(1, 2, 9, 5)))
        output, lse = headroom.attention(q, k, v, return_lse=True)
        self.assertEqual((output.device.type, output.shape, lse.shape), ("meta", (2, 4, 7, 5), (2, 4, 7)))
        self.assertEqual([x.shape for x in torch.autograd.grad(output.sum() + lse.sum(), (q, k, v))],
                         [x.shape for x in (q, k, v)])


class Errors(unittest.TestCase):
    def test_messages(self):
        q, k, v = inputs()
        for identifier, text, arguments, options in [
            ("shape", "q and k differ in the last dimension", (q, k[..., :5], v), {}),
            ("shape", "do not divide", (q, k[:, :3], v[:, :3]), {}),
            ("dtype", "expected three strided tensors of one dtype", (q, k.float(), v), {}),
            ("dtype", "expected float, double, bfloat16 or half", [x.long() for x in (q, k, v)], {}),
            ("mask", "broadcastable to", (q, k, v), {"mask": torch.ones(8, 9, dtype=torch.bool)}),
            ("mask", "both given", (q, k, v), {"mask": hides_some(7, 9), "hidden": hides_some(7, 9)}),
            ("bias", "broadcastable to", (q, k, v), {"bias": noise(3, 7, 9)}),
            ("key_lengths", "contains 10", (q, k, v), {"key_lengths": torch.tensor([3, 10])}),
            ("sequences", "ends with 6", (q, k, v), {"sequence_starts": torch.tensor([0, 6])}),
            ("scale", "finite", (q, k, v), {"scale": float("nan")}),
            ("dropout", "probability in [0, 1)", (q, k, v), {"dropout": 1.0}),
            ("dropout", "one int64 on the CPU", (q, k, v), {"dropout": 0.1, "seed": torch.tensor(0.5)}),
            ("backend_name", "expected one of automatic, tiled", (q, k, v), {"backend": "flash"}),
            ("backend", "the backend fused does not serve softcap", (q, k, v), {"backend": "fused", "softcap": 2.0}),
        ]:
            with self.subTest(identifier + ": " + text):
                with self.assertRaisesRegex(RuntimeError, re.escape(f"[headroom.attention.{identifier}] ")
                                            + ".*" + re.escape(text)):
                    headroom.attention(*arguments, **options)
        with self.assertRaisesRegex(RuntimeError, r"\[headroom.attention.dropout\] .*but seed is not"):
            torch.ops.headroom.attention_forward(q, k, v, dropout=0.1)
        with self.assertRaisesRegex(RuntimeError, r"\[headroom.attention.backend\] attention_forward"):
            torch.ops.headroom.attention_forward(q, k, v, backend="reference")
        with self.assertRaisesRegex(RuntimeError, r"\[headroom.attention.shape\] q, k and v have 4, 3"):
            headroom.attention(q.to("meta"), k[0].to("meta"), v.to("meta"))


class Process(unittest.TestCase):
    def test_nothing_is_loaded_twice(self):
        mapped = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
        self.assertIn(LIBRARY.resolve(), {path.resolve() for path in mapped})
        for name in ("libgomp", "libtorch_cpu", "libc10", "libstdc++"):
            self.assertEqual(len([path for path in mapped if path.name.startswith((name + ".", name + "-"))]), 1, name)

    def test_the_process_keeps_its_allocator_and_engine(self):
        symbols = LIBRARY.read_bytes()
        self.assertIn(b"callBoxed", symbols)  # names of functions of LibTorch are in the file
        for name in (b"SetCPUAllocator", b"set_default_engine_stub"):
            self.assertNotIn(name, symbols)

    def test_threads_are_pytorch_s(self):
        # A pool of its own would start more threads
        code = """
import os, torch, headroom
q = torch.randn(2, 4, 300, 16)
counts, outputs = [], []
for threads in (1, 3):
    torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    outputs.append(headroom.attention(q, q, q))
    counts.append(len(os.listdir("/proc/self/task")) - before)
torch.nn.functional.scaled_dot_product_attention(q, q, q)
counts.append(len(os.listdir("/proc/self/task")) - before)
print(counts, torch.equal(*outputs))
"""
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        self.assertEqual((run.stderr, run.stdout.strip()), ("", "[0, 2, 2] True"))


if __name__ == "__main__":
    unittest.main()
