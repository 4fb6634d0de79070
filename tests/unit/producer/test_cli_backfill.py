"""`codeherd backfill`, verb by verb, on real repositories and with a worker that runs in a thread."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from codeherd_producer.backfill.scanner import scan
from codeherd_producer.client import Client
from codeherd_producer.commands.backfill import backfill
from codeherd_producer.commands.backfill_progress import Meter
from codeherd_producer.commands.failures import ExitCode
from codeherd_schema.backfills import Backfills, FileState, RunState
from codeherd_schema.requests import InfillRequest
from codeherd_schema.settings import SharedSettings
from codeherd_schema.store import Store
from tests.unit.producer.backfill.conftest import newer_python as newer_python
from tests.unit.producer.backfill.test_run import (
    FILES,
    OTHER_ONE,
    TARGETS,
    Bench,
    fine_when_sampled,
    hopeless,
    text_of,
)
from tests.unit.producer.conftest import CommandLine, Output
from tests.unit.producer.json_documents import Documents

UNKNOWN = "0190a0a0-0000-7000-8000-000000000000"


@pytest.fixture
def database_url(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CODEHERD_DATABASE_URL", sqlite_url)
    return sqlite_url


@pytest.fixture(autouse=True)
def _git_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tmp_path / "gitconfig"
    settings.write_text("[user]\n\tname = Ada\n\temail = ada@example.org\n[init]\n\tdefaultBranch = main\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


def git_bytes(folder: Path, *arguments: str, given: bytes | None = None) -> bytes:
    done = subprocess.run(["git", *arguments], cwd=folder, input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def git(folder: Path, *arguments: str, given: bytes | None = None) -> str:
    return git_bytes(folder, *arguments, given=given).decode()


def commit(folder: Path) -> None:
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "all")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository whose files lack `TARGETS` docstrings."""
    folder = tmp_path / "project"
    for path, text in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(text.encode())
    git(tmp_path, "init", "--quiet", str(folder))
    commit(folder)
    return folder


@pytest.fixture
def bench(database_url: str, store: Store, root: Path) -> Iterator[Bench]:
    """A worker that runs whatever is queued, for as long as the test lasts."""
    settings = SharedSettings.model_validate({"database_url": database_url})
    stop = threading.Event()
    with Client(settings, publish=False) as client, contextlib.closing(Backfills.open(database_url)) as rows:
        bench = Bench(client, store, rows, root)

        def serve() -> None:
            while not stop.wait(0.005):
                bench.work()

        worker = threading.Thread(target=serve)
        worker.start()
        yield bench
        stop.set()
        worker.join()


@pytest.fixture
def codeherd(command_line: CommandLine) -> CommandLine:
    """Runs `codeherd backfill ARGUMENTS`."""

    def run(*arguments: str, **how: Any) -> Output:
        return command_line("backfill", *arguments, **how)

    return run


def documented(folder: Path) -> int:
    """How many symbols below a folder have a docstring."""
    return sum(
        symbol.is_documented
        for path in folder.rglob("*.py")
        if path.name != "broken.py"
        for symbol in scan(path.read_bytes()).symbols
    )


def patched(root: Path, patch: bytes) -> dict[str, bytes]:
    """Return what a patch makes of the project, and leave the project as it is."""
    git(root, "apply", "--check", given=patch)
    git(root, "apply", given=patch)
    found = {path: (root / path).read_bytes() for path in FILES}
    git(root, "apply", "--reverse", given=patch)
    return found


def no_runs(database_url: str) -> bool:
    with contextlib.closing(Backfills.open(database_url)) as rows:
        return rows.list() == []


# A plan.


def test_a_dry_run_counts_and_asks_nothing(codeherd: CommandLine, root: Path, database_url: str) -> None:
    words = codeherd("docstrings", str(root), "--dry-run")
    document = codeherd("docstrings", str(root), "--dry-run", "--json").document

    assert words.status == 0
    assert words.rows[:2] == [["files", "4"], ["symbols to document", str(TARGETS)]]
    assert [row for row in words.rows if "syntax" in row[0]] != []
    assert (document["files"], document["targets"], document["schema"]) == (4, TARGETS, 1)
    assert sum(document["left_files"].values()) == 1
    assert document["passed_over"]["documented"] == 2
    assert no_runs(database_url)


# Handing over.


def test_the_patch_on_stdout_applies_and_after_it_nothing_is_left_to_ask(
    codeherd: CommandLine, bench: Bench
) -> None:
    before = documented(bench.root)

    done = codeherd("docstrings", str(bench.root))

    assert done.status == 0
    assert f"{TARGETS} docstrings, 0 symbols left for a human" in done.stderr
    assert git(bench.root, "status", "--porcelain") == ""
    git(bench.root, "apply", "--check", given=done.stdout)
    git(bench.root, "apply", given=done.stdout)
    assert documented(bench.root) == before + TARGETS
    commit(bench.root)
    asked = len(bench.ran)
    again = codeherd("docstrings", str(bench.root))
    assert (again.status, again.stdout, len(bench.ran)) == (0, b"", asked)


def test_files_in_place_are_what_the_patch_makes_of_them_and_twice_is_once(
    codeherd: CommandLine, bench: Bench
) -> None:
    expected = patched(bench.root, codeherd("docstrings", str(bench.root)).stdout)

    assert codeherd("docstrings", str(bench.root), "--in-place").stdout == b""

    assert {path: (bench.root / path).read_bytes() for path in FILES} == expected
    again = codeherd("apply", "--in-place")
    assert again.status == 0
    assert "one.py has its docstrings already" in again.stderr
    assert {path: (bench.root / path).read_bytes() for path in FILES} == expected


