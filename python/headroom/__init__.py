"""headroom's attention for PyTorch: any request, forward and backward, without a tensor of Lq x Lk elements.

    output = headroom.attention(q, k, v, causal=True)

    with headroom.replace_sdpa():  # the model's calls of F.scaled_dot_product_attention come here
        model(x).sum().backward()

Errors are RuntimeError; the message starts with an id that docs/errors.md explains.
"""

from contextlib import contextmanager
from pathlib import Path

import torch

from headroom._built_for import TORCH
from headroom.memory import MemoryReport, measure

__all__ = ["MemoryReport", "attention", "instruction_set", "measure", "replace_sdpa", "scaled_dot_product_attention"]

# PyTorch's C++ interface is another in each minor version: with another one the library may load, and read the wrong
# bytes
if torch.__version__.split(".")[:2] != TORCH.split("."):
    raise ImportError(f"[headroom.python.torch] this headroom was built for PyTorch {TORCH}.*, and here is PyTorch "
                      f"{torch.__version__}; build it beside this one, or install torch=={TORCH}.*")
torch.ops.load_library(Path(__file__).with_name("libheadroom_ops.so"))


def attention(q, k, v, *, scale=None, alignment="top_left", query_offset=0, causal=False, window=(-1, -1),
              global_keys=0, key_lengths=None, sequence_starts=None, key_sequence_starts=None, mask=None, hidden=None,
              block_mask=None, block_size=128, bias=None, relative_bias=None, alibi_slopes=None, sink=None,
              softcap=None, rotary=None, polar=None, polar_phase=None, dropout=0.0, seed=None, backend="automatic",
              return_lse=False):
    """softmax(softcap(scale·q·kᵀ) + bias + relative_bias - alibi_slopes·|distance|, over the allowed keys)·v.

    q [..., H, Lq, D], k [..., Hk, Lk, D], v [..., Hk, Lk, Dv]: three dimensions or more, any strides, one
    floating-point dtype. Hk divides H, batch dimensions of k and v broadcast to those of q. Returns [..., H, Lq, Dv];
    with `return_lse` also the log-sum-exp of the scores [..., H, Lq]. Differentiable in q, k, v, bias, relative_bias,
    alibi_slopes, sink and polar_phase. A query that sees no key gets output 0, log-sum-exp -inf (or its head's sink)
    and gradient 0.

    The options are those of headroom::AttentionOptions (docs/020_attention.md); all of them hold at once:

    scale                factor of q·kᵀ, 1/sqrt(D) unless given
    alignment            "top_left": query i of a sequence stands at key i; "bottom_right": the last query at the last
                         key
    query_offset         is added to the positions of the queries
    causal               a query sees keys up to its position
    window               (left, right): keys from position - left to position + right; negative: unlimited
    global_keys          widens the window: keys at this many first positions are seen by all, queries there see all
    key_lengths          integers, broadcastable to the batch dimensions: how many keys are valid
    sequence_starts      [S+1] integers: packed sequences, each query sees the keys of its own
    key_sequence_starts  the same for the keys where they differ
    mask, hidden         bool, broadcastable to [..., H, Lq, Lk]: True where a key is seen, or where it is not
    block_mask           bool for blocks of block_size queries and keys; what is not seen is not computed
    bias                 broadcastable to [..., H, Lq, Lk]
    relative_bias        [H or 1, 2R-1], element R-1+distance
    alibi_slopes         broadcastable to [..., H, Lq]
    sink                 [H]: a score without a value
    softcap              s becomes softcap·tanh(s / softcap)
    rotary               complex [positions, R/2]: turns neighbouring pairs of the first R features of q and k
    polar                float or double [positions, 2D], cosines and then sines: q·kᵀ becomes the sum over features d
                         of softplus(q_d)·softplus(k_d)·cos(angle of the key - angle of the query), not with rotary
    polar_phase          [Hk, D]: angles that those of keys have more
    dropout              probability that a weight is dropped, always applied; nothing is stored for it
    seed                 int, or int64 tensor of one element: the same seed drops the same weights. Drawn from PyTorch's
                         generator unless given, so torch.manual_seed makes it reproducible
    backend              "automatic", "tiled", "fused", "chunked", "reference"
    """
    if isinstance(seed, int):
        seed = torch.tensor(seed, dtype=torch.int64)
    operator = torch.ops.headroom.attention_with_lse if return_lse else torch.ops.headroom.attention
    return operator(
        q, k, v, scale=scale, alignment=alignment, query_offset=query_offset, causal=causal, window_left=window[0],
        window_right=window[1], global_keys=global_keys, key_lengths=key_lengths, sequence_starts=sequence_starts,
        key_sequence_starts=key_sequence_starts, mask=mask, hidden=hidden, block_mask=block_mask,
        block_size=block_size, bias=bias, relative_bias=relative_bias, alibi_slopes=alibi_slopes, sink=sink,
        softcap=softcap, rotary=rotary, polar=polar, polar_phase=polar_phase, dropout=dropout, seed=seed,
        backend=backend)


