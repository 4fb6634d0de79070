from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import sysconfig
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from codeherd_producer.backfill.coverage import Count, Ignored, counted, measure, meets, of_file
from codeherd_producer.backfill.interpreters import Interpreter
from codeherd_producer.backfill.scanner import scan

#: Runs interrogate's own command line for each list of flags, and prints numbers in place of its table.
INTERROGATE = """
import json, sys
from interrogate import cli, coverage

def note(self, results, output, verbosity):
    found.append({
        "total": results.total, "covered": results.covered, "percent": results.perc_covered,
        "meets": results.ret_code == 0,
        "files": {one.filename: [one.total, one.covered] for one in results.file_results},
    })

coverage.InterrogateCoverage.print_results = note
found = []
for flags in json.load(sys.stdin):
    try:
        cli.main(flags, standalone_mode=False)
    except SystemExit as end:
        assert end.code in (0, 1), end
print(json.dumps(found))
"""

#: Every flag alone, and some together: the flags and the same in our words.
FLAGS: dict[str, tuple[list[str], Ignored]] = {
    "nothing": ([], Ignored()),
    "magic": (["--ignore-magic"], Ignored(magic=True)),
    "init method": (["--ignore-init-method"], Ignored(init_method=True)),
    "init module": (["--ignore-init-module"], Ignored(init_module=True)),
    "module": (["--ignore-module"], Ignored(module=True)),
    "nested functions": (["--ignore-nested-functions"], Ignored(nested_functions=True)),
    "nested classes": (["--ignore-nested-classes"], Ignored(nested_classes=True)),
    "private": (["--ignore-private"], Ignored(private=True)),
    "semiprivate": (["--ignore-semiprivate"], Ignored(semiprivate=True)),
    "property": (["--ignore-property-decorators"], Ignored(property_decorators=True)),
    "setters": (["--ignore-setters"], Ignored(setters=True)),
    "overloads": (["--ignore-overloaded-functions"], Ignored(overloaded_functions=True)),
    "regex": (["--ignore-regex", "^get", "-r", "_h"], Ignored(regex=[re.compile("^get"), re.compile("_h")])),
    "whitelist": (
        ["--whitelist-regex", "[A-Z]", "-w", ".*e"],
        Ignored(whitelist_regex=[re.compile("[A-Z]"), re.compile(".*e")]),
    ),
    "whitelist and nested": (
        ["-w", "[a-z_]", "-C", "-n"],
        Ignored(whitelist_regex=[re.compile("[a-z_]")], nested_classes=True, nested_functions=True),
    ),
    "google": (["--style", "google"], Ignored(style="google")),
    "google and nested": (["--style", "google", "-C"], Ignored(style="google", nested_classes=True)),
    "nested": (["-n", "-C"], Ignored(nested_functions=True, nested_classes=True)),
    "all": (
        ["-m", "-i", "-I", "-M", "-n", "-C", "-p", "-s", "-P", "-S", "-O", "-r", "x"],
        Ignored(
            magic=True, init_method=True, init_module=True, module=True, nested_functions=True,
            nested_classes=True, private=True, semiprivate=True, property_decorators=True, setters=True,
            overloaded_functions=True, regex=[re.compile("x")],
        ),
    ),
}  # fmt: skip