def test_a_file_that_was_taken_back_can_be_handed_over_again(codeherd: CommandLine, bench: Bench) -> None:
    codeherd("docstrings", str(bench.root), "--in-place")
    expected = (bench.root / "one.py").read_bytes()
    (bench.root / "two.py").write_bytes(b"def other(): ...\n")
    git(bench.root, "checkout", "--quiet", "one.py")

    done = codeherd("apply", "--in-place")

    assert (bench.root / "one.py").read_bytes() == expected
    assert "two.py was changed since it was planned, and is left alone" in done.stderr
    assert (bench.root / "two.py").read_bytes() == b"def other(): ...\n"


def test_each_file_has_a_patch_of_its_own_if_wanted(
    codeherd: CommandLine, bench: Bench, tmp_path: Path
) -> None:
    folder = tmp_path / "patches"

    done = codeherd("docstrings", str(bench.root), "--patches", str(folder))

    assert done.stdout == b""
    assert sorted(path.name for path in folder.rglob("*.patch")) == ["one.py.patch", "two.py.patch"]
    for path in folder.rglob("*.patch"):
        git(bench.root, "apply", given=path.read_bytes())
    assert documented(bench.root) == 2 + TARGETS


@pytest.mark.parametrize(
    ("grouping", "titles"),
    [
        (
            "per-file",
            ["Add docstrings to one.py", "Add docstrings to pkg/four.py", "Add docstrings to two.py"],
        ),
        ("per-dir", ["Add docstrings to ./", "Add docstrings to pkg/"]),
        ("single", ["Add docstrings"]),
    ],
)
def test_commits_go_to_a_branch_and_the_working_tree_is_never_touched(
    codeherd: CommandLine, bench: Bench, grouping: str, titles: list[str]
) -> None:
    (bench.root / "pkg").mkdir()
    (bench.root / "pkg" / "four.py").write_text("def sixth(y):\n    return y\n")
    commit(bench.root)
    (bench.root / "notes").write_text("mine")
    before = git(bench.root, "rev-parse", "HEAD"), git(bench.root, "status", "--porcelain")

    done = codeherd("docstrings", str(bench.root), "--branch", "texts", "--commit", grouping)

    assert (done.status, done.stdout) == (0, b"")
    assert ("1 commit on texts" if len(titles) == 1 else f"{len(titles)} commits on texts") in done.stderr
    assert "# Docstrings of backfill" in done.stderr
    assert (git(bench.root, "rev-parse", "HEAD"), git(bench.root, "status", "--porcelain")) == before
    assert sorted(git(bench.root, "log", "--format=%s", "HEAD..texts").splitlines()) == titles
    [run] = bench.rows.list()
    messages = git(bench.root, "log", "--format=%B", "HEAD..texts")
    assert messages.count(f"Backfill-Run: {run.id}\nBackfill-Model: tiny") == len(titles)
    expected = codeherd("apply").stdout
    assert git(bench.root, "diff", "--no-color", "HEAD..texts", "--stat") != ""
    git(bench.root, "switch", "--quiet", "texts")
    assert documented(bench.root) == 2 + TARGETS + 1
    git(bench.root, "apply", "--check", "--reverse", given=expected)


def test_a_branch_that_has_everything_gets_no_second_commit(codeherd: CommandLine, bench: Bench) -> None:
    codeherd("docstrings", str(bench.root), "--branch", "texts")
    tip = git(bench.root, "rev-parse", "texts")

    done = codeherd("apply", "--branch", "texts")

    assert done.status == 0
    assert git(bench.root, "rev-parse", "texts") == tip


