"""LoRAs and statistics as files."""
