"""Tell whether a base class describes a method already, so that a new docstring would hide its words.

Owns: which class a name means, in its file or through the imports of others, as far as that can be told
without running anything. On doubt nothing is described. Knows only files below one folder, reads each when
it is first asked for, and keeps of it the names of classes, their bases and their documented methods.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from codeherd_producer.backfill.scanner import Import, Scan, Symbol

#: Files that are remembered; about ten kilobytes each.
_MOST_FILES: Final = 1_024
#: Classes above one another, and files that hand a name on.
_DEEPEST: Final = 50


@dataclass(frozen=True, slots=True)
class _Class:
    """One definition of a class."""

    #: As written.
    bases: tuple[str, ...]
    #: Names of methods with a docstring of their own.
    documented: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Outline:
    """What is kept of a file."""

    #: By qualified name; a class in two branches has two definitions.
    classes: Mapping[str, tuple[_Class, ...]]
    imports: tuple[Import, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """A class, by file and qualified name."""

    file: Path
    name: str


class Inheritance:
    """The classes of a repository."""

    def __init__(self, home: Path, files: Iterable[Path], load: Callable[[Path], Scan | None]) -> None:
        """Prepare; nothing is read yet.

        Args:
            home: absolute; what lies outside is not looked at.
            files: absolute paths that modules may be looked for in.
            load: gives a file's scan, None if it cannot be read.
        """
        self._home = home
        self._load = load
        self._files = files
        self._by_last_word: dict[str, list[Path]] | None = None
        self._outlines: OrderedDict[Path, _Outline] = OrderedDict()
        self._import_roots: dict[Path, Path] = {}

    def add(self, file: Path, scan: Scan) -> None:
        """Remember a file that was read for other reasons."""
        self._outlines[file] = _outline_of(scan)
        self._outlines.move_to_end(file)
        if len(self._outlines) > _MOST_FILES:
            self._outlines.popitem(last=False)

    def describes(self, file: Path, method: Symbol) -> bool:
        """Whether some class above the method's own documents a method of this name."""
        owner, _, name = method.name.rpartition(".")
        place = _Place(file, owner)
        return self._is_above(place, name, (place,))

    def _is_above(self, place: _Place, method: str, path: tuple[_Place, ...]) -> bool:
        """Whether the bases of every definition of a class have a documented method."""
        definitions = self._outline(place.file).classes.get(place.name, ())
        return bool(definitions) and all(
            any(self._has(place, base, method, path) for base in one.bases) for one in definitions
        )

    def _has(self, place: _Place, base: str, method: str, path: tuple[_Place, ...]) -> bool:
        """Whether a base, by whatever it may mean, documents a method or inherits it documented."""
        meant = self._meant(place, base)
        return bool(meant) and all(one is not None and self._documents(one, method, path) for one in meant)

    def _documents(self, place: _Place, method: str, path: tuple[_Place, ...]) -> bool:
        if place in path or len(path) > _DEEPEST:
            return False
        definitions = self._outline(place.file).classes.get(place.name, ())
        if definitions and all(method in one.documented for one in definitions):
            return True
        return self._is_above(place, method, (*path, place))

    def _meant(self, place: _Place, base: str) -> list[_Place | None]:
        """Return every class that a base, as written in a class's header, may mean; None is one unknown."""
        name = base.partition("[")[0]
        if not all(part.isidentifier() for part in name.split(".")):
            return []
        classes = self._outline(place.file).classes
        scopes = (place.name[: len(place.name) - cut] for cut in _cuts(place.name))
        local = next((scope + name for scope in scopes if scope + name in classes), None)
        if local == place.name:
            # `class A(A)` means an A from before.
            local = None
        return [
            *([_Place(place.file, local)] if local is not None else []),
            *self._imported(place.file, name, 0),
        ]

    def _imported(self, file: Path, name: str, depth: int) -> list[_Place | None]:
        """Return what a dotted name may mean by the imports of a file."""
        head, _, rest = name.partition(".")
        imports = self._outline(file).imports
        found = [self._followed(file, one, rest, depth) for one in imports if one.name == head]
        if found:
            return found
        stars = [self._module(file, one.module) for one in imports if one.name == "*"]
        from_stars = [self._named(module, name, depth) for module in stars if module is not None]
        return [one for one in from_stars if one is not None]

    def _followed(self, file: Path, one: Import, rest: str, depth: int) -> _Place | None:
        if one.attribute is not None:
            inner = f"{one.module}{'' if one.module.endswith('.') else '.'}{one.attribute}"
            module = self._module(file, inner) if rest else None
            if module is not None:
                return self._named(module, rest, depth)
            module = self._module(file, one.module)
            return None if module is None else self._named(module, _dotted(one.attribute, rest), depth)
        words = rest.split(".")
        # `import a` and then `a.b.c.Base`: the longest module that there is.
        for count in range(len(words) - 1, -1, -1):
            module = self._module(file, ".".join([one.module, *words[:count]]))
            if module is not None:
                return self._named(module, ".".join(words[count:]), depth)
        return None

    def _named(self, file: Path, name: str, depth: int) -> _Place | None:
        """Return the class that a module knows by this name, its own or one that it hands on."""
        if not name or depth > _DEEPEST:
            return None
        imported = self._imported(file, name, depth + 1)
        if name in self._outline(file).classes:
            return None if imported else _Place(file, name)
        # More than one origin is doubt.
        return imported[0] if len(set(imported)) == 1 else None

    def _outline(self, file: Path) -> _Outline:
        if file not in self._outlines:
            scan = self._load(file)
            self.add(file, scan if scan is not None else _NOTHING)
        self._outlines.move_to_end(file)
        return self._outlines[file]

    def _module(self, importer: Path, module: str) -> Path | None:
        """Return the file of a module, as its importer calls it."""
        dotted = module.lstrip(".")
        words = dotted.split(".") if dotted else []
        level = len(module) - len(dotted)
        if level:
            folder = importer.parents[level - 1] if level <= len(importer.parents) else self._home
            return self._at(folder, words)
        found = self._at(self._import_root(importer.parent), words)
        if found is not None or words[0] in sys.stdlib_module_names:
            return found
        places = [file for file in self._candidates(words[-1]) if self._is_called(file, words)]
        return places[0] if len(places) == 1 else None

    def _at(self, folder: Path, words: list[str]) -> Path | None:
        path = folder.joinpath(*words)
        if not path.is_relative_to(self._home):
            return None
        places = [path / "__init__.py", *([path.with_name(f"{path.name}.py")] if words else [])]
        return next((file for file in places if file.is_file()), None)

    def _import_root(self, folder: Path) -> Path:
        """Return the folder that a package's topmost folder lies in."""
        if folder not in self._import_roots:
            is_package = (folder / "__init__.py").is_file() and folder.parent != folder
            self._import_roots[folder] = self._import_root(folder.parent) if is_package else folder
        return self._import_roots[folder]

    def _is_called(self, file: Path, words: list[str]) -> bool:
        """Whether a file may be the module of this name; inside of a package that has the package's."""
        found = _words_of(file)
        fewest = len(found) - len(self._import_root(file.parent).parts)
        return fewest <= len(words) and found[-len(words) :] == tuple(words)

    def _candidates(self, word: str) -> list[Path]:
        if self._by_last_word is None:
            self._by_last_word = {}
            for file in self._files:
                self._by_last_word.setdefault(_words_of(file)[-1], []).append(file)
        return self._by_last_word.get(word, [])


