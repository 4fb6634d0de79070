import pytest

from codeherd_schema.errors import InvalidSetting
from codeherd_schema.models import ModelTable
from codeherd_worker.memory import CACHE_SHARE, fitting_length

GIB = 2**30


def test_slots_share_the_free_memory() -> None:
    model = ModelTable().find("codellama-7b")

    length = fitting_length(model, slots=31, free_bytes=64 * GIB)

    # 512 KiB per token (config of the 7B model): 64 GiB hold 131,072 tokens.
    assert length == int(131_072 * CACHE_SHARE) // 31


def test_no_slot_is_longer_than_the_window() -> None:
    model = ModelTable().find("codellama-34b")

    assert fitting_length(model, slots=1, free_bytes=64 * GIB) == model.context_window


def test_too_many_slots_are_refused_with_a_hint() -> None:
    model = ModelTable().find("codellama-13b")

    with pytest.raises(InvalidSetting, match="64 slots leave") as caught:
        fitting_length(model, slots=64, free_bytes=10 * GIB)
    assert caught.value.hint is not None
    assert "worker_slots" in caught.value.hint
