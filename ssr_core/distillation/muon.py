"""Muon: steps of matrices in which all directions count alike, however large their gradients are.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon). A
factor's gradient is dominated by the few directions of its layer's inputs that are large, which least squares has
fitted already; what is left to learn is in the small ones. PyTorch's own (2.9 and later) iterates in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

ITERATIONS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)  # of the iteration, as in the source: singular values end between 0.7 and 1.2
NEGLIGIBLE = 1e-4  # of all gradients' norm: a matrix with less has hardly more than rounding errors
NOTHING = 1e-20  # beside it no gradient is small


class Muon(torch.optim.Optimizer):
    """Moves each matrix by the learning rate, in root mean square, a step.

    Matrices are to be in units of their own size, so that their gradients can be compared. Those with hardly any beside
    the others, such as of a layer whose output a normalization takes away, move less.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            learning = [parameter for parameter in group["params"] if parameter.grad is not None]
            norms = [parameter.grad.norm() for parameter in learning]
            floor = NEGLIGIBLE * torch.stack(norms or [torch.zeros(())]).norm() + NOTHING
            for parameter, norm in zip(learning, norms, strict=True):
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(mean, group["momentum"])  # Nesterov's
                size = group["lr"] * max(parameter.shape) ** 0.5
                parameter.addcmul_(orthogonalized(ahead), norm / (norm + floor), value=-size)


def orthogonalized(matrix: Tensor) -> Tensor:
    """(m, n): with singular values near 1 instead of its own, but for those that are nothing beside the others.

    The polynomials act on the small Gram matrix, and on the wide matrix only at the ends.
    """
    upright = matrix.shape[0] > matrix.shape[1]
    wide = matrix.mT if upright else matrix
    wide = wide / wide.norm().clamp_min(NOTHING)
    gram = wide @ wide.mT
    product = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    first, third, fifth = QUINTIC
    for _ in range(ITERATIONS):
        polynomial = third * gram + fifth * (gram @ gram)
        polynomial.diagonal().add_(first)
        product, gram = polynomial @ product, polynomial @ (polynomial @ gram)
    found = product @ wide
    return found.mT if upright else found