def instruction_set():
    """The instruction set of the kernels in use, such as "avx2": the widest that the processor has.

    The environment's HEADROOM_ISA, when attention is first called, takes a narrower one.
    """
    return torch.ops.headroom.instruction_set()


def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                                 enable_gqa=False):
    """torch.nn.functional.scaled_dot_product_attention by headroom: same arguments, results and broadcasting.

    attn_mask is bool (True: a key is seen) or is added to the scores, then differentiable; is_causal aligns top left.
    Beyond PyTorch, attn_mask and is_causal may be given together.
    """
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    dims = [x.dim() for x in (query, key, value)]
    _require(min(dims) >= 2, "shape", f"query, key and value have {dims} dimensions, expected 2 or more: [..., L, D]")
    rank = max(*dims, 3)
    query, key, value = (x[(None,) * (rank - x.dim())] for x in (query, key, value))

    # PyTorch broadcasts all three; headroom broadcasts the batch of key and value, which have one shape, to query's
    if enable_gqa and key.size(-3) != value.size(-3):
        key, value = (x.repeat_interleave(query.size(-3) // x.size(-3), dim=-3) for x in (key, value))
    *key_batch, key_heads = _broadcast(key.shape[:-2], value.shape[:-2])
    key, value = (x.expand(*key_batch, key_heads, -1, -1) for x in (key, value))
    batch = _broadcast(query.shape[:-3], key_batch)
    heads = query.size(-3) if enable_gqa else _broadcast(query.shape[-3:-2], [key_heads])[0]
    query = query.expand(*batch, heads, -1, -1)

    mask = bias = None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            mask = attn_mask
        else:  # PyTorch takes a float mask beside double inputs
            bias = attn_mask.to(query.dtype) if query.dtype == torch.float64 else attn_mask
    output = attention(query, key, value, scale=scale, causal=is_causal, mask=mask, bias=bias, dropout=dropout_p)
    return output.squeeze(0) if max(dims) == 2 else output


@contextmanager
def replace_sdpa():
    """Within it, torch.nn.functional.scaled_dot_product_attention of CPU tensors is headroom's.

    The operator behind the function is replaced, in all threads: models may have imported the function under any name,
    and modules that call it are served too, such as torch.nn.TransformerEncoderLayer and torch.nn.MultiheadAttention
    with need_weights=False. Their "fast path", which never calls it and stores Lq x Lk, is off meanwhile. What
    torch.compile compiled outside stays as it was.
    """
    if torch._C._dispatch_has_kernel_for_dispatch_key("aten::scaled_dot_product_attention", "AutogradCPU"):
        raise RuntimeError("[headroom.python.replaced] scaled_dot_product_attention is replaced already; "
                           "leave the other replacement first")
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with torch.library._scoped_library("aten", "IMPL") as library:
        for key in ("CPU", "AutogradCPU", "AutogradMeta"):  # Meta: while torch.compile traces
            library.impl("scaled_dot_product_attention", scaled_dot_product_attention, key)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


def _autocast(*tensors):
    """The tensors as torch.autocast would give them to PyTorch's function."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return [x.to(dtype) if x is not None and x.dtype in narrow else x for x in tensors]


def _require(holds, identifier, message):
    if not holds:
        raise RuntimeError(f"[headroom.attention.{identifier}] {message}")


def _broadcast(*shapes):
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        text = " and ".join(str(list(shape)) for shape in shapes)
        raise RuntimeError(f"[headroom.attention.shape] the leading dimensions {text} of query, key and value do not "
                           "broadcast; expected [..., H, L, D] with equal sizes or 1, or enable_gqa=True") from error
