"""Layer: every input position of a linear or convolution layer is a token, in pieces of bounded size."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ssr_core import Lora, ModelMismatchError, Site, StatisticsCollector
from ssr_core.measure import layer
from synthetic import collect, inputs_of, outputs_of, random, random_lora

LAYERS = {
    "linear on a vector": (nn.Linear(6, 5), (6,)),
    "linear on tokens": (nn.Linear(6, 5), (2, 7, 6)),
    "linear without bias": (nn.Linear(6, 5, bias=False), (9, 6)),
    "conv1d": (nn.Conv1d(3, 5, 4), (2, 3, 9)),
    "conv1d dilated": (nn.Conv1d(3, 5, 3, stride=2, padding=3, dilation=2), (2, 3, 9)),
    "conv2d": (nn.Conv2d(3, 5, 3), (2, 3, 6, 7)),
    "conv2d 1x1": (nn.Conv2d(3, 5, 1), (2, 3, 6, 7)),
    "conv2d strided": (nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 3, 6, 7)),
    "conv2d dilated": (nn.Conv2d(3, 5, 3, padding=2, dilation=(1, 2)), (2, 3, 6, 7)),
    "conv2d same": (nn.Conv2d(3, 5, (3, 5), padding="same"), (2, 3, 6, 7)),
    "conv2d valid": (nn.Conv2d(3, 5, 3, padding="valid"), (2, 3, 6, 7)),
    "conv2d circular": (nn.Conv2d(3, 5, 3, padding=(1, 2), padding_mode="circular"), (2, 3, 6, 7)),
    "conv2d reflect same": (nn.Conv2d(3, 5, 3, padding="same", padding_mode="reflect"), (2, 3, 6, 7)),
    "conv3d": (nn.Conv3d(2, 4, (2, 3, 3), stride=(1, 2, 1), padding=(0, 1, 1)), (2, 2, 4, 5, 6)),
    "conv3d causal": (nn.Conv3d(2, 4, 3, padding=(0, 1, 1), padding_mode="replicate"), (1, 2, 4, 5, 6)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_statistics_and_output_are_those_of_the_unfolded_inputs(kind):
    module, shape = LAYERS[kind]
    model = nn.Sequential(module).double()
    loras = [random_lora("cat", model, 3, seed=1).with_strength(0.7), random_lora("dog", model, 2, seed=2)]
    site = next(iter(loras[0].updates))
    x = random(*shape)
    collector = StatisticsCollector(loras)
    with torch.no_grad():
        base = model(x)
        with collector.watching(model, 0):
            out = model(x)
    unfolded = inputs_of(module, x)
    z = unfolded @ collector.subspaces[site].down.double().flatten(1).T
    statistics = collector.calibration().statistics[site]
    assert statistics.tokens == (len(unfolded), 0)
    torch.testing.assert_close(statistics.gram[0], z.T @ z, rtol=1e-10, atol=1e-10)

    weight = module.weight.flatten(1) + 0.7 * loras[0].updates[site].dense().double().flatten(1)
    wanted = unfolded @ weight.T + (0 if module.bias is None else module.bias)
    torch.testing.assert_close(out, outputs_of(wanted, base, module.weight.ndim > 2), rtol=1e-6, atol=1e-6)


def test_one_image_without_a_batch_axis_counts_like_a_batch_of_one():
    model = nn.Sequential(nn.Conv2d(3, 5, 3)).double()
    loras = [random_lora("cat", model, 2, seed=1), random_lora("dog", model, 2, seed=2)]
    x = random(3, 6, 6)  # four output columns, as many as the joint rank
    single, batched = collect(loras, model, [x]), collect(loras, model, [x[None]])
    for site, statistics in batched.statistics.items():
        assert single.statistics[site].tokens == statistics.tokens
        torch.testing.assert_close(single.statistics[site].gram, statistics.gram)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)])
def test_an_empty_batch_adds_no_token(shape):
    model = nn.Sequential(nn.Linear(6, 5)).double()
    calibration = collect([random_lora("cat", model, 2, 1), random_lora("dog", model, 2, 2)], model, [random(*shape)])
    assert calibration.tokens == (0, 0)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "grouped"),
        (nn.Conv1d(4, 4, 3, groups=4), "grouped"),
        (nn.ConvTranspose2d(4, 4, 3), "transposed"),
        (nn.ConvTranspose1d(4, 4, 3), "transposed"),
        (nn.LayerNorm(4), "no linear or conv"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_layer_that_cannot_be_routed_is_refused_by_name(module, kind):
    model = nn.ModuleDict({"blocks": nn.ModuleList([module])})
    lora = random_lora("cat", nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4)])}), 2)
    with (
        pytest.raises(ModelMismatchError, match=rf"blocks\.0 .*{kind}"),
        StatisticsCollector([lora]).watching(model, 0),
    ):
        pass
    assert not module._forward_hooks


class Scaled(nn.Module):
    """As StyleGAN's equalized layers: what it multiplies with is not its weight."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))

    def forward(self, x):
        return nn.functional.linear(x, self.weight / 3)