#: What each shape is named for; the odd ones are where interrogate counts as nobody would guess.
SHAPES = {
    "empty.py": "",
    "comment.py": "# nothing\n",
    "docstring_only.py": '"""Module."""\n',
    "blank_docstrings.py": '""" \n """\ndef f():\n    "\\n"\nclass A:\n    """"""\n    def g(self): "x"\n',
    "not_docstrings.py": 'f"{1}"\ndef f():\n    b"x"\ndef g():\n    f"x"\ndef h():\n    ("a"\n     "b")\n',
    "one_lines.py": 'def f(): return 1\nclass A: "doc"\ndef g(): "doc"; return 1\nasync def h(): ...\n',
    "pkg/__init__.py": "def from_init():\n    pass\n",
    "pkg/deep/__init__.py": '"""Deep."""\n',
    "pkg/deep/names.py": """
def __getattr__(name): ...
def __init__(): "a function, not a method"
def __(): ...
def ___(): ...
def _(): ...
def __private(): ...
def _half(): ...
def _half__(): ...
def __dunder__(): ...
class __Private:
    def inside(self):
        def deeper(): ...
class _Half:
    '''Doc.'''
    def __init__(self): ...
    async def __aenter__(self): '''Doc.'''
    def __private(self): ...
def hidden():
    def inside_hidden(): ...
def xray(): ...
class xclass:
    def in_x(self): ...
""",
    "nested.py": """
def outer():
    '''Doc.'''
    def inner():
        def innermost(): '''Doc.'''
        async def a_innermost(): ...
        class InInner:
            def method(self):
                def in_method(): ...
    async def a_inner():
        def in_async(): ...
        class InAsync:
            def method(self): ...
    class InOuter:
        '''Doc.'''
        def __init__(self): ...
        def method(self):
            def in_method(): ...
        class Deeper:
            def __init__(self): '''Doc.'''
            class Deepest:
                def method(self):
                    class OfMethod:
                        def last(self): ...
async def a_outer():
    def inner(): ...
    async def a_inner(): ...
    class InAsync:
        class Deeper:
            def method(self): ...
class A:
    if True:
        def conditional(self):
            for _ in []:
                def in_loop(): ...
    else:
        class B:
            def conditional(self): '''Doc.'''
    try:
        def tried(self): ...
    except* ValueError:
        def failed(self): ...
    with x:
        match x:
            case 1:
                def matched(self): ...
""",
    "decorated.py": """
import typing
class A:
    @property
    def size(self): ...
    @size.setter
    def size(self, value): ...
    @size.deleter
    def size(self): ...
    @size.getter
    def size(self): ...
    @functools.cached_property
    def cached(self): ...
    @property
    @other
    def two(self):
        def in_two(): ...
    @abc.property
    def of_abc(self): ...
    @property()
    def called(self): ...
    @sizes[0].setter
    def indexed(self, value): ...
    @sizes().setter
    def given(self, value): ...
    @a or b.setter
    def either(self, value): ...
    @lambda f: f.deleter
    def made(self): ...
    @(
        (size) . # of two lines
        setter
    )
    async def size(self, value): ...
    @setter
    def bare(self, value): ...
    @typing.overload
    def f(self): ...
    @overload
    def f(self):
        class InOverload: ...
    @(typing).overload
    def f(self): ...
    @t.overload
    def f(self): ...
    @overload()
    def f(self): ...
    def f(self): '''Doc.'''
@overload
class Overload:
    def kept(self): ...
@property.setter
class Setter: ...
""",
    "google.py": """
class Both:
    '''Doc.'''
    def __init__(self): '''Doc.'''
class OnlyClass:
    '''Doc.'''
    def __init__(self): ...
class OnlyInit:
    if True:
        def __init__(self): '''Doc.'''
    else:
        def __init__(self): ...
class NoneAtAll:
    def __init__(self):
        def __init__(): '''Doc.'''
class Async:
    async def __init__(self): '''Doc.'''
def f():
    def __init__(): '''Doc.'''
""",
    "names.py": "def get_x(): ...\ndef forget(): ...\ndef ähnlich(): ...\ndef ﬁle(): ...\nclass get: ...\n",
    "crlf.py": 'class A:\r\n    def f():\r\n        """Doc."""\r\n\r\n    def g(self):\r\n        0\r\n',
    "cr.py": 'class A:\r    def f(self):\r        """Doc."""\r\r    def g(self):\r        ...\r',
    "form_feed.py": "\f\nclass A:\n\f\n    def f(self): ...\n\f    def g(self): ...\n\nx = '\x0b \u2028'\n",
    "wrong_suffix.txt": "def f(): ...\n",
    "stub.pyi": "def f(): ...\n",
    ".py": "def in_a_file_without_a_name(): ...\n",
    "venv/lib.py": "def f(): ...\n",
    "venv_tools.py": "def f(): ...\n",
    "pkg/venv/lib.py": "def f(): ...\n",
    ".git/hook.py": "def f(): ...\n",
    ".gitlab/hook.py": "def f(): ...\n",
    ".hidden/a.py": "def f(): ...\n",
    "left/out.py": "def f(): ...\n",
    "left_over.py": "def f(): ...\n",
    "a[b]/c.py": "def f(): ...\n",
}


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return root


