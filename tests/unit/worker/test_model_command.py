from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from codeherd_worker import model_command
from codeherd_worker.engine.loading import load_model
from codeherd_worker.engine.saving import save_quantized
from codeherd_worker.prompt_command import EMBEDDED_FOLDER
from tests.unit.producer.json_documents import Documents

NF4_AND_NONE = {"source": "embedded", "a": "nf4", "b": "none"}


def asked(command: str, question: Any) -> tuple[int, Any]:
    target = io.StringIO()
    text = question if isinstance(question, bytes) else json.dumps(question).encode()
    status = model_command.main([command], io.BytesIO(text), target)
    return status, json.loads(target.getvalue())


def test_the_embedded_model_is_quantized(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "copy"

    status, answer = asked("quantize", {"source": "embedded", "out": str(out), "quantization": "int8"})

    assert status == 0
    assert answer == {
        "folder": str(out),
        "quantization": "int8",
        "revision": answer["revision"],
        "source_bytes": (EMBEDDED_FOLDER / "model.safetensors").stat().st_size,
        "saved_bytes": (out / "model.safetensors").stat().st_size,
    }
    assert load_model(str(out), quantization="auto", device="cpu", slots=2).revision == answer["revision"]
    assert Documents().faults("models quantize", {"schema": 1} | answer) == []
    # No terminal, no bar; nothing but the answer on stdout.
    assert capfd.readouterr() == ("", "")


def test_two_settings_are_compared_on_a_text(tmp_path: Path) -> None:
    text = tmp_path / "text.py"
    text.write_text("def add(a, b):\n    return a + b\n" * 20)
    question = {"source": "embedded", "a": "none", "b": "bf16", "texts": [str(text)], "prompts": 1}

    status, answer = asked("compare", question | {"tokens": 100})

    assert status == 0
    assert Documents().faults("models compare", {"schema": 1} | answer) == []
    assert [answer[side]["quantization"] for side in ("a", "b")] == ["none", "bf16"]
    assert answer["tokens"] == 100
    # Twenty copies of two lines: predictable to anything that reads what went before.
    assert 1 < answer["a"]["perplexity"] < 10
    assert answer["a"]["weight_bytes"] == pytest.approx(2 * answer["b"]["weight_bytes"], rel=1e-3)


def test_without_a_text_python_itself_is_read() -> None:
    status, answer = asked("compare", {"source": "embedded", "a": "none", "b": "none", "tokens": 600})

    assert status == 0
    assert (answer["tokens"], answer["prompts"], answer["agreement"]) == (600, 2, 1.0)
    assert answer["a"]["nats_per_token"] < 5


@pytest.mark.parametrize(
    ("command", "question", "code"),
    [
        ("quantize", b"", "invalid_request"),
        ("quantize", {"source": "embedded"}, "invalid_request"),
        ("quantize", {"source": "embedded", "out": "/tmp", "quantization": "none"}, "invalid_request"),
        ("quantize", {"source": "embedded", "out": "/tmp", "quantization": "nf4"}, "invalid_request"),
        ("quantize", {"source": "/nowhere", "out": "/o", "quantization": "nf4"}, "model_files_invalid"),
        ("compare", {"source": "embedded", "a": "nf5", "b": "none"}, "invalid_request"),
        ("compare", {"source": "embedded", "a": "nf4", "b": "none", "texts": ["/no"]}, "invalid_request"),
        (
            "compare",
            {"source": "embedded", "a": "nf4", "b": "none", "texts": [os.devnull]},
            "invalid_request",
        ),
        ("compare", {"source": "embedded", "a": "torchao-int4", "b": "none"}, "invalid_setting"),
    ],
)
def test_a_failure_is_an_answer(command: str, question: Any, code: str) -> None:
    if isinstance(question, dict):
        question = question | {"device": "cpu"}

    status, answer = asked(command, question)

    assert status == 2
    assert answer["error"]["code"] == code
    assert answer["error"]["message"]


def test_a_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "latin.txt"
    text.write_bytes("größe".encode("latin-1"))

    status, answer = asked("compare", NF4_AND_NONE | {"texts": [str(text)]})

    assert status == 2
    assert "it is not UTF-8" in answer["error"]["message"]


def test_an_already_quantized_model_says_so(tmp_path: Path) -> None:
    save_quantized(
        str(EMBEDDED_FOLDER), tmp_path / "a", quantization="nf4", device="cpu", progress=lambda *_: None
    )

    question = {"source": str(tmp_path / "a"), "out": str(tmp_path / "b"), "quantization": "nf4"}
    status, answer = asked("quantize", question)

    assert status == 2
    assert answer["error"]["code"] == "invalid_setting"


def test_a_wrong_question_is_answered_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "codeherd_worker.model_command", "quantize"],
        input=b"{}",
        capture_output=True,
        timeout=60,
        check=False,
    )

    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.decode().splitlines()}
    assert done.returncode == 2
    assert "pydantic" in imported
    assert not {"torch", "transformers"} & imported


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_gets_a_bar_unless_quiet_is_asked_for(tmp_path: Path, quiet: bool) -> None:
    question = {"source": "embedded", "out": str(tmp_path / "copy"), "quantization": "nf4", "quiet": quiet}
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "codeherd_worker.model_command", "quantize"],
        input=json.dumps(question).encode(),
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "80"},
        timeout=120,
        check=True,
    )
    os.write(theirs, b"\nend\n")
    drawn = b""
    while b"end" not in drawn:
        drawn += os.read(ours, 65536)
    os.close(ours)
    os.close(theirs)

    assert json.loads(done.stdout)["quantization"] == "nf4"
    assert ((b"load" in drawn) and (b"100%" in drawn)) != quiet
