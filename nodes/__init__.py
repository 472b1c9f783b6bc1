"""The nodes of this pack. Each is a file here; what they call lies in the folders, in the order of the data flow.

    schema -> reading -> wording -> calibrating -> writing -> polishing -> pictures

(SSR Propose Prompts ->) SSR Prompts -> SSR Add LoRA, SSR Add LoRA Stack, SSR Add Combination
    -> SSR Collect Stats -> SSR Solve (-> SSR Polish) -> SSR Apply, SSR Save LoRA
                         -> SSR Split

SSR Save Stats, SSR Load Stats and SSR Add Stats keep what was measured; SSR Report tells what it means.
SSR Compare shows what came of it. SSR Quick Merge does all of it in one node.
"""

from comfy_api.latest import ComfyExtension, io

from .add_combination import SSRAddCombination
from .add_lora import SSRAddLoRA
from .add_lora_stack import SSRAddLoRAStack
from .add_scores import SSRAddScores
from .add_stats import SSRAddStats
from .apply import SSRApply
from .collect_stats import SSRCollectStats
from .compare import SSRCompare
from .load_stats import SSRLoadStats
from .polish import SSRPolish
from .prompts import SSRPrompts
from .propose_prompts import SSRProposePrompts
from .quick_merge import SSRQuickMerge
from .report import SSRReport
from .save_lora import SSRSaveLoRA
from .save_stats import SSRSaveStats
from .solve import SSRSolve
from .split import SSRSplit


class SSRMergeExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            *(SSRProposePrompts, SSRPrompts, SSRAddLoRA, SSRAddLoRAStack, SSRAddCombination, SSRCollectStats),
            *(SSRSaveStats, SSRLoadStats, SSRAddStats, SSRReport),
            *(SSRSolve, SSRPolish, SSRApply, SSRSaveLoRA, SSRSplit, SSRCompare, SSRAddScores),
            SSRQuickMerge,
        ]


async def comfy_entrypoint() -> SSRMergeExtension:
    return SSRMergeExtension()
