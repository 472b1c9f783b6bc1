"""The nodes of this pack. Each is a file; what they share are the values in `sockets`.

SSR Prompts -> SSR Add LoRA, SSR Add LoRA Stack -> SSR Collect Stats -> SSR Solve -> SSR Apply, SSR Save LoRA
"""

from comfy_api.latest import ComfyExtension, io

from .add_lora import SSRAddLoRA
from .add_lora_stack import SSRAddLoRAStack
from .apply import SSRApply
from .collect_stats import SSRCollectStats
from .prompts import SSRPrompts
from .save_lora import SSRSaveLoRA
from .solve import SSRSolve


class SSRMergeExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [SSRPrompts, SSRAddLoRA, SSRAddLoRAStack, SSRCollectStats, SSRSolve, SSRApply, SSRSaveLoRA]


async def comfy_entrypoint() -> SSRMergeExtension:
    return SSRMergeExtension()
