"""What a quantized model takes as it lies on disk; no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.memory.footprint import Deployment, Footprint, footprint, mtp_weight_bytes
from compress.model.architecture import Architecture
from compress.model.config import architecture_of, is_export
from compress.model.quantized import method_of
from compress.model.weights import index_bytes, planned_weights


@dataclass(frozen=True, kw_only=True)
class AsStored:
    """A quantized model on disk: its formats and who wrote them, and bytes of weights if known.

    Bytes are without those of layers that predict further tokens, which count as BF16. ``served``
    of one of our exports has its KV format too.
    """

    formats: str
    weights: int | None
    export: Architecture | None = None

    def served(self, architecture: Architecture, deployment: Deployment) -> Footprint:
        """Bytes of the model as it is; ``architecture`` is that of it in BF16."""
        made = footprint(self.export or architecture, deployment)
        return made if self.weights is None else replace(made, weights=self.weights)


def as_stored(path: Path, config: Mapping[str, Any]) -> AsStored | None:
    """What a model is on disk; None where it is not quantized.

    Without its weights, the index says what they take. InputError as ``planned_weights``.
    """
    if is_export(path, config):
        own = architecture_of(path, config)
        formats = ", ".join(sorted(format.upper() for format in own.formats - {"bf16"}))
        weights = footprint(own, Deployment(context=0)).weights
        return AsStored(formats=f"{formats} by compress", weights=weights, export=own)
    if (method := method_of(path, config)) is None:
        return None
    if found := planned_weights(path, config):
        if not found.quantized:
            return None  # undone, but for what config.json says
        return AsStored(formats=found.quantized, weights=found.bytes)
    if (total := index_bytes(path)) is not None:
        total -= mtp_weight_bytes(architecture_of(path, config))
    return AsStored(formats=method.said, weights=total)
