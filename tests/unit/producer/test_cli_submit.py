from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest

from codeherd_schema.requests import ChatRequest, GenerateRequest, InfillRequest, Overflow, Request
from codeherd_schema.store import Store
from tests.by_hand import finish
from tests.unit.producer.conftest import CommandLine


@pytest.fixture(autouse=True)
def _database(monkeypatch: pytest.MonkeyPatch, sqlite_url: str) -> None:
    monkeypatch.setenv("CODEHERD_DATABASE_URL", sqlite_url)


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    return sqlite_url


def stored(store: Store, job_id: str) -> Request:
    job = store.get(job_id.strip())
    assert job is not None
    return job.request


def test_submit_prints_the_id_and_nothing_else(command_line: CommandLine, store: Store) -> None:
    done = command_line("submit", "generate", "def f():")

    assert (done.status, done.stderr) == (0, "")
    assert done.stdout == f"{store.list()[0].id}\n".encode()


def test_text_comes_from_argument_pipe_or_file(
    command_line: CommandLine, store: Store, tmp_path: Path
) -> None:
    text = "x = 'é'\r\n\t"
    file = tmp_path / "source.py"
    file.write_bytes(text.encode())

    ways = [
        command_line("submit", "generate", text),
        command_line("submit", "generate", "-", stdin=text.encode()),
        command_line("submit", "generate", stdin=text.encode()),
        command_line("submit", "generate", f"@{file}"),
    ]

    assert [stored(store, done.text) for done in ways] == [GenerateRequest(prompt=text)] * 4


def test_two_at_signs_are_one_that_is_text(command_line: CommandLine, store: Store) -> None:
    done = command_line("submit", "generate", "@@property")

    assert stored(store, done.text) == GenerateRequest(prompt="@property")


def test_a_terminal_without_text_gets_the_help_and_status_2(command_line: CommandLine) -> None:
    done = command_line("submit", "generate", terminal=True)

    assert (done.status, done.stdout) == (2, b"")
    assert "Usage: codeherd submit generate" in done.stderr


@pytest.mark.parametrize("arguments", [("-",), ("@latin1.py",)])
def test_text_that_is_not_utf8_is_refused(
    command_line: CommandLine, store: Store, arguments: tuple[str]
) -> None:
    Path("latin1.py").write_bytes(b"x = '\xe9'")

    done = command_line("submit", "generate", *arguments, stdin=b"x = '\xe9'")

    assert done.status == 2
    assert "is not UTF-8: byte 5 is 0xe9" in done.stderr
    assert store.list() == []


def test_every_option_reaches_the_request(command_line: CommandLine, store: Store) -> None:
    done = command_line(
        *(
            "submit",
            "generate",
            "x",
            "--model",
            "tiny-python",
            "--max-new-tokens",
            "7",
            "--temperature",
            "0.5",
        ),
        *("--top-p", "0.9", "--top-k", "40", "--repetition-penalty", "1.1", "--stop", "\n", "--stop", "#"),
        *(
            "--min-p",
            "0.05",
            "--logprobs",
            "3",
            "--seed",
            "3",
            "-n",
            "2",
            "--priority",
            "1",
            "--run-at",
            "10m",
            "--expires",
            "1h30m",
        ),
        *("--deadline", "2d", "--label", "team=docs", "--metadata", "why=a=b", "--idempotency-key", "k"),
        "--truncate",
    )

    request = stored(store, done.text)
    sampling = request.sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (
        7,
        0.5,
        0.9,
        40,
    )
    assert (sampling.repetition_penalty, sampling.stop, sampling.seed, sampling.n) == (1.1, ("\n", "#"), 3, 2)
    assert (sampling.min_p, sampling.logprobs) == (0.05, 3)
    assert (request.model, request.priority, request.overflow) == ("tiny-python", 1, Overflow.TRUNCATE)
    assert (request.run_at, request.expires_at) == (timedelta(minutes=10), timedelta(minutes=90))
    assert (request.deadline, request.idempotency_key) == (timedelta(days=2), "k")
    assert (request.labels, request.metadata) == ({"team": "docs"}, {"why": "a=b"})