def test_commits_may_be_mails_and_have_a_prefix(codeherd: CommandLine, bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "mails"

    done = codeherd(
        *("docstrings", str(bench.root), "--format-patch", str(folder), "--commit-prefix", "docs: "),
        *("--commit", "single", "--max-files", "1"),
    )

    assert done.status == 0
    mails = sorted(folder.iterdir())
    assert len(mails) == 2
    assert b"docs: add docstrings (1 of 2)" in mails[0].read_bytes()
    assert git(bench.root, "branch", "--list").split() == ["*", "main"]
    again = codeherd("apply", "--format-patch", str(tmp_path / "again"))
    assert (again.status, len(list((tmp_path / "again").iterdir()))) == (0, 2)
    git(bench.root, "am", "--quiet", "--keep-cr", *map(str, mails))
    assert documented(bench.root) == 2 + TARGETS


def test_a_folder_inside_of_a_repository_gives_paths_from_its_top(
    codeherd: CommandLine, bench: Bench
) -> None:
    (bench.root / "sub" / "six.py").write_text("def sixth(y):\n    return y\n")
    commit(bench.root)

    done = codeherd("docstrings", str(bench.root / "sub"))

    assert b"b/sub/six.py" in done.stdout
    git(bench.root, "apply", "--check", given=done.stdout)


# Files that were changed since they were planned.


def other_one(root: Path) -> str:
    """Change a method and add a function above all others, change the other file's head, and commit that."""
    (root / "one.py").write_text(OTHER_ONE)
    (root / "two.py").write_bytes(b"# Mine.\r\n" + (root / "two.py").read_bytes())
    commit(root)
    return OTHER_ONE


#: What a hand-over says of it.
CARRIED = (
    "one.py was changed since it was planned: 1 docstring carried over, 2 left (2 changed): "
    "a new run asks for what still lacks one\n"
    "two.py was changed since it was planned: 1 docstring carried over\n"
)


def test_every_way_of_handing_over_carries_texts_over_into_the_files_as_they_are_now(
    codeherd: CommandLine, bench: Bench, tmp_path: Path
) -> None:
    codeherd("docstrings", str(bench.root))
    [run] = bench.rows.list()
    asked = len(bench.ran)
    before = other_one(bench.root)
    text = text_of(bench, run, "first")
    head = git(bench.root, "rev-parse", "HEAD")
    found: dict[str, dict[str, bytes]] = {}

    printed = codeherd("apply")
    found["stdout"] = patched(bench.root, printed.stdout)
    assert codeherd("apply").stdout == printed.stdout
    codeherd("apply", "--patches", str(tmp_path / "patches"))
    every = b"".join(path.read_bytes() for path in sorted((tmp_path / "patches").iterdir()))
    found["patches"] = patched(bench.root, every)
    for _ in range(2):
        branch = codeherd("apply", "--branch", "texts")
        assert CARRIED in branch.stderr
        assert "2 commits on texts" in branch.stderr
    found["branch"] = {path: git_bytes(bench.root, "show", f"texts:{path}") for path in FILES}
    codeherd("apply", "--format-patch", str(tmp_path / "mails"))
    clone = tmp_path / "clone"
    git(bench.root, "clone", "--quiet", ".", str(clone))
    git(clone, "am", "--quiet", "--keep-cr", *sorted(map(str, (tmp_path / "mails").iterdir())))
    found["mails"] = {path: (clone / path).read_bytes() for path in FILES}
    assert git(bench.root, "status", "--porcelain") == ""
    in_place = codeherd("apply", "--in-place")
    found["in place"] = {path: (bench.root / path).read_bytes() for path in FILES}

    assert CARRIED in printed.stderr
    assert CARRIED in in_place.stderr
    header = "def first(a, b):\n"
    expected = before.replace(header, f'{header}    """{text}"""\n').encode()
    assert {way: files["one.py"] for way, files in found.items()} == dict.fromkeys(found, expected)
    two = found["stdout"]["two.py"]
    assert two.startswith(b'# Mine.\r\ndef fourth(x):\r\n    """')
    assert two.count(b"\r\n") == two.count(b"\n") == 4
    assert all(files == found["stdout"] for files in found.values())
    assert git(bench.root, "rev-parse", "HEAD") == head
    # Again, when they are there: not a byte more, and nothing was ever asked.
    again = codeherd("apply", "--in-place")
    assert again.status == 0
    assert {path: (bench.root / path).read_bytes() for path in FILES} == found["stdout"]
    commit(bench.root)
    assert codeherd("apply").stdout == b""
    assert len(bench.ran) == asked


def test_a_new_run_asks_for_what_was_not_carried_over_alone(codeherd: CommandLine, bench: Bench) -> None:
    codeherd("docstrings", str(bench.root))
    other_one(bench.root)
    codeherd("apply", "--in-place")
    commit(bench.root)
    [run] = bench.rows.list()

    codeherd("docstrings", str(bench.root), "--in-place")

    newest = bench.rows.list()[0]
    files = bench.rows.files(newest.id, states=list(FileState))
    names = [target.name for file in files for target in bench.rows.targets(file.id)]
    assert names == ["zeroth", "Second", "Second.third"]
    assert text_of(bench, run, "first") in (bench.root / "one.py").read_text()


def test_an_edit_that_is_not_committed_leaves_a_file_alone_until_it_is(
    codeherd: CommandLine, bench: Bench
) -> None:
    codeherd("docstrings", str(bench.root))
    other = OTHER_ONE.encode()
    (bench.root / "one.py").write_bytes(other)

    for place in ((), ("--branch", "texts"), ("--in-place",)):
        done = codeherd("apply", *place)
        assert done.status == 0
        assert (
            "one.py was changed since it was planned, and is left alone: has changes that are not committed"
            in done.stderr
        )
        assert (bench.root / "one.py").read_bytes() == other
        assert b"one.py" not in done.stdout
    assert git(bench.root, "diff", "--name-only", "main", "texts").split() == ["two.py"]
    commit(bench.root)
    assert b"a/one.py" in codeherd("apply").stdout


def test_with_allow_dirty_an_edit_that_is_not_committed_is_carried_over_too(
    codeherd: CommandLine, bench: Bench
) -> None:
    codeherd("docstrings", str(bench.root), "--allow-dirty")
    (bench.root / "one.py").write_text(OTHER_ONE)

    done = codeherd("apply")

    assert "one.py was changed since it was planned: 1 docstring carried over, 2 left" in done.stderr
    git(bench.root, "apply", "--check", given=done.stdout)
    # The branch begins at the commit, which is another.
    on_branch = codeherd("apply", "--branch", "texts")
    assert "one.py is another one on the branch, and is left alone" in on_branch.stderr


def test_outside_of_a_repository_every_edit_is_carried_over(
    codeherd: CommandLine, bench: Bench, tmp_path: Path
) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "one.py").write_text(FILES["one.py"])
    codeherd("docstrings", str(folder))
    (folder / "one.py").write_text(OTHER_ONE)

    done = codeherd("apply", "--in-place")

    assert "1 docstring carried over, 2 left (2 changed)" in done.stderr
    assert (folder / "one.py").read_text().count('"""') == 2


def test_a_branch_with_the_old_file_keeps_it(codeherd: CommandLine, bench: Bench) -> None:
    codeherd("docstrings", str(bench.root), "--branch", "texts")
    tip = git(bench.root, "rev-parse", "texts")
    other_one(bench.root)

    old = codeherd("apply", "--branch", "texts")
    new = codeherd("apply", "--branch", "anew")

    assert "one.py is another one on the branch, and is left alone" in old.stderr
    assert git(bench.root, "rev-parse", "texts") == tip
    assert "2 commits on anew" in new.stderr


