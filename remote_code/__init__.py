"""Code that exports bring along for readers without classes of their own, and vLLM's plugin.

The other files are copied as they are, so they import each other relatively and nothing of ours.
"""


def register() -> None:
    """Let transformers know the configurations, so that vLLM needs no code of a directory.

    vLLM calls it, an entry point of ``vllm.general_plugins``, before it reads a model.
    """
    from transformers import AutoConfig

    from .configuration_decilm import DeciLMConfig
    from .configuration_nemotron_h_puzzle import NemotronHPuzzleConfig

    for known in (DeciLMConfig, NemotronHPuzzleConfig):
        AutoConfig.register(known.model_type, known, exist_ok=True)
