"""Prints the parameters that tests/optim/optimizers.cpp expects after 20 steps of each optimizer, as PyTorch 2.13 and
prodigyopt 1.1.2 (pip install prodigyopt) compute them in double precision.
"""

import torch
from prodigyopt import Prodigy

torch.set_default_dtype(torch.float64)
torch.Tensor.bfloat16 = torch.Tensor.clone  # Muon's products in double, too


def start():
    matrix = torch.arange(12.0).cos().view(4, 3)
    vector = 0.3 * torch.arange(5.0) - 0.5
    return [matrix.requires_grad_(), vector.requires_grad_()]


def train(name, parameters, optimizers):
    for step in range(20):
        for parameter in parameters:
            wave = (1.3 * step + 0.9 * torch.arange(float(parameter.numel()))).sin().view(parameter.shape)
            parameter.grad = 0.7 * parameter.detach() + wave
        for optimizer in optimizers:
            if step == 12:
                for group in optimizer.param_groups:
                    group["lr"] /= 2
            optimizer.step()
    values = torch.cat([p.detach().flatten() for p in parameters]).tolist()
    print(f'{{"{name}",\n {{{", ".join(f"{x:.15g}" for x in values)}}}}},')


for nesterov in (False, True):
    p = start()
    sgd = torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1, nesterov=nesterov)
    train("sgd, Nesterov" if nesterov else "sgd", p, [sgd])
p = start()
train("radam", p, [torch.optim.RAdam(p, 0.05, (0.8, 0.99), weight_decay=0.1, decoupled_weight_decay=True)])
for nesterov in (False, True):
    p = start()
    muon = torch.optim.Muon(p[:1], 0.05, 0.1, 0.9, nesterov, adjust_lr_fn="match_rms_adamw")
    train("muon, Nesterov" if nesterov else "muon", p,
          [muon, torch.optim.AdamW(p[1:], 0.05, (0.8, 0.99), weight_decay=0.1)])
for safeguard in (False, True):
    p = start()
    train("prodigy, safeguard" if safeguard else "prodigy", p,
          [Prodigy(p, 0.9, (0.8, 0.99), weight_decay=0.1, d0=1e-3, d_coef=0.7, safeguard_warmup=safeguard)])
