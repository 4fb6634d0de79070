from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from codeherd_producer.client import Client
from codeherd_producer.counter import REST_S, PromptCounter, is_doubtful, tokenizer_folder
from codeherd_schema.errors import InvalidRequest, PromptTooLong
from codeherd_schema.models import TINY, ModelTable, ServedModel, check_fit
from codeherd_schema.requests import GenerateRequest, InfillRequest, Overflow, Sampling
from codeherd_schema.settings import SharedSettings
from tests.by_hand import HandClock
from tests.unit.worker.engine.small_vocabularies import model_bytes

#: A command that would show if it were run.
BROKEN = (sys.executable, "-c", "raise SystemExit(3)")
#: For `tiny`: in no case more tokens than the window, surely more, and something between.
SURELY_FITS, SURELY_TOO_LONG, DOUBTFUL = "x" * 1_000, "x" * 100_000, "x = 1\n" * 400


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """A model of `tiny`'s size whose folder is on this machine."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "tokenizer.model").write_bytes(model_bytes("control"))
    return TINY.model_copy(update={"name": "here", "source": str(folder)})


def fits(request: GenerateRequest, model: ServedModel, tokens: int) -> bool:
    try:
        check_fit(model, request, tokens)
    except PromptTooLong:
        return False
    return True


def test_only_the_middle_is_doubtful() -> None:
    assert [is_doubtful(GenerateRequest(prompt=text), TINY) for text in (SURELY_FITS, DOUBTFUL)] == [
        False,
        True,
    ]
    with pytest.raises(PromptTooLong):
        ModelTable().check(GenerateRequest(prompt=SURELY_TOO_LONG))


def test_what_may_be_truncated_is_never_counted() -> None:
    request = GenerateRequest(prompt=SURELY_TOO_LONG, overflow=Overflow.TRUNCATE)

    assert not is_doubtful(request, TINY)
    assert PromptCounter(BROKEN).faults([(request, TINY)]) == {}


def test_prompts_that_surely_fit_start_no_process(caplog: pytest.LogCaptureFixture) -> None:
    assert PromptCounter(BROKEN).faults([(GenerateRequest(prompt=SURELY_FITS), TINY)] * 3) == {}
    assert not caplog.records


def test_the_models_own_tokenizer_decides_in_the_middle(model: ServedModel) -> None:
    short = GenerateRequest(prompt=DOUBTFUL, sampling=Sampling(max_new_tokens=1))
    long = InfillRequest(prefix="é\x01" * 900, suffix=DOUBTFUL)
    assert is_doubtful(short, model)
    assert is_doubtful(long, model)

    faults = PromptCounter().faults([(short, model), (long, model), (short, model), (long, model)])

    assert {place: type(fault) for place, fault in faults.items()} == {1: PromptTooLong, 3: PromptTooLong}
    assert "`here` has room for 2048 together" in str(faults[1])
    assert faults[1].hint


def test_models_are_asked_apart(model: ServedModel) -> None:
    other = model.model_copy(update={"name": "narrow", "context_window": 600})
    request = GenerateRequest(prompt="x = 1\n" * 330)

    faults = PromptCounter().faults([(request, model), (request, other)])

    assert set(faults) == {1}


def test_submit_refuses_by_the_models_tokenizer(model: ServedModel, sqlite_url: str, tmp_path: Path) -> None:
    models_file = tmp_path / "models.toml"
    numbers = ("parameters", "layers", "kv_heads", "head_dim", "vocab_size", "context_window")
    entry = "\n".join(f"{name} = {getattr(model, name)}" for name in numbers)
    models_file.write_text(f'[models.here]\nsource = "{model.source}"\n{entry}\n')
    settings = SharedSettings.model_validate({"database_url": sqlite_url, "models_file": models_file})

    with Client(settings, publish=False) as client:
        with pytest.raises(PromptTooLong, match=r"prompt has \d+ tokens"):
            client.submit(GenerateRequest(model="here", prompt="é\x01" * 900))
        assert client.list() == []


def test_a_folder_that_is_not_here_leaves_the_counting_to_the_worker(
    caplog: pytest.LogCaptureFixture,
) -> None:
    elsewhere = ModelTable().find("codellama-7b")
    request = GenerateRequest(model="codellama-7b", prompt="x = 1\n" * 10_000)
    assert is_doubtful(request, elsewhere)

    assert tokenizer_folder(elsewhere) is None
    assert PromptCounter(BROKEN).faults([(request, elsewhere)]) == {}
    assert not caplog.records


def test_the_embedded_model_is_always_here() -> None:
    assert tokenizer_folder(TINY) == "embedded"


@pytest.mark.parametrize(
    ("command", "timeout_s", "reason"),
    [
        (BROKEN, 30, "exit status 3"),
        (("/nonexistent/python",), 30, "FileNotFoundError"),
        ((sys.executable, "-c", "print('not JSON')"), 30, "JSONDecodeError"),
        ((sys.executable, "-c", "print('{}')"), 30, "KeyError"),
        ((sys.executable, "-c", "import threading; threading.Event().wait()"), 0.1, "no answer within"),
    ],
)
def test_a_tokenizer_that_cannot_be_asked_stops_no_submit(
    command: tuple[str, ...],
    timeout_s: float,
    reason: str,
    model: ServedModel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = HandClock()
    counter = PromptCounter(command, timeout_s=timeout_s, clock=clock)
    pairs = [(GenerateRequest(prompt=DOUBTFUL), model)]

    assert [counter.faults(pairs) for _ in range(3)] == [{}, {}, {}]

    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert reason in record.message
    clock.now += REST_S
    counter.faults(pairs)
    assert len(caplog.records) == 2


def test_a_folder_without_a_tokenizer_stops_no_submit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    empty = TINY.model_copy(update={"source": str(tmp_path)})

    assert PromptCounter().faults([(GenerateRequest(prompt=DOUBTFUL), empty)]) == {}
    assert "exit status 2" in caplog.text


def test_another_refusal_keeps_its_kind(model: ServedModel) -> None:
    answer = '{"prompts": [{"error": {"code": "%s", "message": "no", "hint": null}}]}'
    request = GenerateRequest(prompt=DOUBTFUL)

    for code, kind in [("reserved_text", "ReservedText"), ("of_tomorrow", "InvalidRequest")]:
        command = (sys.executable, "-c", f"print({answer % code!r})")
        [fault] = PromptCounter(command).faults([(request, model)]).values()

        assert isinstance(fault, InvalidRequest)
        assert type(fault).__name__ == kind
