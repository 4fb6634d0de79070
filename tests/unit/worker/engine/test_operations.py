from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional

from codeherd_worker.engine.operations import Operations, _Compiled, _Torch, operations_for

CPU = torch.device("cpu")
EPSILON = 1e-5
#: Below, at and beyond whole lanes of a sum; a real model's.
WIDTHS = [1, 15, 16, 17, 64, 100, 576]
ROWS = [1, 2, 3, 33]


@pytest.fixture(params=["compiled", "torch"])
def do(request: pytest.FixtureRequest) -> Operations:
    """A CPU's operations in float32, in both forms."""
    return _Compiled(EPSILON) if request.param == "compiled" else _Torch(nn.SiLU(), EPSILON)


@pytest.fixture
def compiled() -> Operations:
    return operations_for(CPU, torch.float32, nn.SiLU(), EPSILON)


@pytest.fixture(autouse=True)
def threads() -> Iterator[Callable[[int], None]]:
    """Set the number of threads; two unless a test says otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_near(output: torch.Tensor, wanted: torch.Tensor) -> None:
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), wanted, rtol=1e-5, atol=1e-7)


def norm_in_float64(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = hidden.double()
    return wide * (wide.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weight.double()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_a_norm_is_what_float64_says(do: Operations, rows: int, width: int, size: float) -> None:
    hidden, weight = draw(rows, width) * size, draw(width, seed=1)
    before = hidden.clone()

    output = do.norm(hidden, weight)

    assert_near(output, norm_in_float64(before, weight))
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_a_sum_and_its_norm_are_what_float64_says(do: Operations, rows: int, width: int) -> None:
    hidden, delta, weight = draw(rows, width), draw(rows, width, seed=1), draw(width, seed=2)
    total, added = hidden + delta, delta.clone()

    summed, normed = do.add_and_norm(hidden, delta, weight)

    assert torch.equal(summed, total)
    assert torch.equal(delta, added)
    assert_near(normed, norm_in_float64(total, weight))


def test_a_sums_norm_has_the_bits_of_the_norm_of_the_sum(compiled: Operations) -> None:
    hidden, delta, weight = draw(5, 100), draw(5, 100, seed=1), draw(100, seed=2)
    wanted = compiled.norm(hidden + delta, weight)

    _, normed = compiled.add_and_norm(hidden, delta, weight)

    assert torch.equal(normed, wanted)


def test_the_norm_of_nothing_is_nothing(do: Operations) -> None:
    assert not do.norm(torch.zeros(2, 64), torch.ones(64)).any()


@pytest.mark.parametrize("size", [2, 4, 12, 64, 128])
@pytest.mark.parametrize("rows", ROWS)
def test_the_first_heads_are_rotated_and_the_others_left_alone(do: Operations, rows: int, size: int) -> None:
    heads, others = 5, 2
    joined = draw(rows, (heads + others) * size)
    angles = draw(rows, 1, size // 2, seed=1) * 100
    cosine, sine = angles.cos().repeat(1, 1, 2), torch.cat([-angles.sin(), angles.sin()], dim=-1)
    before = joined.clone()

    do.rotate(joined, heads, cosine, sine)

    rotated = before.double().view(rows, -1, size)[:, :heads]
    low, high = rotated.chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    whole = angles.double().repeat(1, 1, 2)
    wanted = rotated * whole.cos() + turned * whole.sin()
    torch.testing.assert_close(joined.view(rows, -1, size)[:, :heads].double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(joined[:, heads * size :], before[:, heads * size :])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_a_gate_is_what_float64_says(do: Operations, rows: int, width: int) -> None:
    gate_up = draw(rows, 2 * width) * 8
    gate, up = gate_up.double().chunk(2, dim=-1)
    wanted = functional.silu(gate) * up

    assert_near(do.gate(gate_up), wanted)


def test_a_gate_is_right_at_its_ends(compiled: Operations) -> None:
    gate = torch.tensor([0.0, -0.0, 100.0, -100.0, 88.0, -86.0, 1e30, -1e30, 1e-30])
    up = torch.full_like(gate, 2.0)

    output = compiled.gate(torch.cat([gate, up])[None])[0]

    assert_near(output[gate > -1e30], 2 * functional.silu(gate.double())[gate > -1e30])


@pytest.mark.parametrize("place", [0, 5, 16])
def test_what_is_no_number_stays_none(compiled: Operations, place: int) -> None:
    bad = draw(3, 34)
    bad[1, place] = torch.nan
    weight = torch.ones(34)

    assert compiled.norm(bad, weight).isnan().any(-1).tolist() == [False, True, False]
    assert compiled.gate(bad).isnan().nonzero().tolist() == [[1, place % 17]]
    assert not compiled.gate(torch.tensor([[torch.inf, 1.0]])).isfinite().any()
    assert not compiled.gate(torch.tensor([[1.0, -torch.inf]])).isfinite().any()
    _, normed = compiled.add_and_norm(draw(3, 34), bad, weight)
    assert normed.isnan().all(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("width", [16, 24, 100])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_a_rows_bits_depend_neither_on_its_neighbours_nor_on_threads(
    compiled: Operations, width: int, bad: float, threads: Callable[[int], None]
) -> None:
    rows = 35
    hidden, delta, weight = draw(rows, width), draw(rows, width, seed=1), draw(width, seed=2)
    cosine, sine = draw(rows, 1, width // 2, seed=3), draw(rows, 1, width // 2, seed=4)

    def outputs(chosen: list[int]) -> list[torch.Tensor]:
        one, two, turned = hidden[chosen], delta[chosen], hidden[chosen]
        compiled.rotate(turned, 1, cosine[chosen], sine[chosen])
        return [
            compiled.norm(one, weight),
            compiled.gate(one),
            turned,
            *compiled.add_and_norm(one, two, weight),
        ]

    alone = [outputs([row]) for row in range(rows)]
    together = outputs([*range(rows)])
    backwards = outputs([*reversed(range(rows))])
    threads(1)
    on_one = outputs([*range(rows)])
    # Rows 0, 2, 4 and so on are bad now.
    hidden[::2] = bad
    beside_bad = outputs([*range(rows)])

    for row in range(rows):
        for own, others, turned_round, single in zip(alone[row], together, backwards, on_one, strict=True):
            assert torch.equal(own[0], others[row])
            assert torch.equal(own[0], turned_round[rows - 1 - row])
            assert torch.equal(own[0], single[row])
    for row in range(1, rows, 2):
        assert all(
            torch.equal(own[0], others[row]) for own, others in zip(alone[row], beside_bad, strict=True)
        )


@pytest.mark.parametrize(
    ("device", "dtype", "activation", "kind"),
    [
        ("cpu", torch.float32, nn.SiLU(), _Compiled),
        ("cpu", torch.bfloat16, nn.SiLU(), _Torch),
        ("cpu", torch.float16, nn.SiLU(), _Torch),
        ("cpu", torch.float32, nn.GELU(), _Torch),
        ("cuda", torch.float32, nn.SiLU(), _Torch),
    ],
)
def test_loops_are_for_float32_on_a_cpu(
    device: str, dtype: torch.dtype, activation: nn.Module, kind: type
) -> None:
    assert type(operations_for(torch.device(device), dtype, activation, EPSILON)) is kind


def test_a_models_own_activation_is_called_where_there_is_no_loop_for_it() -> None:
    gate_up = draw(3, 20)
    gate, up = gate_up.clone().chunk(2, dim=-1)

    output = operations_for(CPU, torch.float32, nn.GELU(), EPSILON).gate(gate_up)

    torch.testing.assert_close(output, functional.gelu(gate) * up)
