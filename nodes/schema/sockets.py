"""Sockets: the types that travel between the nodes, and what their schemas have in common.

The values are frozen, because ComfyUI hands one object to every consumer and caches it. Each lives where it is made:
Task in `reading`, Stats in `calibrating`, LoraModel in `writing`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from comfy.model_management import InterruptProcessingException
from comfy_api.latest import io
from server import PromptServer

CATEGORY = "SSR Merge"

SSRTasks = io.Custom("SSR_TASKS")
SSRStats = io.Custom("SSR_STATS")
SSRSheet = io.Custom("SSR_SHEET")
LoraModelSocket = io.Custom("LORA_MODEL")
LoraStackSocket = io.Custom("LORA_STACK")


def schema(**fields: Any) -> io.Schema:
    """An io.Schema of this pack's category, without the fields that an older ComfyUI does not know."""
    fields = {"category": CATEGORY, **fields}
    return io.Schema(**{key: value for key, value in fields.items() if key in io.Schema.__dataclass_fields__})


def say(cls: type[io.ComfyNode], text: str) -> None:
    """A line of text on the node that runs."""
    if PromptServer.instance is not None and cls.hidden.unique_id is not None:
        PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)


def ending_said(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    """Has a node whose work takes long say why it ended early, in the place of what it was at."""

    @wraps(execute)
    def executed(cls: type[io.ComfyNode], *given: Any, **named: Any) -> io.NodeOutput:
        try:
            return execute(cls, *given, **named)
        except InterruptProcessingException as stop:
            say(cls, str(stop) or "Stopped; nothing of this run is kept.")
            raise
        except Exception as error:
            say(cls, str(error))
            raise

    return executed


# folds an input away in the frontend, where ComfyUI knows how
ADVANCED: dict[str, Any] = {"advanced": True} if "advanced" in inspect.signature(io.Int.Input).parameters else {}

# a seed that stays: by default the frontend makes a new one each time, and all would be collected again
FIXED: Any = getattr(getattr(io, "ControlAfterGenerate", None), "fixed", None)
