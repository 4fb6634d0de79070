"""`codeherd models quantize` and `compare`, with the real worker package below them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import get_args

import pytest

from codeherd_producer.commands import models
from codeherd_worker.engine.quantization import Quantization
from tests.unit.producer.conftest import CommandLine


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_text("def add(a, b):\n    return a + b\n" * 10)
    return path


def test_a_copy_is_written_once_and_its_sizes_are_told(command_line: CommandLine) -> None:
    done = command_line("models", "quantize", "tiny", "copy")
    again = command_line("models", "quantize", "tiny", "copy", "--json")

    copy = Path("copy").absolute()
    ((folder, before, now, revision),) = done.rows
    assert done.status == 0
    assert folder == str(copy)
    assert int(now) == (copy / "model.safetensors").stat().st_size < int(before)
    assert len(revision) == 64
    assert done.stderr == "5.1 MB before, 2.5 MB now, as nf4\n"
    assert again.status == 2
    assert again.document["error"]["code"] == "invalid_request"
    assert again.document["error"]["message"] == f"`{copy}` exists already"


def test_two_settings_are_shown_side_by_side(command_line: CommandLine, text: Path) -> None:
    done = command_line(
        *("models", "compare", "tiny", "--a", "bf16", "--b", "none", "--text", str(text), "--prompts", "1")
    )

    rows = {row[0]: row[1:] for row in done.rows}
    assert done.status == 0
    assert rows["quantization"] == ["bf16", "none"]
    assert rows["dtype"] == ["bfloat16", "float32"]
    assert float(rows["perplexity"][0]) == pytest.approx(float(rows["perplexity"][1]), rel=0.05)
    assert 0.9 < float(rows["agreement"][0]) <= 1
    assert "tokens read, 1 prompts continued by 64" in done.stderr


@pytest.mark.parametrize("verb", ["quantize", "compare"])
def test_an_unknown_model_is_refused_before_anything_starts(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr(models, "MODEL_COMMAND", ("/no/such/command",))

    done = command_line("models", verb, "codelama-7b", *(["copy"] if verb == "quantize" else []))

    assert done.status == 2
    assert "did you mean `codellama-7b`" in done.stderr


def test_a_model_that_is_not_here_is_named(command_line: CommandLine) -> None:
    done = command_line("models", "quantize", "owner/some-llama@v1", "copy")

    assert done.status == 1
    assert "`owner/some-llama@v1` is no folder, and no model in the hub's local cache" in done.stderr
    assert "hint: download the model" in done.stderr


@pytest.mark.parametrize(
    ("given", "source"),
    [
        ("tiny", "embedded"),
        ("codellama-7b", "codellama/CodeLlama-7b-hf"),
        ("codellama-7b@v1", "codellama/CodeLlama-7b-hf@v1"),
        ("codellama/CodeLlama-7b-hf@v1", "codellama/CodeLlama-7b-hf@v1"),
        ("owner/unlisted", "owner/unlisted"),
    ],
)
def test_a_model_is_named_by_table_or_hub_and_may_be_pinned(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, given: str, source: str
) -> None:
    tell = "import json, sys; said = sys.stdin.read(); error = dict(code='x', message=said, hint=None); "
    tell += "print(json.dumps({'error': error}))"
    monkeypatch.setattr(models, "MODEL_COMMAND", (sys.executable, "-c", tell))

    done = command_line("--quiet", "models", "quantize", given, "copy", "--json")

    asked = json.loads(done.document["error"]["message"])
    assert asked == {
        "source": source,
        "out": str(Path("copy").absolute()),
        "quantization": "nf4",
        "device": None,
        "quiet": True,
    }


def test_a_machine_without_the_worker_package_says_what_to_install(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)

    done = command_line("models", "compare", "tiny")

    assert done.status == 1
    assert "hint: pip install 'codeherd[worker]'" in done.stderr


def test_a_command_that_breaks_is_told_by_its_status(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "MODEL_COMMAND", (sys.executable, "-c", "import sys; sys.exit(7)"))

    done = command_line("models", "compare", "tiny")

    assert done.status == 1
    assert "the model command ended with status 7" in done.stderr


def test_every_quantization_of_a_worker_can_be_compared() -> None:
    # Two lists, because a producer cannot import the worker's.
    assert get_args(Quantization) == models._QUANTIZATIONS


def test_the_table_is_still_what_the_word_alone_shows(command_line: CommandLine) -> None:
    done = command_line("models")

    assert done.status == 0
    assert done.rows[0][0] == "tiny"
