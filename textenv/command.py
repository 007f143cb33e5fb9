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


def check_first(folder: Path) -> None:
    """Raise ValueError if Python has found another package `agents` before ours in `folder`.

    `python -m agents` may still run our program: an editable install adds what the other package lacks.
    """
    place = Path(next(iter(sys.modules[NAME].__path__))).resolve()
    if place != folder:
        raise ValueError(
            f"{_described(place)} comes before the package {NAME!r} of textenv in {str(folder)!r}. Run `textenv` "
            "instead of `python -m agents`, or take the other one off Python's path."
        )


def _described(place: Path) -> str:
    """A folder, and the distribution that has written it, if one has."""
    for other in importlib.metadata.distributions():
        if any(
            file.parts[0] == NAME and Path(str(other.locate_file(file))).resolve().is_relative_to(place)
            for file in other.files or ()
        ):
            return f"{str(place)!r}, of the distribution {other.name!r},"
    return repr(str(place))


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
    """Say so where another package cannot be imported by its name, such as a folder of the present directory."""
    if os.environ.get("RANK", "0") != "0":
        return
    places = dict.fromkeys((Path(name) / NAME).resolve() for name in (os.getcwd(), *sys.path))
    for place in places:
        if place != folder and any(place.glob("*.py")):
            print(
                f"note: {_described(place)} has the name of a package of textenv, which comes first here. If functions "
                "of yours import from it, rename it, or work in an environment of its own.",
                file=sys.stderr,
            )
