from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from codeherd_producer.backfill.files import FileReason, find, is_dirty, look
from codeherd_producer.backfill.git import Git, GitFailed


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *settings, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def put(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_py", ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--initial-branch=main")
    put(tmp_path, a_py="x = 1\n", pkg__b_py="y = 1\n", pkg__tests__test_b_py="z = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def reasons(root: Path, **options: object) -> dict[str, FileReason | None]:
    return {file.path: file.reason for file in find(root, **options)}  # type: ignore[arg-type]


def test_what_git_knows_is_found_and_what_it_ignores_is_not(repository: Path) -> None:
    put(repository, ignored__c_py="c = 1\n")
    (repository / ".gitignore").write_text("ignored/\n")
    git(repository, "add", ".gitignore")
    git(repository, "commit", "-m", "ignore")

    assert reasons(repository) == {"a.py": None, "pkg/b.py": None, "pkg/tests/test_b.py": None}
    assert [file.is_test for file in find(repository)] == [False, False, True]
    assert reasons(repository / "pkg") == {"b.py": None, "tests/test_b.py": None}


def test_files_with_changes_are_left_alone(repository: Path) -> None:
    put(repository, a_py="x = 2\n", new_py="n = 1\n")
    git(repository, "mv", "pkg/b.py", "pkg/moved.py")

    assert reasons(repository) == {
        "a.py": FileReason.DIRTY,
        "new.py": FileReason.DIRTY,
        "pkg/moved.py": FileReason.DIRTY,
        "pkg/tests/test_b.py": None,
    }
    assert set(reasons(repository, allow_dirty=True).values()) == {None}


def test_only_what_changed_since_a_commit_is_wanted(repository: Path) -> None:
    git(repository, "checkout", "-b", "feature")
    put(repository, a_py="x = 2\n")
    git(repository, "commit", "-am", "second")

    found = reasons(repository, changed_since="main")

    assert found["a.py"] is None
    assert found["pkg/b.py"] is FileReason.UNCHANGED
    for odd in ("no-such-commit", "--output=x"):
        with pytest.raises(GitFailed):
            find(repository, changed_since=odd)


def test_other_peoples_and_programs_files_are_left_alone(repository: Path) -> None:
    put(
        repository,
        vendor__v_py="v = 1\n",
        made_py="m = 1\n",
        theirs_py="t = 1\n",
        lfs_py="version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    )
    (repository / "x_pb2.py").write_text("x = 1\n")
    (repository / "link.py").symlink_to("a.py")
    (repository / "large.py").write_text("x = '" + "x" * 4_000_000 + "'\n")
    (repository / ".gitattributes").write_text(
        "made.py linguist-generated\ntheirs.py linguist-vendored=true\na.py -linguist-generated\n"
    )
    git(repository, "add", ".")
    git(repository, "commit", "-m", "more")

    found = reasons(repository)

    assert {path: reason for path, reason in found.items() if reason is not None} == {
        "large.py": FileReason.LARGE,
        "lfs.py": FileReason.LFS,
        "link.py": FileReason.SYMLINK,
        "made.py": FileReason.GENERATED,
        "theirs.py": FileReason.VENDORED,
        "vendor/v.py": FileReason.VENDORED,
        "x_pb2.py": FileReason.GENERATED,
    }


def test_submodules_are_not_entered(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    git(other, "init", "--initial-branch=main")
    put(other, inner_py="i = 1\n")
    git(other, "add", ".")
    git(other, "commit", "-m", "first")
    git(repository, "-c", "protocol.file.allow=always", "submodule", "add", str(other), "sub")
    git(repository, "commit", "-m", "sub")

    assert "sub/inner.py" not in reasons(repository)


def test_patterns_narrow_what_is_wanted(repository: Path) -> None:
    assert reasons(repository, exclude=["pkg/tests/*"])["pkg/tests/test_b.py"] is FileReason.EXCLUDED
    found = reasons(repository, include=["pkg/*"], exclude=["*test*"])
    assert [path for path, reason in found.items() if reason is None] == ["pkg/b.py"]


def test_odd_names_are_names(repository: Path) -> None:
    names = ["with space.py", "tab\there.py", "новый.py", '"quoted".py', "-dash.py", "line\nbreak.py"]
    for name in names:
        (repository / name).write_text("x = 1\n")
    git(repository, "add", ".")
    git(repository, "commit", "-m", "odd")
    (repository / names[0]).write_text("x = 2\n")

    found = reasons(repository)

    assert {*names} <= found.keys()
    assert found[names[0]] is FileReason.DIRTY
    assert found[names[5]] is None


def test_a_folder_without_git_is_walked(tmp_path: Path) -> None:
    put(tmp_path, a_py="", pkg__b_py="")
    for name in ("node_modules", "pkg/__pycache__", ".hidden", "x.egg-info"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "c.py").touch()

    assert Git.of(tmp_path) is None
    assert [file.path for file in find(tmp_path)] == ["a.py", "pkg/b.py"]


def test_what_is_no_file_of_text_is_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / os.fsdecode(b"\xe9.py")).touch()
    (tmp_path / "folder.py").mkdir()

    assert list(reasons(tmp_path).values()) == [FileReason.GONE, FileReason.NAME]


def test_a_patch_is_tried_without_being_applied(repository: Path) -> None:
    known = Git.of(repository)
    assert known is not None
    patch = b"--- a/a.py\n+++ b/a.py\n@@ -1 +1 @@\n-x = 1\n+x = 2\n"

    assert known.applies(patch)
    assert not known.applies(patch.replace(b"-x = 1", b"-x = 7"))
    assert known.blob_id(b"x = 1\n") == git(repository, "rev-parse", "HEAD:a.py")
    assert known.dirty() == set()


def test_one_file_is_looked_at_as_all_are_but_for_its_changes(repository: Path) -> None:
    put(
        repository,
        a_py="x = 2\n",
        vendor__c_py="c = 1\n",
        pkg__made_py="m = 1\n",
        lfs_py="version https://git-lfs\n",
    )
    (repository / ".gitattributes").write_text("pkg/made.py linguist-generated\n")
    (repository / "link.py").symlink_to("a.py")

    together = {file.path: file for file in find(repository, allow_dirty=True)}

    assert {path: look(repository, path) for path in together} == together
    assert {file.reason for file in together.values()} == {
        None,
        FileReason.VENDORED,
        FileReason.GENERATED,
        FileReason.LFS,
        FileReason.SYMLINK,
    }
    assert look(repository / "pkg", "made.py").reason is FileReason.GENERATED
    assert look(repository, "gone.py").reason is FileReason.GONE


def test_a_file_is_dirty_until_its_changes_are_committed(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    put(repository, a_py="x = 2\n", new_py="n = 1\n", pkg__b_py="y = 2\n")
    git(repository, "add", "pkg/b.py")
    odd = repository / "*.py"
    odd.write_text("o = 1\n")
    git(repository, "add", "./[*].py")
    git(repository, "commit", "-m", "odd", "--", ":(literal)*.py")
    plain = tmp_path_factory.mktemp("plain")
    put(plain, a_py="x = 1\n")

    paths = ["a.py", "new.py", "pkg/b.py", "pkg/tests/test_b.py", "*.py"]
    assert [is_dirty(repository, path) for path in paths] == [True, True, True, False, False]
    assert is_dirty(repository / "pkg", "b.py")
    git(repository, "add", ".")
    git(repository, "commit", "-m", "all")
    assert not any(is_dirty(repository, path) for path in paths)
    assert not is_dirty(plain, "a.py")