def interrogate(root: Path, runs: Sequence[list[str]]) -> list[dict[str, Any]]:
    empty = root.parent / f"{root.name}.toml" if os.access(root.parent, os.W_OK) else Path(os.devnull)
    if not empty.exists():
        empty.touch()
    settings = ["--config", str(empty)] if empty.suffix else []
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERROGATE],
        input=json.dumps([[*settings, *flags, str(root)] for flags in runs]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    for answer in answers:
        answer["files"] = {os.path.relpath(path, root): found for path, found in answer["files"].items()}
    assert len(answers) == len(runs)
    return answers


def numbers(
    root: Path, ignoring: Ignored, *, skipped: int = 0, other: Interpreter | None = None
) -> dict[str, Any]:
    found = measure(root, ignoring, other)
    assert len(found.skipped) == skipped, found.skipped
    assert (found.total, found.covered) == (
        sum(file.total for file in found.files),
        sum(file.covered for file in found.files),
    )
    return {
        "total": found.total,
        "covered": found.covered,
        "percent": found.percent,
        "meets": meets(found, 80.0),
        "files": {file.path: [file.total, file.covered] for file in found.files},
    }


def test_numbers_are_interrogates_for_every_flag_and_shape(tmp_path: Path) -> None:
    root = put(tmp_path / "root", SHAPES)

    theirs = interrogate(root, [flags for flags, _ in FLAGS.values()])

    ours = [numbers(root, ignoring) for _, ignoring in FLAGS.values()]
    assert dict(zip(FLAGS, ours, strict=True)) == dict(zip(FLAGS, theirs, strict=True))
    # Each flag has something to do: none gives the numbers of no flag at all.
    assert all((one["total"], one["covered"]) != (ours[0]["total"], ours[0]["covered"]) for one in ours[1:])


def test_numbers_of_newer_syntax_are_those_that_interrogate_has_where_it_is_known(
    tmp_path: Path, newer_python: Path
) -> None:
    # What only the newer one reads stands last, where no docstring is looked for; its place is an assignment.
    ends = {"newer": "newtype X = int\n", "plain": "X         = int\n"}
    newer, plain = (
        put(tmp_path / name, {path: f"{text}\n{end}" for path, text in SHAPES.items()})
        for name, end in ends.items()
    )

    theirs = interrogate(plain, [flags for flags, _ in FLAGS.values()])

    assert numbers(newer, Ignored(), skipped=len(theirs[0]["files"]))["files"] == {}
    with Interpreter(newer_python) as other:
        ours = [numbers(newer, ignoring, other=other) for _, ignoring in FLAGS.values()]
    assert dict(zip(FLAGS, ours, strict=True)) == dict(zip(FLAGS, theirs, strict=True))


def test_the_other_interpreter_is_asked_only_about_what_this_one_cannot_read(
    tmp_path: Path, newer_python: Path
) -> None:
    put(tmp_path, {"a.py": "def f(): 'Doc.'\n", "b.py": "newtype X = int\n", "c.py": "def f(:\n"})

    with Interpreter(newer_python) as other:
        found = measure(tmp_path, Ignored(), other)
    # One that is not there is not missed where it is not needed.
    for name in ("b.py", "c.py"):
        (tmp_path / name).unlink()
    alone = measure(tmp_path, Ignored(), Interpreter(tmp_path / "no-python"))

    assert [(file.path, file.total, file.covered) for file in found.files] == [("a.py", 2, 1), ("b.py", 1, 0)]
    assert [file.path for file in found.skipped] == ["c.py"]
    assert alone.files == found.files[:1]


def test_a_decorator_of_newer_syntax_is_known_by_its_end() -> None:
    symbols = scan(b"class A:\n    @x.setter\n    def f(self): ...\n    @y\n    def g(self): ...\n").symbols
    newer = [
        dataclasses.replace(one, decorators=("newtype(t'{x!r:>{y}}' as z).setter",))
        if one.decorators == ("x.setter",)
        else one
        for one in symbols
    ]

    for ignoring in (Ignored(setters=True), Ignored(property_decorators=True)):
        for found in (counted(symbols, ignoring), counted(newer, ignoring)):
            assert [symbol.name for symbol, _ in found or ()] == ["", "A", "A.g"]


@pytest.mark.parametrize(
    "exclude",
    [["left"], ["left/"], ["left/out.py"], ["pkg", "venv_tools.py"], ["*deep"], ["a[b]"], ["./pkg/../left"]],
)  # fmt: skip
def test_what_is_excluded_is_what_interrogate_excludes(tmp_path: Path, exclude: list[str]) -> None:
    root = put(tmp_path / "root", SHAPES)
    flags = [part for path in exclude for part in ("--exclude", str(root / path))]

    [theirs] = interrogate(root, [flags])

    assert numbers(root, Ignored(exclude=exclude))["files"] == theirs["files"]
    assert numbers(root, Ignored(exclude=[str(root / path) for path in exclude]))["files"] == theirs["files"]


@pytest.mark.parametrize("package", ["asyncio", "json", "logging"])
def test_numbers_are_interrogates_for_packages_of_the_standard_library(package: str) -> None:
    library = Path(sysconfig.get_path("stdlib")) / package

    theirs = interrogate(library, [flags for flags, _ in FLAGS.values()])

    # Read once: 19 times over is what takes long.
    scans = {path: scan(path.read_bytes()) for path in library.rglob("*.py")}
    for (name, (_, ignoring)), answer in zip(FLAGS.items(), theirs, strict=True):
        counts = {path: of_file(found, ignoring) for path, found in scans.items()}
        assert answer["files"] == {
            str(path.relative_to(library)): [count.total, count.covered]
            for path, count in counts.items()
            if count is not None and not (ignoring.init_module and path.name == "__init__.py")
        }, name


def test_one_file_is_counted_whatever_is_excluded(tmp_path: Path) -> None:
    root = put(tmp_path / "root", SHAPES)

    [theirs] = interrogate(root / "pkg/__init__.py", [["-I", "-e", str(root)]])

    found = measure(root / "pkg/__init__.py", Ignored(init_module=True, exclude=[str(root)]))
    assert (found.total, found.covered) == (theirs["total"], theirs["covered"]) == (2, 0)
    assert [file.path for file in found.files] == ["__init__.py"]


def test_files_that_interrogate_dies_on_are_listed_or_counted(tmp_path: Path) -> None:
    (tmp_path / "bom.py").write_bytes(b"\xef\xbb\xbf'''Doc.'''\n")
    (tmp_path / "latin.py").write_bytes("# coding: latin-1\ndef größe(): 'Größe.'\n".encode("latin-1"))
    (tmp_path / "good.py").write_text("def f(): ...\n")
    (tmp_path / "bytes.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "cookie.py").write_text("# coding: klingon\n")
    (tmp_path / "newer.py").write_text("def f(:\n")
    (tmp_path / "null.py").write_bytes(b"x = 1\0\n")
    (tmp_path / "away.py").symlink_to("nowhere")
    (tmp_path / "folder.py").mkdir()
    os.mkfifo(tmp_path / "pipe.py")

    found = measure(tmp_path, Ignored())

    assert {file.path: (file.total, file.covered) for file in found.files} == {
        "bom.py": (1, 1),
        "good.py": (2, 0),
        "latin.py": (2, 1),
    }
    reasons = {file.path: file.reason for file in found.skipped}
    assert reasons.keys() == {"away.py", "bytes.py", "cookie.py", "newer.py", "null.py", "pipe.py"}
    assert reasons["away.py"] == "cannot be read: No such file or directory"
    assert reasons["bytes.py"].startswith("encoding: ")
    assert reasons["cookie.py"] == "encoding: unknown encoding: klingon"
    assert reasons["newer.py"].startswith("syntax: ")
    assert reasons["pipe.py"] == "no ordinary file"
    assert (found.total, found.covered, found.missing) == (5, 2, 3)
    assert found.percent == 40.0


def test_a_folder_that_cannot_be_listed_is_skipped_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("'''Doc.'''\n")
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):
        # Deeper than the longest path that the system takes.
        os.mkdir("d" * 250, dir_fd=here)
        here, above = os.open("d" * 250, os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(here)

    found = measure(tmp_path, Ignored())

    assert [file.path for file in found.files] == ["a.py"]
    assert [file.reason for file in found.skipped] == ["cannot be read: File name too long"]
    assert found.skipped[0].path.startswith("ddd")


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        measure(tmp_path / "nowhere", Ignored())


def test_nothing_to_count_is_all_covered(tmp_path: Path) -> None:
    found = measure(tmp_path, Ignored())

    assert (found.total, found.percent, found.files) == (0, 100.0, ())


def test_counted_symbols_tell_which_are_missing() -> None:
    symbols = scan(b"'''Doc.'''\nclass A:\n    def f(self): ...\n    def g(self): 'Doc.'\n").symbols

    found = counted(symbols, Ignored(regex=[re.compile("f")]))

    assert found is not None
    assert [(symbol.name, is_covered) for symbol, is_covered in found] == [
        ("", True),
        ("A", False),
        ("A.g", True),
    ]


def test_a_share_is_rounded_to_the_decimals_of_what_is_asked_for(tmp_path: Path) -> None:
    put(tmp_path / "root", {"a.py": "'''Doc.'''\n" + "def f(): ''\n" + "def f(): 'Doc.'\n" * 1})
    [*theirs] = interrogate(
        tmp_path / "root", [["-f", asked] for asked in ("66.7", "66.67", "66.68", "67", "66", "0")]
    )

    found = measure(tmp_path / "root", Ignored())

    asked = (66.7, 66.67, 66.68, 67.0, 66.0, 0.0)
    assert [meets(found, one) for one in asked] == [answer["meets"] for answer in theirs]
    assert [meets(found, one) for one in asked] == [True, True, False, False, True, True]
    assert not meets(Count(10_000, 9_999), 100.0) or round(99.99, 1) == 100.0


def test_flags_are_named_in_one_order_whatever_order_they_were_given_in() -> None:
    patterns = [re.compile("b"), re.compile("a")]

    ignoring = Ignored(setters=True, magic=True, regex=patterns, whitelist_regex=patterns, style="google")

    assert ignoring.flags() == [
        *("--ignore-magic", "--ignore-setters", "--ignore-regex=a", "--ignore-regex=b"),
        *("--whitelist-regex=a", "--whitelist-regex=b", "--style=google"),
    ]
    assert Ignored(exclude=["a"]).flags() == []


def test_memory_does_not_grow_with_the_text_of_the_files(tmp_path: Path) -> None:
    text = "'''Doc.'''\n" + "def f(a, b):\n    return [a, b, 1, 2, 3]\n\n\n" * 30

    def peak(folder: Path, files: int) -> int:
        put(folder, {f"{number}.py": text for number in range(files)})
        measure(folder, Ignored())
        tracemalloc.start()
        measure(folder, Ignored())
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    assert peak(tmp_path / "many", 12) < 1.5 * peak(tmp_path / "few", 2)
