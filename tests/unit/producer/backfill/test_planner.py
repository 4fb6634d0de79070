from __future__ import annotations

import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest

from codeherd_producer.backfill.git import GitFailed
from codeherd_producer.backfill.interpreters import InterpreterFailed
from codeherd_producer.backfill.planner import PlannedFile, Wanted, plan, plan_again, read
from codeherd_producer.backfill.scanner import Unreadable
from codeherd_producer.backfill.selection import Selection
from codeherd_schema.errors import InvalidRequest

#: Syntax that no Python has, but for the one of `newer_python`.
NEW = "newtype X = int\n"
FUNCTION = "def f(a):\n    return a\n"


def put(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def planned(folder: Path, wanted: Wanted | None = None) -> dict[str, PlannedFile]:
    return {file.path: file for file in plan(folder, wanted or Wanted())}


def git(folder: Path, *arguments: str) -> None:
    settings = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *settings, *arguments], cwd=folder, capture_output=True, check=True)


def test_each_file_comes_with_its_targets_and_with_what_is_passed_over(tmp_path: Path) -> None:
    code = (
        b'"""M."""\n'
        + FUNCTION.encode()
        + b"def _g(a):\n    return a\ndef _h(a):\n    return a\nclass A:\n    x = 1\n"
    )
    put(tmp_path, {"pkg/b.py": code, "a.py": b"", "pkg/data.txt": b"x"})

    files = list(plan(tmp_path, Wanted()))

    assert [file.path for file in files] == ["a.py", "pkg/b.py"]
    found = files[1]
    assert found.reason is None
    assert found.sha256 == hashlib.sha256(code).hexdigest()
    assert [symbol.name for symbol in found.targets] == ["f", "A"]
    assert found.passed_over == {"documented": 1, "semiprivate": 2}
    assert found.scan is not None
    assert found.scan.text == code.decode()


def test_a_file_that_cannot_be_read_has_a_reason_and_the_next_one_follows(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "a_syntax.py": "def f(:\n",
            "b_bytes.py": b"x = '\xe9'\n",
            "c_cookie.py": "# coding: nonsense\n",
            "d_nul.py": b"x = 1\0\n",
            "e_deep.py": "(" * 500,
            "f_bom.py": b"\xef\xbb\xbf" + FUNCTION.encode(),
            "g_latin.py": "# coding: latin-1\n# é\n".encode("latin-1") + FUNCTION.encode(),
            "h_empty.py": "",
        },
    )
    (tmp_path / "i_link.py").symlink_to("f_bom.py")
    (tmp_path / "j_pipe.py").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "j_pipe.py")
    (tmp_path / os.fsdecode(b"k_\xe9.py")).write_text(FUNCTION)

    files = planned(tmp_path)

    reasons = {
        path: None if file.reason is None else file.reason.partition(":")[0] for path, file in files.items()
    }
    assert reasons == {
        "a_syntax.py": "syntax",
        "b_bytes.py": "encoding",
        "c_cookie.py": "encoding",
        "d_nul.py": "syntax",
        "e_deep.py": "syntax",
        "f_bom.py": None,
        "g_latin.py": None,
        "h_empty.py": None,
        "i_link.py": "symbolic link",
        "j_pipe.py": "cannot be read",
        # As it can be stored.
        "k_\\udce9.py": "name is not UTF-8",
    }
    assert {path for path, file in files.items() if file.targets} == {"f_bom.py", "g_latin.py"}
    assert files["a_syntax.py"].sha256 == hashlib.sha256(b"def f(:\n").hexdigest()
    assert files["i_link.py"].sha256 == ""


def test_the_head_of_a_file_can_keep_it_as_it_is(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "generated.py": "# @generated\n" + FUNCTION,
            "marked.py": "#!/x\n# backfill: skip-file\n" + FUNCTION,
            "late.py": "\n" * 30 + "# backfill: skip-file\n" + FUNCTION,
            "text.py": "x = '# backfill: skip-file'\n" + FUNCTION,
            "one.py": "# backfill: skip\n" + FUNCTION,
        },
    )

    files = planned(tmp_path)

    assert {path: (file.reason, len(file.targets)) for path, file in files.items()} == {
        "generated.py": ("generated", 0),
        "late.py": (None, 1),
        "marked.py": ("marked in its head", 0),
        "one.py": (None, 0),
        "text.py": (None, 1),
    }
    assert files["one.py"].passed_over == {"module": 1, "marked": 1}


