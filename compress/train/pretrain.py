"""``compress pretrain``: train a teacher from a recipe, from its tokenizer to its checkpoint."""

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from compress.core.errors import InputError
from compress.core.files import read_json, write_json
from compress.core.settings import read_settings
from compress.core.terminal import note
from compress.measure.losses import nll_from_hidden
from compress.model.build import load_model, student_config
from compress.model.checkpoint import in_bf16, open_checkpoint, write_checkpoint
from compress.model.families import read_architecture
from compress.model.kernels import modeling
from compress.model.modules import final_hidden, head_of
from compress.sweep.placement import placement
from compress.text.documents import read_documents
from compress.text.packing import pack
from compress.text.splits import split_documents
from compress.text.tokenizer import load_tokenizer
from compress.train.checkpoints import FILES, forget
from compress.train.loop import Progress, TrainSettings, batch_at, digest, train
from compress.train.precision import Numerics, numerics_of, quantized
from compress.train.recipes import PRECISIONS, PretrainRecipe
from compress.train.world import ALONE, World, world

EXACT = Numerics(PRECISIONS["fp32"])
EOS = "<|endoftext|>"
BIAS = "e_score_correction_bias"
LOAD = "load_since_balance"
BALANCE_RATE = 1e-3
HELD_OUT_TOKENS = 16_384
RECIPE, METRICS = "recipe.yaml", "metrics.json"


def pretrain(recipe: Path, out: Path, progress: Progress | None = None) -> dict[str, float]:
    """Train the teacher of a recipe into ``out``; its held-out figures, also in metrics.json.

    Interrupted, it continues from its last checkpoint (beside ``out``); finished with the same
    recipe, it does nothing. ``out`` becomes a Hugging Face directory in bf16 with tokenizer and
    recipe, and replaces what an earlier recipe left there. Of several processes the first writes
    and has figures. InputError on a recipe, config, text or tokenizer that cannot be used, a batch
    that does not divide among processes, a loss that is not finite, or an ``out`` of something
    else.
    """
    settings, ours = read_settings(recipe, PretrainRecipe, "pretraining recipe"), world()
    if ours.leads:
        if (finished := metrics_of(recipe, out)) is not None:
            return finished
        ours.told({"pretrain": [str(recipe), str(out)]})
    numerics = numerics_of(settings.precision, settings.emulate, placement("auto", None))
    ours.require(settings.batch, "adamw")
    splits = split_documents(read_documents(settings.data))
    tokenizer = tokenizer_of(settings, splits["train"])
    model = new_model(settings, tokenizer)
    rows = pack(splits["train"], tokenizer, settings.length, seed=settings.seed)
    held_out = HeldOut(splits["select"], tokenizer, settings.length)
    count_loads(model)

    def loss_of(reader: nn.Module, step: int) -> Tensor:
        numerics.at((step + 0.5) / settings.steps)
        whole = batch_at(rows, step, settings.batch, settings.seed, shift=True)
        loss: Tensor = reader(ours.share(whole)).mean() / ours.size
        return loss

    def after_step(reader: nn.Module, step: int) -> None:
        balance(reader, ours)

    asked = TrainSettings(
        steps=settings.steps,
        batch_tokens=settings.batch * settings.length,
        learning_rate=settings.learning_rate,
        warmup=settings.warmup,
        decay=settings.decay,
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        checkpoint_every=settings.checkpoint_every,
        precision=settings.precision,
        validate_every=settings.checkpoint_every,
        patience=settings.patience,
        data=digest(rows),
    )
    with quantized(model, read_architecture(settings.model), numerics):
        curve = train(
            Reader(model, numerics),
            loss_of,
            asked,
            what="pretrain",
            directory=work_of(out),
            progress=progress,
            after_step=after_step,
            validate=held_out.measure,
            world=ours,
        )
    if not ours.leads:
        return {}
    write_teacher(model, tokenizer, out)
    counts = {"steps": settings.steps, "tokens": curve[-1].tokens}
    metrics = counts | held_out.measure(Reader(load_model(out)))
    write_json(out / METRICS, metrics)
    shutil.copyfile(recipe, out / RECIPE)
    forget(work_of(out))
    note(
        f"held-out text: {metrics['nats_per_token']:.3f} nats per token, "
        f"{metrics['bits_per_byte']:.3f} bits per byte"
    )
    return metrics


def work_of(out: Path) -> Path:
    """Where the checkpoints of an unfinished training of ``out`` are."""
    return out.with_name(out.name + ".training")


