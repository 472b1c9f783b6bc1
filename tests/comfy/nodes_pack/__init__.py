"""Custom nodes for the tests' own server, not part of the published pack: exact data, and things that break."""

from comfy_api.latest import ComfyExtension, io

from .broken import TestBigLora, TestDisturb, TestFault, TestInspect
from .exact import TestConditioning, TestSaveTensor


class TestExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TestConditioning, TestSaveTensor, TestFault, TestInspect, TestBigLora, TestDisturb]


async def comfy_entrypoint() -> TestExtension:
    return TestExtension()
