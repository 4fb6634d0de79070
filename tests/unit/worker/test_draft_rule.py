import pytest

from codeherd_worker.draft_rule import choose_draft_tokens
from codeherd_worker.engine.quantization import Device

B = 10**9


def chosen(device: Device, quantization: str, billions: float, slots: int, asked: str = "auto") -> int:
    return choose_draft_tokens(
        asked, device=device, quantization=quantization, parameters=int(billions * B), slots=slots
    )


@pytest.mark.parametrize(
    ("quantization", "billions", "most_slots"),
    [
        # Rows are slots times four: 7, 5 and 16 fused rows, and 128 that memory binds.
        ("nf4", 6.7, 1),
        ("nf4", 13, 1),
        ("nf4", 33.7, 4),
        ("torchao-int4", 69, 4),
        ("int8", 6.7, 32),
        ("none", 33.7, 32),
        ("bf16", 6.7, 32),
    ],
)
@pytest.mark.parametrize("device", ["cuda", "cuda-group"])
def test_drafts_stop_where_rows_begin_to_cost(
    device: Device, quantization: str, billions: float, most_slots: int
) -> None:
    assert chosen(device, quantization, billions, most_slots) == 3
    assert chosen(device, quantization, billions, most_slots + 1) == 0


def test_a_cpu_has_drafts_and_an_unknown_format_has_none() -> None:
    assert chosen("cpu", "nf4", 6.7, 64) == 3
    assert chosen("cuda", "gptq", 6.7, 1) == 0


@pytest.mark.parametrize("asked", ["0", "5"])
def test_what_is_asked_for_is_given(asked: str) -> None:
    assert chosen("cuda", "nf4", 6.7, 64, asked) == int(asked)
