"""LoRAs as low-rank updates, and the subspace that several of them span in a layer."""
