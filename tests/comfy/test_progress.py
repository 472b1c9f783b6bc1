"""The demo's progress: a bar in a terminal, two lines in a log."""

import io

import pytest

from demo.run import progress
from hosting.server import Event


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def follow(monkeypatch: pytest.MonkeyPatch, output: io.StringIO) -> str:
    """What `output` shows of a workflow of 50 nodes with 20 steps each."""
    monkeypatch.setattr("sys.stdout", output)
    with progress("Merging") as show:
        for node in range(50):
            show(Event("executing", str(node), {}))
            for step in range(20):
                show(Event("progress", str(node), {"value": step + 1, "max": 20}))
        show(Event("executing", None, {}))
    return output.getvalue()


def test_a_log_gets_one_line_before_and_one_after(monkeypatch):
    first, last, *more = follow(monkeypatch, io.StringIO()).splitlines()
    assert first == "Merging ..." and last.startswith("Merging: done in ") and more == []


def test_a_terminal_gets_a_bar(monkeypatch):
    shown = follow(monkeypatch, Terminal())
    assert "\r" in shown and "50 nodes" in shown and "step 20 of 20" in shown
