from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeherd_producer.backfill.commits import (
    Change,
    Group,
    Grouping,
    Made,
    blame_ignore_lines,
    branch,
    grouped,
    message,
)
from codeherd_producer.backfill.git import Git, GitFailed
from codeherd_producer.backfill.worktree import CommitRefused

BEFORE = b"def f():\n    pass\n"
AFTER = b'def f():\n    """Do it."""\n    pass\n'
TEXT = message(Group("Add docstrings", ("a.py",)), run="r1", model="code-llama-7b", docstrings=2)


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test the same user, and none of the machine's settings."""
    settings = tmp_path / "gitconfig"
    settings.write_text(
        "[user]\n\tname = Ada\n\temail = ada@example.org\n[init]\n\tdefaultBranch = main\n"
        # Of the tests' own clones of submodules.
        '[protocol "file"]\n\tallow = always\n'
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)


def git(folder: Path, *arguments: str, given: bytes | None = None) -> bytes:
    done = subprocess.run(["git", *arguments], cwd=folder, input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def said(folder: Path, *arguments: str) -> str:
    return git(folder, *arguments).decode().strip()


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def made(folder: Path) -> Path:
    """Make a repository of three files."""
    git(folder.parent, "init", "--quiet", str(folder))
    put(folder, {"a.py": BEFORE, "pkg/b.py": BEFORE, "pkg/sub/c.py": BEFORE, "notes.txt": b"notes\n"})
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "first")
    return folder


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository in the middle of its user's work: staged, unstaged, untracked and stashed changes."""
    folder = made(tmp_path / "repository")
    put(folder, {"notes.txt": b"set aside\n"})
    git(folder, "stash")
    put(folder, {"notes.txt": b"staged\n", "staged.py": b"x = 1\n"})
    git(folder, "add", ".")
    put(
        folder, {"notes.txt": b"unstaged\n", "untracked.py": b"y = 1\n", "pkg/sub/c.py": BEFORE + b"# mine\n"}
    )
    return folder


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    folder = tmp_path / "beside"
    folder.mkdir()
    return folder


def state(folder: Path, ours: str = "docs") -> dict[str, tuple[int, bytes]]:
    """Return every file of a repository and its git folder, but for objects and our own branch."""
    theirs = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.startswith(".git/objects/") or name.endswith(f"/refs/heads/{ours}"):
            continue
        facts = path.lstat()
        theirs[name] = (facts.st_mode, path.read_bytes() if path.is_file() else b"")
        if path.is_file():
            theirs[f"{name} written"] = (facts.st_mtime_ns, b"")
    return theirs


@pytest.fixture
def _untouched(repository: Path, beside: Path) -> Iterator[None]:
    before = state(repository)
    yield
    after = state(repository)
    assert after.keys() == before.keys()
    assert [name for name in before if before[name] != after[name]] == []
    assert list(beside.iterdir()) == []


untouched = pytest.mark.usefixtures("_untouched")


def change(path: str, before: bytes = BEFORE, after: bytes = AFTER) -> Change:
    return Change(path, before, after)


def lent(repository: Path) -> Git:
    found = Git.of(repository)
    assert found is not None
    return found


def hook(repository: Path, name: str, script: str) -> None:
    path = repository / ".git" / "hooks" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@untouched
def test_commits_are_on_the_branch_and_the_users_things_are_as_they_were(
    repository: Path, beside: Path
) -> None:
    with branch(lent(repository), "docs", within=beside) as docs:
        first = docs.commit([change("a.py")], TEXT)
        second = docs.commit([change("pkg/b.py")], TEXT)

    assert first == Made(said(repository, "rev-parse", "docs~1"), ("a.py",), (), (), ())
    assert second.commit == said(repository, "rev-parse", "docs")
    assert said(repository, "rev-parse", "docs~2") == said(repository, "rev-parse", "main")
    assert git(repository, "show", "docs:a.py") == AFTER
    assert git(repository, "show", "docs:pkg/b.py") == AFTER
    assert said(repository, "diff", "--name-only", "main", "docs").split() == ["a.py", "pkg/b.py"]
    assert said(repository, "log", "-1", "--format=%an <%ae> %cn", "docs") == "Ada <ada@example.org> Ada"
    assert said(repository, "fsck", "--no-dangling") == ""


