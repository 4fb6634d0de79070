from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from codeherd_worker.engine.linears import Linear, join
from codeherd_worker.engine.rounding import agreeing_rows, even_rows, pass_lengths

IN, OUT = 8, 4


class Faulty:
    """A matrix product that rounds as it is told to: exact but for what `disturb` does to the output."""

    def __init__(
        self, disturb: Callable[[torch.Tensor], object] = lambda output: None, name: str = ""
    ) -> None:
        self._disturb, self._name = disturb, name
        self._weight = torch.arange(IN * OUT, dtype=torch.float32).view(OUT, IN)
        self.calls = 0

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        output = (rows[:, None] * self._weight).sum(-1)
        self._disturb(output)
        return output

    def kind(self) -> tuple[object, ...]:
        return (self._disturb, self._name)

    def sample(self, tokens: int) -> torch.Tensor:
        return torch.randn(tokens, IN, generator=torch.Generator().manual_seed(0))


def last_row_differs_at(*counts: int) -> Faulty:
    def disturb(output: torch.Tensor) -> None:
        if len(output) in counts:
            output[-1] += 1

    return Faulty(disturb)


def all_rows_differ_at(*counts: int) -> Faulty:
    def disturb(output: torch.Tensor) -> None:
        if len(output) in counts:
            output += 1

    return Faulty(disturb)


@pytest.fixture
def _two_threads() -> Iterator[None]:
    # With one thread, all rows round alike on many machines.
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("faulty", "rows"), [((), 4), ((4,), 5), ((4, 5, 6), 7), ((5,), 4), (range(4, 20), 20)]
)
def test_rows_are_added_until_all_agree(faulty: tuple[int, ...], rows: int) -> None:
    assert even_rows([last_row_differs_at(*faulty)], 4) == rows


def test_one_matrix_that_disagrees_is_enough_to_add_rows() -> None:
    linears = [Faulty(), last_row_differs_at(4), last_row_differs_at(5, 6)]

    assert even_rows(linears, 4) == 7


def test_where_nothing_helps_no_row_is_added() -> None:
    assert even_rows([last_row_differs_at(*range(2, 100))], 4) == 4


def test_rows_that_differ_from_other_counts_but_agree_among_each_other_are_even() -> None:
    assert even_rows([all_rows_differ_at(4)], 4) == 4


def test_one_of_the_matrices_of_a_kind_is_tried_with_four_vectors() -> None:
    alike = [Faulty() for _ in range(3)]
    for linear in alike:
        linear.kind = lambda: ("the same",)  # type: ignore[method-assign]

    even_rows(alike, 4)

    assert sorted(linear.calls for linear in alike) == [0, 0, 4]


@pytest.mark.parametrize("vector", range(4))
def test_rows_that_only_one_vector_tells_apart_are_not_even(vector: int) -> None:
    # 16-bit outputs hide most of what differs inside: one vector may see nothing.
    tries = iter(range(100))

    def disturb(output: torch.Tensor) -> None:
        if next(tries) == vector:
            output[-1] += 1

    assert even_rows([Faulty(disturb)], 4) == 5


@pytest.mark.parametrize("vector", range(4))
def test_counts_that_only_one_vector_tells_apart_do_not_agree(vector: int) -> None:
    tries = iter(range(100))

    def disturb(output: torch.Tensor) -> None:
        # Every vector is multiplied at both counts, the wanted one first.
        output += next(tries) == 2 * vector

    assert agreeing_rows([Faulty(disturb)], 6, [2]) == []


def test_counts_at_which_a_row_has_other_bits_are_left_out() -> None:
    linears = [all_rows_differ_at(3), last_row_differs_at(5), Faulty()]

    assert agreeing_rows(linears, 6, range(1, 7)) == [1, 2, 4, 6]


def test_all_lengths_hold_where_nothing_depends_on_them() -> None:
    assert pass_lengths([Faulty()], 128, (32, 64, 128)) == (32, (32, 64, 96, 128))


def test_lengths_at_which_a_granule_has_other_bits_are_left_out() -> None:
    assert pass_lengths([all_rows_differ_at(64), Faulty()], 128, (32, 64, 128)) == (32, (32, 96, 128))
    assert pass_lengths([last_row_differs_at(96)], 128, (32, 64, 128)) == (32, (32, 64, 128))


def test_a_granule_that_differs_within_a_chunk_gives_way_to_a_larger_one() -> None:
    def disturb(output: torch.Tensor) -> None:
        # Each second stretch of 32 rows rounds otherwise: granules of 64 do not notice.
        output[32:64] += 1
        output[96:128] += 1

    assert pass_lengths([Faulty(disturb)], 128, (32, 64, 128)) == (64, (64, 128))


def test_where_no_granule_holds_a_pass_is_one_chunk() -> None:
    def disturb(output: torch.Tensor) -> None:
        output += torch.arange(len(output))[:, None]

    assert pass_lengths([Faulty(disturb)], 96, (32,)) == (96, (96,))


def test_without_candidates_a_pass_is_one_chunk() -> None:
    assert pass_lengths([Faulty()], 40, ()) == (40, (40,))


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 128])
def test_what_is_found_on_this_machine_holds(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    linears: list[Linear] = [
        join([torch.nn.Linear(size, out, bias=False).to(dtype).requires_grad_(False)]) for out in (size, 320)
    ]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(160, size, generator=generator).to(dtype)

    for slots in (1, 3, 4, 5, 7, 9):
        rows = even_rows(linears, slots)
        counts = agreeing_rows(linears, rows, range(1, rows + 1))

        assert slots <= rows <= slots + 16
        assert rows in counts
        for linear in linears:
            full = linear(tokens[:rows])
            for count in counts:
                # Any rows, in any place, beside any others.
                shifted = tokens[:rows].roll(1, 0)[:count].contiguous()
                assert torch.equal(linear(tokens[:count].contiguous()), full[:count])
                assert torch.equal(linear(shifted), full.roll(1, 0)[:count])

    granule, lengths = pass_lengths(linears, 128, (32, 64, 128))
    assert lengths[-1] == 128
    for linear in linears:
        whole = linear(tokens[:128])
        for length in lengths:
            assert torch.equal(linear(tokens[:length].contiguous()), whole[:length])
        moved = linear(tokens[granule : granule + 128].contiguous())
        assert torch.equal(moved[: 128 - granule], whole[granule:])
