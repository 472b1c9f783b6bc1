"""Has readers of this pack read damaged files, and says of each whether it was refused by name, sane, or a bug."""

import importlib
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch

import damaged_files as damage
from lora_kinds import lora_of
from tiny_flux import flux_lora


@dataclass(frozen=True)
class Reader:
    """What is fuzzed: sound files to start from, the ways to damage them, and who reads them."""

    sound: list[bytes]
    kinds: dict[str, damage.Damage]
    read: Callable[[Path], None]  # raises SSRError, or AssertionError where a result is not sane
    ending: str = ".safetensors"


def fuzz(reader: Reader, seeds: Iterable[int], folder: Path) -> tuple[Counter[str], list[str]]:
    """How many files were refused ("error") and read ("sane"), and a line for each that shows a bug."""
    inbox, canary = folder / "inbox", folder / "canary"
    inbox.mkdir(exist_ok=True)
    found: Counter[str] = Counter()
    bugs: list[str] = []
    for seed in seeds:
        rng = random.Random(seed)
        kind = list(reader.kinds)[seed % len(reader.kinds)]
        path = inbox / f"stranger{seed}{reader.ending}"
        path.write_bytes(reader.kinds[kind](rng, rng.choice(reader.sound), canary))
        before = _snapshot(folder)
        try:
            found[_outcome(reader, path)] += 1
        except Exception as error:
            bugs.append(f"  {kind}, seed {seed}: {type(error).__name__}: {str(error)[:200]}")
        if _snapshot(folder) != before:
            bugs.append(f"  {kind}, seed {seed}: something was written")
            canary.unlink(missing_ok=True)
        path.unlink()
    return found, bugs


def _outcome(reader: Reader, path: Path) -> str:
    try:
        reader.read(path)
    except ValueError as error:
        # by name: the pack's ssr_core is not `import ssr_core`'s
        if "SSRError" not in [kind.__name__ for kind in type(error).__mro__]:
            raise
        assert path.stem in str(error), f"the file is not named: {error}"
        return "error"
    return "sane"


def _snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def core_readers(core: ModuleType, folder: Path) -> dict[str, Reader]:
    loras, statistics = _measured(core, folder / "sound.safetensors")

    def read_lora(path: Path) -> None:
        lora = core.load_lora(path)
        assert all(update.is_finite() for update in lora.updates.values()), "an update is not finite"

    def read_statistics(path: Path) -> None:
        calibration = core.load_statistics(path, loras)
        try:
            merged = core.merge(calibration)
        except core.SolveError:
            return
        assert all(update.is_finite() for update in merged.updates.values()), "the merge is not finite"

    return {
        "ssr_core.load_lora": Reader(_plain(), damage.LORAS, read_lora),
        "ssr_core.load_statistics": Reader([statistics], damage.STATISTICS, read_statistics),
    }


def node_readers(pack: ModuleType, model: Any) -> dict[str, Reader]:
    """Of the loaded pack, in a real ComfyUI, for `model`, the tiny Flux."""
    patches, task = (
        importlib.import_module(f"{pack.__name__}.nodes.{name}") for name in ("reading.patches", "reading.task")
    )
    kinds = ("loha", "lokr", "lokr factors", "glora", "dora", "oft", "difference")
    sound = [*_plain(), *(safetensors.torch.save(lora_of(kind)) for kind in kinds)]

    def read(path: Path) -> None:
        loaded = patches.read_tasks([task.Task(path.stem, path, 1.0, [])], model)[0]
        assert all(update.is_finite() for update in loaded.model.updates.values()), "an update is not finite"
        tensors = [patch[1][0] for patch in loaded.model.patches.values()]
        assert all(torch.isfinite(tensor.float()).all() for tensor in tensors), "a patch is not finite"

    return {
        "nodes.read_tasks": Reader(sound, damage.LORAS, read),
        "nodes.read_tasks, .pt": Reader(sound, damage.CHECKPOINTS, read, ".pt"),
    }


def _plain() -> list[bytes]:
    loras = [flux_lora("generic", only=_few), flux_lora("kohya", only=_few)]
    return [safetensors.torch.save(lora) for lora in (*loras, flux_lora("generic", rank=2, alpha=1.0, only=_few))]


def _few(module: str) -> bool:
    return any(part in module for part in ("img_attn.proj", "img_attn_proj", "single_blocks.0", "single_blocks_0"))


def _measured(core: ModuleType, path: Path) -> tuple[list, bytes]:
    """Three LoRAs, and the content of a file of their statistics, with context rows and corrections."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.GELU(), torch.nn.Linear(12, 8)).double()
    sites = {core.Site.whole("0", 12): (12, 8), core.Site.whole("2", 8): (8, 12)}
    loras = [
        core.Lora(name, {s: core.LowRankUpdate(normal(rank, i), normal(out, rank)) for s, (out, i) in sites.items()})
        for name, rank in (("cat", 3), ("dog", 2), ("pose", 1))
    ]
    collector, batches = core.StatisticsCollector(loras), [normal(20, 8).double() for _ in loras]
    with torch.no_grad():
        for task, x in enumerate(batches):
            with collector.surveying(model, task, 4):
                model(x)
        collector.see(4)
        for task, x in enumerate(batches):
            with collector.watching(model, task) as recording:
                recording.at(0.5)
                model(x)
        updates = core.merge(collector.calibration()).updates
        for task, x in enumerate(batches):
            with collector.refining(model, task, updates) as run:
                with run.alone():
                    model(x)
                with run.merged():
                    model(x)
    core.save_statistics(collector.calibration(), path)
    content = path.read_bytes()
    path.unlink()
    return loras, content
