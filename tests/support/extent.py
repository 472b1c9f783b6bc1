"""Extent: how much of what is alike is tested."""

import os
from collections.abc import Iterable


def chosen(every: Iterable[str], telling: tuple[str, ...]) -> tuple[str, ...]:
    """Those that are of a kind of their own; with SSR_CLASSES=all every one, which takes minutes."""
    return tuple(every) if os.environ.get("SSR_CLASSES") == "all" else telling
