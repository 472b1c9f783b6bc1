# SPDX-License-Identifier: Apache-2.0
"""Other people's ways of merging, each by its formula. `deltas` are the LoRAs' dense differences of one layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.utils.merge_utils import ties
from testbed import LATENT, Deltas, Testbed
from torch import Tensor

ITERATIONS = 1  # of IterIS; a second made it worse on the LoRAs that settings are chosen on
OFF_DIAGONAL = 0.9  # RegMean's factor, as in its paper
SHIFT = 1e-5  # IterIS's regularization, relative to the norm of the correlation: the best of 1e-7 to 1e-2 there
CUTOFF = 1e-8  # of WUDI's eigenvalues, relative to the largest


def wudi(deltas: Tensor) -> Tensor:
    """WUDI-Merging (arXiv 2503.08099): the M with the least sum over k of |(M - D_k) D_k^T|^2 / |D_k|^2.

    Its authors descend to it from the sum; here the least squares are solved, with the smallest M of all that fit.
    """
    deltas = deltas.double()
    grams = deltas.mT @ deltas / deltas.square().sum((1, 2), keepdim=True).clamp_min(1e-300)
    inverse = torch.linalg.pinv(grams.sum(0), rtol=CUTOFF, hermitian=True)
    return ((deltas @ grams).sum(0) @ inverse).float()


def knots(deltas: Tensor, density: float) -> Tensor:
    """KnOTS (arXiv 2410.19735): [D_1 ... D_K] = U S [V_1 ... V_K], of whose V_k TIES makes one V; then U S V."""
    left, values, right = torch.linalg.svd(torch.cat(list(deltas), dim=1), full_matrices=False)
    rank = int((values > 1e-6 * values[0]).sum())
    parts = right[:rank].split(deltas.shape[2], dim=1)
    return (left[:, :rank] * values[:rank]) @ ties(list(parts), torch.ones(len(parts)), density)


def null_space(deltas: Tensor, styles: Sequence[bool]) -> Tensor:
    """NP-LoRA (arXiv 2511.11051), hard projection: subjects read only what the style does not, D_s + D_c (I - V V^T).

    V are all of the style's right singular vectors. Several subjects or styles are summed; without a style nothing is
    projected.
    """
    chosen = torch.tensor(styles)
    style, subjects = deltas[chosen], deltas[~chosen].sum(0)
    if len(style):
        _, values, right = torch.linalg.svd(torch.cat(list(style)), full_matrices=False)
        seen = right[values > 1e-6 * values[0]]
        subjects = subjects - subjects @ seen.mT @ seen
    return style.sum(0) + subjects


def fitted(bed: Testbed, names: Sequence[str], steps: int, prompts: int) -> dict[str, Deltas]:
    """RegMean (arXiv 2212.09849) and IterIS (arXiv 2411.15231): least squares over the layers' whole inputs.

    With x what a layer sees under LoRA k alone, x' what it sees under the merge and W_k its weight with the LoRA, the
    merged weight is (sum of c_k W_k x x'^T) (sum of c_k x' x'^T)^-1. RegMean takes x for x', c_k = 1 and shrinks what
    is off the diagonal. IterIS starts alike ("IterIS start"), runs the merge and solves again, with c_k = 1 / sum of
    |W_k x|^2 and a multiple of the identity added to every correlation. All are of full rank, which no LoRA file holds.
    The points are as many as ours, along the LoRAs' own ways.
    """
    walks = [_walk(bed, name, steps, prompts) for name in names]
    seen = _seen(bed, walks, {})
    start = merged = _solved(bed, seen, _iteris)
    for _ in range(ITERATIONS):
        merged = _solved(bed, _seen(bed, walks, merged), _iteris)
    return {"RegMean": _solved(bed, seen, _regmean), "IterIS start": start, "IterIS": merged}


@dataclass
class _Sums:
    """Over the tokens of one LoRA at one layer, float64; x as it sees them alone, y as the merge does."""

    delta: Tensor  # the LoRA's, (out, in)
    cross: Tensor  # x y^T, (in, in)
    gram: Tensor  # y y^T, (in, in)
    written: float = 0.0  # |W_k x|^2


Walk = tuple[str, list[str], list[Tensor]]  # a LoRA, its prompts, and the latents that it passes through
Term = tuple[Tensor, Tensor]  # what it adds to both sides of M gram = target


def _walk(bed: Testbed, name: str, steps: int, prompts: int) -> Walk:
    texts = bed.prompts((name,), False)[:prompts]
    noise = torch.randn(len(texts), *LATENT, generator=torch.Generator().manual_seed(0))
    with bed.patched(bed.alone(name)):
        return name, texts, bed.walk(texts, noise, steps)[0][:-1]


def _seen(bed: Testbed, walks: Sequence[Walk], merged: Deltas) -> dict[str, list[_Sums]]:
    """What each layer sees under each LoRA alone and, at the same points, under `merged`; empty: alone, too."""
    modules = sorted({module for name, *_ in walks for module in bed.alone(name)})
    found: dict[str, list[_Sums]] = {module: [] for module in modules}
    for name, texts, points in walks:
        deltas = bed.alone(name)
        for module in modules:
            weight = bed.weight(module)
            nothing = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
            delta = deltas.get(module, torch.zeros_like(weight)).double()
            found[module].append(_Sums(delta, nothing, nothing.clone()))
        for point, sigma in zip(points, torch.linspace(1, 0, len(points) + 1), strict=False):
            alone = bed.inputs(deltas, modules, texts, point, sigma)
            drifted = bed.inputs(merged, modules, texts, point, sigma) if merged else alone
            for module, x in alone.items():
                sums, y = found[module][-1], drifted[module]
                sums.cross += x.mT @ y
                sums.gram += y.mT @ y
                sums.written += float((x @ (bed.weight(module) + sums.delta.float()).mT).square().sum())
    return found


def _solved(bed: Testbed, seen: Mapping[str, list[_Sums]], term: Callable[[_Sums, Tensor], Term]) -> Deltas:
    found = {}
    for module, every in seen.items():
        weight = bed.weight(module).double()
        grams, targets = zip(*(term(sums, weight) for sums in every), strict=True)
        found[module] = torch.linalg.solve(sum(grams), sum(targets).mT).mT.float()
    return found


def _regmean(sums: _Sums, weight: Tensor) -> Term:
    gram = OFF_DIAGONAL * sums.gram + (1 - OFF_DIAGONAL) * sums.gram.diagonal().diag()
    return gram, sums.delta @ gram


def _iteris(sums: _Sums, weight: Tensor) -> Term:
    """As differences from the base's weight, which the merge has in common with every LoRA."""
    shift = SHIFT * sums.gram.norm() * torch.eye(len(sums.gram), dtype=torch.float64)
    target = (weight + sums.delta) @ sums.cross - weight @ sums.gram + sums.delta @ shift
    return (sums.gram + shift) / sums.written, target / sums.written
