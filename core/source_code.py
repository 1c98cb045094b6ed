"""Python files as part of a fingerprint: digests of their code, and their imports.

Comments, docstrings, positions and formatting do not change a digest.
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
NOT_SAID = ("kind", "type_comment", "type_ignores")  # ignored: u"text" is "text"


# -- the digest of a file -------------------------------------------------------------------------


@functools.cache
def parse(source: bytes) -> ast.Module | None:
    """The syntax tree of a file; None if it cannot be parsed, for example while being edited."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None


@functools.cache
def source_digest(source: bytes) -> str:
    """A digest of the code in a Python file, or of all its bytes if it cannot be parsed."""
    tree = parse(source)
    if tree is None:
        return hashlib.sha256(source).hexdigest()
    text = node_text(tree, reads_docstrings(tree))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def node_text(node: ast.AST, with_docstrings: bool) -> str:
    """A syntax tree as text, without positions. Unlike `ast.dump` it omits empty fields, so that it
    is the same in all versions of Python."""
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
    """Whether a file may use docstrings, for example as prompts. The docstring that a recipe passes
    to `main` does not count: it is only for --help."""
    for node in walk_without_main(tree):
        if isinstance(node, ast.Name) and node.id in ("__doc__", "getdoc"):
            return True
        if isinstance(node, ast.Attribute) and node.attr in ("__doc__", "getdoc"):
            return True
    return False


def walk_without_main(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a tree, except the arguments of a call main(...)."""
    yield node
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "main":
        return
    for child in ast.iter_child_nodes(node):
        yield from walk_without_main(child)


# -- the imports of a file -------------------------------------------------------------------------


@functools.cache
def imported_names(source: bytes, package: str) -> tuple[str, ...]:
    """The modules that a Python file of `package` imports, including inside functions.

    In `from a import b`, b may be a module or a name in a: both a and a.b are listed.
    """
    tree = parse(source)
    if tree is None:
        # The file is being edited during a run; its changed digest is enough.
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
    """The possible files of a module in a folder: NAME.py, or NAME/__init__.py."""
    path = folder.joinpath(*name.split("."))
    return [Path(f"{path}.py"), path / "__init__.py"]


def find_loaded_or_beside(name: str, home_folder: Path) -> Path | None:
    """The file of a module, if it is in a folder of the repository or in `home_folder`.

    A module that has not been loaded yet, because it is imported inside a function, is looked up by
    name, so that a fingerprint does not depend on what ran before.
    """
    module = sys.modules.get(name)
    if module is None:
        return find_beside(name, [ROOT, home_folder])
    file = getattr(module, "__file__", None)
    if not file:
        return None
    path = Path(file).resolve()
    # Not installed packages: a package in the home folder is recognized by its path.
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
    """{module: file} of the modules `names` in this process and of everything that they import,
    directly or indirectly."""

    def find(name: str) -> tuple[Path | None, str]:
        package = getattr(sys.modules.get(name), "__package__", None) or name.rpartition(".")[0]
        return find_loaded_or_beside(name, home_folder), package

    return follow_imports(names, find)


def find_code_of_file(path: Path) -> dict[str, Path]:
    """{module: file} of a Python file that a separate process imports (core/function_server.py),
    and of what it imports from its folder or the repository."""
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
    """{module: file} of the modules `names` and of what they import; `find(name)` returns (file of
    a module or None, its package)."""
    files: dict[str, Path] = {}
    # Without this set, a module would be read once for each import path to it.
    seen = set()
    queue = list(names)
    while queue:
        name = queue.pop()
        if not name or name in seen:
            continue
        seen.add(name)
        queue.append(name.rpartition(".")[0])  # Python imports the package of a module first
        path, package = find(name)
        if path is None:
            continue
        files[name] = path
        queue += imported_names(path.read_bytes(), package)
    return files


def named_digests(files: Iterable[Path], home_folder: Path) -> dict[str, str]:
    """{name: digest of the code} of Python files."""
    digests = {shown_name(path, home_folder): source_digest(path.read_bytes()) for path in files}
    return dict(sorted(digests.items()))


def shown_name(path: Path, home_folder: Path) -> str:
    """The name of a file in a record: its path in the repository or in `home_folder`, because two
    folders may have files of the same name."""
    for folder in (ROOT, home_folder):
        if path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    return path.name