def test_a_killed_hand_over_is_repeated_without_a_second_docstring(
    codeherd: CommandLine, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    codeherd("docstrings", str(bench.root))
    other_one(bench.root)
    expected = patched(bench.root, codeherd("apply").stdout)

    def killed(_rows: Backfills, _file: int, _state: FileState) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Backfills, "set_file_state", killed)
        assert codeherd("apply", "--in-place").status == ExitCode.INTERRUPTED
    assert (bench.root / "one.py").read_bytes() == expected["one.py"]
    commit(bench.root)

    assert codeherd("apply", "--in-place").status == 0

    assert {path: (bench.root / path).read_bytes() for path in FILES} == expected


# Commits by owner.


def test_commits_may_be_by_owner_and_no_longer_than_wanted(codeherd: CommandLine, bench: Bench) -> None:
    pkg = bench.root / "pkg"
    pkg.mkdir()
    for name in ("six", "seven", "eight"):
        (pkg / f"{name}.py").write_text(f"def {name}(y):\n    return y\n")
    (bench.root / ".github").mkdir()
    (bench.root / ".github" / "CODEOWNERS").write_text("/pkg/ @team/pkg @ada # both\n/one.py @ada\n/two.py\n")
    commit(bench.root)

    done = codeherd("docstrings", str(bench.root), "--branch", "texts", "--commit", "per-owner")
    part = codeherd("apply", "--branch", "part", "--commit", "per-owner", "--max-lines", "2")

    assert (done.status, part.status) == (0, 0)
    assert git(bench.root, "log", "--reverse", "--format=%s", "main..texts").splitlines() == [
        "Add docstrings for @ada",
        "Add docstrings for @ada, @team/pkg",
        "Add docstrings to files without an owner",
    ]
    changed = git(bench.root, "diff", "--name-only", "texts~2", "texts~1").split()
    assert changed == ["pkg/eight.py", "pkg/seven.py", "pkg/six.py"]
    assert git(bench.root, "log", "--reverse", "--format=%s", "main..part").splitlines() == [
        "Add docstrings for @ada",
        "Add docstrings for @ada, @team/pkg (1 of 2)",
        "Add docstrings for @ada, @team/pkg (2 of 2)",
        "Add docstrings to files without an owner",
    ]


def test_commits_by_owner_need_a_file_that_names_them_before_anything_is_asked(
    codeherd: CommandLine, bench: Bench
) -> None:
    by_owner = ("--branch", "texts", "--commit", "per-owner")

    done = codeherd("docstrings", str(bench.root / "sub"), *by_owner)

    assert done.status == ExitCode.USAGE
    assert "has no CODEOWNERS file" in done.stderr
    assert "--commit per-dir" in done.stderr
    assert (bench.rows.list(), bench.ran) == ([], [])


# Going on.


def test_a_budget_stops_a_run_and_resume_gives_the_same_patch(codeherd: CommandLine, bench: Bench) -> None:
    whole = codeherd("docstrings", str(bench.root)).stdout

    part = codeherd("docstrings", str(bench.root), "--no-cache", "--budget-jobs", "1", "--json").document
    rest = codeherd("resume", "--json").document["run"]

    assert part["run"]["state"] == RunState.STOPPED
    assert (rest["id"], rest["state"]) == (part["run"]["id"], RunState.DONE)
    assert rest["symbols"] == {"open": 0, "accepted": TARGETS, "rejected": 0}
    assert patched(bench.root, codeherd("apply").stdout).keys() == patched(bench.root, whole).keys()
    older = bench.rows.list()[1].id
    assert codeherd("resume", older).stdout == whole


@pytest.mark.parametrize("budget", [("--budget-jobs", "1"), ("--budget-time", "0.001")])
def test_a_used_up_budget_says_how_to_go_on(
    codeherd: CommandLine, bench: Bench, budget: tuple[str, str]
) -> None:
    done = codeherd("docstrings", str(bench.root), *budget)

    [run] = bench.rows.list()
    assert f"the budget is used up; `codeherd backfill resume {run.id}` goes on" in done.stderr