def metrics_of(recipe: Path, out: Path) -> dict[str, float] | None:
    """Figures of a finished training of this very recipe in ``out``; None if there is none."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    interrupted = any(work_of(out).glob(FILES))
    if not (out / METRICS).is_file() and not interrupted:
        raise InputError(f"{out} exists and is no teacher of ours; choose another directory")
    if not (out / RECIPE).is_file() or (out / RECIPE).read_bytes() != recipe.read_bytes():
        return None
    metrics: dict[str, float] = read_json(out / METRICS)
    return metrics


def tokenizer_of(settings: PretrainRecipe, documents: list[str]) -> PreTrainedTokenizerFast:
    """The tokenizer that the recipe names, or one trained on the documents."""
    if isinstance(settings.tokenizer, Path):
        return load_tokenizer(settings.tokenizer)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.tokenizer.vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    fast: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = fast(tokenizer_object=bpe, eos_token=EOS)
    return tokenizer


def new_model(settings: PretrainRecipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A freshly initialized model of the recipe's config: fp32, training, on a GPU if any."""
    try:
        architecture = read_architecture(settings.model)
    except InputError as error:
        raise InputError(f"the recipe's model: {error}") from error
    if architecture.vocab < len(tokenizer):
        raise InputError(
            f"model.vocab_size {architecture.vocab} is below the tokenizer's {len(tokenizer)}"
        )
    torch.manual_seed(settings.seed)
    eos = tokenizer.eos_token_id
    special = {"bos_token_id": eos, "eos_token_id": eos, "pad_token_id": eos}
    try:
        config = AutoConfig.for_model(**settings.model | special | {"use_cache": True})
    except StrictDataclassError as error:
        raise InputError(f"the recipe's model: {' '.join(str(error).split())}") from error
    cuda = torch.cuda.is_available()
    if not cuda:
        # Looping over the experts is faster on a CPU than the grouped matrix product.
        config._experts_implementation = "eager"
    modeling(architecture.family)  # whose kernels choose by device from here on
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            # transformers draws Mamba's short kernels like wide matrices: so small that the block
            # would start below the eps of its gated norm and barely learn.
            module.reset_parameters()
    placed: nn.Module = model
    placed.to("cuda" if cuda else "cpu").train()
    assert isinstance(model, PreTrainedModel)
    return model


class Reader(nn.Module):
    """A model that reads text: the forward pass gives the nats of every token but a row's first."""

    def __init__(self, model: PreTrainedModel, numerics: Numerics = EXACT) -> None:
        super().__init__()
        self.model, self.numerics = model, numerics

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Nats of the tokens of rows, flat."""
        ids_BT = ids_BT.to(next(self.model.parameters()).device)
        with self.numerics.computing(ids_BT.device):
            hidden_BTD = final_hidden(self.model, ids_BT)
            hidden_ND, targets = hidden_BTD[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()
            return nll_from_hidden(hidden_ND, head_of(self.model), targets)


def count_loads(model: nn.Module) -> None:
    """Have the routers of a model count, beside their correction bias, what each expert is sent."""
    for router in routers_of(model):
        router.register_buffer(LOAD, torch.zeros_like(getattr(router, BIAS)), persistent=False)
        router.register_forward_hook(count_load)


def count_load(router: nn.Module, _: object, output: tuple[Tensor, ...]) -> None:
    """Add the tokens that this forward pass sent to each expert."""
    if router.training:
        load = router.get_buffer(LOAD)
        load += output[2].flatten().bincount(minlength=len(load))


@torch.no_grad()
def balance(model: nn.Module, world: World = ALONE) -> None:
    """Loss-free expert balancing: a step of the correction biases against the loads since the last.

    The loads are those of all processes.
    """
    for router in routers_of(model):
        load = world.sum(router.get_buffer(LOAD))
        router.get_buffer(BIAS).add_(BALANCE_RATE * (load.mean() - load).sign())
        load.zero_()


def routers_of(model: nn.Module) -> list[nn.Module]:
    """The routers with a correction bias."""
    return [module for module in model.modules() if hasattr(module, BIAS)]


class HeldOut:
    """Fixed rows of held-out text and the bytes they spell."""

    def __init__(
        self, documents: list[str], tokenizer: PreTrainedTokenizerFast, length: int
    ) -> None:
        rows = pack(documents, tokenizer, length, what="the held-out text")
        self.rows = rows[: HELD_OUT_TOKENS // length]
        texts = tokenizer.batch_decode(self.rows[:, 1:], skip_special_tokens=True)
        self.bytes = sum(len(text.encode()) for text in texts)

    @torch.no_grad()
    def measure(self, reader: nn.Module) -> dict[str, float]:
        """Nats per token and bits per byte that a ``Reader`` gives; it keeps its mode."""
        training = reader.training
        reader.train(False)
        nats = torch.cat([reader(rows) for rows in torch.split(self.rows, 8)]).double()
        reader.train(training)
        bits = nats.sum().item() / math.log(2)
        return {"nats_per_token": nats.mean().item(), "bits_per_byte": bits / self.bytes}


def write_teacher(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """The checkpoint of a trained model: bf16, names as on disk, tokenizer beside it."""
    with tempfile.TemporaryDirectory() as directory:
        # transformers knows how to name and split its fused experts; what it wrote is then checked
        # against the family's table, tensor by tensor.
        stock = Path(directory)
        model.save_pretrained(stock)
        tokenizer.save_pretrained(stock)
        checkpoint = open_checkpoint(stock)
        config = student_config(checkpoint.config, checkpoint.architecture)
        tensors = in_bf16(checkpoint.items(), checkpoint.architecture)
        write_checkpoint(out, tensors, config | {"dtype": "bfloat16"}, stock)
