"""From statistics to one LoRA."""
