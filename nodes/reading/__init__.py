"""Reading: LoRA files and stacks become low-rank updates of a model's layers."""
