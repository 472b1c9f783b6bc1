# SPDX-License-Identifier: Apache-2.0
"""What the demo shows: the LoRAs, and prompts and seeds that none of them was calibrated on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """A prompt with the LoRAs that it asks for: a row of the picture, and a part of one of the table."""

    loras: tuple[str, ...]
    prompt: str
    seed: int
    is_drawn: bool = True

    @property
    def asked(self) -> str:
        """Of which LoRAs, in few words; rows of the same are one row of the table."""
        return " + ".join(Path(lora).stem for lora in self.loras)


CAT, ROBOT, SEPIA = LORAS = ("mochi_cat.safetensors", "robo_robot.safetensors", "sepia_style.safetensors")

ROWS = (
    Row((CAT,), "mochi the cat on the beach", 3),
    Row((CAT,), "mochi the cat in the snow", 5),
    Row((ROBOT,), "robo the robot on grass", 4),
    Row((ROBOT,), "robo the robot on the moon", 6),
    Row((SEPIA,), "a red house on grass, sepia style", 2),
    Row((SEPIA,), "a blue boat on the beach, sepia style", 8),
    Row((CAT, SEPIA), "mochi the cat on the beach, sepia style", 3),
    Row((CAT, SEPIA), "mochi the cat in the snow, sepia style", 5, is_drawn=False),
    Row((ROBOT, SEPIA), "robo the robot on grass, sepia style", 4, is_drawn=False),
    Row((ROBOT, SEPIA), "robo the robot on the moon, sepia style", 6),
)

ERROR_SEEDS = (101, 102, 103, 104)  # of the table of errors: not those of the picture, nor of the calibration
