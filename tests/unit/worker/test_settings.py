import pytest

from codeherd_schema.errors import InvalidSetting
from codeherd_schema.settings import SharedSettings, load
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
