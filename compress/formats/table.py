"""The number formats."""

from typing import Literal, get_args

Format = Literal["bf16", "fp8", "nvfp4"]


KvFormat = Literal["bf16", "fp8"]


FORMATS: tuple[Format, ...] = get_args(Format)


KV_FORMATS: tuple[KvFormat, ...] = get_args(KvFormat)
