"""The table of what fits on which card is what Requirement says."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_in_the_docs_is_what_is_told_before_collecting(pack, monkeypatch):
    """Of ComfyUI's own model classes at their real sizes."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks" / "speed"), *sys.path])
    import cards

    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert [line for line in cards.table() if line not in text] == []
