from __future__ import annotations

import pytest

from codeherd_producer.commands.failures import ExitCode
from codeherd_schema.requests import GenerateRequest, InfillRequest, Request, Sampling
from codeherd_schema.results import Candidate, FinishReason, LikelyToken, TokenLogprob
from codeherd_schema.states import JobState
from codeherd_schema.store import Store
from tests.by_hand import claim, finish, result_of
from tests.unit.producer.conftest import CommandLine

#: The fields of a job document; a test that fails here breaks somebody's script.
JOB_FIELDS = {
    *("id", "kind", "model", "state", "priority", "attempt", "max_attempts", "crash_count", "worker"),
    *("run_at", "expires_at", "deadline", "created_at", "started_at", "finished_at", "batch_id"),
    *("idempotency_key", "labels", "error"),
}
UNKNOWN = "00000000-0000-7000-8000-000000000000"


@pytest.fixture(autouse=True)
def _database(monkeypatch: pytest.MonkeyPatch, sqlite_url: str) -> None:
    monkeypatch.setenv("CODEHERD_DATABASE_URL", sqlite_url)


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    return sqlite_url


def submit(command_line: CommandLine, *options: str) -> str:
    return command_line("submit", "generate", "x = ", *options).text.strip()


def test_result_is_the_text_byte_for_byte(command_line: CommandLine, store: Store) -> None:
    job_id = submit(command_line)
    finish(store, job_id, "  1\r\n\té")

    done = command_line("result", job_id)

    assert (done.status, done.stdout, done.stderr) == (0, "  1\r\n\té".encode(), "")


def test_result_in_its_place(command_line: CommandLine, store: Store) -> None:
    job_id = command_line("submit", "infill", "a<FILL_ME>c").text.strip()
    finish(store, job_id, "b")

    assert command_line("result", job_id, "--echo").text == "abc"


def test_several_candidates_are_told_apart(command_line: CommandLine, store: Store) -> None:
    job_id = submit(command_line, "-n", "2")
    claimed = claim(store, job_id)
    candidates = [
        Candidate(index=i, text=text, finish_reason=FinishReason.EOS, completion_tokens=1, seed=i)
        for i, text in enumerate(("one", "two"))
    ]
    store.succeed(claimed, result_of(claimed, "").model_copy(update={"candidates": tuple(candidates)}))

    assert command_line("result", job_id).text == "==> candidate 0 <==\none\n==> candidate 1 <==\ntwo\n"
    assert command_line("result", job_id, "--index", "1").text == "two"
    assert command_line("result", job_id, "--index", "2").status == ExitCode.USAGE


def test_result_document_holds_the_job_and_the_whole_result(command_line: CommandLine, store: Store) -> None:
    job_id = submit(command_line)
    stored = finish(store, job_id, "1")

    document = command_line("result", job_id, "--json").document

    assert (document["schema"], set(document["job"])) == (1, JOB_FIELDS)
    assert document["result"] == stored.model_dump(mode="json")


def test_result_document_tells_log_probabilities(command_line: CommandLine, store: Store) -> None:
    job_id = submit(command_line, "--logprobs", "1")
    claimed = claim(store, job_id)
    likeliest = LikelyToken(token_id=30, piece="▁", text_hex="20", logprob=-0.25)
    token = TokenLogprob(token_id=259, piece="<0xE9>", text_hex="e9", logprob=-1.5, top=(likeliest,))
    candidate = Candidate(
        index=0, text="é", finish_reason=FinishReason.EOS, completion_tokens=1, seed=1, logprobs=(token,)
    )
    store.succeed(claimed, result_of(claimed, "").model_copy(update={"candidates": (candidate,)}))

    [told] = command_line("result", job_id, "--json").document["result"]["candidates"]

    assert told["logprobs"] == [
        {
            "token_id": 259,
            "piece": "<0xE9>",
            "text_hex": "e9",
            "logprob": -1.5,
            "top": [{"token_id": 30, "piece": "▁", "text_hex": "20", "logprob": -0.25}],
        }
    ]


def test_result_of_a_job_that_has_none(command_line: CommandLine, store: Store) -> None:
    waiting, failed, cancelled = (submit(command_line) for _ in range(3))
    store.fail(claim(store, failed), code="engine_failed", message="broke")
    command_line("cancel", cancelled)

    statuses = [command_line("result", job_id).status for job_id in (waiting, failed, cancelled, UNKNOWN)]

    assert statuses == [
        ExitCode.STILL_ALIVE,
        ExitCode.JOB_FAILED,
        ExitCode.WITHDRAWN,
        ExitCode.NOT_FOUND,
    ]


