r"""Find every class and function of one Python file, and the exact place where its docstring goes.

Owns: decoding, the symbols, what a docstring may say about each (parameters, raises, returns), where names
of other modules come from, and positions. Does not decide what gets a docstring (`selection`), and changes
nothing (`editor`). Standard library only, in one file: another interpreter runs it for syntax that this one
does not know,

    python scanner.py < file.py     prints the scan as JSON, on one line
    python scanner.py --many        for each file a line with its number of bytes, then these: the same

Positions are characters of the decoded text without a byte order mark. Structure comes from `ast`,
positions from `tokenize`, both of the text with `\n` line ends: rows and columns are those of the file.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import functools
import hashlib
import io
import json
import re
import sys
import tokenize
import warnings
from collections.abc import Iterator
from typing import Any

#: UTF-8's byte order mark.
BOM = b"\xef\xbb\xbf"
#: What has a name, a header and a body.
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
#: What ends a line of Python; `str.splitlines` knows eight more, which are ordinary characters here.
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z")


class Unreadable(Exception):
    """The file is no Python that this interpreter reads; the message says why, in a few words."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One name in a signature."""

    name: str
    #: As written; None without.
    annotation: str | None
    #: "", "*" or "**".
    stars: str


@dataclasses.dataclass(frozen=True)
class Import:
    """One name that comes from elsewhere, outside of functions."""

    #: As this file calls it; "*" is every name.
    name: str
    #: As written, with the dots of a relative import before it.
    module: str
    #: What is taken out of the module; None for the module itself.
    attribute: str | None


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A module, class or function, and where its docstring is or would be."""

    #: As in `__qualname__`: `A.f`, `f.<locals>.g`; "" is the module.
    name: str
    #: Number among the symbols of the same name, from 0: branches and overloads define a name twice.
    twin: int
    #: `module`, `class`, `function` or `method`.
    kind: str
    is_async: bool
    #: Is defined inside a function.
    is_nested: bool
    #: First and last line, from 1, decorators not counted.
    line: int
    end_line: int
    #: First character: that of the first decorator if there is one.
    start: int
    #: Where the lines of a docstring go; None for a body on the header's line, which has `one_line`.
    insert_at: int | None
    #: From after the colon to the body's first token; None for a block.
    one_line: tuple[int, int] | None
    #: White space before each line of the body; for `one_line`, what lines of its own would have.
    indent: str
    #: What ends the header's line.
    newline: str
    #: The line after `insert_at` is blank, or there is none.
    is_blank_after: bool
    #: The docstring's value; None without. One of white space alone counts as missing.
    docstring: str | None
    #: From the first quote to the last, with prefix and parentheses as the statement has them.
    docstring_span: tuple[int, int] | None
    #: Decorators as written, without `@`.
    decorators: tuple[str, ...]
    #: Base classes as written.
    bases: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    returns: str | None
    #: Whether a value is returned, or yielded, by the function itself.
    gives_value: bool
    yields: bool
    #: Names of exceptions that are raised by the function itself, in order, once each.
    raises: tuple[str, ...]
    #: Statements of the body without the docstring, and whether all are `pass`, `...` or constants.
    statements: int
    is_trivial: bool
    #: Code of this file reads or sets the symbol's `__doc__`.
    is_doc_used: bool
    #: A class that keeps `__doc__` in a slot: with a docstring Python refuses to make it.
    has_doc_slot: bool

    @property
    def is_documented(self) -> bool:
        """Whether there is a docstring that says something."""
        return self.docstring is not None and self.docstring.strip() != ""


@dataclasses.dataclass(frozen=True)
class Scan:
    """One file."""

    encoding: str
    has_bom: bool
    #: Without the byte order mark.
    text: str
    symbols: tuple[Symbol, ...]
    #: In the order of the file.
    imports: tuple[Import, ...]
    #: First and last line, from 1, of each import at the top level.
    import_lines: tuple[tuple[int, int], ...]
    #: Of a scan by another interpreter: stands for the meaning of the code without any docstring. None for
    #: one by this interpreter, which can look at the code itself.
    shape: str | None = None

    def encoded(self, text: str) -> bytes:
        """Return a text in this file's encoding.

        Raises:
            UnicodeEncodeError: the encoding lacks a character.
        """
        return (BOM if self.has_bom else b"") + text.encode(self.encoding)


def scan(raw: bytes) -> Scan:
    """Find the symbols of a file.

    Raises:
        Unreadable: unknown encoding, wrong bytes, or syntax that this interpreter does not know.
    """
    encoding, text = _decoded(raw)
    has_bom = raw.startswith(BOM)
    with warnings.catch_warnings():
        # Of the user's own escapes and comparisons.
        warnings.simplefilter("ignore")
        try:
            lines = _LINE.findall(text)
            unix = "".join(_unix(line) for line in lines)
            tree = ast.parse(unix)
            tokens = list(tokenize.generate_tokens(io.StringIO(unix, newline="").readline))
            uses = _Uses(tree)
            symbols = tuple(_Finder(text, lines, unix, tokens, uses.documents).symbols(tree))
        except (SyntaxError, ValueError, tokenize.TokenError) as err:
            raise Unreadable(f"syntax: {getattr(err, 'msg', None) or err}") from err
        except (RecursionError, MemoryError) as err:
            raise Unreadable("nested too deeply for this interpreter") from err
    import_lines = tuple(
        (node.lineno, node.end_lineno or node.lineno)
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    )
    return Scan(encoding, has_bom, text, symbols, tuple(uses.imports), import_lines)


def _decoded(raw: bytes) -> tuple[str, str]:
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        encoding = "utf-8" if encoding == "utf-8-sig" else encoding
        body = raw.removeprefix(BOM)
        text = body.decode(encoding)
    except (SyntaxError, LookupError, UnicodeDecodeError) as err:
        raise Unreadable(f"encoding: {getattr(err, 'msg', None) or err}") from err
    try:
        is_same = text.encode(encoding) == body
    except UnicodeError:
        is_same = False
    if not is_same:
        raise Unreadable(f"encoding: {encoding} does not give the same bytes back")
    return encoding, text


def _unix(line: str) -> str:
    return line.rstrip("\r\n") + "\n" if line.endswith(("\r", "\n")) else line


class _Finder:
    """Matches the tree's definitions with the tokens of their headers."""

    def __init__(
        self, text: str, lines: list[str], unix: str, tokens: list[tokenize.TokenInfo], documents: set[str]
    ) -> None:
        self._text = text
        self._documents = documents
        self._lines = lines
        self._unix_lines = unix.split("\n")
        self._tokens = tokens
        self._starts = [0]
        for line in lines:
            self._starts.append(self._starts[-1] + len(line))
        self._places = {token.start: place for place, token in enumerate(tokens)}
        self._twins: dict[str, int] = {}

    def symbols(self, tree: ast.Module) -> Iterator[Symbol]:
        yield self._module(tree)
        # Not recursive: generated code nests deeper than Python's stack.
        waiting: list[tuple[ast.AST, str, bool, bool]] = [(tree, "", False, False)]
        found: list[Symbol] = []
        while waiting:
            parent, prefix, in_class, in_function = waiting.pop()
            for node in ast.iter_child_nodes(parent):
                if not isinstance(node, DEFINITIONS):
                    waiting.append((node, prefix, in_class, in_function))
                    continue
                name = prefix + node.name
                found.append(self._symbol(node, name, in_class, in_function))
                is_class = isinstance(node, ast.ClassDef)
                inner = f"{name}." if is_class else f"{name}.<locals>."
                waiting.append((node, inner, is_class, in_function or not is_class))
        for symbol in sorted(found, key=lambda one: (one.line, one.start)):
            twin = self._twins.get(symbol.name, 0)
            self._twins[symbol.name] = twin + 1
            yield dataclasses.replace(symbol, twin=twin) if twin else symbol

    def _module(self, tree: ast.Module) -> Symbol:
        value, span = self._docstring(tree)
        first = next((t for t in self._tokens if t.type not in _QUIET), None)
        # Below the first comments: shebang, coding, licence.
        at = self._starts[first.start[0] - 1] if first is not None and tree.body else len(self._text)
        return Symbol(
            name="", twin=0, kind="module", is_async=False, is_nested=False,
            line=1, end_line=len(self._lines), start=0, insert_at=at, one_line=None,
            indent="", newline=self._newline(0), is_blank_after=False,
            docstring=value, docstring_span=span,
            decorators=(), bases=(), parameters=(), returns=None, gives_value=False, yields=False, raises=(),
            statements=len(tree.body), is_trivial=_is_trivial(tree.body),
            is_doc_used="" in self._documents, has_doc_slot=False,
        )  # fmt: skip

    def _symbol(self, node: Any, name: str, in_class: bool, in_function: bool) -> Symbol:
        is_class = isinstance(node, ast.ClassDef)
        at = self._place(node)
        colon = self._colon(at)
        after = colon + 1
        while self._tokens[after].type == tokenize.COMMENT:
            after += 1
        if self._tokens[after].type == tokenize.NEWLINE:
            row = self._tokens[after].start[0]
            insert_at: int | None = self._starts[row]
            one_line = None
            indent = self._indent(after)
        else:
            row = self._tokens[after].start[0]
            insert_at = None
            one_line = (self._offset(self._tokens[colon].end), self._offset(self._tokens[after].start))
            indent = self._deeper(self._indent_of(node.lineno - 1))
        value, span = self._docstring(node)
        facts = _Facts(node)
        first = min([node, *node.decorator_list], key=lambda one: (one.lineno, one.col_offset))
        start = self._offset((first.lineno, self._column(first)))
        if first is not node:
            # Back to the `@`, which may be lines above in parentheses' company.
            start = self._text.rindex("@", 0, start)
        return Symbol(
            name=name, twin=0,
            kind="class" if is_class else "method" if in_class else "function",
            is_async=isinstance(node, ast.AsyncFunctionDef), is_nested=in_function,
            line=node.lineno, end_line=node.end_lineno, start=start,
            insert_at=insert_at, one_line=one_line, indent=indent, newline=self._newline(row - 1),
            is_blank_after=insert_at is not None and self._is_blank(row),
            docstring=value, docstring_span=span,
            decorators=tuple(ast.unparse(one) for one in node.decorator_list),
            bases=tuple(ast.unparse(one) for one in node.bases) if is_class else (),
            parameters=() if is_class else tuple(_parameters(node.args)),
            returns=None if is_class or node.returns is None else ast.unparse(node.returns),
            gives_value=facts.gives_value, yields=facts.yields, raises=facts.raises,
            statements=len(node.body) - (value is not None),
            is_trivial=_is_trivial(node.body),
            is_doc_used=name in self._documents, has_doc_slot=is_class and _has_doc_slot(node),
        )  # fmt: skip

    def _place(self, node: Any) -> int:
        """Return the place of the token `def`, `async` or `class`."""
        return self._places[(node.lineno, self._column(node))]

    def _colon(self, place: int) -> int:
        """Return the place of the colon that ends a header."""
        depth = lambdas = 0
        while True:
            token = self._tokens[place]
            if token.type == tokenize.OP:
                if token.string in "([{":
                    depth += 1
                elif token.string in ")]}":
                    depth -= 1
                elif token.string == ":" and depth == 0:
                    if not lambdas:
                        return place
                    lambdas -= 1
            elif token.type == tokenize.NAME and token.string == "lambda" and depth == 0:
                lambdas += 1
            place += 1

    def _indent(self, place: int) -> str:
        """Return the indentation of the block that begins after the header's end at `place`."""
        while self._tokens[place].type in _BETWEEN:
            place += 1
        token = self._tokens[place]
        if token.type == tokenize.INDENT:
            # A form feed starts the columns anew.
            return token.string.rpartition("\f")[2]
        # A backslash at the beginning of a line hides it from `tokenize`.
        return self._indent_of(token.start[0] - 1)

    def _indent_of(self, row: int) -> str:
        """Return the indentation of the logical line that a row begins, or goes on after backslashes."""
        indent = _white(self._lines[row])
        while row and self._lines[row - 1].strip(" \t\f\r\n") == "\\":
            row -= 1
            # The first that there is counts.
            indent = _white(self._lines[row]) or indent
        return indent

    def _deeper(self, indent: str) -> str:
        """Return the indentation of a block inside a line: one step more, as most blocks here have it."""
        fitting = [step for step in self._steps if indent.endswith(step)] or self._steps
        return indent + (fitting[0] if fitting else "\t" if indent.endswith("\t") else "    ")

    @functools.cached_property
    def _steps(self) -> list[str]:
        """What the file's blocks are indented by, most usual first."""
        steps: collections.Counter[str] = collections.Counter()
        around = [""]
        for token in self._tokens:
            if token.type == tokenize.INDENT:
                indent = token.string.rpartition("\f")[2]
                if indent.startswith(around[-1]):
                    steps[indent[len(around[-1]) :]] += 1
                around.append(indent)
            elif token.type == tokenize.DEDENT:
                around.pop()
        return [step for step, _ in steps.most_common() if step]

    def _docstring(self, node: Any) -> tuple[str | None, tuple[int, int] | None]:
        if not node.body or not isinstance(node.body[0], ast.Expr):
            return None, None
        value = node.body[0].value
        if not isinstance(value, ast.Constant) or not isinstance(value.value, str):
            return None, None
        statement: Any = node.body[0]
        start = self._offset((statement.lineno, self._column(statement)))
        return value.value, (start, self._offset((statement.end_lineno, self._end_column(statement))))

    def _column(self, node: Any) -> int:
        return _characters(self._unix_lines[node.lineno - 1], node.col_offset)

    def _end_column(self, node: Any) -> int:
        return _characters(self._unix_lines[node.end_lineno - 1], node.end_col_offset)

    def _offset(self, position: tuple[int, int]) -> int:
        return self._starts[position[0] - 1] + position[1]

    def _newline(self, row: int) -> str:
        line = self._lines[row] if row < len(self._lines) else ""
        if row and not line.endswith(("\r", "\n")):
            # The last line of a file may lack an end.
            line = self._lines[row - 1]
        return "\r\n" if line.endswith("\r\n") else line[-1:] if line.endswith(("\r", "\n")) else "\n"

    def _is_blank(self, row: int) -> bool:
        return row >= len(self._lines) or not self._lines[row].strip(" \t\f\r\n")


