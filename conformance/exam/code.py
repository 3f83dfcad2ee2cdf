"""A fingerprint of the code that results depend on, so that an exam does not go on with another."""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from translution.registry import BACKENDS, Backend

LIBRARY = "translution"
# The library's folders may lie apart where it is installed for development.
PARTS = ("translution.spec", "translution.backends", "translution.conformance")
SOURCES = frozenset(
    ".py .pyx .so .pyd .dll .dylib .c .cc .cpp .cu .cuh .h .hpp .cl .metal .ptx .cubin .wasm".split()  # noqa: SIM905
)
# So many bytes are read, of the rest size and time count; so many files are looked at in a package.
MOST_BYTES, MOST_FILES = 2**24, 4000
IMPORTS = re.compile(rb"^[ \t]*(?:from[ \t]+(\w[\w.]*)|import[ \t]+(\w.*))", re.MULTILINE)
NOT_FOUND = "not found"


def code_of(backend: str | Backend) -> dict[str, str]:
    """By module or package, a fingerprint of the code that a backend's results depend on. Nothing is imported.

    Of the backend's package, of what that imports and is not installed, and of this library where it is not installed,
    the contents of all source files count; of what is installed beside the backend, the version. Imports by a computed
    name are not seen, nor is the state of a backend that is an object.
    """
    module = BACKENDS.get(backend, backend) if isinstance(backend, str) else type(backend).__module__
    module = module.partition(":")[0]
    own, waiting, found, room = module.partition(".")[0], [module, LIBRARY], dict[str, str](), MOST_BYTES
    seen = {name for name in sys.stdlib_module_names if name != own}
    while waiting:
        name = waiting.pop()
        if name in seen or name.partition(".")[0] in seen:
            continue
        home, roots = _home(name)
        seen |= {name, home}
        if home in found:
            continue
        top = home.partition(".")[0]
        known = _version(top)
        if not roots or (top != own and _is_installed(roots[0])):
            if known or top == own:
                found[home] = known or NOT_FOUND
            continue
        told = hashlib.sha256()
        for path, within in _files(roots):
            content, size = _content(path, room)
            room -= size
            told.update(f"{within}\0{len(content)}\0".encode() + content)
            if top != LIBRARY and path.suffix == ".py":
                waiting += _imports(content)
        found[home] = f"{known} sha256 {told.hexdigest()[:16]}".strip()
    return found


def _home(name: str) -> tuple[str, list[Path]]:
    """The outermost package or module on the way to a dotted name that is no mere namespace; its files and folders."""
    parts, locations = name.split("."), None
    for n in range(1, len(parts) + 1):
        home = ".".join(parts[:n])
        spec = _spec(home, locations)
        if spec is None:
            return home, []
        locations = list(spec.submodule_search_locations or ())
        if spec.origin is not None and spec.has_location:
            roots = locations or [spec.origin]
            if home == LIBRARY:
                found = [_spec(part, locations) for part in PARTS]
                roots += [one for part in found if part for one in part.submodule_search_locations or ()]
            return home, [Path(root) for root in roots if Path(root).exists()]
    return name, []


def _spec(name: str, locations: Sequence[str] | None) -> importlib.machinery.ModuleSpec | None:
    """As the process in which a backend is examined would find it: the folder of the command comes first."""
    if name == "__main__":
        file = getattr(sys.modules[name], "__file__", None)
        return None if file is None else importlib.util.spec_from_file_location(name, file)
    if locations is None:
        more = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        found = importlib.machinery.PathFinder.find_spec(name, [str(Path.cwd()), *more, *sys.path])
        if found is not None:
            return found
    for finder in sys.meta_path:
        found = finder.find_spec(name, locations) if hasattr(finder, "find_spec") else None
        if found is not None:
            return found
    return None


def _files(roots: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Source files, each once, and their paths within their roots."""
    seen = set[Path]()
    for root in roots:
        if root.is_file():
            yield root, root.name
            continue
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if name[0] != "." and name != "__pycache__")
            for name in sorted(names):
                path = Path(folder, name)
                if path.suffix in SOURCES and path not in seen and path.is_file():
                    seen.add(path)
                    yield path, str(path.relative_to(root))
            if len(seen) >= MOST_FILES:
                return


def _content(path: Path, room: int) -> tuple[bytes, int]:
    """What the file holds and its size; where that is more than ``room``, or can't be read, what is known of it."""
    try:
        state = path.stat()
        if state.st_size <= room:
            return path.read_bytes(), state.st_size
        return f"{state.st_size} {state.st_mtime_ns}".encode(), room
    except OSError as error:
        return str(error.errno).encode(), 0


def _imports(content: bytes) -> Iterator[str]:
    """What a file imports by its full name."""
    for origin, names in IMPORTS.findall(content):
        for name in names.split(b",") if names else [origin]:
            if words := name.split():
                found = words[0].decode(errors="replace")
                if all(part.isidentifier() for part in found.split(".")):
                    yield found


@functools.cache
def _installed() -> tuple[Path, ...]:
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return tuple(Path(path) for path in (*paths, site.getusersitepackages()) if path)


def _is_installed(path: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in _installed())


def _version(name: str) -> str:
    """Of the distribution of that name; "" where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
