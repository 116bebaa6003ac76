"""Structures that need no code: the family's own config, and ours for what no class expresses."""

from compress.export.layouts.directory import Quantization, Structure, as_stored

# All layers alike: stock classes build it.
STOCK = Structure(config=lambda config, _: dict(config))
# Anything; stock loaders refuse the model type, and ``compress.load`` reads architecture.json.
OWN = Structure(
    config=lambda config, _: {
        "model_type": "compress",
        "architectures": config["architectures"],
        "base_config": dict(config),
    }
)
# Formats as they are measured and stored in a run.
OWN_FORMATS = Quantization(
    tensors=as_stored, config=lambda *_: {"quantization": {"quant_method": "compress"}}
)
