import pytest

from codeherd_schema.errors import DeviceUnavailable
from codeherd_worker.device import DeviceGroup, count_gpus, parse_gpus


def test_all_gives_one_process_per_gpu() -> None:
    groups = parse_gpus("all", available=2)

    assert groups == (DeviceGroup("gpu0", "0", "cuda"), DeviceGroup("gpu1", "1", "cuda"))


def test_plus_joins_gpus_into_one_process() -> None:
    groups = parse_gpus("0+1,3", available=4)

    assert groups == (DeviceGroup("gpu0+1", "0,1", "cuda-group"), DeviceGroup("gpu3", "3", "cuda"))


def test_numbers_count_within_the_visible_gpus() -> None:
    groups = parse_gpus("1", available=2, visible="4,GPU-8f2")

    assert groups[0].environment()["CUDA_VISIBLE_DEVICES"] == "GPU-8f2"


def test_cpu_hides_every_gpu_and_can_be_named_twice() -> None:
    groups = parse_gpus("cpu,cpu", available=0)

    assert [g.name for g in groups] == ["cpu0", "cpu1"]
    assert {g.environment()["CUDA_VISIBLE_DEVICES"] for g in groups} == {""}


@pytest.mark.parametrize(
    ("text", "available", "says"),
    [
        ("all", 0, "no GPU found"),
        ("2", 2, "GPU 2 is not there, 2 found"),
        ("0,0", 2, "named twice"),
        ("0+0", 2, "named twice"),
        ("", 2, "names no devices"),
        ("one", 2, "names no devices"),
        ("-1", 2, "names no devices"),
    ],
)
def test_what_is_not_there_is_refused(text: str, available: int, says: str) -> None:
    with pytest.raises(DeviceUnavailable, match=says):
        parse_gpus(text, available=available)


def test_gpus_are_counted_by_torch_in_another_process() -> None:
    import torch

    assert count_gpus() == torch.cuda.device_count()


def test_a_torch_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceUnavailable, match="torch does not start"):
        count_gpus({"PYTHONPATH": "", "PYTHONHOME": "/nowhere"})