def test_the_message_says_where_the_texts_come_from(repository: Path) -> None:
    with branch(lent(repository), "docs") as docs:
        docs.commit([change("a.py")], TEXT)

    text = git(repository, "log", "-1", "--format=%B", "docs")
    assert text.decode().split("\n")[:3] == [
        "Add docstrings",
        "",
        "2 docstrings in 1 file, written by a model. Nothing but docstrings was added.",
    ]
    trailers = git(repository, "interpret-trailers", "--parse", given=text).decode()
    assert trailers == "Backfill-Run: r1\nBackfill-Model: code-llama-7b\n"


def test_messages_are_read_as_they_were_written_whatever_the_users_encoding(repository: Path) -> None:
    git(repository, "config", "i18n.commitEncoding", "ISO-8859-1")

    with branch(lent(repository), "docs") as docs:
        docs.commit([change("a.py")], TEXT.replace("Add", "Déjà: add"))

    shown = said(repository, "log", "-1", "--encoding=UTF-8", "--format=%s", "docs")
    assert shown == "Déjà: add docstrings"


@pytest.mark.parametrize(
    "name",
    ["with space.py", "*.py", ":(top)x.py", "zwei\nzeilen.py", "déjà.py", "\udce9.py", "-x.py", '"q".py'],
)
def test_odd_names_are_committed_literally(tmp_path: Path, name: str) -> None:
    folder = made(tmp_path / "repository")
    paths = (name, f"sub/{name}")
    put(folder, dict.fromkeys(paths, BEFORE))
    (folder / name).chmod(0o755)
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "odd")
    before = state(folder)

    with branch(lent(folder), "docs") as docs:
        result = docs.commit([change(path) for path in paths], TEXT)
        again = docs.commit([change(path) for path in paths], TEXT)

    assert result.committed == again.known == paths
    changed = git(folder, "diff", "--name-only", "-z", "main", "docs").split(b"\0")
    assert changed == [*sorted(os.fsencode(path) for path in paths), b""]
    assert said(folder, "ls-tree", "-r", "docs").count("100755") == 1
    assert state(folder) == before


@untouched
def test_what_an_earlier_try_committed_is_known(repository: Path, beside: Path) -> None:
    with branch(lent(repository), "docs", within=beside) as docs:
        first = docs.commit([change("a.py")], TEXT)
    with branch(lent(repository), "docs", within=beside) as docs:
        again = docs.commit([change("a.py"), change("pkg/b.py")], TEXT)
        third = docs.commit([change("a.py"), change("pkg/b.py")], TEXT)
        ids = docs.commits("r1")
        others = docs.commits("r2")

    assert (again.known, again.committed) == (("a.py",), ("pkg/b.py",))
    assert third == Made(None, (), ("a.py", "pkg/b.py"), (), ())
    assert ids == [first.commit, again.commit]
    assert others == []


@untouched
def test_a_file_that_is_not_what_was_edited_is_left_alone(repository: Path, beside: Path) -> None:
    mine = BEFORE + b"# mine\n"

    with branch(lent(repository), "docs", within=beside) as docs:
        # Edited with a change that was never committed; not committed at all; no file; now another.
        result = docs.commit(
            [
                change("pkg/sub/c.py", mine),
                change("untracked.py"),
                change("pkg"),
                change("a.py/b.py"),
                change("a.py"),
            ],
            TEXT,
        )

    assert result.changed == ("pkg/sub/c.py", "untracked.py", "pkg", "a.py/b.py")
    assert said(repository, "diff", "--name-only", "main", "docs") == "a.py"


