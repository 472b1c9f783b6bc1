"""Recording: what is computed in half precision, what is computed once, and what is put on the device once."""

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ssr_core import Lora, Site, StatisticsCollector
from ssr_core.measure import layer
from synthetic import collect, random, random_lora, random_update, relative_error


class Attention(nn.Module):
    """q, k and v apart on one input, and an output projection."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out(torch.softmax(q @ k.mT, -1) @ v)


class Products(TorchFunctionMode):
    """Counts matrix products whose right side has `inner` rows."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.inner, self.columns = inner, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("__matmul__", "matmul", "mm") and args[1].shape[0] == self.inner:
            self.columns.append(args[1].shape[1])
        return func(*args, **(kwargs or {}))


def surveyed(model: nn.Module, loras: list[Lora], x: Tensor, rows: int = 3) -> StatisticsCollector:
    collector = StatisticsCollector(loras)
    for task in range(len(loras)):
        with torch.no_grad(), collector.surveying(model, task, rows):
            model(x)
    collector.see(rows)
    return collector


def pair(model: nn.Module) -> list[Lora]:
    return [random_lora("cat", model, 2, 1), random_lora("dog", model, 1, 2)]


@pytest.mark.parametrize("tokens", [0, 10])
def test_layers_with_one_input_are_projected_together(tokens):
    model, x = Attention().double(), random(30, 16)
    collector = surveyed(model, pair(model), x)
    assert collector.survey.shared == {"k": "q", "v": "q"}
    with torch.no_grad(), collector.recording(0, tokens=tokens, survey=0) as recording, Products(16) as products:
        recording.attach(model)
        model(x)
    joint = 3 * 3 + 3  # three layers of rank 3, and their context rows once
    assert products.columns.count(joint) == 1
    for statistics in collector.calibration().statistics.values():
        assert statistics.tokens == (tokens or 30, 0)


@pytest.mark.parametrize("tokens", [0, 10])
def test_what_is_projected_together_is_what_each_layer_would_have_measured(tokens):
    model, x = Attention().double(), random(30, 16)
    together, apart = (surveyed(model, pair(model), x) for _ in range(2))
    apart.survey.shared = {}
    results = []
    for collector in (together, apart):
        with torch.no_grad(), collector.recording(1, tokens=tokens) as recording:
            recording.attach(model)
            results.append(model(x))
    torch.testing.assert_close(*results)
    if tokens:  # each layer has its own turn then
        return
    for site, statistics in together.calibration().statistics.items():
        torch.testing.assert_close(statistics.gram, apart.calibration().statistics[site].gram)


def test_a_layer_that_gets_another_input_after_all_is_measured_on_its_own():
    model, x, other = Attention().double(), random(30, 16), random(30, 16, seed=1)
    collector = surveyed(model, pair(model), x)
    with torch.no_grad(), collector.recording(0) as recording:
        recording.attach(model)
        model.q(x)
        model.k(other)
        model.v(x)
    for name, seen in (("q", x), ("k", other), ("v", x)):
        site = Site.whole(name, 16)
        z = seen @ collector.subspaces[site].down.double().T
        torch.testing.assert_close(collector.calibration().statistics[site].gram[0], z.T @ z)


def test_a_fused_layer_of_slices_has_its_context_rows_projected_once():
    model, x = nn.ModuleDict({"qkv": nn.Linear(16, 12)}).double(), random(30, 16)
    loras = [
        Lora(name, {Site("qkv", at, at + 4, 12): random_update(4, 16, 2, seed + at) for at in (0, 4, 8)})
        for seed, name in enumerate(("cat", "dog"))
    ]
    collector = StatisticsCollector(loras)
    for task in range(2):
        with torch.no_grad(), collector.surveying(model, task, 3):
            model["qkv"](x)
    collector.see(3)
    with torch.no_grad(), collector.recording(0) as recording, Products(16) as products:
        recording.attach(model)
        model["qkv"](x)
    assert products.columns.count(3 * 4 + 3) == 1 and set(products.columns) <= {12, 3 * 4 + 3}  # 12: the layer itself
    for site, statistics in collector.calibration().statistics.items():
        z = x @ collector.subspaces[site].down.double().T
        torch.testing.assert_close(statistics.gram[0], z.T @ z)


@pytest.mark.parametrize("factors", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_statistics_of_half_precision_runs_are_within_a_thousandth(factors, monkeypatch):
    """As on accelerators, where activations are not widened, whatever precision the files are in."""
    monkeypatch.setattr(layer, "WIDENED", ())
    model = nn.Sequential(nn.Linear(256, 64)).bfloat16()
    loras = [
        Lora(lora.name, {site: type(u)(u.down.to(factors), u.up.to(factors)) for site, u in lora.updates.items()})
        for lora in (random_lora("cat", model, 8, 1), random_lora("dog", model, 8, 2))
    ]
    x = (random(2000, 256) + 2 * random(1, 256, seed=3)).bfloat16()  # with a direction that dominates
    (site,) = (calibration := collect(loras, model, [x])).statistics
    z = x.double() @ calibration.subspaces[site].down.double().T
    assert relative_error(calibration.statistics[site].gram[0], z.T @ z) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_update_of_a_half_precision_run_is_right_to_its_rounding(dtype, monkeypatch):
    monkeypatch.setattr(layer, "WIDENED", ())
    model = nn.Sequential(nn.Linear(64, 32)).to(dtype)
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    (site, update), *_ = random_lora("cat", model, 4, 1).updates.items()
    tiny = type(update)(update.down, update.up * 1e-6)  # as with a small alpha; float16 alone would lose it
    x = random(100, 64, dtype=dtype)
    with torch.no_grad(), StatisticsCollector([Lora("cat", {site: tiny}, 1e3)]).watching(model, 0):
        out = model(x)
    assert relative_error(out, 1e3 * x.double() @ tiny.dense().double().T) < 5e-3


def test_factors_are_put_where_the_model_computes_once_per_run(monkeypatch):
    placed = []
    place = layer.Layer.place
    monkeypatch.setattr(layer.Layer, "place", lambda self, *args: placed.append(self.name) or place(self, *args))
    model, x = Attention().double(), random(30, 16)
    collector = StatisticsCollector(pair(model))
    with torch.no_grad(), collector.recording(0) as recording:
        for _ in range(3):  # as for each prompt
            recording.attach(model)
            model(x)
            recording.detach()
    assert sorted(placed) == ["k", "out", "q", "v"]


def test_the_output_is_added_to_in_place_unless_somebody_else_may_hold_it():
    model, x = nn.Sequential(nn.Linear(16, 8)).double(), random(30, 16)
    made: list[int] = []
    forward = model[0].forward
    model[0].forward = lambda x: made.append((y := forward(x)).data_ptr()) or y
    with torch.no_grad(), StatisticsCollector([random_lora("cat", model, 2, 1)]).watching(model, 0):
        assert model(x).data_ptr() == made[-1]
        handle = model[0].register_forward_hook(lambda *_: None)
        assert model(x).data_ptr() != made[-1]
        handle.remove()


def test_an_identity_under_a_weight_does_not_have_its_input_changed():
    class Alias(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.Sequential(Alias(8, 8)).double()
    x = random(5, 8)
    kept = x.clone()
    with torch.no_grad(), StatisticsCollector([random_lora("cat", model, 2, 1)]).watching(model, 0):
        assert not torch.equal(model(x), x)
    assert torch.equal(x, kept)