def test_a_run_that_was_interrupted_while_it_was_planned_is_planned_to_the_end(
    codeherd: CommandLine, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(60):
        (bench.root / f"more_{number:02}.py").write_text(f"def more_{number}(x):\n    return x\n")
    commit(bench.root)

    def pressed(_meter: Meter, _files: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Meter, "planned", pressed)
        stopped = codeherd("docstrings", str(bench.root))
    [run] = bench.rows.list()

    assert stopped.status == ExitCode.INTERRUPTED
    assert f"`codeherd backfill resume {run.id}` takes it up" in stopped.stderr
    assert sum(bench.rows.progress(run.id).files.values()) < 60
    resumed = codeherd("resume")
    assert resumed.status == 0
    assert resumed.stdout.count(b"diff --git") == 62


def test_a_run_that_is_done_ended_when_it_did_however_often_it_is_resumed(
    codeherd: CommandLine, bench: Bench
) -> None:
    done = codeherd("docstrings", str(bench.root), "--json").document["run"]

    resumed = codeherd("resume", "--json").document["run"]

    assert done["finished_at"] is not None
    assert resumed == done


def test_a_run_with_json_says_how_it_ended_and_no_patch(codeherd: CommandLine, bench: Bench) -> None:
    document = codeherd("docstrings", str(bench.root), "--json").document

    assert document["run"]["state"] == "done"
    assert document["run"]["questions"] == {"asked": TARGETS, "answered": TARGETS}
    in_place = codeherd("resume", "--json", "--in-place").document
    assert in_place["run"]["files"]["applied"] == 2
    assert documented(bench.root) == 2 + TARGETS


# Looking.


def test_runs_and_status_tell_how_far_a_run_is(codeherd: CommandLine, bench: Bench) -> None:
    bench.source = hopeless
    codeherd("docstrings", str(bench.root))
    [run] = bench.rows.list()

    [row] = codeherd("runs").rows
    [document] = codeherd("runs", "--json").document["runs"]
    status = dict(codeherd("status", run.id[:12]).rows)
    status_document = codeherd("status", "--json").document

    assert row == [run.id, "done", "tiny", str(TARGETS), "0", str(TARGETS), str(bench.root)]
    assert document == status_document["run"]
    assert document["symbols"] == {"open": 0, "accepted": 0, "rejected": TARGETS}
    assert status["symbols rejected"] == status["rejected: placeholder"] == str(TARGETS)
    assert status["state"] == "done"
    assert status_document["rejected"] == {"placeholder": TARGETS}
    assert sum(status_document["skipped_files"].values()) == 1
    assert status_document["files_asked"] == []


def test_status_names_the_files_under_way(codeherd: CommandLine, bench: Bench) -> None:
    codeherd("docstrings", str(bench.root), "--budget-jobs", "1", "--json")

    document = codeherd("status", "--json").document

    asked = [file["path"] for file in document["files_asked"]]
    assert len(asked) == document["run"]["files"]["asked"] > 0
    assert [row[0] for row in codeherd("status").rows if row[0].startswith("asked: ")] == [
        f"asked: {path}" for path in asked
    ]


def test_show_prints_every_text_and_why_it_was_not_taken(codeherd: CommandLine, bench: Bench) -> None:
    bench.source = fine_when_sampled
    codeherd("docstrings", str(bench.root))

    words = codeherd("show", "Second.third").text
    [symbol] = codeherd("show", "third", "--json").document["symbols"]

    assert words.startswith("one.py:6 Second.third: accepted\n--- exchange 0, seed 0: placeholder\n")
    assert (symbol["path"], symbol["name"], symbol["state"]) == ("one.py", "Second.third", "accepted")
    assert symbol["candidates"][0]["reason"] == "placeholder"
    assert symbol["text"] in [one["text"] for one in symbol["candidates"]]
    unknown = codeherd("show", "fourteenth")
    assert (unknown.status, unknown.stdout) == (ExitCode.NOT_FOUND, b"")


def test_a_report_has_four_forms(codeherd: CommandLine, bench: Bench) -> None:
    codeherd("docstrings", str(bench.root))
    (bench.root / "two.py").write_bytes(b"def other(): ...\n")
    codeherd("apply", "--in-place")

    forms = {form: codeherd("report", "--format", form) for form in ("markdown", "json", "sarif", "rdjson")}

    assert {done.status for done in forms.values()} == {0}
    assert codeherd("report").stdout == forms["markdown"].stdout
    assert "one.py" in forms["markdown"].text
    symbols = {one["name"]: one for one in json.loads(forms["json"].stdout)["symbols"]}
    assert symbols["first"]["status"] == "accepted"
    assert symbols["first"]["text"] in forms["markdown"].text
    # What was accepted for a file that is another one now is no docstring of anything.
    assert symbols["fourth"]["status"] == "skipped"
    assert (symbols["fourth"].get("text"), symbols["fourth"].get("score")) == (None, None)
    assert len(json.loads(forms["sarif"].stdout)["runs"][0]["results"]) == TARGETS
    assert len(json.loads(forms["rdjson"].stdout)["diagnostics"]) == TARGETS


def test_a_deleted_run_is_gone_and_the_older_one_is_the_newest(codeherd: CommandLine, bench: Bench) -> None:
    codeherd("docstrings", str(bench.root))
    codeherd("docstrings", str(bench.root))
    newest, older = bench.rows.list()

    assert codeherd("delete", newest.id).status == 0

    assert codeherd("status", newest.id).status == ExitCode.NOT_FOUND
    assert codeherd("status", "--json").document["run"]["id"] == older.id


# Measuring.


def test_check_fails_below_the_share_that_is_wanted(codeherd: CommandLine, root: Path) -> None:
    (root / "broken.py").unlink()

    enough, little = codeherd("check", str(root), "--min", "20"), codeherd("check", str(root), "--min", "80")
    document = codeherd("check", str(root), "--json").document

    assert (enough.status, little.status) == (ExitCode.OK, ExitCode.GATE)
    assert (document["covered"], document["total"], document["met"]) == (2, 8, True)
    assert "25.0 % is documented, 80 % is wanted" in little.stderr
    assert codeherd("docstrings", str(root), "--check", "--min", "80").status == ExitCode.GATE
    [row, _] = [row for row in codeherd("check", str(root), "-v").rows if row[0] in ("one.py", "two.py")]
    assert row[:3] == ["one.py", "4", "4"]


def test_check_leaves_out_what_its_flags_name_and_lists_what_it_cannot_read(
    codeherd: CommandLine, root: Path
) -> None:
    done = codeherd("check", str(root), "-M", "-r", "^f", "--min", "100", "-v")

    assert done.status == ExitCode.GATE
    assert done.rows[-1][:3] == ["total", "2", "2"]
    assert "left out: broken.py" in done.stderr


def test_check_takes_the_projects_settings_of_interrogate(codeherd: CommandLine, root: Path) -> None:
    (root / "pyproject.toml").write_text("[tool.interrogate]\nfail-under = 60\nignore-module = true\n")

    as_set = codeherd("check", str(root), "--json")
    overridden = codeherd("check", str(root), "--json", "--min", "10")

    assert (as_set.status, overridden.status) == (ExitCode.GATE, ExitCode.OK)
    assert (as_set.document["total"], as_set.document["min"]) == (5, 60)


def test_a_ratchet_starts_holds_and_fails_when_coverage_fell(codeherd: CommandLine, root: Path) -> None:
    held = ("check", str(root), "--ratchet", "ratchet.json", "--json")

    verdicts = [codeherd(*held).document["ratchet"] for _ in range(2)]
    (root / "sub" / "three.py").write_text("def fifth():\n    return 5\n\n\ndef sixth():\n    return 6\n")
    fell = codeherd(*held)

    assert verdicts == ["started", "held"]
    assert (fell.status, fell.document["ratchet"], fell.document["met"]) == (ExitCode.GATE, "fell", False)
    words = codeherd("check", str(root), "--ratchet", "ratchet.json")
    assert words.status == ExitCode.GATE
    assert "sub/three.py: 3 missing, 0 before" in words.stderr


def test_a_ratchets_file_that_is_made_or_written_anew_is_told_in_a_line(
    codeherd: CommandLine, root: Path
) -> None:
    (root / "broken.py").unlink()
    held = ("check", str(root), "--ratchet", "ratchet.json")

    made, kept = codeherd(*held), codeherd(*held)
    (root / "two.py").write_text('def fourth(x):\n    """Say four."""\n    return x\n')
    written, as_json = codeherd(*held), codeherd(*held, "--json")

    assert made.stderr == "there was no ratchet.json; it is made now: 2 of 8 documented\n"
    assert (kept.stderr, as_json.stderr) == ("", "")
    assert written.stderr == "ratchet.json is written anew: 3 of 8 documented, 2 of 8 before\n"
    Path("ratchet.json").unlink()
    assert (
        codeherd(*held, "--json").stderr == "there was no ratchet.json; it is made now: 3 of 8 documented\n"
    )


@pytest.mark.parametrize(
    "arguments", [("-r", "("), ("-w", "("), ("--ratchet", "no/such/folder/ratchet.json"), ("--min", "101")]
)
def test_check_refuses_what_cannot_be_meant(
    codeherd: CommandLine, root: Path, arguments: tuple[str, ...]
) -> None:
    assert codeherd("check", str(root), *arguments).status == ExitCode.USAGE


def test_eval_asks_for_held_back_docstrings_and_tells_how_near_the_texts_come(
    codeherd: CommandLine, bench: Bench
) -> None:
    for number in range(4):
        (bench.root / f"old_{number}.py").write_text(
            f'def old_{number}(x):\n    """Return the older value {number} of a row."""\n    return x\n'
        )

    words = codeherd("eval", str(bench.root), "--count", "4")
    document = codeherd("eval", str(bench.root), "--count", "4", "--form", "paper", "--json").document

    assert (words.status, words.stderr) == (0, "")
    assert "tiny" in words.text or "model" in words.text
    assert document["evaluation"]
    assert len(bench.ran) == 8
    assert bench.rows.list() == []
    (bench.root / "pyproject.toml").write_text(
        "[tool.interrogate]\nexclude = ['old_0.py', 'old_1.py', 'sub']\n"
    )
    codeherd("eval", str(bench.root), "--no-cache")
    assert len(bench.ran) == 8 + 2


def test_eval_of_code_without_docstrings_has_nothing_to_tell(codeherd: CommandLine, bench: Bench) -> None:
    (bench.root / "sub" / "three.py").unlink()

    done = codeherd("eval", str(bench.root))

    assert (done.status, done.stdout) == (ExitCode.USAGE, b"")
    assert bench.ran == []


# Documents.


def test_every_json_document_is_as_docs_cli_md_describes_it(codeherd: CommandLine, bench: Bench) -> None:
    told = Documents()
    (bench.root / "old.py").write_text(
        'def old(x):\n    """Return the older value of a row."""\n    return x\n'
    )
    commit(bench.root)
    root = str(bench.root)

    def document(*arguments: str) -> Any:
        return codeherd(*arguments).document

    found = {
        "docstrings --dry-run": document("docstrings", root, "--dry-run", "--json"),
        "docstrings": document("docstrings", root, "--budget-jobs", "1", "--json"),
        # While a file is asked.
        "status": document("status", "--json"),
        "resume": document("resume", "--json"),
        "runs": document("runs", "--json"),
        "show": document("show", "first", "--json"),
        "check": document("check", root, "--json"),
        "docstrings --check": document("docstrings", root, "--check", "--json"),
        "eval": document("eval", root, "--json"),
    }
    # A symbol that is left for a human.
    bench.source = hopeless
    document("docstrings", root, "--no-cache", "--json")
    found["report --format json"] = document("report", "--format", "json")

    assert {f"backfill {name}" for name in found} == {
        command for command in told.commands if command.startswith("backfill ")
    }
    faults = {name: told.faults(f"backfill {name}", one) for name, one in found.items()}
    assert faults == {name: [] for name in found}


def test_every_verb_that_writes_json_is_in_docs_cli_md_and_every_option_has_help() -> None:
    told = Documents().commands
    for name, verb in backfill.commands.items():
        options = [one for one in verb.params if isinstance(one, click.Option)]

        assert [one.name for one in options if not one.help] == []
        if any(one.name == "as_json" for one in options):
            assert f"backfill {name}" in told


# What the project says.


def test_the_projects_settings_hold_unless_the_command_line_says_otherwise(
    codeherd: CommandLine, bench: Bench
) -> None:
    (bench.root / "pyproject.toml").write_text(
        "[tool.ruff]\nline-length = 60\n[tool.ruff.lint.pydocstyle]\nconvention = 'google'\n"
        "[tool.interrogate]\nignore-module = false\nignore-init-method = true\n"
    )
    commit(bench.root)

    codeherd("docstrings", str(bench.root), "--budget-jobs", "1")
    codeherd(
        *("docstrings", str(bench.root), "--budget-jobs", "1", "--convention", "numpy", "--width", "70"),
        *("--no-module", "--init-method", "--private"),
    )

    theirs, ours = (run.options for run in reversed(bench.rows.list()))
    assert (theirs["convention"], theirs["width"]) == ("google", 60)
    assert (ours["convention"], ours["width"]) == ("numpy", 70)
    assert [theirs["kinds"][name] for name in ("modules", "init", "private")] == [True, False, False]
    assert [ours["kinds"][name] for name in ("modules", "init", "private")] == [False, True, True]


def test_a_kind_that_is_named_is_planned(codeherd: CommandLine, root: Path, database_url: str) -> None:
    def targets(*arguments: str) -> int:
        return int(codeherd("docstrings", str(root), "--dry-run", "--json", *arguments).document["targets"])

    assert targets("--module") == TARGETS + 2
    assert targets("--everything") == TARGETS + 2
    assert targets("--everything", "--no-module") == TARGETS
    assert targets("--name", "Second") == 2
    assert targets("--no-name", "Second") == TARGETS - 2
    assert targets("--include", "two.py") == 1
    assert targets("--exclude", "one.py") == 1


# What is wrong.


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("-m", "codellama-34b"), "unsupported_by_model"),
        (("-m", "no-such-model"), "model_not_found"),
        (("--name", "("), "invalid_request"),
        (("--in-place", "--branch", "x"), "usage"),
        (("--patches", "x", "--format-patch", "y"), "usage"),
        (("--commit", "single"), "usage"),
        (("--in-place", "--commit-prefix", "docs: "), "usage"),
        (("--max-lines", "9"), "usage"),
        (("--commit", "per-owner", "--branch", "x"), "no_owners_file"),
        (("--min", "80"), "usage"),
        (("--python", "/bin/false"), "interpreter_failed"),
        (("--python", "/no/such/python"), "interpreter_failed"),
        (("--changed-since", "nowhere"), "git_failed"),
        (("--width", "3"), "usage"),
    ],
)
def test_wrong_use_is_told_before_a_run_is_made(
    codeherd: CommandLine, root: Path, database_url: str, arguments: tuple[str, ...], code: str
) -> None:
    done = codeherd("docstrings", str(root), *arguments, "--json")

    assert done.status == ExitCode.USAGE
    assert done.document["error"]["code"] == code
    assert no_runs(database_url)


