"""Requests for which PyTorch stores L x L on the CPU without a word, and headroom does not.

Each route runs forward and, where PyTorch can, backward. PyTorch must be seen to allocate a block for L² numbers, which
keeps the list honest; headroom must never ask for a block of L² bytes, and give the same result where nothing is
random.
"""

import unittest
import warnings

from support import gradients, largest, noise

import headroom
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

LENGTH, DIM = 1024, 16
SQUARE = LENGTH * LENGTH


def heads(count, features=DIM, batch=1):
    return noise(batch, count, LENGTH, features, dtype=torch.float32)


class Routes(unittest.TestCase):
    def compare(self, theirs, ours, inputs, *, is_random=False, without_gradient=False):
        """`theirs` and `ours` take the inputs and return the output."""
        def step(run):
            def call():
                output = run(*inputs)
                results.extend([output] if without_gradient else [output, *gradients(output, inputs)])
            results = []
            return call, results

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # flex_attention warns that it is slow, not that it stores scores
            run, expected = step(theirs)
            report = headroom.measure(run)
        self.assertGreaterEqual(report.largest, 4 * SQUARE)
        run, results = step(ours)
        report = headroom.measure(run)
        self.assertLess(report.largest, SQUARE)
        if not is_random:
            for a, b in zip(results, expected):
                self.assertLess(largest(a - b), 1e-4 * max(1, largest(b)))

    def compare_sdpa(self, inputs, *, is_random=False, **options):
        self.compare(lambda *x: F.scaled_dot_product_attention(*x, **options),
                     lambda *x: headroom.scaled_dot_product_attention(*x, **options), inputs, is_random=is_random)

    def test_dropout(self):
        self.compare_sdpa([heads(1), heads(1), heads(1)], dropout_p=0.1, is_random=True)

    def test_mask_with_gradient(self):
        bias = noise(1, LENGTH, dtype=torch.float32)
        self.compare_sdpa([heads(1), heads(1), heads(1), bias])

    def test_mask_with_gradient_where_gradients_are_off(self):
        bias = noise(1, LENGTH, dtype=torch.float32)
        with torch.no_grad():
            self.compare(F.scaled_dot_product_attention, headroom.scaled_dot_product_attention,
                         [heads(1), heads(1), heads(1), bias], without_gradient=True)

    def test_three_dimensions(self):
        self.compare_sdpa([heads(1)[0], heads(1)[0], heads(1)[0]])

    def test_mask_of_three_dimensions(self):
        self.compare_sdpa([heads(2)] * 3, attn_mask=noise(2, 1, LENGTH, gradient=False) > 0)

    def test_other_width_of_values(self):
        self.compare_sdpa([heads(1), heads(1), heads(1, 8)])

    def test_keys_of_one_batch(self):
        self.compare_sdpa([heads(1, batch=2), heads(1), heads(1)])

    def test_one_head_of_keys(self):
        self.compare_sdpa([heads(2), heads(1), heads(1)])

    def test_other_heads_of_values(self):
        self.compare_sdpa([heads(2), heads(1), heads(2)], enable_gqa=True)

    def test_features_apart(self):
        def columns(run):
            return lambda *x: run(*(y.mT.contiguous().mT for y in x))

        self.compare(columns(F.scaled_dot_product_attention), columns(headroom.scaled_dot_product_attention),
                     [heads(1), heads(1), heads(1)])

    def test_flash_off(self):
        def off(*x):
            with sdpa_kernel(SDPBackend.MATH):
                return F.scaled_dot_product_attention(*x)

        self.compare(off, headroom.scaled_dot_product_attention, [heads(1), heads(1), heads(1)])

    def test_bool_mask(self):
        # The mask is there already, a byte an element; PyTorch makes a float copy of it
        seen = noise(LENGTH, LENGTH, gradient=False) > 0
        self.compare_sdpa([heads(1), heads(1), heads(1)], attn_mask=seen)

    def test_multihead_attention_with_weights(self):
        module = torch.nn.MultiheadAttention(DIM, 1, batch_first=True)
        x = noise(1, LENGTH, DIM, dtype=torch.float32)

        def ours(x):
            with headroom.replace_sdpa():
                return module(x, x, x, need_weights=False)[0]

        self.compare(lambda x: module(x, x, x)[0], ours, [x])  # need_weights is True unless told

    def test_flex_attention(self):
        slope = 0.01
        self.compare(
            lambda q, k, v: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s - slope * (i - j).abs()),
            lambda q, k, v: headroom.attention(q, k, v, alibi_slopes=torch.tensor([[slope]])),
            [heads(1).detach(), heads(1).detach(), heads(1).detach()], without_gradient=True)  # it has none on a CPU


if __name__ == "__main__":
    unittest.main()
