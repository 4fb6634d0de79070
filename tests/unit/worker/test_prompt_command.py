from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from codeherd_schema.models import TINY, ChatFormat
from codeherd_schema.requests import (
    ChatRequest,
    GenerateRequest,
    InfillRequest,
    Overflow,
    Request,
    Sampling,
    dump_request,
)
from codeherd_worker import prompt_command
from codeherd_worker.engine.prompts import build_prompt
from codeherd_worker.engine.vocabulary import Vocabulary
from tests.unit.worker.engine.small_vocabularies import write_model

INFILL = InfillRequest(prefix="def f():\n    ", suffix="\n")
GENERATE = GenerateRequest(prompt="x = </s> 汉")
TOO_LONG = GenerateRequest(prompt="x", sampling=Sampling(max_new_tokens=5000))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("step", tmp_path_factory.mktemp("command") / "step")


def question(folder: Path | str, *requests: Any, **options: Any) -> str:
    dumped = [dump_request(r) if not isinstance(r, dict) else r for r in requests]
    model = TINY.model_copy(update={"chat": ChatFormat.STEP}).model_dump(mode="json")
    return json.dumps({"requests": dumped, "folder": str(folder), "model": model, **options})


def asked(text: str) -> tuple[int, Any]:
    target = io.StringIO()
    status = prompt_command.main(io.BytesIO(text.encode()), target)
    return status, json.loads(target.getvalue())


def test_each_request_gets_its_prompt(folder: Path) -> None:
    dialog = ChatRequest.model_validate({"messages": [{"role": "user", "content": "hi"}]})
    vocabulary = Vocabulary.from_folder(folder)

    status, answer = asked(question(folder, INFILL, GENERATE, dialog))

    assert status == 0
    model = TINY.model_copy(update={"chat": ChatFormat.STEP})
    requests: tuple[Request, ...] = (INFILL, GENERATE, dialog)
    for request, told in zip(requests, answer["prompts"], strict=True):
        prompt = build_prompt(request, vocabulary, model)
        assert told["token_ids"] == list(prompt.token_ids)
        assert told["prompt_tokens"] == len(prompt.token_ids)
        assert told["stop_ids"] == sorted(prompt.stop_ids)
        assert told["pieces"] == [vocabulary.piece(i) for i in prompt.token_ids]
        assert told["cut"] == []


def test_the_text_shows_what_the_model_reads(folder: Path) -> None:
    _, answer = asked(question(folder, INFILL, GENERATE))

    infill, generate = (told["text"] for told in answer["prompts"])
    assert infill == "<s> <PRE> def f():\n     <SUF>\n <MID>"
    assert generate == "<s> x = </s> 汉"


def test_what_was_cut_is_told(folder: Path) -> None:
    request = GenerateRequest(prompt="word " * 3000, overflow=Overflow.TRUNCATE)

    _, answer = asked(question(folder, request))

    (cut,) = answer["prompts"][0]["cut"]
    assert cut["part"] == "prompt"
    assert cut["total"] - cut["removed"] + 1 == answer["prompts"][0]["prompt_tokens"]


def test_a_wrong_request_does_not_spoil_the_others(folder: Path) -> None:
    status, answer = asked(question(folder, TOO_LONG, {"kind": "generate"}, GENERATE))

    too_long, invalid, fine = answer["prompts"]
    assert status == 0
    assert too_long["error"]["code"] == "context_length_exceeded"
    assert too_long["error"]["hint"]
    assert invalid["error"] == {
        "code": "invalid_request",
        "message": "`prompt`: field required",
        "hint": None,
    }
    assert fine["prompt_tokens"] > 1


def test_counting_tells_nothing_else(folder: Path) -> None:
    _, answer = asked(question(folder, GENERATE, TOO_LONG, count_only=True))

    counted, refused = answer["prompts"]
    assert list(counted) == ["prompt_tokens"]
    assert list(refused) == ["error"]


@pytest.mark.parametrize("text", ["", "{}", "[]", "not json", '{"requests": 1}'])
def test_a_question_without_sense_is_an_error_for_all(text: str) -> None:
    status, answer = asked(text)

    assert status == 2
    assert answer["error"]["code"] == "invalid_request"


def test_a_folder_without_a_tokenizer_is_an_error_for_all(tmp_path: Path) -> None:
    status, answer = asked(question(tmp_path, GENERATE))

    assert status == 2
    assert answer["error"]["code"] == "model_files_invalid"


def test_embedded_means_the_folder_inside_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(prompt_command.__file__).parent / "tiny" == prompt_command.EMBEDDED_FOLDER
    monkeypatch.setattr(prompt_command, "EMBEDDED_FOLDER", folder)

    assert asked(question("embedded", GENERATE))[0] == 0


def test_the_command_answers_without_torch_and_transformers(folder: Path) -> None:
    # As a producer runs it, but each import is told on stderr.
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "codeherd_worker.prompt_command"],
        input=question(folder, INFILL).encode(),
        capture_output=True,
        timeout=60,
        check=True,
    )

    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.decode().splitlines()}
    assert json.loads(done.stdout)["prompts"][0]["prompt_tokens"] > 4
    assert "codeherd_worker.engine.prompts" in imported
    assert not {"torch", "transformers", "tokenizers", "numpy", "celery", "sqlalchemy"} & imported
