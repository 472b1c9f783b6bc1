"""The order in which Python happens to keep names must not be seen in a merge."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import hashlib, sys, torch
from ssr_core import merge, save_lora, save_statistics, Lora, MergeSettings
from synthetic import collect, mlp, random, random_lora
model = mlp()
loras = [random_lora(name, model, rank, rank, modules) for name, rank, modules in
         (("cat", 3, None), ("dog", 2, ["2"]), ("pose", 1, ["0"]))]
calibration = collect(loras, model, [random(20, 8, seed=task) for task in range(3)])
save_statistics(calibration, sys.argv[1] + ".stats")
save_lora(merge(calibration, MergeSettings(rank=2)).updates, sys.argv[1], {"b": "1", "a": "2"})
for name in (sys.argv[1], sys.argv[1] + ".stats"):
    print(hashlib.sha256(open(name, "rb").read()).hexdigest())
"""


def test_statistics_and_merge_are_the_same_files_in_every_process(tmp_path):
    found = set()
    for seed in ("0", "1", "2"):
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / seed)]
        found.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(found) == 1 and len(found.pop().split()) == 2
