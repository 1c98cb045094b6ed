"""Make each .ipynb from its .py: `make notebooks` runs them, `make colab` fills in a repository.

    python notebooks/build.py                        run all notebooks on the real model
    python notebooks/build.py 02_dpo 04_rl           run these
    python notebooks/build.py --colab OWNER/NAME     write the repository into badge and set-up cell

The .py files are Python, so the shell commands of the set-up cell are comments there; in the .ipynb
they are live.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent

# An indented comment with a shell command or a magic of IPython: "    # !git clone ...".
COMMENTED_COMMAND = re.compile(r"^([ ]+)# (?=[!%])", re.MULTILINE)
# Where a notebook names its repository. In a .ipynb, which is JSON, quotes have a backslash.
REPOSITORY_PATTERNS = (
    re.compile(r'(?<=REPOSITORY = ")(https://github\.com/)[^/"]+/[^/"]+(?=")'),
    re.compile(r'(?<=REPOSITORY = \\")(https://github\.com/)[^/"]+/[^/"\\]+(?=\\")'),
    re.compile(r"(https://colab\.research\.google\.com/github/)[^/]+/[^/]+(?=/blob/)"),
)
OWNER_AND_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9._-]+")


def find_sources(folder: Path) -> list[Path]:
    """The sources of the notebooks, 00_quickstart.py and so on, in order."""
    return sorted(folder.glob("[0-9]*.py"))


def read_notebook(source: Path):
    """The notebook of a .py, without outputs, its commands live."""
    import jupytext

    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # random ones would make every run a difference
        if cell.cell_type == "code":
            cell.source = COMMENTED_COMMAND.sub(r"\1", cell.source)
    notebook.metadata.pop("jupytext", None)
    notebook.metadata.kernelspec = {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    }
    return notebook


def run_notebook(source: Path) -> None:
    """Run the notebook of `source`, and write it with its outputs beside it."""
    import nbformat
    from nbclient import NotebookClient

    notebook = read_notebook(source)
    resources = {"metadata": {"path": str(source.parent)}}
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources=resources).execute()
    nbformat.write(notebook, source.with_suffix(".ipynb"))


def fill_repository(folder: Path, repository: str) -> None:
    """Write OWNER/NAME into REPOSITORY, and into badge and set-up cell of all notebooks in `folder`.

    Raises ValueError if `repository` is anything else. Outputs of the notebooks stay.
    """
    if not OWNER_AND_NAME.fullmatch(repository):
        raise ValueError(f"{repository!r} is not the name of a repository; write OWNER/NAME")
    for path in (*find_sources(folder), *sorted(folder.glob("[0-9]*.ipynb"))):
        text = path.read_text(encoding="utf-8")
        for pattern in REPOSITORY_PATTERNS:
            text = pattern.sub(rf"\g<1>{repository}", text)
        path.write_text(text, encoding="utf-8")
    (folder / "REPOSITORY").write_text(repository + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="notebooks to run; all by default")
    parser.add_argument("--colab", metavar="OWNER/NAME", help="fill in this repository; run none")
    arguments = parser.parse_args()
    if arguments.colab is not None:
        try:
            fill_repository(FOLDER, arguments.colab)
        except ValueError as error:
            parser.error(str(error))
        return

    sources = {source.stem: source for source in find_sources(FOLDER)}
    for name in arguments.names or sources:
        if name not in sources:
            parser.error(f"there is no notebook {name}; choose from {', '.join(sources)}")
        started = time.perf_counter()
        run_notebook(sources[name])
        minutes = (time.perf_counter() - started) / 60
        print(f"{name}: {minutes:.1f} minutes", file=sys.stderr)


if __name__ == "__main__":
    main()
