"""SSR Polish on many model classes: gradients pass, and computing blocks again gives what keeping all of them gives."""

from dataclasses import replace

import pytest
import torch
from extent import chosen
from more_models import MORE, TELLING

from run_nodes import collect, execute, hooks, node, relative, solve, task
from tiny_models import GENERIC, loras

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("pack")]


def polish(model, stats, lora, **given):
    return execute(node("polish.SSRPolish"), model=model, stats=stats, lora=lora, seed=0, **given)


@pytest.mark.parametrize("name", chosen(MORE, TELLING))  # those of the families are in test_polish
def test_every_class(name, monkeypatch):
    import ssr_pack.nodes.polishing.points as points
    import ssr_pack.ssr_core.distillation.frozen as frozen

    monkeypatch.setattr(points, "FEWEST", 4)
    kind = MORE[name]
    model = kind.build()
    files = [loras(model, GENERIC, rank=2, seed=seed, strength=0.2)[0] for seed in (1, 2)]
    tasks = [replace(task(file, f"{seed}"), conditioning=kind.conditioning(seed)) for seed, file in enumerate(files, 1)]
    stats = collect(model, *tasks, steps=4, latent=kind.latent())
    merged = solve(stats)[0]
    lora, report, _ = polish(model, stats, merged, steps=2, batch=2)
    assert hooks(model) == 0
    assert "Error on held-out points" in report
    assert all(torch.isfinite(value).all() for value in lora.values())
    monkeypatch.setattr(frozen, "blocks_of", lambda model: [])  # all in memory, as autograd does by itself
    plain = polish(model, stats, merged, steps=2, batch=2)[0]
    assert all(relative(lora[key], plain[key]) < 1e-3 for key in plain)
