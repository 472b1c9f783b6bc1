"""The pages of the repository: what they link to is there, and they name the nodes and files that exist."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*/README.md")]
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_within_the_repository_leads_somewhere(page):
    targets = [a or b for a, b in LINK.findall(page.read_text(encoding="utf-8"))]
    local = [target for target in targets if not target.startswith(("http://", "https://", "#"))]
    missing = [target for target in local if not (page.parent / target.partition("#")[0]).exists()]
    assert missing == []


def test_the_readme_tells_of_every_node_and_every_workflow():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    english = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert [node["display_name"] for node in english.values() if f"**{node['display_name']}**" not in readme] == []
    names = [path.name for path in (ROOT / "workflows").glob("*.json")]
    assert [name for name in names if f"workflows/{name}" not in readme] == []