def test_a_file_that_goes_away_during_the_run_is_told(tmp_path: Path) -> None:
    put(tmp_path, {"a.py": FUNCTION, "b.py": FUNCTION})

    files = plan(tmp_path, Wanted())
    first = next(files)
    (tmp_path / "b.py").unlink()

    assert first.targets
    assert next(files).reason == "cannot be read"


def test_methods_that_a_base_class_describes_are_passed_over(tmp_path: Path) -> None:
    base = """
class Base:
    def run(self):
        'Go.'
        return 1
    def stop(self):
        return 2
"""
    own = """
from .z_base import Base
class Own(Base):
    def run(self):
        return 3
    def stop(self):
        return 4
"""
    put(tmp_path, {"pkg/__init__.py": "", "pkg/a_own.py": own, "pkg/z_base.py": base})

    usual = planned(tmp_path)["pkg/a_own.py"]
    asked = planned(tmp_path, Wanted(Selection(overrides=True)))["pkg/a_own.py"]

    assert [symbol.name for symbol in usual.targets] == ["Own", "Own.stop"]
    assert usual.passed_over["override"] == 1
    assert [symbol.name for symbol in asked.targets] == ["Own", "Own.run", "Own.stop"]


def test_a_base_class_may_lie_elsewhere_in_the_repository(tmp_path: Path) -> None:
    git(tmp_path, "init")
    base = 'class Base:\n    def run(self):\n        """Go."""\n        return 1\n'
    own = "from core.base import Base\nclass Own(Base):\n    def run(self):\n        return 3\n"
    put(
        tmp_path,
        {"core/base.py": base, "core/__init__.py": "", "plugins/__init__.py": "", "plugins/own.py": own},
    )

    [_, found] = plan(tmp_path / "plugins", Wanted(allow_dirty=True))

    assert [symbol.name for symbol in found.targets] == ["Own"]
    assert found.passed_over["override"] == 1


def test_paths_narrow_what_is_wanted_and_names_do_too(tmp_path: Path) -> None:
    put(tmp_path, {"a.py": FUNCTION, "b/c.py": FUNCTION, "b/d.py": FUNCTION})

    selection = Selection(exclude=[re.compile("^f$")])
    files = planned(tmp_path, Wanted(selection, include=["b/*"], exclude=["*d.py"]))

    assert {path: file.reason for path, file in files.items()} == {
        "a.py": "excluded by path",
        "b/c.py": None,
        "b/d.py": "excluded by path",
    }
    assert files["b/c.py"].passed_over["excluded by name"] == 1


def test_only_committed_files_that_changed_are_wanted(tmp_path: Path) -> None:
    git(tmp_path, "init", "--initial-branch=main")
    put(tmp_path, {"a.py": FUNCTION, "b.py": FUNCTION, "c.py": FUNCTION})
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "checkout", "-b", "feature")
    put(tmp_path, {"a.py": FUNCTION + "x = 1\n"})
    git(tmp_path, "commit", "-am", "second")
    put(tmp_path, {"b.py": FUNCTION + "x = 1\n"})

    def reasons(wanted: Wanted) -> dict[str, str | None]:
        return {path: file.reason for path, file in planned(tmp_path, wanted).items()}

    dirty, same = "has changes that are not committed", "not changed since the reference"
    assert reasons(Wanted(changed_since="main")) == {"a.py": None, "b.py": dirty, "c.py": same}
    assert reasons(Wanted(allow_dirty=True)) == {"a.py": None, "b.py": None, "c.py": None}


def test_what_cannot_be_planned_at_all_is_refused_before_the_first_file(tmp_path: Path) -> None:
    git(tmp_path, "init")
    put(tmp_path, {"a.py": FUNCTION})

    with pytest.raises(InvalidRequest, match="no folder"):
        plan(tmp_path / "a.py", Wanted())
    with pytest.raises(GitFailed):
        plan(tmp_path, Wanted(changed_since="nowhere"))
    with pytest.raises(InterpreterFailed):
        plan(tmp_path, Wanted(python=tmp_path / "no-python"))