def _outline_of(scan: Scan) -> _Outline:
    definitions: dict[str, list[tuple[Symbol, set[str]]]] = {}
    # A class comes before its methods.
    for symbol in scan.symbols:
        if symbol.kind == "class":
            definitions.setdefault(symbol.name, []).append((symbol, set()))
        owner, _, name = symbol.name.rpartition(".")
        if symbol.kind == "method" and symbol.is_documented:
            for one, documented in definitions.get(owner, ()):
                if one.line <= symbol.line <= one.end_line:
                    documented.add(name)
    classes = {
        name: tuple(_Class(one.bases, frozenset(documented)) for one, documented in twins)
        for name, twins in definitions.items()
    }
    return _Outline(classes, scan.imports)


def _cuts(name: str) -> Iterator[int]:
    """Yield how many last characters of a qualified name to take away for each scope, innermost first."""
    outer = name
    while outer:
        outer = outer.rpartition(".")[0]
        yield len(name) - len(outer) - bool(outer)


def _dotted(first: str, rest: str) -> str:
    return f"{first}.{rest}" if rest else first


def _words_of(file: Path) -> tuple[str, ...]:
    return file.parts[:-1] if file.name == "__init__.py" else (*file.parts[:-1], file.stem)


#: Of a file that cannot be read.
_NOTHING: Final = Scan("utf-8", False, "", (), (), ())
