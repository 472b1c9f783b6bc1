"""Parallel: the same results in the same order, whatever the number of cores, and nothing of it is left behind."""

import threading

import pytest
import torch

from ssr_core.parallel import each


@pytest.fixture(params=[1, 3])
def cores(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_and_the_number_of_threads_is_as_before(cores):
    assert list(each(lambda n: n**2, range(20))) == [n**2 for n in range(20)]
    assert torch.get_num_threads() == cores


def test_an_error_is_raised_here_and_what_has_not_begun_never_does(cores):
    begun = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 2:
            raise ValueError("two")
        return number

    with pytest.raises(ValueError, match="two"):
        list(each(work, range(10_000)))
    assert len(begun) < 10_000
    assert torch.get_num_threads() == cores
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ssr")]


def test_a_loop_that_is_left_stops_the_work(cores):
    for result in each(lambda n: n, range(10_000)):
        if result == 3:
            break
    assert torch.get_num_threads() == cores


@pytest.mark.parametrize("inference", [False, True])
def test_work_is_done_in_the_modes_of_the_caller(cores, inference):
    with torch.inference_mode(inference), torch.no_grad():
        modes = set(each(lambda _: (torch.is_inference_mode_enabled(), torch.is_grad_enabled()), range(8)))
    assert modes == {(inference, False)}
