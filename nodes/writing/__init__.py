"""Writing: statistics become a merged LoRA, on a model or in a file."""