#: Tokens before the first statement.
_QUIET = frozenset({tokenize.COMMENT, tokenize.NL, tokenize.ENCODING})
#: Tokens between a header and its block.
_BETWEEN = frozenset({tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE})


def _white(line: str) -> str:
    return line[: len(line) - len(line.lstrip(" \t\f"))].rpartition("\f")[2]


def _characters(line: str, column: int) -> int:
    """Turn a column in UTF-8 bytes, as `ast` counts, into one in characters."""
    return column if line.isascii() else len(line.encode("utf-8", "surrogatepass")[:column].decode("utf-8"))


class _Uses:
    """What a file takes from other modules, and whose `__doc__` it names."""

    def __init__(self, tree: ast.Module) -> None:
        self.imports: list[Import] = []
        #: Names of symbols, and of what only looks like one.
        self.documents: set[str] = set()
        # Node, prefix of names, the class around, innermost scope is a class, is in a function.
        waiting: list[tuple[ast.AST, str, str | None, bool, bool]] = [(tree, "", None, False, False)]
        while waiting:
            node, prefix, around, in_class, in_function = waiting.pop()
            if isinstance(node, (ast.Import, ast.ImportFrom)) and not in_function:
                self.imports += _imports(node)
            elif isinstance(node, ast.Name) and node.id == "__doc__":
                # In a class body it is the class's own, elsewhere the module's.
                self.documents.add(around if in_class and around is not None else "")
            else:
                self.documents |= _documents(node, prefix, around)
            if isinstance(node, ast.ClassDef):
                around, in_class = prefix + node.name, True
                prefix = f"{around}."
            elif isinstance(node, _FUNCTIONS):
                prefix, in_class, in_function = f"{prefix}{node.name}.<locals>.", False, True
            children = list(ast.iter_child_nodes(node))
            waiting += [(one, prefix, around, in_class, in_function) for one in reversed(children)]


