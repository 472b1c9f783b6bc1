"""The layers of Flux as a merge of several LoRAs sees them, at their real size and without memory."""

import torch

from ssr_core import Site, Subspace

# (out, in) of the layers of a block; a double block has its own twice, for the picture and the text
DOUBLE = ((9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288), (18432, 3072))
SINGLE = ((21504, 3072), (3072, 15360), (9216, 3072))


def flux(tasks: int, rank: int) -> dict[Site, Subspace]:
    """Those of its 19 double and 38 single blocks."""
    sizes = [size for size in DOUBLE for _ in range(2 * 19)] + [size for size in SINGLE for _ in range(38)]
    with torch.device("meta"):
        return {
            Site.whole(str(number), out): Subspace(
                torch.empty(tasks * rank, inputs, dtype=torch.bfloat16),
                torch.empty(out, tasks * rank, dtype=torch.bfloat16),
                (rank,) * tasks,
            )
            for number, (out, inputs) in enumerate(sizes)
        }