def test_a_folder_that_is_not_there_is_wrong_use(codeherd: CommandLine, database_url: str) -> None:
    for verb in ("docstrings", "check", "eval"):
        done = codeherd(verb, "no-such-folder")
        assert (done.status, "does not exist" in done.stderr) == (ExitCode.USAGE, True)


@pytest.mark.parametrize("verb", ["resume", "apply", "status", "report", "delete"])
def test_a_run_that_nobody_knows_is_status_4(codeherd: CommandLine, database_url: str, verb: str) -> None:
    for run in (UNKNOWN, "0190"):
        done = codeherd(verb, run)
        assert (done.status, done.stdout) == (ExitCode.NOT_FOUND, b"")
        assert "[run_not_found]" in done.stderr


def test_no_run_yet_is_status_4_and_two_that_begin_alike_must_be_told_apart(
    codeherd: CommandLine, bench: Bench
) -> None:
    assert codeherd("status").status == ExitCode.NOT_FOUND
    runs = [bench.create() for _ in range(2)]

    done = codeherd("status", runs[0].id[:2])

    assert done.status == ExitCode.NOT_FOUND
    assert "2 runs have an id like" in done.stderr


@pytest.mark.parametrize("extra", [(), ("--dry-run",)])
def test_a_folder_that_git_ignores_is_no_success(
    codeherd: CommandLine, root: Path, database_url: str, extra: tuple[str, ...]
) -> None:
    (root / ".gitignore").write_text("build/\n")
    (root / "build").mkdir()
    (root / "build" / "made.py").write_text("def made():\n    return 1\n")

    done = codeherd("docstrings", str(root / "build"), *extra)

    assert done.status == ExitCode.USAGE
    assert "no Python files that git knows of" in done.stderr
    assert no_runs(database_url)


