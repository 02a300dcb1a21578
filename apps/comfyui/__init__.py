"""Nodes of ComfyUI (V3): import `comfy_entrypoint` in the __init__.py of a folder in custom_nodes."""

from typing import Any


async def comfy_entrypoint() -> Any:
    """Return the extension; ComfyUI calls it when it loads custom nodes, and its interface is imported then."""
    from steer.apps.comfyui.nodes import SteerExtension

    return SteerExtension()
