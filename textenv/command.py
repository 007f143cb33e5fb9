"""The command `textenv`, which runs the `agents` that came with this package, whatever else has that name.

`python -m agents` runs the first `agents` on Python's path: a folder `agents/` in the present directory comes before
ours. The command takes ours from beside this package, so it works in such a folder too. It cannot help where another
distribution has written its files over ours: both commands then stop with a sentence.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import Any

NAME = "agents"


def main() -> None:
    """Run the command line as `textenv`."""
    folder = Path(__file__).resolve().parents[1] / NAME
    try:
        check_whole(folder)
        _load(folder)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    _tell_hidden(folder)
    sys.path.insert(0, os.getcwd())  # as `python -m` does: rewards and prompts may be functions of modules here
    program: Any = importlib.import_module(f"{NAME}.__main__")
    program.start("textenv")


def check_whole(folder: Path) -> None:
    """Raise ValueError if another distribution has replaced files of ours in `folder`, and name it.

    Packages of one name share a folder, and pip does not notice: what is installed later wins.
    """
    try:
        own = importlib.metadata.distribution("textenv")
    except importlib.metadata.PackageNotFoundError:  # used from its source tree alone
        return
    replaced = {
        str(file)
        for file in own.files or ()
        if file.parts[0] == NAME
        and Path(str(own.locate_file(file))).resolve().is_relative_to(folder)
        and _differs(file)
    }
    if not replaced:
        return
    for other in importlib.metadata.distributions():
        common = sorted(replaced & {str(file) for file in other.files or ()})
        if other.name != own.name and common:
            raise ValueError(
                f"the distribution {other.name!r} has a package {NAME!r} too, and has replaced {common[0]} of textenv "
                f"in {str(folder)!r}. Install the two in environments of their own, or remove it: pip uninstall "
                f"{other.name}, then pip install --force-reinstall --no-deps textenv."
            )


def _differs(file: importlib.metadata.PackagePath) -> bool:
    """Whether a file is there and is not what was installed, by the hash that was noted then."""
    path = Path(str(file.locate()))
    if file.hash is None or file.hash.mode not in hashlib.algorithms_available or not path.is_file():
        return False
    digest = hashlib.new(file.hash.mode, path.read_bytes()).digest()
    return urlsafe_b64encode(digest).decode().rstrip("=") != file.hash.value


def _load(folder: Path) -> None:
    """Make `import agents` mean the package in `folder`. Raises ValueError if there is none."""
    file = folder / "__init__.py"
    if not file.is_file():
        raise ValueError(f"no package {NAME!r} beside textenv in {str(folder.parent)!r}; install textenv again.")
    spec: Any = importlib.util.spec_from_file_location(NAME, file, submodule_search_locations=[str(folder)])
    sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def _tell_hidden(folder: Path) -> None:
    """Say so where a package of the present directory cannot be imported by its name."""
    here = Path.cwd() / NAME
    if here.resolve() != folder and any(here.glob("*.py")) and os.environ.get("RANK", "0") == "0":
        print(
            f"note: {str(here)!r} has the name of a package of textenv, which comes first here. If functions of yours "
            f"import from it, rename it.",
            file=sys.stderr,
        )
