from __future__ import annotations

from pathlib import Path

import pytest

from codeherd_producer.backfill.inheritance import Inheritance
from codeherd_producer.backfill.scanner import Scan, scan

BASE = '''
class Base:
    def run(self):
        """Go."""
    def stop(self):
        pass
'''
OWN = """
class Own({base}):
    def run(self):
        return 1
    def stop(self):
        return 1
"""


class Repository:
    """Files by path, and which of them were read."""

    def __init__(self, home: Path, files: dict[str, str]) -> None:
        self.home = home
        self.read: list[str] = []
        for name, text in files.items():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(text)
        self.inheritance = Inheritance(home, [home / name for name in files], self.load)

    def load(self, file: Path) -> Scan | None:
        self.read.append(file.relative_to(self.home).as_posix())
        return scan(file.read_bytes())

    def described(self, name: str) -> set[str]:
        """Return the methods of a file that some base class describes."""
        file = self.home / name
        methods = [symbol for symbol in scan(file.read_bytes()).symbols if symbol.kind == "method"]
        return {method.name for method in methods if self.inheritance.describes(file, method)}


def described(home: Path, files: dict[str, str], name: str = "pkg/own.py") -> set[str]:
    return Repository(home, files).described(name)


@pytest.mark.parametrize(
    ("imports", "base"),
    [
        ("from pkg.base import Base", "Base"),
        ("from pkg.base import Base as B", "B"),
        ("from .base import Base", "Base"),
        ("from . import base", "base.Base"),
        ("from . import base as b", "b.Base"),
        ("import pkg.base", "pkg.base.Base"),
        ("import pkg.base as b", "b.Base"),
        ("from .base import *", "Base"),
        ("from . import Base", "Base"),
        ("from pkg import Again", "Again"),
        ("from .base import Base", "Base[int]"),
        ("from .base import Base", "Other, Base, metaclass=Meta"),
        ("if 1:\n    from .base import Base", "Base"),
        ("try:\n    from .base import Base\nexcept ImportError:\n    from pkg.base import Base", "Base"),
        (BASE, "Base"),
        (BASE + "class Between(Base): pass\n", "Between"),
        ("from .base import Base\nclass Between(Base): pass\n", "Between"),
        ("class Outer:\n" + BASE.replace("\n", "\n    "), "Outer.Base"),
        ("from .base import Base as Own", "Own"),
    ],
)  # fmt: skip
def test_a_base_class_is_found_by_its_name(tmp_path: Path, imports: str, base: str) -> None:
    files = {
        "pkg/__init__.py": "from .base import Base\nfrom pkg.base import Base as Again\n",
        "pkg/base.py": BASE,
        "pkg/own.py": f"{imports}\n{OWN.format(base=base)}",
    }

    assert described(tmp_path, files) - {"Base.run"} == {"Own.run"}


@pytest.mark.parametrize(
    ("imports", "base"),
    [
        ("", "Base"),
        ("def f():\n    from .base import Base", "Base"),
        ("from .gone import Base", "Base"),
        ("from .base import Gone", "Gone"),
        ("from elsewhere import Base", "Base"),
        ("import base", "base.Base"),
        ("from ........ import base", "base.Base"),
        ("from .base import Base", "make(Base)"),
        ("from .base import Base", "*bases"),
        # Either may be meant.
        ("try:\n    from elsewhere import Base\nexcept ImportError:\n    from .base import Base", "Base"),
        ("from .base import Base\nclass Base:\n    pass\n", "Base"),
        ("if 1:\n    class B:\n        def run(self):\n            'x'\nelse:\n    class B: pass\n", "B"),
        ("if 1:\n    class B: pass\nelse:\n    class B:\n        def run(self):\n            'x'\n", "B"),
        ("from .twice import Base", "Base"),
        # Round and round.
        ("from .own import Own", "Own"),
        ("class A(Own): pass\n", "A"),
        ("from .round import Base", "Base"),
    ],
)
def test_on_doubt_nothing_is_described(tmp_path: Path, imports: str, base: str) -> None:
    files = {
        "pkg/__init__.py": "",
        "pkg/base.py": BASE,
        "pkg/twice.py": BASE + "try:\n    from fast import Base\nexcept ImportError:\n    pass\n",
        "pkg/round.py": "from .round import Base\nfrom .round import *\n",
        "pkg/own.py": f"{imports}\n{OWN.format(base=base)}",
    }

    assert described(tmp_path, files) - {"B.run"} == set()


