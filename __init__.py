"""ComfyUI-SSR-Merge: merge several LoRAs into one that keeps each of them."""

if __package__:  # ComfyUI imports this folder as a package; a lone import, as test collectors do, has no nodes to offer
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"  # help pages; there is no script

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
