"""Distillation: a few gradient steps on a merge, with the LoRAs that it is made of as its teachers."""
