from __future__ import annotations

import pytest
import torch
from torch import nn

from codeherd_worker.engine import linears
from codeherd_worker.engine.linears import Linear, join
from tests.unit.worker.engine.tiny_llama import has_avx512

IN = 48


def linear(out: int, *, bias: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(IN, out, bias=bias).to(dtype).requires_grad_(False)


def rows_of(tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tokens, IN, generator=torch.Generator().manual_seed(7)).to(dtype)


class Quantized(nn.Linear):
    """A subclass, as quantization libraries make them, that answers what no dense matrix would."""

    def __init__(self, out: int, answer: float) -> None:
        super().__init__(IN, out, bias=False)
        self.answer, self.seen = answer, list[torch.Size]()

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 -- nn.Linear's name
        self.seen.append(input.shape)
        return torch.full((*input.shape[:-1], self.out_features), self.answer)


class Wrapped(torch.Tensor):
    """A tensor subclass, as torchao puts it into a plain nn.Linear."""


def without_tiles(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(linears, "can_tile", lambda _weight: False)


def without_packing(patch: pytest.MonkeyPatch) -> None:
    without_tiles(patch)
    patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)


@pytest.fixture(params=["tiled", "packed", "dense"])
def device_without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Once with all that a CPU can have, then as on devices that have less."""
    name: str = request.param
    if name == "packed":
        without_tiles(monkeypatch)
    if name == "dense":
        without_packing(monkeypatch)
    return name


@pytest.mark.parametrize("tokens", [1, 3, 16, 100])
@pytest.mark.parametrize("outputs", [32, 20])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_one_matrix_multiplies_as_its_module_does(
    device_without: str, tokens: int, outputs: int, bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    # A whole number of panels, and else.
    module = linear(outputs, bias=bias, dtype=dtype)
    rows = rows_of(tokens, dtype)

    output = join([module])(rows)

    assert output.dtype == dtype
    exact = rows.double() @ module.weight.double().T + (module.bias.double() if bias else 0)
    torch.testing.assert_close(output.double(), exact, rtol=tolerance, atol=tolerance)


def test_all_forms_agree_within_rounding() -> None:
    rows = rows_of(9)
    forms = []
    for limit in (lambda _patch: None, without_tiles, without_packing):
        with pytest.MonkeyPatch.context() as patch:
            limit(patch)
            forms.append(join([linear(20), linear(12, seed=1)]))

    assert len({form.kind()[0] for form in forms}) == (3 if has_avx512() else 2)
    for form in forms[1:]:
        torch.testing.assert_close(form(rows), forms[0](rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("biases", [(False, False, False), (True, True, True), (False, True, False)])
def test_outputs_of_joined_matrices_lie_side_by_side(
    device_without: str, biases: tuple[bool, bool, bool]
) -> None:
    sizes = [24, 8, 8]
    modules = [
        linear(size, bias=bias, seed=seed)
        for seed, (size, bias) in enumerate(zip(sizes, biases, strict=True))
    ]
    rows = rows_of(5)
    expected = [module(rows) for module in modules]

    output = join(modules)(rows)

    assert output.shape == (5, sum(sizes))
    for part, own in zip(torch.split(output, sizes, dim=-1), expected, strict=True):
        torch.testing.assert_close(part, own, rtol=1e-5, atol=1e-5)


def test_joined_modules_still_work_and_share_one_memory(device_without: str) -> None:
    modules = [linear(24), linear(8, seed=1), linear(8, seed=2)]
    rows = rows_of(5)
    before = [module(rows) for module in modules]
    weights = [module.weight.clone() for module in modules]

    join(modules)

    for module, weight, output in zip(modules, weights, before, strict=True):
        assert torch.equal(module.weight, weight)
        torch.testing.assert_close(module(rows), output)
    assert len({module.weight.untyped_storage().data_ptr() for module in modules}) == 1
    held = modules[0].weight.untyped_storage().nbytes()
    assert held == sum(weight.nbytes for weight in weights)


def test_a_matrix_alone_is_not_copied_where_it_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    without_packing(monkeypatch)
    module = linear(20)
    joined = join([module])

    module.weight.zero_()

    assert not joined(rows_of(2)).any()


def test_quantized_modules_are_called_as_they_are() -> None:
    modules = [Quantized(6, 1.0), Quantized(4, 2.0)]

    output = join(modules)(rows_of(3))
    alone = join(modules[:1])(rows_of(2))

    assert output.tolist() == [[1.0] * 6 + [2.0] * 4] * 3
    assert alone.tolist() == [[1.0] * 6] * 2
    assert modules[0].seen == [(3, IN), (2, IN)]
    assert modules[1].seen == [(3, IN)]


def test_one_quantized_module_keeps_all_as_they_are() -> None:
    dense = linear(4)
    address = dense.weight.data_ptr()
    rows = rows_of(3)

    output = join([Quantized(6, 1.0), dense])(rows)

    assert dense.weight.data_ptr() == address
    assert torch.equal(output[:, 6:], dense(rows))


def test_a_plain_module_with_a_tensor_subclass_counts_as_quantized() -> None:
    module = linear(4)
    module.weight = nn.Parameter(module.weight.data.as_subclass(Wrapped), requires_grad=False)
    other = linear(4, seed=1)
    address = other.weight.data_ptr()

    join([module, other])

    assert other.weight.data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_is_a_reproducible_input(device_without: str, dtype: torch.dtype) -> None:
    joined = join([linear(6, dtype=dtype), linear(4, dtype=dtype, seed=1)])

    sample = joined.sample(5)

    assert (sample.shape, sample.dtype) == ((5, IN), dtype)
    assert torch.equal(sample, joined.sample(5))
    assert len({tuple(row) for row in sample.tolist()}) == 5
    assert joined(sample).shape == (5, 10)


def test_the_sample_of_integer_weights_has_the_type_that_they_compute_in() -> None:
    module = Quantized(6, 1.0)
    module.weight = nn.Parameter(torch.zeros(6, IN, dtype=torch.int8), requires_grad=False)
    assert join([module]).sample(2).dtype == torch.float16

    module.compute_dtype = torch.bfloat16  # type: ignore[assignment]  # as bitsandbytes has it
    assert join([module]).sample(2).dtype == torch.bfloat16


def test_matrices_of_equal_shape_are_of_one_kind(device_without: str) -> None:
    def kind(*modules: nn.Linear) -> tuple[object, ...]:
        joined: Linear = join(modules)
        return joined.kind()

    assert kind(linear(6)) == kind(linear(6, seed=1))
    assert kind(linear(6)) == kind(linear(4), linear(2))
    assert len({kind(linear(6)), kind(linear(8)), kind(linear(6, bias=True))}) == 3
    assert kind(Quantized(6, 1.0)) == kind(Quantized(6, 2.0)) != kind(linear(6))
