"""Python files as a part of a fingerprint: what they say, and what they import.

Comments, docstrings, positions and formatting are no part of what code says.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE_FOLDERS = (ROOT, ROOT / "core", ROOT / "recipes")
HAVE_DOCSTRINGS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
NOT_SAID = ("kind", "type_comment", "type_ignores")  # u"text" is "text"


# -- what a file says -----------------------------------------------------------------------------


@functools.cache
def parse(source: bytes) -> ast.Module | None:
    """The syntax tree of a file; None for one that is being edited and cannot be parsed."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None


@functools.cache
def source_digest(source: bytes) -> str:
    """A digest of what a Python file says. Of one that cannot be parsed, every byte counts."""
    tree = parse(source)
    if tree is None:
        return hashlib.sha256(source).hexdigest()
    text = node_text(tree, reads_docstrings(tree))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def node_text(node: ast.AST, with_docstrings: bool) -> str:
    """A syntax tree as text, without positions. Unlike that of `ast.dump`, it is the same in all
    versions of Python: what is empty is left out."""
    parts = [type(node).__name__]
    for name, value in ast.iter_fields(node):
        if name in NOT_SAID or value is None:
            continue
        if not isinstance(value, list):
            parts.append(f"{name}={field_text(value, with_docstrings)}")
            continue
        if name == "body" and is_docstring(node) and not with_docstrings:
            value = value[1:]
        if value:
            items = ",".join(field_text(item, with_docstrings) for item in value)
            parts.append(f"{name}=[{items}]")
    return f"({' '.join(parts)})"


def field_text(value: object, with_docstrings: bool) -> str:
    return node_text(value, with_docstrings) if isinstance(value, ast.AST) else repr(value)


def is_docstring(node: ast.AST) -> bool:
    """Whether a node begins with a docstring."""
    if not isinstance(node, HAVE_DOCSTRINGS) or not node.body:
        return False
    first = node.body[0]
    if not isinstance(first, ast.Expr) or not isinstance(first.value, ast.Constant):
        return False
    return isinstance(first.value.value, str)


def reads_docstrings(tree: ast.Module) -> bool:
    """Whether a file may use docstrings, such as those of its functions as prompts. A recipe hands
    its own to `main`, for --help alone."""
    for node in walk_without_main(tree):
        if isinstance(node, ast.Name) and node.id in ("__doc__", "getdoc"):
            return True
        if isinstance(node, ast.Attribute) and node.attr in ("__doc__", "getdoc"):
            return True
    return False


def walk_without_main(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree, except for the arguments of a call main(...)."""
    yield node
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "main":
        return
    for child in ast.iter_child_nodes(node):
        yield from walk_without_main(child)


# -- what a file imports ---------------------------------------------------------------------------


@functools.cache
def imported_names(source: bytes, package: str) -> tuple[str, ...]:
    """The modules that a Python file of `package` imports, also inside its functions.

    In `from a import b`, b may be a module or a name in a: both a and a.b are listed.
    """
    tree = parse(source)
    if tree is None:
        # The file is being edited while a run goes on; its changed digest is what counts.
        return ()
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parent = package.rsplit(".", node.level - 1)[0]
                module = f"{parent}.{module}".strip(".")
            names.append(module)
            names += [f"{module}.{alias.name}" for alias in node.names]
    return tuple(names)


def candidate_files(name: str, folder: Path) -> list[Path]:
    """The files that a module may have in a folder: its own, or that of its package."""
    path = folder.joinpath(*name.split("."))
    return [Path(f"{path}.py"), path / "__init__.py"]


def find_loaded_or_beside(name: str, home_folder: Path) -> Path | None:
    """The file of a module, if it is in a folder of the repository or in `home_folder`.

    A module that an import inside a function has not loaded yet is looked up by its name, so that
    a fingerprint does not depend on what ran before.
    """
    module = sys.modules.get(name)
    if module is None:
        return find_beside(name, [ROOT, home_folder])
    file = getattr(module, "__file__", None)
    if not file:
        return None
    path = Path(file).resolve()
    # Not what is installed: a package of the home folder is named by its path.
    is_own = path.parent in (*CODE_FOLDERS, home_folder)
    is_own = is_own or path in candidate_files(name, home_folder)
    return path if is_own and path.is_file() else None


def find_beside(name: str, folders: Iterable[Path]) -> Path | None:
    """The file of a module in the first of these folders that has it."""
    for folder in folders:
        for candidate in candidate_files(name, folder):
            if candidate.is_file():
                return candidate.resolve()
    return None


def find_code(names: Iterable[str], home_folder: Path) -> dict[str, Path]:
    """{module: file} of the modules `names` of this process, and of all that they import, directly
    or not."""

    def find(name: str) -> tuple[Path | None, str]:
        package = getattr(sys.modules.get(name), "__package__", None) or name.rpartition(".")[0]
        return find_loaded_or_beside(name, home_folder), package

    return follow_imports(names, find)


def find_code_of_file(path: Path) -> dict[str, Path]:
    """{module: file} of a Python file that a process of its own imports (core/function_server.py),
    and of what it imports: from beside it, or from the repository."""
    path = path.resolve()
    folders = [path.parent, ROOT]

    def find(name: str) -> tuple[Path | None, str]:
        if name == path.stem:
            return path, ""
        file = find_beside(name, folders)
        is_package = file is not None and file.name == "__init__.py"
        return file, name if is_package else name.rpartition(".")[0]

    return follow_imports([path.stem], find)


def follow_imports(names: Iterable[str], find) -> dict[str, Path]:
    """{module: file} of the modules `names` and of what they import; `find(name)` returns the file
    of a module, or None, and its package."""
    files: dict[str, Path] = {}
    # Modules import each other: without this set a module would be read once for each path to it.
    seen = set()
    queue = list(names)
    while queue:
        name = queue.pop()
        if not name or name in seen:
            continue
        seen.add(name)
        queue.append(name.rpartition(".")[0])  # Python runs the package of a module first
        path, package = find(name)
        if path is None:
            continue
        files[name] = path
        queue += imported_names(path.read_bytes(), package)
    return files


def named_digests(files: Iterable[Path], home_folder: Path) -> dict[str, str]:
    """{name: digest of what it says} of Python files."""
    digests = {shown_name(path, home_folder): source_digest(path.read_bytes()) for path in files}
    return dict(sorted(digests.items()))


def shown_name(path: Path, home_folder: Path) -> str:
    """What a file is called in a record: its path in the repository, or in `home_folder`. Two
    folders may have a file of the same name."""
    for folder in (ROOT, home_folder):
        if path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    return path.name
