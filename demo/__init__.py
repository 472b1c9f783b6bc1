"""A demonstration of the node pack in a real ComfyUI: run it with `uvx nox -s demo`."""