@untouched
def test_a_branch_without_commits_is_not_left_behind(repository: Path, beside: Path) -> None:
    with branch(lent(repository), "docs", within=beside) as docs:
        assert docs.commit([change("none.py")], TEXT).commit is None
        assert docs.commits("r1") == []

    assert said(repository, "for-each-ref", "--format=%(refname)", "refs/heads") == "refs/heads/main"


@untouched
def test_a_branch_that_was_there_is_never_deleted(repository: Path, beside: Path) -> None:
    git(repository, "update-ref", "refs/heads/docs", "main")

    with branch(lent(repository), "docs", within=beside):
        pass

    assert said(repository, "rev-parse", "docs") == said(repository, "rev-parse", "main")


def test_hooks_run_on_the_branch_as_for_the_user(repository: Path, tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    hook(
        repository,
        "pre-commit",
        f'echo "$(git symbolic-ref HEAD) $(git diff --cached --name-only)" >> {heard}',
    )
    hook(repository, "commit-msg", 'echo "Signed-off-by: hook" >> "$1"')

    with branch(lent(repository), "docs") as docs:
        docs.commit([change("a.py")], TEXT)

    assert heard.read_text() == "refs/heads/docs a.py\n"
    assert said(repository, "log", "-1", "--format=%B", "docs").endswith("Signed-off-by: hook")


def test_a_hook_that_fails_ends_it_and_nothing_is_half_done(repository: Path, beside: Path) -> None:
    hook(repository, "pre-commit", "echo 'D100: no docstring'; touch litter; exit 3")
    before = state(repository)

    with pytest.raises(CommitRefused) as refused, branch(lent(repository), "docs", within=beside) as docs:
        docs.commit([change("a.py")], TEXT)

    assert "hook" in refused.value.message
    assert "D100: no docstring" in (refused.value.hint or "")
    assert state(repository) == before
    assert list(beside.iterdir()) == []
    assert said(repository, "branch", "--list", "docs") == ""


def test_after_a_refused_commit_the_branch_takes_others(repository: Path, beside: Path) -> None:
    hook(repository, "pre-commit", "! git diff --cached --name-only | grep -q a.py")
    before = state(repository)

    with branch(lent(repository), "docs", within=beside) as docs:
        with pytest.raises(CommitRefused):
            docs.commit([change("a.py"), change("pkg/b.py")], TEXT)
        result = docs.commit([change("pkg/b.py")], TEXT)

    assert result.committed == ("pkg/b.py",)
    assert said(repository, "diff", "--name-only", "main", "docs") == "pkg/b.py"
    assert state(repository) == before


@pytest.mark.parametrize("is_relative", [True, False])
def test_hooks_in_a_folder_that_is_not_tracked_run_too(repository: Path, is_relative: bool) -> None:
    folder = repository / ".hooks" / "_"
    put(folder, {".gitignore": b"*\n", "pre-commit": b"#!/bin/sh\necho refused by it\nexit 1\n"})
    (folder / "pre-commit").chmod(0o755)
    git(repository, "config", "core.hooksPath", ".hooks/_" if is_relative else str(folder))

    with pytest.raises(CommitRefused) as refused, branch(lent(repository), "docs") as docs:
        docs.commit([change("a.py")], TEXT)

    assert "refused by it" in (refused.value.hint or "")


def test_what_a_hook_alters_is_told(repository: Path) -> None:
    hook(repository, "pre-commit", "echo '# formatted' >> a.py; git add a.py")

    with branch(lent(repository), "docs") as docs:
        result = docs.commit([change("a.py"), change("pkg/b.py")], TEXT)

    assert result.committed == ("a.py", "pkg/b.py")
    assert result.altered == ("a.py",)


def test_a_hook_for_checkouts_that_fails_leaves_nothing(repository: Path, beside: Path) -> None:
    for condition in ("true", "git symbolic-ref -q HEAD"):
        hook(repository, "post-checkout", f"{condition} && exit 1; exit 0")
        before = state(repository)

        with pytest.raises(GitFailed), branch(lent(repository), "docs", within=beside):
            pytest.fail("there is no checkout")

        assert state(repository) == before
        assert list(beside.iterdir()) == []
        assert said(repository, "branch", "--list", "docs") == ""


def test_a_branch_that_somebody_makes_meanwhile_is_theirs(repository: Path) -> None:
    hook(repository, "post-checkout", "git update-ref refs/heads/docs HEAD")

    with pytest.raises(GitFailed), branch(lent(repository), "docs"):
        pytest.fail("it is there already")

    assert said(repository, "rev-parse", "docs") == said(repository, "rev-parse", "main")


def test_a_hook_that_breaks_the_checkout_leaves_no_entry(repository: Path, beside: Path) -> None:
    hook(repository, "pre-commit", "rm .git; exit 1")
    before = state(repository)

    with pytest.raises(CommitRefused), branch(lent(repository), "docs", within=beside) as docs:
        docs.commit([change("a.py")], TEXT)

    assert state(repository) == before
    assert list(beside.iterdir()) == []


def signer(tmp_path: Path, status: int) -> str:
    program = tmp_path / "signer"
    program.write_text(
        "#!/bin/sh\ncat > /dev/null\necho '[GNUPG:] SIG_CREATED ' >&2\n"
        f"echo '-----BEGIN PGP SIGNATURE-----'\necho '-----END PGP SIGNATURE-----'\nexit {status}\n"
    )
    program.chmod(0o755)
    return str(program)


def test_commits_are_signed_if_the_user_signs(repository: Path, tmp_path: Path) -> None:
    git(repository, "config", "commit.gpgSign", "true")
    git(repository, "config", "gpg.program", signer(tmp_path, 0))

    with branch(lent(repository), "docs") as docs:
        docs.commit([change("a.py")], TEXT)

    assert "gpgsig -----BEGIN PGP SIGNATURE-----" in said(repository, "cat-file", "commit", "docs")


def test_without_the_users_signature_there_is_no_commit(repository: Path, tmp_path: Path) -> None:
    git(repository, "config", "commit.gpgSign", "true")
    git(repository, "config", "gpg.program", signer(tmp_path, 1))
    before = state(repository)

    with pytest.raises(CommitRefused), branch(lent(repository), "docs") as docs:
        docs.commit([change("a.py")], TEXT)

    assert state(repository) == before
    assert said(repository, "branch", "--list", "docs") == ""


def test_line_ends_that_git_does_not_keep_are_no_change(tmp_path: Path) -> None:
    folder = made(tmp_path / "repository")
    # What a pattern for `a.py` would look like.
    odd = ":(top)a.py"
    put(folder, {odd: BEFORE + b"# odd\n"})
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "odd")
    # The user's editor wrote \n, a checkout now would write \r\n; git calls the file unchanged.
    git(folder, "config", "core.autocrlf", "true")
    git(folder, "config", "core.safecrlf", "true")

    with branch(lent(folder), "docs") as docs:
        first = docs.commit([change("a.py"), change(odd, BEFORE + b"# odd\n")], TEXT)
    with branch(lent(folder), "docs") as docs:
        again = docs.commit([change("a.py"), change("pkg/b.py", BEFORE.replace(b"pass", b"1"))], TEXT)

    assert first.committed == ("a.py", odd)
    assert again.known == ("a.py",)
    assert again.changed == ("pkg/b.py",)
    assert git(folder, "show", "docs:a.py") == AFTER


