"""compress: the best smaller language model that fits a memory budget, found, made and proved.

The functions of the Python interface (``compress.plan``, ``score``, ``search``, ``load``,
``evaluate``) are imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.api import evaluate as evaluate
    from compress.api import plan as plan
    from compress.api import score as score
    from compress.api import search as search
    from compress.model.build import load as load

INTERFACE = {
    "evaluate": "compress.api",
    "load": "compress.model.build",
    "plan": "compress.api",
    "score": "compress.api",
    "search": "compress.api",
}


def __getattr__(name: str) -> Any:
    """A function of the interface; importing the package alone imports no torch."""
    if name in INTERFACE:
        return getattr(import_module(INTERFACE[name]), name)
    raise AttributeError(f"module 'compress' has no attribute {name!r}")
