"""headroom in the place of torch.nn.functional.scaled_dot_product_attention: values, gradients, models, memory."""

import re
import unittest

from support import gradients, largest, noise

import headroom
import torch
import torch.nn.functional as F
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as imported_by_name
from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Names of the operators that run, attention's and matrix products."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))

    def attend(self):
        return {name for name in self.names if "attention" in name or "bmm" in name}


OURS = {"headroom::attention_forward"}


def naive(*arguments, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*arguments, **options)


def mask(*shape):
    result = noise(*shape, gradient=False) > -0.3
    result[..., shape[-2] // 2, :] = False  # a query that sees no key
    return result


class Function(unittest.TestCase):
    def test_same_in_double(self):
        q, k, v = noise(2, 4, 7, 6), noise(2, 4, 9, 6), noise(2, 4, 9, 5)
        grouped = noise(2, 2, 9, 6), noise(2, 2, 9, 5)
        requests = {
            "plain": ((q, k, v), {}),
            "causal": ((q, k, v), {"is_causal": True}),
            "more queries than keys, causal": ((k, q, q), {"is_causal": True}),
            "scale": ((q, k, v), {"scale": -0.3}),
            "mask": ((q, k, v, mask(2, 4, 7, 9)), {}),
            "mask for all": ((q, k, v, mask(7, 9)), {}),
            "mask of keys": ((q, k, v, noise(2, 1, 1, 9, gradient=False) > 0), {}),
            "bias": ((q, k, v, noise(2, 4, 7, 9)), {}),
            "bias of heads": ((q, k, v, noise(4, 1, 9)), {}),
            "bias that hides": ((q, k, v, noise(7, 9, gradient=False).masked_fill(~mask(7, 9), -torch.inf)), {}),
            "bias in float": ((q, k, v, noise(7, 9, dtype=torch.float32)), {}),
            "grouped heads": ((q, *grouped), {"enable_gqa": True}),
            "grouped heads of k": ((q, grouped[0], v), {"enable_gqa": True}),
            "grouped heads of v": ((q, k, grouped[1]), {"enable_gqa": True, "is_causal": True}),
            "two dimensions": ((q[0, 0], k[0, 0], v[0, 0]), {}),
            "two dimensions, causal, mask": ((q[0, 0], k[0, 0], v[0, 0], mask(7, 9)), {}),
            "three dimensions": ((q[0], k[0], v[0], noise(7, 9)), {}),
            "five dimensions": ((q.view(2, 2, 2, 7, 6), k.view(2, 2, 2, 9, 6), v.view(2, 2, 2, 9, 5)), {}),
            "one head of keys": ((q, k[:, :1], v[:, :1]), {}),
            "one batch of keys": ((q, k[:1], v[:1]), {}),
            "keys broadcast, values not": ((q, k[:1], v), {}),
            "values broadcast, keys not": ((q, k, v[:, :1]), {}),
            "queries broadcast": ((q[:1, :1], k, v), {}),
            "fewer dimensions of keys": ((q, k[0, 0], v[0]), {}),
            "fewer dimensions of queries": ((q[0, 0], k, v), {}),
            "no keys": ((q, k[:, :, :0], v[:, :, :0]), {}),
            "split heads": ((q.mT.contiguous().mT, k.transpose(1, 2).contiguous().transpose(1, 2), v), {}),
        }
        for name, (arguments, options) in requests.items():
            with self.subTest(name):
                inputs = [x for x in arguments if x.requires_grad]
                expected = naive(*arguments, **options)
                output = headroom.scaled_dot_product_attention(*arguments, **options)
                for ours, exact in zip([output, *gradients(output, inputs)], [expected, *gradients(expected, inputs)]):
                    self.assertEqual((ours.shape, ours.dtype), (exact.shape, exact.dtype))
                    # A bias in float has a gradient in float
                    self.assertLess(largest(ours - exact), 1e-13 if exact.dtype == torch.float64 else 1e-6)

    def test_mask_and_causal(self):
        q, k, v, seen = noise(2, 4, 7, 6), noise(2, 4, 9, 6), noise(2, 4, 9, 5), mask(7, 9)
        expected = naive(q, k, v, seen & torch.ones(7, 9, dtype=torch.bool).tril())
        output = headroom.scaled_dot_product_attention(q, k, v, seen, is_causal=True)
        self.assertLess(largest(output - expected), 1e-13)

    def test_accuracy(self):
        # Against double: RMS error at most 2, largest at most 4 times that of PyTorch's plain code in the same dtype
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = (noise(2, 4, 131, 32, dtype=dtype) for _ in range(3))
            for name, extra, options in [
                ("plain", (), {}),
                ("causal", (), {"is_causal": True}),
                ("mask", (mask(131, 131),), {}),
                ("bias", (noise(4, 131, 131, dtype=dtype),), {}),
                ("bias in float", (noise(131, 131, dtype=torch.float32),), {}),
                ("grouped heads", (), {"enable_gqa": True}),
            ]:
                with self.subTest(name, dtype=dtype):
                    keys, values = (x[:, ::2] if name == "grouped heads" else x for x in (k, v))
                    given = [x.detach().requires_grad_(x.is_floating_point()) for x in (q, keys, values, *extra)]

                    def run(function, arguments):
                        output = function(*arguments, **options)
                        return [output, *gradients(output, [x for x in arguments if x.requires_grad])]

                    doubled = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in given]
                    exact = run(naive, doubled)
                    for ours, plain, truth in zip(run(headroom.scaled_dot_product_attention, given),
                                                  run(naive, given), exact):
                        ours, plain = ours.double() - truth, plain.double() - truth
                        self.assertLessEqual(ours.square().mean().sqrt(), 2 * plain.square().mean().sqrt())
                        self.assertLessEqual(largest(ours), 4 * largest(plain))

    def test_autocast(self):
        q, k, v = (noise(1, 2, 33, 8, dtype=torch.float32) for _ in range(3))
        with torch.autocast("cpu", torch.bfloat16):
            output = headroom.scaled_dot_product_attention(q, k.bfloat16(), v)
            expected = headroom.attention(*(x.bfloat16() for x in (q, k, v)))
        self.assertTrue(torch.equal(output, expected))

    def test_errors(self):
        q = noise(2, 4, 7, 6)
        for identifier, arguments, options in [
            ("shape", (q, noise(2, 2, 9, 6), noise(2, 2, 9, 6)), {}),
            ("shape", (q, noise(2, 3, 9, 6), noise(2, 3, 9, 6)), {"enable_gqa": True}),
            ("shape", (q[0, 0, 0], q, q), {}),
            ("shape", (q, q[..., :5], q), {}),
            ("bias", (q, q, q, noise(3, 4, 7, 7)), {}),
            ("mask", (q, q, q, mask(8, 7)), {}),
            ("dropout", (q, q, q), {"dropout_p": 1.5}),
            ("dtype", (q, q.float(), q), {}),
        ]:
            with self.subTest(identifier, options=options):
                with self.assertRaisesRegex(RuntimeError, re.escape(f"[headroom.attention.{identifier}] ")):
                    headroom.scaled_dot_product_attention(*arguments, **options)


