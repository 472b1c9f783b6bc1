"""Stats: what a calibration leaves behind. The value of SSR_STATS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...ssr_core import Calibration
from ..reading.loaded_lora import LoadedLora
from .circumstances import Circumstances


@dataclass(frozen=True, eq=False)
class Stats:
    """All that SSR Solve needs: the LoRAs, what was measured, and where it all comes from."""

    loras: tuple[LoadedLora, ...]  # (K,)
    calibration: Calibration
    text: Calibration | None  # of the text encoder; None: nothing was measured there, and its parts are summed
    with_clip: bool  # whether the text encoder was there, so that the names in `loras` are its own
    silent: tuple[str, ...]  # modules that a LoRA changes and that never ran
    provenance: Mapping[str, str]  # metadata for the file that is saved in the end
    collections: tuple[Circumstances, ...]  # how it was measured: once, unless statistics were added

    @property
    def model(self) -> str:
        """ComfyUI's class of the model it was measured on."""
        return self.collections[0].model
