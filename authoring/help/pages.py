"""Page: what the frontend shows of a node when asked for help."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..locales import LANGUAGES, read

PROSE = Path(__file__).parent
HEADINGS = {"en": ("Inputs", "Outputs", "optional"), "zh": ("输入", "输出", "可选"), "ja": ("入力", "出力", "省略可")}


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
    """Lists, not tables: the panel that shows them is narrow."""
    inputs, outputs, optional = HEADINGS[language]
    lines = [f"# {strings['display_name']}", "", prose, "", f"## {inputs}", ""]
    for section in ("required", "optional"):
        for name in schema["input_order"].get(section, []):
            facts = [_kind(schema["input"][section][name]), *([optional] if section == "optional" else [])]
            lines.append(_line(name, strings["inputs"][name], facts))
    lines += ["", f"## {outputs}", ""]
    for number, kind in enumerate(schema["output"]):
        lines.append(_line(schema["output_name"][number], strings["outputs"][str(number)], [kind]))
    return "\n".join(lines) + "\n"


def _kind(spec: list[Any]) -> str:
    default = (spec[1] if len(spec) > 1 else {}).get("default")
    kind = "COMBO" if isinstance(spec[0], list) else spec[0]
    return kind if default in (None, "") else f"{kind} {default}"


def _line(name: str, told: Mapping[str, str], facts: list[str]) -> str:
    named = f"**{name}**" if told["name"] == name else f"**{name}** {told['name']}"
    return f"- {named} ({', '.join(facts)}): {told['tooltip']}"