def test_a_folder_without_python_is_no_success(
    codeherd: CommandLine, tmp_path: Path, database_url: str
) -> None:
    (tmp_path / "empty").mkdir()

    done = codeherd("docstrings", str(tmp_path / "empty"))

    assert (done.status, "no Python files below" in done.stderr) == (ExitCode.USAGE, True)


@pytest.mark.parametrize("place", [("--branch", "texts"), ("--format-patch", "mails")])
def test_commits_outside_of_a_repository_are_refused_before_anything_is_asked(
    codeherd: CommandLine, bench: Bench, tmp_path: Path, place: tuple[str, str]
) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "one.py").write_text(FILES["one.py"])
    unborn = tmp_path / "unborn"
    git(tmp_path, "init", "--quiet", str(unborn))
    (unborn / "one.py").write_text(FILES["one.py"])

    outside = codeherd("docstrings", str(folder), *place)
    without_commit = codeherd("docstrings", str(unborn), "--allow-dirty", *place)

    assert (outside.status, without_commit.status) == (ExitCode.USAGE, ExitCode.USAGE)
    assert "is in no git repository" in outside.stderr
    assert "has no commit" in without_commit.stderr
    assert (bench.rows.list(), bench.ran) == ([], [])
    assert codeherd("docstrings", str(folder)).stdout.count(b"diff --git") == 1


def test_a_hook_that_refuses_is_told_with_its_words_and_the_run_can_be_repeated(
    codeherd: CommandLine, bench: Bench
) -> None:
    hook = bench.root / ".git" / "hooks" / "pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(
        "#!/bin/sh\ngit diff --cached --name-only | grep -q two && echo not two >&2 && exit 1\nexit 0\n"
    )
    hook.chmod(0o755)

    refused = codeherd("docstrings", str(bench.root), "--branch", "texts")

    assert refused.status == ExitCode.USAGE
    assert "Add docstrings to two.py: " in refused.stderr
    assert "[commit_refused]" in refused.stderr
    assert "not two" in refused.stderr
    assert git(bench.root, "log", "--format=%s", "main..texts") == "Add docstrings to one.py\n"
    assert git(bench.root, "status", "--porcelain") == ""
    assert bench.states(bench.rows.list()[0])["two.py"] is FileState.DONE
    hook.unlink()
    asked = len(bench.ran)
    assert codeherd("apply", "--branch", "texts").status == 0
    assert git(bench.root, "log", "--format=%s", "main..texts").splitlines() == [
        "Add docstrings to two.py",
        "Add docstrings to one.py",
    ]
    assert len(bench.ran) == asked


