"""Contents: the example workflows by the names of their files."""

from __future__ import annotations

from collections.abc import Callable

from . import comparisons, families, scenarios
from .graph import Group

WORKFLOWS: dict[str, Callable[[], list[Group]]] = {
    "START-HERE-first-steps-sdxl": scenarios.first_steps,
    "two-characters-flux": comparisons.two_characters_flux,
    "style-and-character-sdxl": comparisons.style_and_character_sdxl,
    "three-loras-zimage": comparisons.three_loras_zimage,
    "speed-lora-in-base-qwen": comparisons.speed_lora_in_base_qwen,
    "two-experts-wan22": scenarios.wan_two_experts,
    "retune-saved-stats-zimage": scenarios.retune_saved_stats,
    "diagnose-only-flux": scenarios.diagnose_only,
    "polish-and-save-zimage": scenarios.polish_and_save,
    "keep-your-sliders-zimage": scenarios.keep_your_sliders,
    "save-for-sharing-zimage": scenarios.save_for_sharing,
    "bake-into-checkpoint-sdxl": scenarios.bake_into_checkpoint,
    "edit-loras-kontext": families.edit_loras,
    "style-and-character-krea2": families.krea2,
    "style-and-character-flux2-klein": families.flux2_klein,
    "style-and-character-anima": families.anima,
    "video-with-sound-ltx2": families.ltx2,
    "video-with-sound-minimax-h3": families.minimax_h3,
    "tiny-demo": comparisons.tiny_demo,
}