def test_syntax_that_is_unknown_here_is_read_by_the_interpreter_that_was_named(
    tmp_path: Path, newer_python: Path
) -> None:
    put(tmp_path, {"a.py": NEW + FUNCTION, "b.py": FUNCTION, "c.py": NEW + FUNCTION, "d.py": "def f(:\n"})

    without = planned(tmp_path)
    files = planned(tmp_path, Wanted(python=newer_python))

    syntax = "syntax: invalid syntax"
    assert [file.reason for file in without.values()] == [syntax, None, syntax, syntax]
    assert [file.reason for file in files.values()] == [None, None, None, syntax]
    [symbol] = files["c.py"].targets
    assert (symbol.name, symbol.line, symbol.insert_at) == ("f", 2, len(NEW + "def f(a):\n"))
    assert files["c.py"].sha256 == hashlib.sha256((NEW + FUNCTION).encode()).hexdigest()


def test_a_base_class_in_newer_syntax_is_known(tmp_path: Path, newer_python: Path) -> None:
    base = 'class Base:\n    def run(self):\n        """Go."""\n        return 1\n'
    own = "from new import Base\nclass Own(Base):\n    def run(self):\n        return 3\n"
    put(tmp_path, {"new.py": NEW + base, "a_own.py": own})

    found = planned(tmp_path, Wanted(python=newer_python))["a_own.py"]

    assert found.passed_over["override"] == 1


def test_a_file_is_read_again_the_same_way(tmp_path: Path, newer_python: Path) -> None:
    put(tmp_path, {"a.py": FUNCTION, "b.py": NEW + FUNCTION})
    files = planned(tmp_path, Wanted(python=newer_python))

    for path in ("a.py", "b.py"):
        raw, scan = read(tmp_path, path, newer_python)
        assert raw == (tmp_path / path).read_bytes()
        assert scan == files[path].scan
    with pytest.raises(Unreadable, match="syntax"):
        read(tmp_path, "b.py", None)
    with pytest.raises(FileNotFoundError):
        read(tmp_path, "gone.py", None)


def test_one_file_is_planned_again_as_all_are(tmp_path: Path, newer_python: Path) -> None:
    base = 'class Base:\n    def f(self):\n        """Say it."""\n        return 1\n'
    put(
        tmp_path,
        {
            "pkg/__init__.py": "",
            "pkg/base.py": base,
            "pkg/a.py": "from pkg.base import Base\n\n\nclass A(Base):\n    def f(self):\n        return 2\n",
            "test_a.py": FUNCTION,
            "new.py": NEW + FUNCTION,
            "broken.py": "def f(:\n",
            "made.py": "# @generated\n" + FUNCTION,
        },
    )
    wanted = Wanted(selection=Selection(private=True, exclude=(re.compile("^g"),)), python=newer_python)

    together = planned(tmp_path, wanted)

    assert {path: plan_again(tmp_path, path, wanted) for path in together} == together
    assert together["pkg/a.py"].passed_over["override"] == 1
    assert [len(together[path].targets) for path in ("new.py", "test_a.py", "broken.py")] == [1, 0, 0]


def test_a_file_with_changes_is_planned_again_when_they_are_committed(tmp_path: Path) -> None:
    git(tmp_path, "init")
    put(tmp_path, {"a.py": FUNCTION})
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    put(tmp_path, {"a.py": FUNCTION + "\n\n" + FUNCTION.replace(" f(", " g(")})

    dirty = plan_again(tmp_path, "a.py", Wanted())
    allowed = plan_again(tmp_path, "a.py", Wanted(allow_dirty=True))
    git(tmp_path, "commit", "--all", "-m", "second")
    # The first commit is long before; only a plan of all asks what was changed since.
    clean = plan_again(tmp_path, "a.py", Wanted(changed_since="HEAD"))

    assert (dirty.reason, dirty.targets) == ("has changes that are not committed", ())
    assert dirty.scan == allowed.scan
    assert [symbol.name for symbol in allowed.targets] == ["f", "g"]
    assert clean == allowed
