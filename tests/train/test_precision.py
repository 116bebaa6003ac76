"""Recipes compute the published formulas, leave in BF16 what they say, and run where they can."""

from pathlib import Path

import pytest
import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from test_distill import SETTINGS, quiet, taught, tokens
from test_pretrain import recipe
from torch import Tensor
from torch.nn import functional

from compress.core.errors import InputError
from compress.model.build import load_model
from compress.model.checkpoint import open_checkpoint
from compress.sweep.placement import REFERENCE
from compress.train.distill import distill
from compress.train.precision import Numerics, linears, numerics_of, quantized
from compress.train.pretrain import pretrain
from compress.train.products import Linear, hadamard, round_stochastically_, rounded
from compress.train.recipes import PRECISIONS, Operand, Precision

GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
QUANTIZED = [name for name, each in PRECISIONS.items() if each.weight]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal values with outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return x * torch.where(torch.rand(shape, generator=generator) < 0.02, 20.0, 1.0)


def test_blocks_of_nvfp4_are_modelopt_s() -> None:
    x = drawn(32, 64)
    # Scales down to the smallest, and zeros.
    x *= 10.0 ** -torch.arange(32)[:, None].clamp(max=8)
    x[20] = 0
    codes, scales, scale = NVFP4QTensor.quantize(x, 16)
    packed = codes.dequantize(
        dtype=torch.float32, scale=scales, double_scale=scale, block_sizes={-1: 16}
    )
    assert torch.equal(rounded(x, Operand(numbers="e2m1", block=(1, 16))), packed)


def test_square_blocks_of_nvfp4_are_the_formula_and_the_same_in_both_directions() -> None:
    x, how = drawn(32, 48), Operand(numbers="e2m1", block=(16, 16))
    scale = x.abs().amax() / (6 * 448)
    expected = torch.empty_like(x)
    for row in range(0, 32, 16):
        for column in range(0, 48, 16):
            block = x[row : row + 16, column : column + 16]
            step = (block.abs().amax() / (6 * scale)).to(torch.float8_e4m3fn).float() * scale
            near = (block.abs() / step).clamp(max=6)[..., None].sub(GRID).abs().argmin(-1)
            expected[row : row + 16, column : column + 16] = GRID[near] * block.sign() * step
    assert torch.equal(rounded(x, how), expected)
    assert torch.equal(rounded(x.T, how), rounded(x, how).T)


def test_scales_of_fp8_are_those_of_the_tensor_and_of_blocks() -> None:
    x = drawn(130, 200)
    amax = x.abs().amax()
    e5m2 = (x / (amax / 57344)).to(torch.float8_e5m2).float() * (amax / 57344)
    assert torch.equal(rounded(x, Operand(numbers="e5m2")), e5m2)
    # A block at the edge is one of what there is.
    for block, part in (((128, 128), x[128:, 128:]), ((1, 128), x[7:8, :128])):
        scale = part.abs().amax() / 448
        found = rounded(x, Operand(numbers="e4m3", block=block))
        inside = found[128:, 128:] if block[0] > 1 else found[7:8, :128]
        assert torch.equal(inside, (part / scale).to(torch.float8_e4m3fn).float() * scale)


def test_stochastic_rounding_gives_neighbours_whose_mean_is_the_value() -> None:
    torch.manual_seed(0)
    values = torch.tensor([0.1, 0.75, 1.1, 2.3, -3.6, 4.5, 6.0, 9.0, 0.0])
    found = round_stochastically_(values.repeat(20_000, 1))
    assert torch.isin(found.abs(), GRID).all()
    torch.testing.assert_close(found.mean(0), values.clamp(-6, 6), atol=0.03, rtol=0)


def test_the_hadamard_transform_leaves_the_product_and_spreads_outliers() -> None:
    x, y = drawn(3, 40), drawn(5, 40, seed=1)
    torch.testing.assert_close(hadamard(x) @ hadamard(y).T, x @ y.T, rtol=1e-4, atol=1e-4)
    peak = torch.zeros(1, 16)
    peak[0, 5] = 8.0
    assert torch.equal(hadamard(peak).abs(), torch.full((1, 16), 2.0))


@pytest.mark.parametrize("name", QUANTIZED)
def test_products_are_of_rounded_operands(name: str) -> None:
    how = PRECISIONS[name]
    x, weight, above = drawn(32, 48), drawn(24, 48, seed=1), drawn(32, 24, seed=2)
    x.requires_grad_(True)
    weight.requires_grad_(True)
    y = Linear.apply(x, weight, how, False)
    assert torch.equal(y, rounded(x, how.activation) @ rounded(weight, how.weight).T)
    torch.manual_seed(1)
    y.backward(above)
    torch.manual_seed(1)
    turned = hadamard if how.hadamard else torch.Tensor.contiguous
    dx = rounded(above, how.gradient) @ rounded(weight.T, how.weight).T
    dw = rounded(turned(above.T), how.gradient) @ rounded(turned(x.T), how.activation).T
    assert torch.equal(x.grad, dx)
    assert torch.equal(weight.grad, dw)
    exact = functional.linear(x, weight)
    assert torch.equal(Linear.apply(x, weight, how, True), exact)
    assert 0 < (y - exact).norm() < 0.3 * exact.norm()


def test_a_recipe_leaves_in_bf16_what_it_says(tiny_hybrid: Path) -> None:
    model, architecture = load_model(tiny_hybrid), open_checkpoint(tiny_hybrid).architecture
    every = list(linears(model, architecture, Precision(name="nvfp4")))
    assert not any("gate" in name or "conv" in name or "lm_head" in name for name in every)
    assert any(name.endswith("experts") for name in every)
    kept = list(linears(model, architecture, PRECISIONS["nvfp4"]))
    assert kept == every[: len(every) - -(-15 * len(every) // 100)]
    inner = Precision(name="fp8-hybrid", plain_first=1, plain_last=2)
    layers = {name.split(".")[2] for name in linears(model, architecture, inner)}
    assert layers == {"1", "2"}
    with (
        pytest.raises(InputError, match="none of 5 layers quantized"),
        quantized(model, architecture, Numerics(PRECISIONS["fp8-hybrid"])),
    ):
        pass


def test_a_student_is_distilled_in_nvfp4_and_is_itself_afterwards(tiny: Path) -> None:
    student, architecture = load_model(tiny), open_checkpoint(tiny).architecture
    kinds = [type(module) for module in student.modules()]
    how = numerics_of("nvfp4", True, REFERENCE)
    asked = taught(tiny, tokens()), student, tokens(), SETTINGS
    with quantized(student, architecture, how):
        curve = distill(*asked, progress=quiet, numerics=how)
    # Of an exact student it is 0: this is what rounding costs.
    assert curve[0].loss > 1e-4
    # The last share of the tokens has plain forward products.
    assert how.plain
    assert [type(module) for module in student.modules()] == kinds


def test_a_teacher_is_pretrained_in_every_recipe(tmp_path: Path) -> None:
    path = recipe(tmp_path, steps=1, precision="nvfp4", emulate=True)
    assert pretrain(path, tmp_path / "out", progress=quiet)["nats_per_token"] > 0


@pytest.mark.parametrize("name", QUANTIZED)
def test_what_a_machine_cannot_run_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} needs .* on cpu; --emulate"):
        pretrain(recipe(tmp_path, precision=name, data="nowhere"), tmp_path / "out")
