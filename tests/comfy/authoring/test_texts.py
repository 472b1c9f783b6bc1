"""What the nodes say: tooltips, help pages and translations, against the schemas of a real server."""

import re
from typing import Any

import pytest

import comfy_runtime as runtime
from authoring.help.pages import pages
from authoring.locales import LANGUAGES, english, flat, read
from hosting.server import PACK_NAME, ComfyServer

pytestmark = pytest.mark.server

DOCS = runtime.ROOT / "web" / "docs"
SCRIPTS = {"zh": r"[\u4e00-\u9fff]", "ja": r"[\u3040-\u30ff\u4e00-\u9fff]"}


@pytest.fixture(scope="module")
def nodes(object_info: dict[str, Any]) -> list[str]:
    return [name for name, info in object_info.items() if PACK_NAME in info["python_module"]]


def test_every_node_input_and_output_is_described(object_info, nodes):
    strings = dict(flat(english(object_info)))
    assert len(nodes) >= 13 and {key.split(".")[0] for key in strings} == set(nodes)
    assert [key for key, text in strings.items() if not text] == []


def test_every_node_is_found_by_other_words_than_its_name(object_info, nodes):
    if "search_aliases" not in object_info[nodes[0]]:
        pytest.skip("this ComfyUI knows no search aliases")
    assert [name for name in nodes if len(object_info[name]["search_aliases"] or ()) < 3] == []


def test_english_is_what_the_schemas_say(object_info):
    assert read("en") == english(object_info), "run `python -m authoring.locales`"


@pytest.mark.parametrize("language", [language for language in LANGUAGES if language != "en"])
def test_a_translation_has_every_string_and_no_other_and_is_in_its_script(object_info, language):
    wanted, has = dict(flat(english(object_info))), dict(flat(read(language)))
    assert sorted(wanted.keys() - has.keys()) == [] and sorted(has.keys() - wanted.keys()) == []
    told = {key: text for key, text in has.items() if key.endswith(("tooltip", "description", "display_name"))}
    assert [key for key, text in told.items() if not re.search(SCRIPTS[language], text)] == []


def test_the_help_pages_are_what_prose_and_schemas_give(object_info, nodes):
    wanted = dict(pages(object_info, nodes))
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} == set(wanted)
    stale = [name for name, text in wanted.items() if (DOCS / name).read_text(encoding="utf-8") != text]
    assert stale == [], "run `python -m authoring.help`"


def test_the_server_hands_out_pages_and_translations(demo_server: ComfyServer, nodes):
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for name in nodes:
        for language in LANGUAGES:
            address = f"http://{demo_server.address}/extensions/{PACK_NAME}/docs/{name}/{language}.md"
            with opener.open(address) as answer:
                assert answer.read().decode().startswith(f"# {read(language)[name]['display_name']}")
