"""Small files of every format that this package writes, kept in tests/core/data: coming versions have to read them.

python tests/support/format_files.py    # for formats that have none yet; those that are there stay as they are
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import torch  # noqa: E402

from ssr_core import Lora, StatisticsCollector, merge, save_lora, save_statistics  # noqa: E402
from synthetic import mlp, random, random_lora  # noqa: E402

DATA = ROOT / "tests" / "core" / "data"


def main() -> None:
    if not (DATA / "statistics-2.safetensors").exists():
        write_with_cases()


def write_with_cases() -> None:
    """Two LoRAs, their combination and silence, refined."""
    model = mlp()
    loras = [random_lora("cat", model, 3, 1).with_strength(0.8), random_lora("dog", model, 2, 2, ["2"])]
    for lora in loras:
        save_lora(lora.updates, DATA / f"statistics-2-{lora.name}.safetensors", prefix="")
    collector = StatisticsCollector([Lora(lora.name, lora.updates, lora.strength) for lora in loras])
    batches = {
        (0,): random(40, 8) + 1,
        (1,): random(40, 8, seed=1) - 1,
        (0, 1): random(20, 8, seed=2),
        (): random(9, 8),
    }
    for case, batch in batches.items():
        with torch.no_grad(), collector.watching(model, case):
            model(batch)
    updates = merge(collector.calibration()).updates
    for case, batch in batches.items():
        with torch.no_grad(), collector.refining(model, case, updates) as run:
            with run.alone():
                model(batch)
            with run.merged():
                model(batch)
    calibration = collector.calibration()
    save_statistics(calibration, DATA / "statistics-2.safetensors")
    save_lora(merge(calibration).updates, DATA / "statistics-2-merged.safetensors", {"ssr.report": "fine"}, prefix="")


if __name__ == "__main__":
    main()