def test_a_refused_commit_leaves_one_document_on_stdout(codeherd: CommandLine, bench: Bench) -> None:
    hook = bench.root / ".git" / "hooks" / "pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)

    done = codeherd("docstrings", str(bench.root), "--branch", "texts", "--json")

    assert done.document["error"]["code"] == "commit_refused"


def test_a_file_with_changes_that_are_not_committed_is_left_alone_unless_wanted(
    codeherd: CommandLine, bench: Bench
) -> None:
    (bench.root / "one.py").write_text(FILES["one.py"] + "\n# mine\n")

    left, taken = (codeherd("docstrings", str(bench.root), *more) for more in ((), ("--allow-dirty",)))

    assert (b"one.py" in left.stdout, b"two.py" in left.stdout) == (False, True)
    assert b"a/one.py" in taken.stdout
    git(bench.root, "apply", "--check", given=taken.stdout)
    on_branch = codeherd("apply", "--branch", "texts")
    assert "one.py is another one on the branch, and is left alone" in on_branch.stderr


def test_a_file_that_changes_between_plan_and_patch_is_left_alone_until_it_is_back(
    codeherd: CommandLine, bench: Bench
) -> None:
    whole = codeherd("docstrings", str(bench.root)).stdout
    before = (bench.root / "two.py").read_bytes()
    (bench.root / "two.py").write_bytes(b"def fourth(x):\n    return x + 1\n")

    part = codeherd("apply")

    assert part.status == 0
    assert b"two.py" not in part.stdout
    assert "two.py was changed since it was planned, and is left alone" in part.stderr
    git(bench.root, "apply", "--check", given=part.stdout)
    (bench.root / "two.py").write_bytes(before)
    assert codeherd("apply").stdout == whole


def test_a_file_that_is_gone_is_left_alone(codeherd: CommandLine, bench: Bench) -> None:
    codeherd("docstrings", str(bench.root))
    (bench.root / "two.py").unlink()

    done = codeherd("apply", "--in-place")

    assert done.status == 0
    assert "two.py was changed since it was planned, and is left alone" in done.stderr
    assert not (bench.root / "two.py").exists()


def test_newer_syntax_is_documented_by_the_interpreter_that_knows_it(
    codeherd: CommandLine, bench: Bench, newer_python: Path
) -> None:
    (bench.root / "new.py").write_text("newtype X = int\n\n\ndef eighth(x):\n    return x\n")
    commit(bench.root)
    with_python = ("--python", str(newer_python), "--include", "new.py")

    without = codeherd("docstrings", str(bench.root), "--include", "new.py")
    done = codeherd("docstrings", str(bench.root), *with_python)

    assert (without.status, without.stdout) == (0, b"")
    assert done.status == 0
    git(bench.root, "apply", given=done.stdout)
    assert (bench.root / "new.py").read_text().count('"""') == 2
    commit(bench.root)
    assert codeherd("docstrings", str(bench.root), *with_python).stdout == b""


def test_newer_syntax_is_counted_by_the_interpreter_that_knows_it(
    codeherd: CommandLine, root: Path, newer_python: Path
) -> None:
    (root / "new.py").write_text('newtype X = int\n\n\ndef eighth(x):\n    """Return it."""\n    return x\n')
    measure = ("check", str(root), "--json")

    without = codeherd(*measure).document
    found = codeherd(*measure, "--python", str(newer_python)).document

    assert {one["path"] for one in without["skipped"]} == {"broken.py", "new.py"}
    assert [one["path"] for one in found["skipped"]] == ["broken.py"]
    assert [one for one in found["files"] if one not in without["files"]] == [
        {"path": "new.py", "total": 2, "covered": 1}
    ]
    assert len(found["files"]) == len(without["files"]) + 1
    by_option = codeherd("docstrings", str(root), "--check", "--json", "--python", str(newer_python))
    assert by_option.document == found


def test_docstrings_of_newer_syntax_are_held_back_by_the_interpreter_that_knows_it(
    codeherd: CommandLine, bench: Bench, newer_python: Path
) -> None:
    (bench.root / "sub" / "three.py").unlink()
    (bench.root / "new.py").write_text(
        'newtype X = int\n\n\ndef eighth(x):\n    """Return the very same thing."""\n    return x\n'
    )
    commit(bench.root)
    ask = ("eval", str(bench.root), "--json", "--python", str(newer_python))

    without = codeherd("eval", str(bench.root))
    found = codeherd(*ask).document["evaluation"]

    assert (without.status, "no docstring that could be held back" in without.stderr) == (
        ExitCode.USAGE,
        True,
    )
    assert (found["cases"], found["files"], found["unread_files"]) == (1, 1, 1)
    [job_id] = bench.ran
    request = bench.client.row(job_id).request
    assert isinstance(request, InfillRequest)
    assert request.prefix.endswith('def eighth(x):\n    """')
    assert request.suffix.startswith('"""\n    return x\n')


@pytest.mark.parametrize("verb", ["check", "eval"])
def test_what_is_no_interpreter_is_told_before_anything_is_read(
    codeherd: CommandLine, root: Path, database_url: str, verb: str
) -> None:
    done = codeherd(verb, str(root), "--json", "--python", "/no/such/python")

    assert done.status == ExitCode.USAGE
    assert done.document["error"]["code"] == "interpreter_failed"