def _imports(node: ast.Import | ast.ImportFrom) -> Iterator[Import]:
    for alias in node.names:
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield Import(alias.asname or alias.name, module, alias.name)
        elif alias.asname is not None:
            yield Import(alias.asname, alias.name, None)
        else:
            # `import a.b` gives the name `a`.
            top = alias.name.partition(".")[0]
            yield Import(top, top, None)


def _documents(node: ast.AST, prefix: str, around: str | None) -> set[str]:
    """Return what `x.__doc__` or `getdoc(x)` may mean here, as names of symbols."""
    if isinstance(node, ast.Attribute) and node.attr == "__doc__":
        whose = node.value
    elif isinstance(node, ast.Call) and node.args and _own_name(node.func) == "getdoc":
        whose = node.args[0]
    else:
        return set()
    text = ast.unparse(whose)
    if text in ("__main__", "sys.modules[__name__]", "sys.modules['__main__']"):
        return {""}
    head, dot, rest = text.partition(".")
    if text in ("type(self)", "self.__class__"):
        head, dot, rest = "self", "", ""
    if head in ("self", "cls", "__class__") and around is not None:
        return {around + dot + rest}
    # A name of this scope, or of the file.
    return {text, prefix + text}


class _Facts:
    """What a function itself does: nested functions and classes do their own."""

    def __init__(self, node: Any) -> None:
        self.gives_value = self.yields = False
        raises: dict[str, None] = {}
        waiting: list[ast.AST] = list(reversed(node.body)) if isinstance(node, _FUNCTIONS) else []
        while waiting:
            one = waiting.pop()
            if isinstance(one, ast.Return):
                is_none = isinstance(one.value, ast.Constant) and one.value.value is None
                self.gives_value |= one.value is not None and not is_none
            elif isinstance(one, (ast.Yield, ast.YieldFrom)):
                self.yields = True
            elif isinstance(one, ast.Raise) and one.exc is not None:
                error = one.exc.func if isinstance(one.exc, ast.Call) else one.exc
                if isinstance(error, (ast.Name, ast.Attribute)) and _looks_like_class(error):
                    raises[ast.unparse(error)] = None
            if not isinstance(one, (*DEFINITIONS, ast.Lambda)):
                waiting.extend(reversed(list(ast.iter_child_nodes(one))))
        self.raises = tuple(raises)


