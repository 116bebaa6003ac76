"""compress: the best smaller language model that fits a memory budget, found, made and proved.

The functions of the Python interface (``compress.plan``, ``score``, ``search``, ``load``,
``evaluate``) live in ``compress.api`` and are imported when first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.api import evaluate as evaluate
    from compress.api import load as load
    from compress.api import plan as plan
    from compress.api import score as score
    from compress.api import search as search

INTERFACE = ("evaluate", "load", "plan", "score", "search")


def __getattr__(name: str) -> Any:
    """A function of the interface; importing the package alone imports no torch."""
    if name in INTERFACE:
        import compress.api

        return getattr(compress.api, name)
    raise AttributeError(f"module 'compress' has no attribute {name!r}")