def test_status_tells_every_job_and_its_attempts(command_line: CommandLine, store: Store) -> None:
    job_id = submit(command_line, "--label", "team=docs")
    finish(store, job_id)

    document = command_line("status", job_id, "--json").document

    [job] = document["jobs"]
    assert set(job) == JOB_FIELDS | {"attempts"}
    assert (job["state"], job["labels"], job["worker"]) == ("succeeded", {"team": "docs"}, "hand")
    assert [attempt["outcome"] for attempt in job["attempts"]] == ["succeed"]


def test_an_unknown_id_is_status_4_in_words_and_in_json(command_line: CommandLine) -> None:
    words, document = command_line("status", UNKNOWN), command_line("status", UNKNOWN, "--json")

    assert (words.status, words.stdout) == (4, b"")
    assert words.stderr == f"error: no job has the id `{UNKNOWN}` [job_not_found]\n"
    assert (document.status, document.stderr) == (4, "")
    assert document.document["error"]["code"] == "job_not_found"


def test_ls_lists_the_newest_first_and_filters(command_line: CommandLine, store: Store) -> None:
    first, second = submit(command_line, "--label", "a=1"), submit(command_line)
    finish(store, first)

    assert [row[0] for row in command_line("ls").rows] == [second, first]
    assert [row[0] for row in command_line("ls", "--state", "succeeded").rows] == [first]
    assert [row[0] for row in command_line("ls", "--label", "a=1").rows] == [first]
    assert [row[0] for row in command_line("ls", "--before", second).rows] == [first]
    assert [row[0] for row in command_line("ls", "--limit", "1").rows] == [second]
    document = command_line("ls", "--kind", "generate", "--json").document
    assert [set(job) for job in document["jobs"]] == [JOB_FIELDS, JOB_FIELDS]


def test_wait_returns_the_state_as_exit_code(command_line: CommandLine, store: Store) -> None:
    good, bad = submit(command_line), submit(command_line)
    finish(store, good)
    store.fail(claim(store, bad), code="engine_failed", message="broke")

    one, other, both = (command_line("wait", *ids) for ids in ((good,), (bad,), (good, bad)))

    assert (one.status, one.rows) == (ExitCode.OK, [[good, "succeeded"]])
    assert (other.status, other.rows) == (ExitCode.JOB_FAILED, [[bad, "failed"]])
    assert both.status == ExitCode.SOME_FAILED
    assert command_line("wait", submit(command_line), "--timeout", "0").status == ExitCode.STILL_ALIVE


def test_cancel_can_be_repeated_and_retry_queues_again(command_line: CommandLine, store: Store) -> None:
    job_id = submit(command_line)

    assert command_line("cancel", job_id).rows == [[job_id, "cancelled"]]
    assert command_line("cancel", job_id).rows == [[job_id, "cancelled"]]
    assert command_line("retry", job_id, "--json").document["jobs"] == [{"id": job_id, "state": "queued"}]
    assert command_line("retry", job_id).status == ExitCode.USAGE
    job = store.get(job_id)
    assert job is not None
    assert job.state is JobState.QUEUED


def test_nothing_is_done_when_one_id_is_unknown(command_line: CommandLine, store: Store) -> None:
    job_id = submit(command_line)

    assert command_line("cancel", job_id, UNKNOWN).status == ExitCode.NOT_FOUND
    job = store.get(job_id)
    assert job is not None
    assert job.state is JobState.QUEUED


@pytest.mark.parametrize("command", ["status", "wait", "cancel", "retry", "result"])
def test_a_command_without_ids_is_wrong_use(command_line: CommandLine, command: str) -> None:
    assert command_line(command).status == ExitCode.USAGE
    assert command_line(command, "--batch", "none").status == ExitCode.USAGE


def test_jobs_of_a_program_are_found_too(command_line: CommandLine, store: Store) -> None:
    requests: list[Request] = [
        GenerateRequest(prompt="a", sampling=Sampling(max_new_tokens=4)),
        InfillRequest(prefix="b", suffix="c"),
    ]
    submitted = store.submit(
        requests, tenant="default", queue_of=lambda r: f"codeherd.{r.model}", batch_id="b1"
    )

    assert [row[0] for row in command_line("status", "--batch", "b1").rows] == [s.job_id for s in submitted]
