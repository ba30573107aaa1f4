"""The Python of the chapters in docs/, each block word for word (tests/static/readme.py), run."""

import unittest

import support  # noqa: F401
import torch

q, k, v = torch.randn(3, 1, 2, 300, 16).unbind()
bias = torch.randn(2, 300, 300)


class Chapters(unittest.TestCase):
    def test_use(self):
        import headroom

        output = headroom.attention(q, k, v, causal=True, bias=bias)  # q [B, H, Lq, D], k and v [B, Hk, Lk, D]
        output, lse = headroom.attention(q, k, v, window=(255, 0), return_lse=True)
        self.assertEqual((output.shape, lse.shape), (q.shape, q.shape[:-1]))

    def test_below_a_model(self):
        import headroom

        model, x = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True), torch.randn(2, 30, 16)
        with headroom.replace_sdpa():
            loss = model(x).square().mean()
            loss.backward()
        self.assertGreater(model.linear1.weight.grad.abs().sum().item(), 0)


def medians():
    """Not run: museval is not among what the tests install."""
    import museval

    scores = museval.EvalStore()
    scores.add_eval_dir("scores")  # evaluate … --museval scores/test
    print(scores)                  # medians over frames, then tracks: the last lines of evaluate


if __name__ == "__main__":
    unittest.main()