def _looks_like_class(error: ast.Name | ast.Attribute) -> bool:
    # `raise err` names a variable.
    return _own_name(error).lstrip("_")[:1].isupper()


def _own_name(expression: ast.AST) -> str:
    """Return `c` for `a.b.c` and for `c`, and nothing for what is no name."""
    if isinstance(expression, ast.Attribute):
        return expression.attr
    return expression.id if isinstance(expression, ast.Name) else ""


def _has_doc_slot(node: ast.ClassDef) -> bool:
    for one in node.body:
        if isinstance(one, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and one.value is not None:
            targets = one.targets if isinstance(one, ast.Assign) else [one.target]
            if any(isinstance(target, ast.Name) and target.id == "__slots__" for target in targets):
                words = (word.value for word in ast.walk(one.value) if isinstance(word, ast.Constant))
                if "__doc__" in words:
                    return True
    return False


def _parameters(arguments: ast.arguments) -> Iterator[Parameter]:
    groups: list[tuple[str, list[ast.arg]]] = [
        ("", [*arguments.posonlyargs, *arguments.args]),
        ("*", [arguments.vararg] if arguments.vararg else []),
        ("", arguments.kwonlyargs),
        ("**", [arguments.kwarg] if arguments.kwarg else []),
    ]
    for stars, members in groups:
        for one in members:
            annotation = None if one.annotation is None else ast.unparse(one.annotation)
            yield Parameter(one.arg, annotation, stars)


def _is_trivial(body: list[ast.stmt]) -> bool:
    return all(
        isinstance(one, ast.Pass) or (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))
        for one in body
    )


