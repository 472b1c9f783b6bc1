"""The example of docs/headless.md, as it stands there, on a model of two layers."""

import re
import runpy
from pathlib import Path

import torch

import ssr_core
from synthetic import dense_joined, mlp, random, random_lora

PAGE = Path(__file__).parents[2] / "docs" / "headless.md"


def example() -> str:
    """The page's first block of Python."""
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


def test_loras_of_a_model_become_one_file_and_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = mlp().float()
    for seed, name in enumerate(("cat", "dog")):
        ssr_core.save_lora(random_lora(name, model, 3, seed).updates, f"{name}.safetensors")
    batches = [random(50, 8, seed=seed, dtype=torch.float32) + seed for seed in range(2)]
    calibration_batches = [{"input": batch} for batch in batches]

    script = tmp_path / "example.py"
    script.write_text(example(), encoding="utf-8")
    known = {"model": model, "short_batches": calibration_batches, "calibration_batches": calibration_batches}
    ran = runpy.run_path(str(script), init_globals=known)
    loras, merge = ran["loras"], ran["merge"]

    report = capsys.readouterr().out
    assert "2 LoRAs, 2 sites, 2 of them shared" in report
    assert merge.report.error(0) < merge.report.error(0, "stack")
    assert merge.report.error(1) < merge.report.error(1, "stack")

    # the file carries the merge: the model with it answers each batch more like that batch's LoRA alone than the stack
    written = dense_joined(ssr_core.load_lora("cat+dog.safetensors").updates)
    alone = [dense_joined(lora.updates) for lora in loras]
    stack = {module: alone[0][module] + alone[1][module] for module in written}

    def answer(deltas: dict[str, torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        patched = mlp()
        for module, delta in deltas.items():
            patched.get_submodule(module).weight.data += delta
        with torch.no_grad():
            return patched(batch.double())

    for task, batch in enumerate(batches):
        wanted = answer(alone[task], batch)
        assert (answer(written, batch) - wanted).norm() < (answer(stack, batch) - wanted).norm()
