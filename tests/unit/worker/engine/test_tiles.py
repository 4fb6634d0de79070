from __future__ import annotations

import numpy as np
import pytest
import torch

from codeherd_worker.engine import linears
from codeherd_worker.engine.tiles import _PANELS, _TERMS, BLOCK, LANES, multiply_rows, pack

#: Every tile alone and beside others, whole blocks, and so many that terms come in parts.
COUNTS = [*range(1, 2 * BLOCK + 2), 47, 100]
#: One term, whole and broken lanes, around a part.
TERMS = [1, 5, 64, _TERMS - 1, _TERMS, _TERMS + 1, 2 * _TERMS + 3]
#: One panel, fewer and more than a group, and not a whole number of them.
OUTPUTS = [LANES, 3 * LANES, _PANELS * LANES, (2 * _PANELS + 5) * LANES]


pytestmark = pytest.mark.usefixtures("one_or_two_threads")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(multiply_rows(rows.numpy(), pack(weight)))


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_products_are_what_float64_says(terms: int, outputs: int) -> None:
    weight = draw(outputs, terms)

    for count in COUNTS:
        rows = draw(count, terms, seed=count)
        wanted = rows.double() @ weight.double().T
        torch.testing.assert_close(product(rows, weight).double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("terms", [5, _TERMS + 40])
def test_an_output_is_one_chain_of_fused_multiply_adds(terms: int) -> None:
    # With integers of this size a product is exact in float64 and a sum is not in float32: the order shows.
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(-4096, 4096, (40, terms), generator=generator).float()
    weight = torch.randint(-4096, 4096, (LANES, terms), generator=generator).float()
    total = np.zeros((40, LANES), np.float32)

    for term in range(terms):
        exact = np.multiply.outer(rows[:, term].double().numpy(), weight[:, term].double().numpy())
        total = (total.astype(np.float64) + exact).astype(np.float32)

    assert np.array_equal(product(rows, weight).numpy(), total)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e38])
def test_a_rows_bits_depend_on_nothing_beside_it(bad: float) -> None:
    rows, weight = draw(70, 600), draw(5 * LANES, 600, seed=1)
    alone = torch.cat([product(rows[row : row + 1], weight) for row in range(70)])
    spoilt = rows.clone()
    spoilt[::2] = bad

    for count in COUNTS:
        if count <= 70:
            assert torch.equal(product(rows[:count], weight), alone[:count])
    assert torch.equal(product(rows.flip(0).contiguous(), weight), alone.flip(0))
    assert torch.equal(product(spoilt, weight)[1::2], alone[1::2])


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    rows, weight = draw(37, 300), draw(7 * LANES, 300, seed=1)
    before = product(rows, weight)

    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(product(rows, weight), before)


def test_a_bad_number_reaches_what_is_made_of_it() -> None:
    rows, weight = draw(20, 48), draw(3 * LANES, 48, seed=1)
    rows[3, 7], weight[30, 5] = torch.nan, torch.inf

    finite = product(rows, weight).isfinite()

    assert not finite[3].any()
    assert not finite[:, 30].any()
    finite[3], finite[:, 30] = True, True
    assert finite.all()


def test_panels_hold_sixteen_outputs_term_by_term_where_vectors_are_aligned() -> None:
    weight = draw(3 * LANES, 5)

    panels = pack(weight)

    assert panels.shape == (3, 5, LANES)
    # A GPU's worker, which has no compiler, asks for it there.
    assert linears.PANEL == LANES
    assert panels.ctypes.data % (4 * LANES) == 0
    for panel in range(3):
        assert np.array_equal(panels[panel], weight[LANES * panel : LANES * (panel + 1)].T.numpy())
