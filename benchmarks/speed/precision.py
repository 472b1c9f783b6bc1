# SPDX-License-Identifier: Apache-2.0
"""What rounding does to the statistics: errors of a layer's Gram matrix against float64 on the same inputs.

    python benchmarks/speed/precision.py

TF32 and half precision are rounded to here, on the CPU, with products summed in float32, as tensor cores do. This
package does not ask for TF32; a host that allows it (torch.backends.cuda.matmul.allow_tf32) gets what the table says.
From half precision runs it measures with `down` in two parts, the second being what rounding took from the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOKENS, WIDTH, RANK = 4096, 3072, 128


def inputs() -> dict[str, Tensor]:
    """With all directions alike, and with one that holds most of the energy, as in real layers."""
    torch.manual_seed(0)
    noise = torch.randn(TOKENS, WIDTH)
    direction = torch.randn(WIDTH) / WIDTH**0.5
    return {"alike": noise, "one dominates": noise + 100 * torch.randn(TOKENS, 1) * direction}


def tf32(values: Tensor) -> Tensor:
    """Rounded to 10 bits of mantissa."""
    return ((values.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def half(values: Tensor) -> Tensor:
    return values.bfloat16().float()


def gram(z: Tensor) -> Tensor:
    return z.mT @ z


def ways(x: Tensor, down: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """By what is rounded: the Gram matrix, and the inputs that it is of."""
    narrow = half(x)
    parts = narrow @ half(down).mT + narrow @ half(down - half(down)).mT
    return {
        "float32": (gram(x @ down.mT), x),
        "TF32 projection": (gram(tf32(x) @ tf32(down).mT), x),
        "TF32 Gram": (gram(tf32(x @ down.mT)), x),
        "bfloat16 run, down rounded": (gram(narrow @ half(down).mT), narrow),
        "bfloat16 run, down in two parts (as built)": (gram(parts), narrow),
        "the same, products rounded to bfloat16 (no CUDA)": (gram(half(parts)), narrow),
    }


def main() -> None:
    down = torch.randn(RANK, WIDTH, generator=torch.Generator().manual_seed(1)) / WIDTH**0.5
    found: dict[str, list[float]] = {}
    for x in inputs().values():
        for name, (measured, seen) in ways(x, down).items():
            exact = gram(seen.double() @ down.double().mT)
            found.setdefault(name, []).append(float((measured.double() - exact).norm() / exact.norm()))
    print(f"torch {torch.__version__}; {TOKENS} tokens, width {WIDTH}, rank {RANK}")
    print(f"{'directions of the inputs':<50}" + "".join(f"{name:>16}" for name in inputs()))
    for name, errors in found.items():
        print(f"{name:<50}" + "".join(f"{error:>16.1e}" for error in errors))


if __name__ == "__main__":
    main()
