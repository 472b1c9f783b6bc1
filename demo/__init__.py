"""A demonstration of the node pack in a real ComfyUI: run it with `python3 run.py demo`."""