def test_infill_splits_at_the_marker(command_line: CommandLine, store: Store) -> None:
    done = command_line("submit", "infill", "-", "--spm", stdin=b"def f():\n    <FILL_ME>\n")

    assert stored(store, done.text) == InfillRequest(prefix="def f():\n    ", suffix="\n", suffix_first=True)


def test_infill_takes_another_marker(command_line: CommandLine, store: Store) -> None:
    done = command_line("submit", "infill", "a <FILL_ME> ??? b", "--fill-token", "???")

    assert stored(store, done.text) == InfillRequest(prefix="a <FILL_ME> ", suffix=" b")


@pytest.mark.parametrize("text", ["no hole", "<FILL_ME> and <FILL_ME>"])
def test_infill_needs_exactly_one_hole(command_line: CommandLine, text: str) -> None:
    done = command_line("submit", "infill", text)

    assert done.status == 2
    assert "[fill_marker]" in done.stderr


def test_infill_takes_the_two_sides_from_files(command_line: CommandLine, store: Store) -> None:
    Path("before").write_text("a <FILL_ME>")

    done = command_line("submit", "infill", "--prefix-file", "before")

    assert stored(store, done.text) == InfillRequest(prefix="a <FILL_ME>", suffix="")


@pytest.mark.parametrize(
    ("place", "prefix"),
    [
        ("crlf.py:1", "def é():"),
        ("crlf.py:1:1", ""),
        ("crlf.py:1:6", "def é"),
        ("crlf.py:2", "def é():\r\n  pass"),
        ("crlf.py:3", "def é():\r\n  pass\r\n"),
    ],
)
def test_infill_at_a_cursor(command_line: CommandLine, store: Store, place: str, prefix: str) -> None:
    text = "def é():\r\n  pass\r\n"
    Path("crlf.py").write_bytes(text.encode())

    done = command_line("submit", "infill", "--at", place)

    assert stored(store, done.text) == InfillRequest(prefix=prefix, suffix=text.removeprefix(prefix))


@pytest.mark.parametrize("place", ["two.py", "two.py:0", "two.py:4", "two.py:1:9", "two.py:1:0", "none.py:1"])
def test_a_cursor_outside_the_file_is_refused(command_line: CommandLine, place: str) -> None:
    Path("two.py").write_text("line 1\nline 2\n")

    assert command_line("submit", "infill", "--at", place).status == 2


def test_infill_takes_one_kind_of_text(command_line: CommandLine) -> None:
    assert command_line("submit", "infill", "a <FILL_ME>", "--at", "x.py:1").status == 2


def test_chat_puts_system_and_earlier_turns_before_the_prompt(
    command_line: CommandLine, store: Store
) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    Path("turns.json").write_text(json.dumps(turns))
    model = ("--model", "codellama-7b-instruct")

    done = command_line("submit", "chat", "why?", "--system", "Be short.", "--messages", "turns.json", *model)

    expected = [{"role": "system", "content": "Be short."}, *turns, {"role": "user", "content": "why?"}]
    assert stored(store, done.text) == ChatRequest.model_validate(
        {"messages": expected, "model": "codellama-7b-instruct"}
    )


