"""Commands about speed: what readers take for models, and for blocks of what may become one."""

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from compress.core.errors import InputError
from compress.core.terminal import command, note
from compress.export.readers import Reader
from compress.flags import Json, ReaderPython
from compress.formats.table import FORMATS

Served = Annotated[Reader, typer.Option(help="What serves: transformers, llama.cpp or vllm.")]


def bench(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL DIR...", help="The first is compared with.")
    ],
    *,
    reader: Served = "transformers",
    reader_python: ReaderPython = None,
    profile: Annotated[
        Path | None, typer.Option(help="What compress profile wrote, to compare with.")
    ] = None,
    json: Json = False,
) -> None:
    """Serve models on this machine and say how fast.

    Prompt and generated tokens a second and peak memory, and their ratios to the first model's, in
    one run in which the models take turns.
    """
    from compress.memory.latency import read_profile
    from compress.model.find import resolve_model
    from compress.run.serving import bench as measured
    from compress.run.serving import print_speeds

    known = None if profile is None else read_profile(profile)
    speeds = measured([resolve_model(model) for model in models], reader, reader_python, known)
    if json:
        print(jsonlib.dumps([asdict(each) for each in speeds]))
    else:
        print_speeds(speeds)


def profile(
    model: Annotated[str, typer.Argument(help="The model whose students will be searched.")],
    *,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("profile.json"),
    formats: Annotated[
        str, typer.Option(help="Separated by commas. [default: all that the reader loads]")
    ] = "",
    reader: Served = "transformers",
    reader_python: ReaderPython = None,
) -> None:
    """Time a reader on blocks of a model, by kind, size and format.

    compress search takes the file as --profile, with --min-tokens-per-second or --max-latency.
    """
    from compress.memory.latency import write_profile
    from compress.model.find import resolve_model
    from compress.run.profile import profile as measured

    listed = [format.strip() for format in formats.split(",") if format.strip()]
    if unknown := [format for format in listed if format not in FORMATS]:
        raise InputError(f"format {unknown[0]!r} is not among {', '.join(FORMATS)}")
    found = measured(
        resolve_model(model), reader, reader_python, [f for f in FORMATS if f in listed]
    )
    write_profile(found, out)
    more = ("--profile", str(out), "--min-tokens-per-second", "20")
    note(f"next: {command('search', model, '--budget', '70%', *more)}")
