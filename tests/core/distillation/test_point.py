"""Points: calls of a model that can be made again."""

import torch
from torch import nn

from ssr_core import PointRecorder
from synthetic import random


class Network(nn.Module):
    """Writes to what it is given."""

    def forward(self, x, prompt, options=None):
        options["seen"] = True
        x += prompt.mean()
        return x * options["scale"], [x[:1]]


def recorded(calls: int = 3) -> tuple[Network, PointRecorder, list]:
    network, recorder = Network(), PointRecorder(2)
    prompt, outputs = random(1, 40), []
    with torch.inference_mode(), recorder.attached(network):
        for number in range(calls):
            x = random(4, 8, seed=number)
            outputs.append(network(x, prompt=prompt.clone(), options={"scale": 2.0 + number, "names": ["a", None]}))
    network(random(4, 8), prompt, {"scale": 1.0})  # not kept
    return network, recorder, outputs


def test_a_call_made_again_gives_the_same_answer():
    network, recorder, outputs = recorded()
    assert [point.case for point in recorder.points] == [2, 2, 2]
    for point, (first, (second,)) in zip(recorder.points, outputs, strict=True):
        for _ in range(2):  # what the model writes into is not the point's own
            for ours, theirs in zip(point.answer(network, torch.device("cpu")), (first, second), strict=True):
                torch.testing.assert_close(ours, theirs)
        assert [target.shape for target in point.target] == [first.shape, second.shape]


def test_what_is_the_same_in_all_steps_is_kept_once():
    _, recorder, _ = recorded()
    assert len({point.kwargs["prompt"].data_ptr() for point in recorder.points}) == 1
    assert len({point.args[0].data_ptr() for point in recorder.points}) == 3


def test_a_point_takes_part_in_gradients_though_it_was_kept_under_inference_mode():
    _, recorder, _ = recorded()
    (point, *_) = recorder.points
    layer = nn.Linear(8, 8).double()

    class Around(nn.Module):
        def forward(self, x, prompt, options):
            return layer(x)

    point.answer(Around(), torch.device("cpu"))[0].sum().backward()
    assert layer.weight.grad is not None
