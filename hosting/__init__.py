"""A real ComfyUI in a process of its own, and its frontend in a browser: for the demo, the tests and `authoring`."""
