"""`codeherd inspect` without a worker: what it says then, and what it makes of figures."""

from __future__ import annotations

from typing import Any

import pytest

from codeherd_producer.commands.worker_picture import SUMMARY, describe, summary_row
from codeherd_schema.requests import GenerateRequest
from codeherd_schema.store import Store
from tests.samples import a_result
from tests.services import free_port
from tests.unit.producer.conftest import CommandLine

FIGURES: dict[str, Any] = {
    "worker": "gpu0@host", "model": "codellama-7b", "queue": "codeherd.codellama-7b", "revision": "abc",
    "quantization": "nf4", "dtype": "bfloat16", "device": "NVIDIA H100", "fingerprint": "0123456789abcdef",
    "uptime_s": 7325.0, "slots": 16, "active": 2, "waiting": 1, "steps": 10, "passes": 20, "tokens": 300,
    "tokens_per_s": 412.3, "busy_share": 0.98, "window_s": 10.0, "prompt_tokens": 1000, "reused_tokens": 620,
    "reuse_rate": 0.62, "drafted": 90, "accepted": 37, "acceptance_rate": 0.411, "cache_bytes": 67 * 10**9,
    "weight_bytes": 4 * 10**9, "memory_bytes": 71 * 10**9, "memory_peak_bytes": 72 * 10**9,
    "granule": 32, "prefill_chunk": 256, "draft_tokens": 3, "drafts_are_optional": False,
    "classes": [
        {"length": 2048, "slots": 15, "spare": 2048, "kv_lengths": [512, 1024, 2048]},
        {"length": 16384, "slots": 1, "spare": 16384, "kv_lengths": [512, 16384]},
    ],
    "plan": {
        "window": 16384,
        "idle_rows": 0,
        "classes": [{"length": 2048, "slots": 15}, {"length": 16384, "slots": 1}],
        "cards": [
            {
                "card": "cuda:0", "total_bytes": 80 * 10**9, "available_bytes": 80 * 10**9,
                "weight_bytes": 4 * 10**9, "cache_bytes": 67 * 10**9, "activation_bytes": 10**9,
                "reserve_bytes": 64 * 10**8, "left_bytes": 16 * 10**8,
            }
        ],
    },
    "slot_views": [
        {
            "slot": 0, "length": 2048, "name": "job-a", "prompt_tokens": 1024, "reused_tokens": 512,
            "prefilled_tokens": 1024, "new_tokens": 512,
        },
        {
            "slot": 1, "length": 2048, "name": None, "prompt_tokens": 0, "reused_tokens": 0,
            "prefilled_tokens": 0, "new_tokens": 0,
        },
        {
            "slot": 15, "length": 16384, "name": "job-b", "prompt_tokens": 8192, "reused_tokens": 0,
            "prefilled_tokens": 4096, "new_tokens": 0,
        },
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _database(monkeypatch: pytest.MonkeyPatch, sqlite_url: str) -> None:
    monkeypatch.setenv("CODEHERD_DATABASE_URL", sqlite_url)


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    return sqlite_url


def test_a_worker_is_described_by_its_slots_speed_and_memory() -> None:
    lines = list(describe(FIGURES, 106))

    assert lines[0] == "gpu0@host  codellama-7b  nf4 (bfloat16) on NVIDIA H100"
    assert lines[1] == "  up 2h2m, fingerprint 0123456789abcdef"
    assert lines[2] == "  2 of 16 slots used, 1 waiting; 412.3 tokens/s, 98 % busy"
    assert lines[3] == "  prompts: 62 % of 1000 tokens reused; drafts: 41 % of 90 tokens accepted"
    assert "weight 4.00 GB, cache 67.00 GB, activation 1.00 GB, reserve 6.40 GB" in lines[4]
    assert lines[6] == "    2048 tokens |█···················| 1 of 15 used"
    assert lines[7] == "   16384 tokens |████████████████████| 1 of 1 used"


def test_a_slot_is_a_bar_of_what_fills_it() -> None:
    lines = list(describe(FIGURES, 66 + 40))

    first, second = lines[8:10]
    assert first == f"  slot   0 |{'▒' * 10}{'█' * 10}{'▓' * 10}{'·' * 10}|    1024+512  job-a"
    assert second == f"  slot  15 |{'█' * 10}{'░' * 10}{'·' * 20}|      8192+0  job-b"


@pytest.mark.parametrize("width", [20, 80, 200])
def test_bars_keep_to_the_terminal(width: int) -> None:
    bars = [line for line in describe(FIGURES, width) if line.startswith("  slot")]

    assert len({len(bar.split("|")[1]) for bar in bars}) == 1
    assert len(bars[0].split("|")[1]) == max(10, width - 66)


def test_an_idle_worker_has_no_rates() -> None:
    idle = FIGURES | {"acceptance_rate": None, "reuse_rate": None, "draft_tokens": 0, "slot_views": []}

    lines = list(describe(idle, 100))

    assert "prompts: - of 1000 tokens reused; drafts: off" in lines[3]
    assert not any(line.startswith("  slot") for line in lines)


def test_the_summary_has_a_value_for_every_column() -> None:
    row = summary_row(FIGURES | {"acceptance_rate": None})

    assert len(row) == len(SUMMARY)
    assert dict(zip(SUMMARY, row, strict=True))["accepted"] == ""
    assert row[:2] == ("gpu0@host", "codellama-7b")


def test_nobody_answers_is_a_service_that_is_away(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, broker_url: str
) -> None:
    monkeypatch.setenv("CODEHERD_BROKER_URL", broker_url)

    done = command_line("inspect", "--answer-s", "0.1")

    assert (done.status, done.text) == (1, "")
    assert "error: no answer from any worker within 0.1 s [service_unavailable]" in done.stderr
    assert "hint: `codeherd worker" in done.stderr


def test_a_named_worker_that_does_not_answer_is_named(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, broker_url: str
) -> None:
    monkeypatch.setenv("CODEHERD_BROKER_URL", broker_url)

    done = command_line("inspect", "gpu7", "--json", "--answer-s", "0.1")

    assert done.status == 1
    assert done.document["error"]["code"] == "service_unavailable"
    assert "worker `gpu7`" in done.document["error"]["message"]


def test_without_a_broker_there_is_nobody_to_ask(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEHERD_BROKER_URL", f"redis://127.0.0.1:{free_port()}/0")

    done = command_line("inspect", "--answer-s", "0.1")

    assert done.status == 1
    assert "[broker_unavailable]" in done.stderr


def test_a_watch_goes_on_until_it_is_stopped(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, broker_url: str
) -> None:
    monkeypatch.setenv("CODEHERD_BROKER_URL", broker_url)

    # The first look must find somebody: a watch on nobody is most likely a mistake.
    assert command_line("inspect", "--watch", "0.2", "--answer-s", "0.1").status == 1
    assert command_line("inspect", "--watch", "0").status == 2


def succeed(store: Store) -> str:
    [job] = store.submit([GenerateRequest(prompt="x")], tenant="default", queue_of=lambda _: "codeherd.tiny")
    claim = store.claim(job.job_id, worker_id="w@host", lease_s=30)
    assert claim is not None
    store.succeed(claim, a_result(claim, prompt_tokens=40, completion_tokens=4))
    return job.job_id


def test_the_mask_of_a_job_that_has_ended_is_drawn_from_its_token_counts(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, broker_url: str, store: Store
) -> None:
    monkeypatch.setenv("CODEHERD_BROKER_URL", broker_url)
    monkeypatch.setenv("COLUMNS", "120")
    job_id = succeed(store)

    done = command_line("inspect", "--mask", job_id, "--answer-s", "0.1")

    lines = done.text.splitlines()
    assert done.status == 0
    assert "does not run: drawn from its token counts" in done.stderr
    assert lines[0] == "slot 0 of 48 tokens: prompt 40 (0 reused, 40 in the cache), 4 new"
    assert sum(line.startswith("prefill") for line in lines) == 40
    assert [line.split()[1] for line in lines if line.startswith("decode")] == ["40", "41", "42", "43"]


def test_a_mask_needs_no_broker_once_the_job_has_ended(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    monkeypatch.setenv("CODEHERD_BROKER_URL", f"redis://127.0.0.1:{free_port()}/0")
    job_id = succeed(store)

    done = command_line("inspect", "--mask", job_id, "--json", "--answer-s", "0.1")

    assert done.status == 0
    assert (done.document["job"], done.document["running"]) == (job_id, False)
    assert done.document["slots"][0]["prompt_tokens"] == 40


def test_the_mask_of_an_unknown_job_is_not_found(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, broker_url: str
) -> None:
    monkeypatch.setenv("CODEHERD_BROKER_URL", broker_url)

    done = command_line("inspect", "--mask", "nobody", "--answer-s", "0.1")

    assert done.status == 4
    assert "[job_not_found]" in done.stderr


def test_the_mask_of_a_job_that_waits_cannot_be_drawn_yet(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, broker_url: str, store: Store
) -> None:
    monkeypatch.setenv("CODEHERD_BROKER_URL", broker_url)
    [job] = store.submit([GenerateRequest(prompt="x")], tenant="default", queue_of=lambda _: "codeherd.tiny")

    done = command_line("inspect", "--mask", job.job_id, "--answer-s", "0.1")

    assert done.status == 3
    assert "[wait_timeout]" in done.stderr