@pytest.mark.parametrize("module", [Scaled(4, 4), Scaled(4, 4, 1, 1), nn.LayerNorm((4, 4)), nn.Embedding(4, 4)])
def test_a_weight_of_two_or_four_axes_makes_no_linear_layer(module):
    assert not layer.multiplies(module)
    lora = random_lora("cat", nn.ModuleDict({"gate": nn.Linear(4, 4)}), 2)
    with (
        pytest.raises(ModelMismatchError, match=r"gate is a .* nobody knows that it multiplies"),
        StatisticsCollector([lora]).watching(nn.ModuleDict({"gate": module}), 0),
    ):
        pass


@pytest.mark.parametrize("kind", ["linear on tokens", "conv2d strided", "conv3d"])
@pytest.mark.parametrize("chunk_bytes", [1, 300, 1000])
def test_pieces_of_any_size_add_up_to_one_pass(kind, chunk_bytes, monkeypatch):
    module, shape = LAYERS[kind]
    model = nn.Sequential(module).double()
    loras = [random_lora("cat", model, 3, seed=1), random_lora("dog", model, 2, seed=2)]
    x = random(5, *shape[1:])

    def measured():
        collector = StatisticsCollector(loras)
        with torch.no_grad(), collector.watching(model, 1):
            out = model(x)
        (statistics,) = collector.calibration().statistics.values()
        return statistics, out

    whole, out = measured()
    monkeypatch.setattr(layer, "CHUNK_BYTES", chunk_bytes)
    pieces, out_by_pieces = measured()
    assert pieces.tokens == whole.tokens
    torch.testing.assert_close(pieces.gram, whole.gram, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out_by_pieces, out, rtol=1e-12, atol=1e-12)


class LargestWide(TorchFunctionMode):
    """Records the largest float32 or float64 tensor that any operation makes, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.float32, torch.float64):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(512, 256), (8000, 512)),
        (nn.Linear(512, 128), (4, 2000, 512)),
        (nn.Conv2d(16, 8, 3, padding=1), (256, 16, 16, 16)),
    ],
    ids=["linear", "linear with a batch", "convolution"],
)
def test_bfloat16_activations_are_widened_piece_by_piece_only(module, shape, monkeypatch):
    chunk_bytes = 2**18
    monkeypatch.setattr(layer, "CHUNK_BYTES", chunk_bytes)
    model = nn.Sequential(module).bfloat16()
    collector = StatisticsCollector([random_lora("cat", model, 4, seed=1), random_lora("dog", model, 4, seed=2)])
    x = random(*shape, dtype=torch.bfloat16)
    assert 4 * x.numel() > 10 * chunk_bytes
    with torch.no_grad(), collector.watching(model, 0), LargestWide() as largest:
        model(x)
    assert 0 < largest.bytes <= chunk_bytes


def test_bfloat16_activations_are_projected_in_float32():
    model = nn.Sequential(nn.Linear(64, 16)).bfloat16()
    loras = [random_lora("cat", model, 3, seed=1), random_lora("dog", model, 2, seed=2)]
    x = random(50, 64, dtype=torch.bfloat16)
    calibration = collect(loras, model, [x])
    (site,) = calibration.statistics
    z = x.double() @ calibration.subspaces[site].down.double().T
    torch.testing.assert_close(calibration.statistics[site].gram[0], z.T @ z, rtol=1e-5, atol=1e-5)


def test_autocast_does_not_narrow_the_signals():
    model = nn.Sequential(nn.Linear(64, 16))
    loras = [random_lora("cat", model, 3, seed=1), random_lora("dog", model, 2, seed=2)]
    x = random(50, 64, dtype=torch.float32)
    collector = StatisticsCollector(loras)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), collector.watching(model, 0):
        model(x)
    (site,) = collector.subspaces
    z = x.double() @ collector.subspaces[site].down.double().T
    gram = collector.calibration().statistics[site].gram[0]
    torch.testing.assert_close(gram, z.T @ z, rtol=1e-5, atol=1e-5)


def test_a_layer_called_with_a_keyword_is_counted():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(input=x)

    model = Model().double()
    calibration = collect([random_lora("cat", model, 2, 1), random_lora("dog", model, 2, 2)], model, [random(9, 6)])
    assert calibration.tokens == (9, 0)


def test_a_convolution_in_channels_last_gives_the_same_statistics():
    model = nn.Sequential(nn.Conv2d(3, 5, 3)).double()
    loras = [random_lora("cat", model, 2, seed=1), random_lora("dog", model, 2, seed=2)]
    x = random(2, 3, 6, 7)
    plain = collect(loras, model, [x])
    strided = collect(loras, model.to(memory_format=torch.channels_last), [x.to(memory_format=torch.channels_last)])
    for site, statistics in plain.statistics.items():
        torch.testing.assert_close(strided.statistics[site].gram, statistics.gram, rtol=1e-12, atol=1e-12)


def test_a_lora_of_another_size_is_refused_with_both_sizes():
    model = nn.Sequential(nn.Linear(6, 5))
    lora = Lora("cat", {Site.whole("0", 5): random_lora("x", nn.Linear(7, 5), 2).updates[Site.whole("", 5)]})
    with (
        pytest.raises(ModelMismatchError, match=r"0 with 7 inputs and 5 outputs.*\(5, 6\)"),
        StatisticsCollector([lora]).watching(model, 0),
    ):
        pass
