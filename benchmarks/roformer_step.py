#!/usr/bin/env python3
"""A training step, or a separation, by the BSRoformer of the PyPI package bs-roformer-infer, or of bs-roformer where
that is installed, with PyTorch's fused attention. The twin of `roformer_step`, which writes configuration, weights and
inputs to a file and runs it.

roformer_step.py FILE train|checkpointed|separate      prints one line of JSON

`checkpointed` wraps what Music-Source-Separation-Training wraps with use_torch_checkpoint: the band split, each
transformer, each mask estimator.
"""
import inspect
import json
import sys
import time
import warnings

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from train_step import peak_memory

warnings.filterwarnings("ignore", category=FutureWarning)  # the package's names for autocast and attention kernels
from bs_roformer.bs_roformer import BSRoformer  # noqa: E402

SHARED = ("dim", "depth", "heads", "dim_head", "time_transformer_depth", "freq_transformer_depth", "stft_n_fft",
          "stft_hop_length", "stft_win_length", "mask_estimator_depth", "zero_dc", "attn_dropout", "ff_dropout")


NEWER = ("num_residual_streams", "use_pope")  # of bs-roformer 1.2


def make_model(config):
    model, audio = config["model"], config["audio"]
    known = inspect.signature(BSRoformer).parameters
    shared = SHARED + tuple(key for key in NEWER if key in known)
    return BSRoformer(**{key: model[key] for key in shared}, freqs_per_bands=tuple(model["freqs_per_bands"]),
                      stereo=audio["channels"] == 2, num_stems=len(audio["stems"]), flash_attn=True)


def checkpoint_parts(model):
    def wrap(module):
        plain = module.forward
        module.forward = lambda *inputs, **options: checkpoint(plain, *inputs, use_reentrant=False, **options)

    wrap(model.band_split)
    for layer in model.layers:
        for transformer in layer:
            wrap(transformer)
    for estimator in model.mask_estimators:
        wrap(estimator)


def main(file, mode):
    content = torch.load(file, weights_only=False)  # our own file
    torch.set_num_threads(content["threads"])
    config = json.loads(content["config"])
    training = config["training"]
    model = make_model(config)
    model.load_state_dict(content.pop("model"))
    mixture, stems = content["mixture"], content["stems"]
    if stems.shape[1] == 1:
        stems = stems[:, 0]  # as the model takes them
    if mode == "checkpointed":
        checkpoint_parts(model)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": [p for p in learning if p.dim() >= 2],
                                    "weight_decay": training["weight_decay"]},
                                   {"params": [p for p in learning if p.dim() < 2], "weight_decay": 0.0}],
                                  lr=training["learning_rate"], betas=training["betas"])

    def train():
        optimizer.zero_grad()
        loss = model(mixture, target=stems)
        loss.backward()
        nn.utils.clip_grad_norm_(learning, training["clip_grad_norm"])
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def separate():
        return model(mixture).abs().mean().item()

    model.train(mode != "separate")
    seconds, losses = [], []
    memory = peak_memory(mixture.device)
    for _ in range(content["steps"]):
        start = time.perf_counter()
        losses.append(separate() if mode == "separate" else train())
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": min(seconds), "memory_bytes": memory(), "loss": losses[0], "last_loss": losses[-1]}))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
