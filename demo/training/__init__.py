# SPDX-License-Identifier: Apache-2.0
"""How the demo's model, its latent space and its LoRAs are trained: needs COMFYUI_PATH, runs outside of ComfyUI."""

from . import host

host.prepare()