def from_json(document: dict[str, Any]) -> Scan:
    """Return the scan that `python scanner.py` printed."""
    symbols = []
    for fields in document["symbols"]:
        lists: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        lists["parameters"] = tuple(Parameter(**one) for one in fields["parameters"])
        symbols.append(Symbol(**lists))
    imports = tuple(Import(**one) for one in document["imports"])
    lines = tuple((first, last) for first, last in document["import_lines"])
    found = Scan(document["encoding"], document["has_bom"], document["text"], tuple(symbols), imports, lines)
    return dataclasses.replace(found, shape=document["shape"])


def _document(raw: bytes) -> dict[str, Any]:
    try:
        found = scan(raw)
        return dataclasses.asdict(dataclasses.replace(found, shape=_shape(found)))
    except Unreadable as err:
        return {"error": str(err)}


def _shape(found: Scan) -> str:
    """Return a digest of the syntax tree without any docstring; it says too whether the code compiles."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(found.text)
            compiles = _compiles(found.text)
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, *DEFINITIONS)) and ast.get_docstring(node) is not None:
                    del node.body[0]
            said = ast.dump(tree)
        except (RecursionError, MemoryError, ValueError) as err:
            raise Unreadable("nested too deeply for this interpreter") from err
    return f"{hashlib.sha256(said.encode('utf-8', 'surrogatepass')).hexdigest()} {compiles}"


def _compiles(text: str) -> bool:
    try:
        compile(text, "<file>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True


def main() -> int:
    """Scan standard input, one file or many; print each scan, or why there is none."""
    if sys.argv[1:] == ["--many"]:
        while size := sys.stdin.buffer.readline():
            sys.stdout.write(json.dumps(_document(sys.stdin.buffer.read(int(size)))) + "\n")
            sys.stdout.flush()
    else:
        sys.stdout.write(json.dumps(_document(sys.stdin.buffer.read())) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
