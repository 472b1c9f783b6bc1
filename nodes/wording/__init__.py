"""Wording: prompts from prompts and from what LoRA files tell, and the words that LoRAs are called by. Texts only."""
