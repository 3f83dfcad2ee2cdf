"""A backend's package as source: which modules it needs, and how to import it anew with one of them changed."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, ModuleType

from translution.conformance.mutants.blind_points import Mutation, mutated, mutations
from translution.registry import Backend


@dataclass(frozen=True, slots=True)
class Package:
    """Paths of the modules that ``import name`` reaches inside the package, by module name."""

    name: str
    paths: Mapping[str, Path]

    @classmethod
    def of(cls, name: str) -> Package:
        """The package of that name and whatever of itself it imports, whoever has imported what so far."""
        paths: dict[str, Path] = {}
        waiting = [name]
        while waiting:
            module = waiting.pop()
            if module in paths:
                continue
            spec = find_spec(module)
            if spec is None or spec.origin is None:
                raise ModuleNotFoundError(f"{module} has no source file", name=module)
            paths[module] = Path(spec.origin)
            waiting += _own_imports(ast.parse(paths[module].read_text(encoding="utf-8")), name)
        return cls(name, dict(sorted(paths.items())))

    def source(self, module: str) -> str:
        """Source text of a module."""
        return self.paths[module].read_text(encoding="utf-8")

    @property
    def fingerprint(self) -> str:
        """A digest of all sources."""
        digest = hashlib.sha256()
        for module in self.paths:
            digest.update(f"{module}\0{self.source(module)}\0".encode())
        return digest.hexdigest()[:16]

    def mutations(self) -> dict[Mutation, int]:
        """Every change of every module, with its number inside the module."""
        return {m: number for module in self.paths for number, m in enumerate(mutations(self.source(module), module))}

    def compiled(self) -> dict[str, CodeType]:
        """The code of every module as it is."""
        return {module: compile(self.source(module), str(path), "exec") for module, path in self.paths.items()}

    def changed(self, mutation: Mutation, number: int) -> CodeType:
        """The code of the mutation's module with the change made."""
        module = mutation.module
        return compile(mutated(self.source(module), number), str(self.paths[module]), "exec")

    def import_anew(self, codes: Mapping[str, CodeType]) -> Backend:
        """The ``backend`` of the package imported from ``codes``, beside the package as it is.

        Afterwards the names lead to what they led to before: laws may ask the unchanged backend what is right.
        """
        own = [m for m in sys.modules if m == self.name or m.startswith(f"{self.name}.")]
        before = {module: sys.modules.pop(module) for module in own}
        finder = _Finder(self, codes)
        sys.meta_path.insert(0, finder)
        try:
            found: Backend = import_module(self.name).backend
        finally:
            sys.meta_path.remove(finder)
            for module in codes:
                sys.modules.pop(module, None)
            for module, old in before.items():
                sys.modules[module] = old
                above, _, name = module.rpartition(".")
                if above in sys.modules:
                    setattr(sys.modules[above], name, old)
        return found


def _own_imports(tree: ast.Module, package: str) -> set[str]:
    found: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        # What a function imports when it is called is not reached by an import.
        waiting += () if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module)
            if node.module == package:
                found |= {name for alias in node.names if _is_module(name := f"{package}.{alias.name}")}
    return {name for name in found if name == package or name.startswith(f"{package}.")}


def _is_module(name: str) -> bool:
    return find_spec(name) is not None


class _Finder(MetaPathFinder, Loader):
    def __init__(self, package: Package, codes: Mapping[str, CodeType]) -> None:
        self.package, self.codes = package, codes

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.codes:
            return None
        file = self.package.paths[fullname]
        spec = ModuleSpec(fullname, self, origin=str(file), is_package=file.name == "__init__.py")
        if spec.submodule_search_locations is not None:
            spec.submodule_search_locations.append(str(file.parent))
        spec.has_location = True
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(self.codes[module.__name__], module.__dict__)