class Replacement(unittest.TestCase):
    def test_however_it_is_called(self):
        q = noise(1, 2, 7, 6)
        calls = [lambda: F.scaled_dot_product_attention(q, q, q), lambda: imported_by_name(q, q, q),
                 lambda: torch._C._nn.scaled_dot_product_attention(q, q, q),
                 lambda: imported_by_name(*[q.detach()] * 3)]
        for call in calls:
            with headroom.replace_sdpa(), Operators() as operators:
                call()
            self.assertEqual(operators.attend(), OURS)
            with Operators() as operators:
                call()
            self.assertTrue(operators.attend().isdisjoint(OURS))

    def test_is_undone(self):
        fast_path = torch.backends.mha.get_fastpath_enabled()
        with self.assertRaisesRegex(ValueError, "on the way"), headroom.replace_sdpa():
            self.assertFalse(torch.backends.mha.get_fastpath_enabled())
            with self.assertRaisesRegex(RuntimeError, r"\[headroom.python.replaced\]"), headroom.replace_sdpa():
                pass
            raise ValueError("on the way out")
        self.assertEqual(torch.backends.mha.get_fastpath_enabled(), fast_path)
        with headroom.replace_sdpa():
            pass

    def test_encoder_layer(self):
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).double()
        x = noise(2, 9, 16)
        padding = torch.tensor([[False] * 9, [False] * 5 + [True] * 4])
        causal = torch.nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
        for training in (True, False):
            for options in ({}, {"src_key_padding_mask": padding}, {"src_mask": causal, "is_causal": True},
                            {"src_mask": causal}):
                for gradient in (True, False):
                    with self.subTest(training=training, options=list(options), gradient=gradient):
                        layer.train(training)
                        with torch.set_grad_enabled(gradient):
                            expected = layer(x, **options)
                            with headroom.replace_sdpa(), Operators() as operators:
                                output = layer(x, **options)
                        self.assertEqual(operators.attend(), OURS)
                        valid = ~padding if "src_key_padding_mask" in options else ...
                        self.assertLess(largest((output - expected)[valid]), 1e-13)
                        if gradient:
                            inputs = [x, *layer.parameters()]
                            for ours, exact in zip(gradients(output[valid], inputs),
                                                   gradients(expected[valid], inputs)):
                                self.assertLess(largest(ours - exact), 1e-12)

    def test_compiled_encoder_layer(self):
        torch.compiler.reset()
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).double()
        x = noise(2, 9, 16)
        inputs = [x, *layer.parameters()]
        expected = gradients(layer(x), inputs)
        backend = AotEagerAndRecordGraphs()
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        with headroom.replace_sdpa():
            output = compiled(x)
            targets = {node.target for graph in backend.fw_graphs for node in graph.graph.nodes}
            self.assertIn(torch.ops.headroom.attention_forward.default, targets)
            self.assertTrue(targets.isdisjoint({torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
                                                torch.ops.aten.bmm.default}))
            for ours, exact in zip(gradients(output, inputs), expected):
                self.assertLess(largest(ours - exact), 1e-12)

    def test_less_memory(self):
        # PyTorch stores scores for the dropout of training, and in the fast path of evaluation
        length, heads = 1024, 2
        layer = torch.nn.TransformerEncoderLayer(16, heads, 32, dropout=0.1, batch_first=True)
        x = noise(1, length, 16, dtype=torch.float32)
        scores = heads * length * length * 4

        def train():
            layer.train()(x).sum().backward()

        def evaluate():
            with torch.no_grad():
                layer.eval()(x)

        for run in (train, evaluate):
            with self.subTest(run.__name__):
                theirs = headroom.measure(run)
                with headroom.replace_sdpa():
                    ours = headroom.measure(run)
                self.assertGreaterEqual(theirs.largest, scores)
                self.assertLess(ours.largest, length * length)
                self.assertLess(ours.added_peak, theirs.added_peak / 4)


if __name__ == "__main__":
    unittest.main()
