"""Page: what the frontend shows of a node when asked for help."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..locales import LANGUAGES, read

PROSE = Path(__file__).parent
HEADINGS = {
    "en": ("Inputs", "Outputs", "| input | type | default | |", "| output | type | |"),
    "zh": ("输入", "输出", "| 输入 | 类型 | 默认值 | |", "| 输出 | 类型 | |"),
    "ja": ("入力", "出力", "| 入力 | 型 | 既定値 | |", "| 出力 | 型 | |"),
}


def pages(info: Mapping[str, Any], nodes: list[str]) -> Iterator[tuple[str, str]]:
    """(path below web/docs, text). A page without a language is for those that have none of their own."""
    for language in LANGUAGES:
        prose, strings = sections(language), read(language)
        for node in nodes:
            text = page(prose[node], info[node], strings[node], language)
            yield f"{node}/{language}.md", text
            if language == "en":
                yield f"{node}.md", text


def sections(language: str) -> dict[str, str]:
    """{node: its prose}"""
    parts = re.split(r"^# (SSR\w+)\n", (PROSE / f"{language}.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def page(prose: str, schema: Mapping[str, Any], strings: Mapping[str, Any], language: str) -> str:
    heading, outputs, input_head, output_head = HEADINGS[language]
    lines = [f"# {strings['display_name']}", "", prose, "", f"## {heading}", "", input_head, "|---|---|---|---|"]
    for section in ("required", "optional"):
        for name in schema["input_order"].get(section, []):
            lines.append(_row(name, schema["input"][section][name], strings["inputs"][name], section == "optional"))
    lines += ["", f"## {outputs}", "", output_head, "|---|---|---|"]
    for number, kind in enumerate(schema["output"]):
        told = strings["outputs"][str(number)]
        lines.append(f"| {_named(schema['output_name'][number], told['name'])} | {kind} | {told['tooltip']} |")
    return "\n".join(lines) + "\n"


def _row(name: str, spec: list[Any], told: Mapping[str, str], optional: bool) -> str:
    options = spec[1] if len(spec) > 1 else {}
    kind = "COMBO" if isinstance(spec[0], list) else spec[0]
    default = "" if options.get("default") in (None, "") else f"`{options['default']}`"
    return f"| {_named(name, told['name'])}{'?' if optional else ''} | {kind} | {default} | {told['tooltip']} |"


def _named(name: str, told: str) -> str:
    return f"`{name}`" if told == name else f"`{name}` {told}"
