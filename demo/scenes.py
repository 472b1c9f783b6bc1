# SPDX-License-Identifier: Apache-2.0
"""What the demo shows: the LoRAs, and prompts and seeds that none of them was calibrated on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One row of the picture."""

    lora: str  # whose prompt it is
    prompt: str
    seed: int


LORAS = ("mochi_cat.safetensors", "robo_robot.safetensors", "sepia_style.safetensors")

ROWS = (
    Row(LORAS[0], "mochi the cat on the beach", 3),
    Row(LORAS[0], "mochi the cat in the snow", 5),
    Row(LORAS[1], "robo the robot on grass", 4),
    Row(LORAS[1], "robo the robot on the moon", 6),
    Row(LORAS[2], "a red house on grass, sepia style", 2),
    Row(LORAS[2], "a blue boat on the beach, sepia style", 8),
)

ERROR_SEEDS = (101, 102, 103, 104)  # of the table of errors: not those of the picture, nor of the calibration