def test_a_class_in_two_branches_is_described_if_each_of_them_is(tmp_path: Path) -> None:
    either = """
if 1:
    class Own(Base):
        def run(self):
            return 1
else:
    class Own(%s):
        pass
"""

    both = described(tmp_path, {"a.py": BASE + either % "Base"}, "a.py")
    one = described(tmp_path, {"a.py": BASE + either % "object"}, "a.py")

    assert (both, one) == ({"Own.run"}, set())


def test_classes_inside_of_functions_and_classes_see_what_is_around_them(tmp_path: Path) -> None:
    inner = "    " + (BASE + OWN.format(base="Base")).replace("\n", "\n    ")

    assert described(tmp_path, {"a.py": f"class Outer:\n{inner}\n"}, "a.py") == {"Outer.Own.run"}
    assert described(tmp_path, {"a.py": f"def f():\n{inner}\n"}, "a.py") == {"f.<locals>.Own.run"}


def test_other_packages_of_the_repository_are_found_by_their_full_name(tmp_path: Path) -> None:
    files = {
        "libs/a/src/apkg/__init__.py": "",
        "libs/a/src/apkg/base.py": BASE,
        "libs/b/src/own.py": "from apkg.base import Base\n" + OWN.format(base="Base"),
        # What is called `apkg.base` is none of these.
        "other/__init__.py": "",
        "other/apkg/__init__.py": "",
        "other/apkg/base.py": "class Base: pass\n",
        "xapkg/base.py": "class Base: pass\n",
    }

    assert described(tmp_path / "one", files, "libs/b/src/own.py") == {"Own.run"}
    twice = files | {"old/apkg/base.py": BASE}
    assert described(tmp_path / "two", twice, "libs/b/src/own.py") == set()


def test_a_module_of_the_standard_library_is_not_one_of_the_same_name_elsewhere(tmp_path: Path) -> None:
    own = "from json import Base\n" + OWN.format(base="Base")
    files = {"tools/json.py": BASE, "pkg/__init__.py": "", "pkg/own.py": own, "tools/own.py": own}

    assert described(tmp_path, files, "pkg/own.py") == set()
    # Its neighbour does hide it.
    assert described(tmp_path, files, "tools/own.py") == {"Own.run"}


def test_what_lies_outside_is_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text(BASE)
    (tmp_path / "__init__.py").write_text("")
    own = "from .. import outside\n" + OWN.format(base="outside.Base")

    assert described(tmp_path / "home", {"own.py": own}, "own.py") == set()


def test_files_are_read_when_they_are_needed_and_once(tmp_path: Path) -> None:
    own = "from .base import Base\nfrom .never import x\n" + OWN.format(base="Base")
    files = {"pkg/__init__.py": "", "pkg/base.py": BASE, "pkg/never.py": "x = 1\n", "pkg/own.py": own}
    repository = Repository(tmp_path, files)
    repository.inheritance.add(tmp_path / "pkg/own.py", scan(own.encode()))

    assert repository.described("pkg/own.py") == {"Own.run"}
    assert repository.read == ["pkg/base.py"]


def test_a_long_row_of_base_classes_ends(tmp_path: Path) -> None:
    code = BASE + "".join(f"class C{n}({f'C{n - 1}' if n else 'Base'}): pass\n" for n in range(300))

    near = described(tmp_path, {"a.py": code + OWN.format(base="C20")}, "a.py")
    far = described(tmp_path, {"a.py": code + OWN.format(base="C299")}, "a.py")

    assert (near, far) == ({"Own.run"}, set())
