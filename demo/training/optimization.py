# SPDX-License-Identifier: Apache-2.0
"""The training loop: AdamW, and Muon where matrices are to be learnt quickly."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

Checkpoint = Callable[[Sequence[Tensor]], None]


def optimize(
    name: str,
    parameters: Sequence[nn.Parameter],
    loss: Callable[[], Tensor],
    steps: int,
    rate: float,
    checkpoint: Checkpoint,
    matrices: Sequence[nn.Parameter] = (),
) -> None:
    """AdamW, but Muon at three times the rate for `matrices`, with a warm-up and a linear decay.

    `checkpoint` gets an average of the weights in the order of `parameters`, ten times on the way.
    """
    optimizers = optimizers_for(parameters, matrices, rate)
    averages = [p.detach().clone() for p in parameters]
    started, running = time.time(), 0.0
    for step in range(steps):
        value = loss()
        take_step(optimizers, min((step + 1) / 50, 1.01 - step / steps), value, parameters)
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], max(0.01, 1 / (step + 1)))
        running = value.item() if step == 0 else 0.98 * running + 0.02 * value.item()
        if step % 50 == 0:
            log.info("%s %d/%d loss %.4f, %.0f s", name, step, steps, running, time.time() - started)
        if (step + 1) % max(1, steps // 10) == 0 or step + 1 == steps:
            checkpoint(averages)


def optimizers_for(
    parameters: Sequence[nn.Parameter], matrices: Sequence[nn.Parameter], rate: float
) -> dict[torch.optim.Optimizer, float]:
    """The optimizers and their rates at full speed."""
    orthogonal = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in orthogonal]
    adam = {torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.01, fused=True): rate} if others else {}
    return adam | ({Muon(matrices): 3 * rate} if matrices else {})


def take_step(
    optimizers: dict[torch.optim.Optimizer, float], factor: float, value: Tensor, parameters: Sequence[nn.Parameter]
) -> None:
    """One step of every optimizer at `factor` times its rate."""
    for optimizer, rate in optimizers.items():
        optimizer.param_groups[0]["lr"] = rate * factor
        optimizer.zero_grad()
    value.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        optimizer.step()


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are orthogonalized (Jordan et al. 2024) in float32; torch.optim.Muon uses bfloat16."""

    def __init__(self, parameters: Sequence[nn.Parameter], momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                shapes.setdefault(tuple(parameter.shape), []).append(parameter)
            for alike in shapes.values():
                self._step_alike(alike, group["lr"], group["momentum"])

    def _step_alike(self, alike: list[nn.Parameter], rate: float, momentum: float) -> None:
        gradients = []
        for parameter in alike:
            buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
            buffer.lerp_(parameter.grad, 1 - momentum)
            gradients.append(parameter.grad.lerp(buffer, momentum))
        for parameter, update in zip(alike, orthogonalized(torch.stack(gradients)), strict=True):
            parameter.mul_(1 - 0.02 * rate).sub_(rate * 0.2 * max(parameter.shape) ** 0.5 * update)


def orthogonalized(matrices: Tensor) -> Tensor:
    """(B, m, n): singular values brought near 1 by a quintic Newton-Schulz iteration.

    The polynomials act on the small Gram matrix, and on the wide matrix only once.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram, product = x @ x.mT, torch.eye(x.shape[1])
    for _ in range(5):
        polynomial = torch.baddbmm(-4.7750 * gram, gram, gram, alpha=2.0315)
        polynomial.diagonal(dim1=1, dim2=2).add_(3.4445)
        product, gram = polynomial @ product, polynomial @ (polynomial @ gram)
    x = product @ x
    return x if wide is matrices else x.mT
