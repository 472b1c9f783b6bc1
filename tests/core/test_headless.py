"""The example of the README, as it stands there, on a model of two layers."""

import torch

import ssr_core
from synthetic import dense_joined, mlp, random, random_lora


def test_loras_of_a_model_become_one_file_and_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = mlp().float()
    for seed, name in enumerate(("cat", "dog")):
        ssr_core.save_lora(random_lora(name, model, 3, seed).updates, f"{name}.safetensors")
    batches = [random(50, 8, seed=seed, dtype=torch.float32) + seed for seed in range(2)]
    calibration_batches = [{"input": batch} for batch in batches]

    loras = [ssr_core.load_lora("cat.safetensors"), ssr_core.load_lora("dog.safetensors")]
    collector = ssr_core.StatisticsCollector(loras)
    for task, batch in enumerate(calibration_batches):
        with torch.no_grad(), collector.watching(model, task):
            model(**batch)
    merge = ssr_core.merge(collector.calibration())
    ssr_core.save_lora(merge.updates, "cat+dog.safetensors")
    print(merge.report)

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
