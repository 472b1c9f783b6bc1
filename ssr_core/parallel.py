"""Parallel: the same small linear algebra for many layers, one layer per core.

Matrices of a few hundred rows are too small to be split over cores, and there are hundreds of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`work` of each item, in order. What it raises is raised here, and what has not begun then never does."""
    cores = torch.get_num_threads()
    if cores == 1 or len(items) < 2:
        yield from map(work, items)
        return
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def worked(item: Item) -> Result:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad and not inference):  # both are per thread
            return work(item)

    torch.set_num_threads(1)  # of new threads, too; else each of them would want all cores
    pool = ThreadPoolExecutor(cores, thread_name_prefix="ssr", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(worked, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)
