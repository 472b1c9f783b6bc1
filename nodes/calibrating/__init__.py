"""Calibrating: ComfyUI samples with each LoRA, and what the layers see is measured."""