@untouched
def test_the_environment_of_a_hook_leads_to_no_other_repository(
    repository: Path, beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = made(tmp_path / "other")
    before = state(other)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))

    with branch(lent(repository), "docs", within=beside) as docs:
        docs.commit([change("a.py")], TEXT)
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name)

    assert git(repository, "show", "docs:a.py") == AFTER
    assert state(other) == before


def test_a_user_in_a_worktree_of_their_own_is_served_alike(repository: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    git(repository, "worktree", "add", "--quiet", "-b", "mine", str(mine))
    put(mine, {"a.py": BEFORE + b"# committed here only\n"})
    git(mine, "commit", "--all", "--quiet", "--message", "mine")
    put(mine, {"notes.txt": b"unstaged\n"})
    before = state(repository), state(mine)

    with branch(lent(mine / "pkg"), "docs") as docs:
        result = docs.commit([change("a.py", BEFORE + b"# committed here only\n"), change("pkg/b.py")], TEXT)

    assert result.committed == ("a.py", "pkg/b.py")
    assert said(repository, "rev-parse", "docs~1") == said(repository, "rev-parse", "mine")
    assert (state(repository), state(mine)) == before
    assert Git(repository).worktrees() == [repository, mine]


def test_submodules_do_not_stand_in_the_way(tmp_path: Path) -> None:
    outer, inner = made(tmp_path / "outer"), made(tmp_path / "inner")
    git(outer, "submodule", "--quiet", "add", str(inner), "inner")
    git(outer, "commit", "--quiet", "--message", "with a submodule")
    # A hook that fills the submodules of every checkout.
    hook(outer, "post-checkout", "git submodule --quiet update --init")
    before = state(outer)

    with branch(lent(outer), "docs") as docs:
        first = docs.commit([change("a.py")], TEXT)
    with branch(lent(outer / "inner"), "docs") as docs:
        second = docs.commit([change("a.py")], TEXT)

    assert first.committed == second.committed == ("a.py",)
    assert said(outer, "diff", "--name-only", "main", "docs") == "a.py"
    assert git(outer / "inner", "show", "docs:a.py") == AFTER
    assert Git(outer).worktrees() == [outer]
    after = state(outer)
    assert [name for name in before if before[name] != after.get(name)] == []


def killed_on(repository: Path, within: Path) -> None:
    """Commit one file on the branch `docs` in a process that is killed before it can tidy up."""
    code = f"""
import os, pathlib, signal
from codeherd_producer.backfill.commits import Change, branch
from codeherd_producer.backfill.git import Git
with branch(Git(pathlib.Path({str(repository)!r})), "docs", within=pathlib.Path({str(within)!r})) as docs:
    docs.commit([Change("a.py", {BEFORE!r}, {AFTER!r})], {TEXT!r})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@untouched
@pytest.mark.parametrize("is_folder_gone", [False, True])
def test_a_killed_run_is_gone_on_with(repository: Path, beside: Path, is_folder_gone: bool) -> None:
    killed_on(repository, beside)
    [holder] = beside.iterdir()
    if is_folder_gone:
        holder.rename(holder.parent.parent / "elsewhere")

    with branch(lent(repository), "docs", within=beside) as docs:
        result = docs.commit([change("a.py"), change("pkg/b.py")], TEXT)
        ids = docs.commits("r1")

    assert (result.known, result.committed) == (("a.py",), ("pkg/b.py",))
    assert len(ids) == 2
    assert Git(repository).worktrees() == [repository]


@untouched
def test_who_is_still_at_work_is_not_disturbed(repository: Path, beside: Path) -> None:
    with branch(lent(repository), "docs", within=beside) as docs:
        with pytest.raises(GitFailed), branch(lent(repository), "docs", within=beside):
            pytest.fail("two on one branch")
        with branch(lent(repository), None, within=beside) as others:
            others.commit([change("a.py")], TEXT)
        result = docs.commit([change("a.py")], TEXT)

    assert said(repository, "rev-parse", "docs") == result.commit


@untouched
@pytest.mark.parametrize(
    ("name", "base"),
    [("main", "HEAD"), ("docs", "no-such"), ("docs", "--output=x"), ("two words", "HEAD"), ("-d", "HEAD")],
)
def test_what_git_refuses_leaves_nothing(repository: Path, beside: Path, name: str, base: str) -> None:
    with pytest.raises(GitFailed), branch(lent(repository), name, base, within=beside):
        pytest.fail("that is no branch for us")

    assert said(repository, "for-each-ref", "--format=%(refname)", "refs/heads") == "refs/heads/main"


def test_mails_rebuild_the_branch_elsewhere(repository: Path, tmp_path: Path) -> None:
    windows = BEFORE.replace(b"\n", b"\r\n")
    put(repository, {"windows.py": windows})
    git(repository, "add", "windows.py")
    git(repository, "commit", "--quiet", "--message", "second", "--", "windows.py")
    git(repository, "clone", "--quiet", ".", str(tmp_path / "clone"))
    for name, value in (("diff.noprefix", "true"), ("color.ui", "always")):
        git(repository, "config", name, value)

    with branch(lent(repository), None) as nowhere:
        nowhere.commit([change("a.py"), change("pkg/b.py")], TEXT)
        last = nowhere.commit([change("windows.py", windows, AFTER.replace(b"\n", b"\r\n"))], TEXT).commit
        mails = nowhere.patches(tmp_path / "mails")

    assert [mail.name for mail in mails] == ["0001-Add-docstrings.patch", "0002-Add-docstrings.patch"]
    git(tmp_path / "clone", "am", "--quiet", "--keep-cr", *map(str, mails))
    rebuilt = said(tmp_path / "clone", "rev-parse", "HEAD^{tree}")
    assert rebuilt == said(repository, "rev-parse", f"{last}^{{tree}}")
    assert said(repository, "for-each-ref", "--format=%(refname)", "refs/heads") == "refs/heads/main"


def test_git_blame_looks_behind_the_commits_that_it_is_told_to_ignore(tmp_path: Path) -> None:
    folder = made(tmp_path / "repository")
    short = b"def f(): return compute(1)\n"
    put(folder, {"a.py": short})
    git(folder, "commit", "--quiet", "--all", "--message", "second")
    expanded = b'def f():\n    """Do it."""\n    return compute(1)\n'
    with branch(lent(folder), "docs") as docs:
        docs.commit([change("a.py", short, expanded)], TEXT)
        lines = blame_ignore_lines("r1", docs.commits("r1"))
    (tmp_path / "ignored").write_text(lines)

    def blamed(*options: str) -> list[str]:
        said_lines = said(folder, "blame", "-s", "-l", *options, "docs", "--", "a.py").splitlines()
        return [line.split()[0] for line in said_lines]

    ours, theirs = said(folder, "rev-parse", "docs"), said(folder, "rev-parse", "main")
    assert lines == f"# Docstrings of backfill r1\n{ours}\n"
    assert blamed() == [ours, ours, ours]
    assert blamed("--ignore-revs-file", str(tmp_path / "ignored")) == [theirs, ours, theirs]
    assert blame_ignore_lines("r1", []) == ""


def test_prefixes_are_seen_from_the_top(repository: Path) -> None:
    found = lent(repository / "pkg" / "sub")

    assert found.prefix(repository) == ""
    assert found.prefix(repository / "pkg" / "sub") == "pkg/sub/"


def titles(groups: Sequence[Group]) -> list[tuple[str, tuple[str, ...]]]:
    return [(group.title, group.paths) for group in groups]


def test_commits_are_per_file_per_folder_or_one() -> None:
    gains = dict.fromkeys(["pkg/z.py", "a.py", "pkg/b.py", "pkg/c/d.py"], 10)

    assert titles(grouped(gains, Grouping.FILE)) == [
        ("Add docstrings to a.py", ("a.py",)),
        ("Add docstrings to pkg/b.py", ("pkg/b.py",)),
        ("Add docstrings to pkg/c/d.py", ("pkg/c/d.py",)),
        ("Add docstrings to pkg/z.py", ("pkg/z.py",)),
    ]
    assert titles(grouped(gains, Grouping.FOLDER)) == [
        ("Add docstrings to ./", ("a.py",)),
        ("Add docstrings to pkg/", ("pkg/b.py", "pkg/z.py")),
        ("Add docstrings to pkg/c/", ("pkg/c/d.py",)),
    ]
    assert titles(grouped(gains, Grouping.SINGLE, most_files=3)) == [
        ("Add docstrings (1 of 2)", ("a.py", "pkg/b.py", "pkg/c/d.py")),
        ("Add docstrings (2 of 2)", ("pkg/z.py",)),
    ]
    assert titles(grouped(gains | {"pkg/b.py": 99}, Grouping.FOLDER, most_lines=20))[1:3] == [
        ("Add docstrings to pkg/ (1 of 2)", ("pkg/b.py",)),
        ("Add docstrings to pkg/ (2 of 2)", ("pkg/z.py",)),
    ]
    assert grouped({}, Grouping.SINGLE) == []


def test_commits_are_by_owner() -> None:
    owners = {
        "a.py": ("@a",),
        "b/c.py": (),
        "b/d.py": ("@a", "@b"),
        "c.py": ("@a", "@b", "@c", "@d", "x\n@e"),
        "d.py": ("@a",),
        "e.py": ("@1", "@2", "@3", "@4"),
        "f.py": (),
    }
    gains = dict.fromkeys(owners, 10)

    assert titles(grouped(gains, Grouping.OWNER, owners_of=owners.__getitem__)) == [
        ("Add docstrings for @a", ("a.py", "d.py")),
        ("Add docstrings to files without an owner", ("b/c.py", "f.py")),
        ("Add docstrings for @a, @b", ("b/d.py",)),
        ("Add docstrings for @a, @b, @c and 2 others", ("c.py",)),
        ("Add docstrings for @1, @2, @3 and 1 other", ("e.py",)),
    ]
    assert titles(grouped(gains, Grouping.OWNER, owners_of=owners.__getitem__, most_lines=19))[:2] == [
        ("Add docstrings for @a (1 of 2)", ("a.py",)),
        ("Add docstrings for @a (2 of 2)", ("d.py",)),
    ]
    [odd] = grouped({"a.py": 1}, Grouping.OWNER, owners_of=lambda _: ("@a\x1b",))
    assert odd.title == r'Add docstrings for "@a\033"'


paths = st.lists(st.sampled_from("ab"), min_size=1, max_size=3).map(lambda parts: "/".join(parts) + ".py")


@given(
    st.dictionaries(paths, st.integers(0, 9)),
    st.sampled_from(Grouping),
    st.none() | st.integers(1, 3),
    st.none() | st.integers(1, 20),
)
def test_every_file_is_in_one_commit_within_the_limits(
    gains: dict[str, int], by: Grouping, most_files: int | None, most_lines: int | None
) -> None:
    groups = grouped(gains, by, most_files=most_files, most_lines=most_lines)

    assert sorted(path for group in groups for path in group.paths) == sorted(gains)
    for group in groups:
        assert 1 <= len(group.paths) <= (most_files or len(gains))
        assert len(group.paths) == 1 or sum(gains[path] for path in group.paths) <= (most_lines or 999)


def test_messages_are_lines_of_text_whatever_is_put_into_them() -> None:
    [odd] = grouped({"a\nb\udce9.py": 1}, Grouping.FILE)

    text = message(odd, run="r", model="m\nSigned-off-by: x", docstrings=1, prefix="docs: ")

    assert text.split("\n") == [
        r'docs: add docstrings to "a\nb\351.py"',
        "",
        "1 docstring in 1 file, written by a model. Nothing but docstrings was added.",
        "",
        "Backfill-Run: r",
        "Backfill-Model: m Signed-off-by: x",
        "",
    ]
