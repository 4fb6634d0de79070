import pytest

from codeherd_schema.errors import InvalidSetting
from codeherd_schema.settings import SharedSettings, load
from codeherd_worker.engine.slot_classes import SlotClass
from codeherd_worker.settings import WorkerSettings


def test_what_only_workers_know_starts_with_worker() -> None:
    own = set(WorkerSettings.model_fields) - set(SharedSettings.model_fields)

    assert own
    assert all(name.startswith("worker_") for name in own)


def test_a_worker_refuses_a_misspelt_worker_setting() -> None:
    with pytest.raises(InvalidSetting, match="unknown setting `worker_slot`") as caught:
        load(WorkerSettings, environment={"CODEHERD_WORKER_SLOT": "4"})

    assert caught.value.hint == "did you mean `worker_slots`?"


def test_an_unknown_quantization_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="worker_quantization"):
        load(WorkerSettings, environment={"CODEHERD_WORKER_QUANTIZATION": "fp4"})


def worker_settings(**values: str) -> WorkerSettings:
    environment = {f"CODEHERD_WORKER_{name.upper()}": value for name, value in values.items()}
    return load(WorkerSettings, environment=environment).settings


def test_slot_lengths_say_how_many_slots_there_are() -> None:
    settings = worker_settings(slot_lengths="16384x1,2048x12,4096x3")

    assert settings.worker_slots == 16
    assert settings.slot_classes == (SlotClass(2048, 12), SlotClass(4096, 3), SlotClass(16_384, 1))


def test_a_length_that_is_named_twice_is_one_class() -> None:
    assert worker_settings(slot_lengths="512x1,512x2").slot_classes == (SlotClass(512, 3),)


def test_without_slot_lengths_they_are_computed() -> None:
    settings = worker_settings(slots="5")

    assert (settings.worker_slots, settings.slot_classes) == (5, ())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"slot_lengths": "2048"}, "worker_slot_lengths"),
        ({"slot_lengths": "2048x"}, "worker_slot_lengths"),
        ({"slot_lengths": "0x4"}, "length of a slot class is 0"),
        ({"slot_lengths": "512x600"}, "512"),
        ({"slot_lengths": "2048x12", "slots": "8"}, "names 12 slots, worker_slots is 8"),
        ({"slot_lengths": "4096x2", "max_len": "2048"}, "worker_max_len is 2048"),
        ({"draft_tokens": "9"}, "worker_draft_tokens"),
        ({"draft_tokens": "some"}, "worker_draft_tokens"),
        ({"reuse_prefixes": "perhaps"}, "worker_reuse_prefixes"),
    ],
)
def test_impossible_slots_and_drafts_are_refused(values: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidSetting, match=said):
        worker_settings(**values)


def test_drafts_and_prefixes_can_be_switched() -> None:
    assert worker_settings().worker_draft_tokens == "auto"
    assert worker_settings(draft_tokens="3").worker_draft_tokens == "3"
    # A number in a TOML file is a number.
    assert WorkerSettings.model_validate({"worker_draft_tokens": 3}).worker_draft_tokens == "3"
    assert not worker_settings(reuse_prefixes="false").worker_reuse_prefixes
