from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from codeherd_worker.engine.uploads import upload

CPU = torch.device("cpu")


@pytest.mark.parametrize("numbers", [[], [7], (3, -1, 2**40), [0, 1], range(3)], ids=str)
def test_numbers_become_int64(numbers: Sequence[int]) -> None:
    uploaded = upload(numbers, CPU)

    assert uploaded.dtype == torch.int64
    assert uploaded.shape == (len(numbers),)
    assert uploaded.tolist() == list(numbers)


@pytest.mark.parametrize("flags", [[True], [False, True, True], (False, False)], ids=str)
def test_flags_stay_flags(flags: Sequence[bool]) -> None:
    uploaded = upload(flags, CPU)

    assert uploaded.dtype == torch.bool
    assert uploaded.tolist() == list(flags)


def test_they_come_to_the_device_that_was_asked_for() -> None:
    uploaded = upload([1, 2], torch.device("meta"))

    assert (uploaded.device.type, uploaded.shape, uploaded.dtype) == ("meta", (2,), torch.int64)
