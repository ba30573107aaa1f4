#!/usr/bin/env python3
"""One training step of the time-frequency transformer in plain PyTorch: nn.Linear, nn.RMSNorm, F.gelu,
F.scaled_dot_product_attention, torch.stft, autograd's own losses, torch.optim.AdamW. The twin of `train_step`, which
writes configuration, weights, inputs and device to a file and runs it.

train_step.py FILE [eager|compiled]      prints one line of JSON
"""
import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x, rotation):  # [N,L,dim], complex [L,D/2]
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [N,H,L,D] each

        def rotate(t):
            pairs = torch.view_as_complex(t.float().reshape(*t.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * rotation).flatten(-2).to(t.dtype)

        attended = F.scaled_dot_product_attention(rotate(q), rotate(k), v)
        return self.to_out(attended.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        widths = [dim, *hidden, dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x))
        return self.layers[-1](x)


class Block(nn.Module):
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads)
        self.feed_forward_norm = nn.RMSNorm(dim, eps=1e-6)
        self.feed_forward = FeedForward(dim, hidden)

    def forward(self, x, rotation):
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Layer(nn.Module):
    def __init__(self, *block):
        super().__init__()
        self.frequency = Block(*block)
        self.time = Block(*block)


class Encoder(nn.Module):
    def __init__(self, layers, *block):
        super().__init__()
        self.layers = nn.ModuleList(Layer(*block) for _ in range(layers))


class TimeFrequencyTransformer(nn.Module):
    def __init__(self, options, channels, stems):
        super().__init__()
        self.options, self.stems = options, stems
        dim = options["emb_dim"]
        self.embed = nn.Linear(2 * channels, dim)
        self.frequency_embedding = nn.Parameter(torch.empty(options["n_fft"] // 2 + 1, dim))
        self.encoder = Encoder(options["n_layers"], dim, options["n_heads"], options["ffn_hidden_dim"])
        self.final_norm = nn.RMSNorm(dim, eps=1e-6)
        self.to_masks = nn.Linear(dim, self.stems * channels * 2)

    def rotation(self, length):
        dim = self.options["emb_dim"] // self.options["n_heads"]
        angles = torch.outer(torch.arange(length).double(), 10000.0 ** (-torch.arange(0, dim, 2).double() / dim))
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64).to(self.to_masks.weight.device)

    def forward(self, mixture):  # [B,C,S]
        n_fft, hop = self.options["n_fft"], self.options["hop_length"]
        batch, channels, samples = mixture.shape
        window = torch.hann_window(n_fft, device=mixture.device)
        spectrum = torch.stft(mixture.flatten(0, 1), n_fft, hop, window=window, return_complex=True)
        spectrum = spectrum.unflatten(0, (batch, channels))  # [B,C,F,T]
        magnitude = spectrum.abs()
        level = magnitude.mean((1, 2, 3), keepdim=True).sqrt() + 1e-4
        compressed = spectrum * ((magnitude + 1e-8).rsqrt() / level)
        tokens = torch.view_as_real(compressed).permute(0, 3, 2, 1, 4).flatten(-2)  # [B,T,F,C·2]
        x = self.embed(tokens) + self.frequency_embedding
        _, frames, bins, dim = x.shape
        over_bins, over_frames = self.rotation(bins), self.rotation(frames)
        for layer in self.encoder.layers:
            x = layer.frequency(x.flatten(0, 1), over_bins).view(batch, frames, bins, dim)
            x = layer.time(x.transpose(1, 2).flatten(0, 1), over_frames)
            x = x.view(batch, bins, frames, dim).transpose(1, 2)
        masks = self.to_masks(self.final_norm(x)).float().unflatten(-1, (self.stems, channels, 2))
        masked = torch.view_as_complex(masks).permute(0, 3, 4, 2, 1) * spectrum.unsqueeze(1)  # [B,N,C,F,T]
        stems = torch.istft(masked.flatten(0, 2), n_fft, hop, window=window, length=samples)
        return stems.view(batch, self.stems, channels, samples)


def separation_loss(estimates, references, options):
    loss = F.l1_loss(estimates, references)
    for length in options["windows"]:
        def spectrum(x):
            return torch.stft(x.flatten(0, -2), max(length, options["min_n_fft"]), options["hop"], length,
                              torch.hann_window(length, device=x.device), return_complex=True)

        loss = loss + options["stft_weight"] * F.l1_loss(spectrum(estimates), spectrum(references))
    return loss


def process_status(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def peak_memory(device):
    """Starts to watch; what is returned gives the bytes at the peak: growth of the resident size, or the
    allocator's."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return lambda: torch.cuda.max_memory_allocated() - before
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    before = process_status("VmRSS:")
    return lambda: process_status("VmHWM:") - before


def main(file, mode="eager"):
    content = torch.load(file, weights_only=False)  # our own file
    device = torch.device(content["device"])
    torch.set_num_threads(content["threads"])
    config = json.loads(content["config"])
    training = config["training"]
    model = TimeFrequencyTransformer(config["model"], config["audio"]["channels"], len(config["audio"]["stems"]))
    model.load_state_dict(content.pop("model"))
    model.to(device)
    mixture, stems = content["mixture"].to(device), content["stems"].to(device)
    run = torch.compile(model) if mode == "compiled" else model
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": training["weight_decay"]},
                                   {"params": vectors, "weight_decay": 0.0}],
                                  lr=training["learning_rate"], betas=training["betas"])

    def step():
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=training.get("bf16", False)):
            estimate = run(mixture)
        loss = separation_loss(estimate.float(), stems, config["loss"])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), training["clip_grad_norm"])
        optimizer.step()
        losses.append(loss.item())
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)

    seconds, losses = [], []
    memory = peak_memory(device)
    for _ in range(content["steps"]):
        step()
    print(json.dumps({"seconds": min(seconds), "memory_bytes": memory(), "loss": losses[0], "last_loss": losses[-1]}))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
