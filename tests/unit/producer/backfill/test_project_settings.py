from __future__ import annotations

import re
from pathlib import Path

import pytest

from codeherd_producer.backfill.docstrings import Convention
from codeherd_producer.backfill.project_settings import BadProjectFile, ProjectSettings, read
from codeherd_producer.backfill.scanner import scan
from codeherd_producer.backfill.selection import Reason, Selection, decided


def project(folder: Path, text: str, name: str = "pyproject.toml") -> ProjectSettings:
    (folder / name).write_text(text)
    return read(folder)


def test_a_project_that_says_nothing_leaves_the_defaults(tmp_path: Path) -> None:
    assert read(tmp_path) == ProjectSettings()
    assert project(tmp_path, "[tool.interrogate]\n[tool.ruff]\nsrc = ['x']\n") == ProjectSettings()


def test_interrogates_flags_are_turned_around_and_those_that_are_not_given_stay(tmp_path: Path) -> None:
    found = project(
        tmp_path,
        """
        [tool.interrogate]
        ignore-magic = false
        ignore_init_method = true
        ignore-semiprivate = false
        ignore-module = false
        ignore-setters = false
        ignore-property-decorators = true
        fail-under = 95
        verbose = 2
        """,
    )

    assert found.selection == Selection(
        magic=True, init=False, semiprivate=True, modules=True, setters=True, properties=False
    )
    assert found.fail_under == 95.0
    assert found.origins == {
        "selection.magic": "pyproject.toml [tool.interrogate] ignore-magic",
        "selection.init": "pyproject.toml [tool.interrogate] ignore-init-method",
        "selection.semiprivate": "pyproject.toml [tool.interrogate] ignore-semiprivate",
        "selection.modules": "pyproject.toml [tool.interrogate] ignore-module",
        "selection.setters": "pyproject.toml [tool.interrogate] ignore-setters",
        "selection.properties": "pyproject.toml [tool.interrogate] ignore-property-decorators",
        "fail_under": "pyproject.toml [tool.interrogate] fail-under",
    }


@pytest.mark.parametrize(
    ("functions", "classes", "nested", "origin"),
    [
        ("false", "false", True, "ignore-nested-functions"),
        ("true", "false", False, "ignore-nested-functions"),
        ("false", "true", False, "ignore-nested-classes"),
    ],
)
def test_either_flag_of_nested_symbols_leaves_them_out(
    tmp_path: Path, functions: str, classes: str, nested: bool, origin: str
) -> None:
    found = project(
        tmp_path,
        f"[tool.interrogate]\nignore-nested-functions = {functions}\nignore-nested-classes = {classes}\n",
    )

    assert found.selection.nested is nested
    assert found.origins["selection.nested"].endswith(f" {origin}")


@pytest.mark.parametrize(
    ("setting", "excluded"),
    [
        ('ignore-regex = "get"', {"get", "getter", "A.get"}),
        ('ignore-regex = ["^get$", "target"]', {"get", "A.get", "target"}),
        ('ignore-regex = ["(?i)GET"]', {"get", "getter", "A.get"}),
        ('whitelist-regex = ["get"]', {"A", "target", "A.forget"}),
    ],
)
def test_names_are_matched_from_their_beginning_as_interrogate_does(
    tmp_path: Path, setting: str, excluded: set[str]
) -> None:
    body = "(self):\n        return 1\n"
    code = "".join(f"def {name}(a):\n    return a\n" for name in ("get", "getter", "target"))
    code += f"class A:\n    def get{body}    def forget{body}"

    selection = project(tmp_path, f"[tool.interrogate]\n{setting}\n").selection

    found = decided(scan(code.encode()), selection, is_test_file=False)
    assert {symbol.name for symbol, reason in found if reason is Reason.EXCLUDED} == excluded


def test_the_convention_is_ruffs_and_else_pydocstyles(tmp_path: Path) -> None:
    pydocstyle = '[tool.pydocstyle]\nconvention = "numpy"\n'
    old = '[tool.ruff.pydocstyle]\nconvention = "pep257"\n'
    new = '[tool.ruff.lint.pydocstyle]\nconvention = "google"\n'

    assert project(tmp_path, pydocstyle).convention is Convention.NUMPY
    assert project(tmp_path, pydocstyle + old).convention is Convention.PEP257
    found = project(tmp_path, pydocstyle + old + new)
    assert found.convention is Convention.GOOGLE
    assert found.origins == {"convention": "pyproject.toml [tool.ruff] lint.pydocstyle.convention"}
    assert project(tmp_path, '[tool.pydocstyle]\nconvention = "none"\n').convention is None


def test_the_width_is_ruffs_for_docstrings_then_its_own_then_blacks(tmp_path: Path) -> None:
    black, ruff = "[tool.black]\nline_length = 79\n", "[tool.ruff]\nline-length = 100\n"

    assert project(tmp_path, black).width == 79
    assert project(tmp_path, black + ruff).width == 100
    found = project(tmp_path, black + ruff + "lint.pycodestyle.max-doc-length = 72\n")
    assert (found.width, found.origins["width"]) == (
        72,
        "pyproject.toml [tool.ruff] lint.pycodestyle.max-doc-length",
    )


def test_ruffs_own_files_come_before_pyproject(tmp_path: Path) -> None:
    project(tmp_path, "[tool.ruff]\nline-length = 100\n")

    assert project(tmp_path, "line-length = 90\n", "ruff.toml").width == 90
    found = project(tmp_path, "line-length = 80\n", ".ruff.toml")
    assert (found.width, found.origins["width"]) == (80, ".ruff.toml line-length")


def test_folders_above_count_up_to_the_top_of_the_repository(tmp_path: Path) -> None:
    inner = tmp_path / "top" / "pkg"
    inner.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("[tool.black]\nline-length = 60\n")
    (tmp_path / "top" / "pyproject.toml").write_text("[tool.ruff]\nline-length = 70\n")

    assert read(inner) == ProjectSettings()
    (tmp_path / "top" / ".git").mkdir()
    assert read(inner).width == 70
    (inner / "ruff.toml").write_text("[lint.pydocstyle]\nconvention = 'numpy'\n")
    assert (read(inner).convention, read(inner).width) == (Convention.NUMPY, None)


def test_paths_that_interrogate_leaves_out_are_seen_from_the_folder(tmp_path: Path) -> None:
    inner = tmp_path / "src" / "pkg"
    inner.mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    text = '[tool.interrogate]\nexclude = ["setup.py", "./docs/", "src/pkg/vendor", "src/pkg"]\n'

    assert project(tmp_path, text).exclude[:4] == ("setup.py", "setup.py/*", "docs", "docs/*")
    assert read(inner).exclude == ("vendor", "vendor/*")


@pytest.mark.parametrize(
    "text",
    [
        "[tool.interrogate\n",
        "[tool.interrogate]\nignore-magic = 'yes'\n",
        "[tool.interrogate]\nignore-magic = 1\n",
        "[tool.interrogate]\nfail-under = 101\n",
        "[tool.interrogate]\nignore-regex = ['(']\n",
        "[tool.interrogate]\nexclude = [1]\n",
        "[tool.black]\nline-length = '88'\n",
    ],
)
def test_what_is_impossible_is_refused_with_the_files_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadProjectFile, match=re.escape(str(tmp_path / "pyproject.toml"))):
        project(tmp_path, text)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ruff.toml").write_bytes(b"\xff")

    with pytest.raises(BadProjectFile, match=r"ruff\.toml"):
        read(tmp_path)
