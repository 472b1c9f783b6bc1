"""Polishing: a merge is distilled at points that its LoRAs are sampled at."""