@pytest.mark.parametrize("turns", ["{}", "[", '[{"role": "assistant", "content": "hello"}]'])
def test_wrong_turns_are_refused(command_line: CommandLine, turns: str) -> None:
    Path("turns.json").write_text(turns)

    done = command_line("submit", "chat", "--messages", "turns.json", "--model", "codellama-7b-instruct")

    assert done.status == 2


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("generate", "x", "--model", "codellama-8b"), "model_not_found"),
        (("infill", "<FILL_ME>", "--model", "codellama-34b"), "unsupported_by_model"),
        (("generate", "x", "--max-new-tokens", "5000"), "context_length_exceeded"),
        (("generate", "x", "--temperature", "3"), "invalid_request"),
        (("generate", "x", "--min-p", "1.5"), "invalid_request"),
        (("generate", "x", "--logprobs", "6"), "invalid_request"),
        (("generate", "x", "--stop", ""), "invalid_request"),
        (("generate", "x", "--run-at", "tomorrow"), "usage"),
        (("generate", "x", "--run-at", "2026-05-01T09:00"), "usage"),
        (("generate", "x", "--label", "team"), "usage"),
        (("generate", "x", "--label", "a=1", "--label", "a=2"), "usage"),
        (("generate", "x", "--deadline", "0s"), "invalid_request"),
        (("generate", "x", "--no-such-option"), "usage"),
        (("generate", "@no-such-file"), "invalid_request"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_queued(
    command_line: CommandLine, store: Store, arguments: tuple[str, ...], code: str
) -> None:
    done = command_line("submit", *arguments)

    assert (done.status, done.stdout) == (2, b"")
    assert f"[{code}]" in done.stderr.splitlines()[0]
    assert store.list() == []


def test_the_same_key_and_request_give_the_same_job(command_line: CommandLine) -> None:
    first = command_line("submit", "generate", "x", "--idempotency-key", "k", "--json").document
    again = command_line("submit", "generate", "x", "--idempotency-key", "k", "--json").document
    other = command_line("submit", "generate", "y", "--idempotency-key", "k", "--json")

    assert (first["deduplicated"], again["deduplicated"]) == (False, True)
    assert again["job"]["id"] == first["job"]["id"]
    assert (other.status, other.document["error"]["code"]) == (2, "idempotency_conflict")


def test_wait_that_runs_out_says_how_to_wait_again(command_line: CommandLine, store: Store) -> None:
    done = command_line("submit", "generate", "x", "--wait", "--timeout", "0")

    assert (done.status, done.stdout) == (3, b"")
    assert f"`codeherd wait {store.list()[0].id}` waits again" in done.stderr


def test_quiet_leaves_notes_out_and_errors_in(command_line: CommandLine) -> None:
    done = command_line("--quiet", "submit", "generate", "x", "--wait", "--timeout", "0")

    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]


def test_wait_says_once_which_pauses_keep_the_job_from_starting(
    command_line: CommandLine, store: Store
) -> None:
    ask = ("submit", "generate", "x", "--wait", "--timeout", "0")
    command_line("pause", "model", "codellama-7b")
    command_line("pause", "batch", "nightly")
    free = command_line(*ask)
    command_line("pause", "model", "tiny", "--reason", "new driver")
    command_line("pause", "tenant", "default")

    kept = command_line(*ask)
    quiet = command_line("--quiet", *ask)

    assert "paused" not in free.stderr
    assert kept.stderr.splitlines()[1:3] == [
        "note: model tiny is paused (new driver): nothing of it starts before `codeherd resume model tiny`",
        "note: tenant default is paused: nothing of it starts before `codeherd resume tenant default`",
    ]
    assert kept.stderr.count("is paused") == 2
    assert "paused" not in quiet.stderr
    assert "paused" not in command_line("submit", "generate", "x").stderr


def test_wait_for_a_job_that_ended_before_says_nothing_of_pauses(
    command_line: CommandLine, store: Store
) -> None:
    ask = ("submit", "generate", "x", "--idempotency-key", "k")
    finish(store, command_line(*ask).text.strip())
    command_line("pause", "model", "tiny")

    done = command_line(*ask, "--wait")

    assert (done.status, done.text) == (0, "pass")
    assert "paused" not in done.stderr


def test_wait_for_a_file_of_jobs_says_what_is_paused_of_it(command_line: CommandLine) -> None:
    # The last of them is not read together with the others.
    models = ["tiny"] * 500 + ["codellama-7b"]
    lines = [{"kind": "generate", "prompt": "x", "model": model} for model in models]
    Path("jobs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    command_line("pause", "model", "codellama-7b")
    command_line("pause", "model", "codellama-13b")
    command_line("pause", "batch", "nightly")

    done = command_line("submit", "jsonl", "jobs.jsonl", "--batch", "nightly", "--wait", "--timeout", "0")

    told = [line.partition(" is paused")[0] for line in done.stderr.splitlines() if " is paused" in line]
    assert told == ["note: model codellama-7b", "note: batch nightly"]
