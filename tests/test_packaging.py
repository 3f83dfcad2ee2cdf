"""The house: what is installed, under which names, and who may import whom."""

import ast
import importlib.metadata
import importlib.resources
import importlib.util
import re
import resource
import statistics
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS: dict[str, str] = PYPROJECT["tool"]["setuptools"]["package-dir"]

# A module may import from its own layer and from those before it.
LAYERS = ("spec", "core", "nn", "backends", "conformance", "paper", "cli")
# The modules of translution_core/ that are the command line: they sit on top, and import the layers below lazily.
COMMAND_LINE = (
    "__main__", "cli", "command_files", "conform_command", "experiment_command", "paper_command", "pick_command",
    "scale_command", "display", "selection_display",
)  # fmt: skip
# What a module may import when it is itself imported; within a function any declared dependency will do.
THIRD_PARTY = {
    "spec": set(),
    "core": {"numpy"},
    "core.graph": {"numpy", "torch"},  # imported where torch makes a graph, and by nothing else
    "nn": {"torch"},  # layers of PyTorch; they reach a backend through translution.run alone
    "cli": {"numpy", "typer", "rich"},
    "backends": {"numpy"},
    "backends.reference": {"numpy"},
    "backends.numpy": {"numpy"},
    "backends.torch": {"numpy", "torch"},
    "backends.torch.compiled": {"numpy", "torch", "llvmlite"},  # imported where it is asked for
    "backends.triton": {"numpy", "torch", "triton"},
    "conformance": {"numpy", "torch", "hypothesis", "pytest"},
    "paper": {"numpy", "torch", "PIL", "filelock", "matplotlib", "mlxtend", "safetensors", "scipy"},
}
# Distributions whose name is not that of their module.
DISTRIBUTIONS = {"PIL": "pillow"}


class Import(NamedTuple):
    """One imported name: `from a import b` is a.b."""

    name: str
    line: int
    level: int
    lazy: bool
    only_for_types: bool

    @property
    def is_eager(self) -> bool:
        return not (self.lazy or self.only_for_types)

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


def modules() -> Iterator[tuple[str, Path]]:
    """Yield the dotted name and the source file of each module that is installed."""
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *(part for part in parts if part != "__init__"))), path


MODULES = dict(modules())


def place(name: str) -> str:
    """Return where a dotted name lives: a layer, or one backend."""
    parts = name.split(".")[1:2]
    if parts in (["spec"], ["nn"], ["conformance"], ["paper"]):
        return parts[0]
    if parts == ["backends"]:
        one_backend = ".".join(name.split(".")[1:3])
        return one_backend if one_backend in THIRD_PARTY else "backends"
    if parts == ["graph"]:
        return "core.graph"
    return "cli" if parts and parts[0] in COMMAND_LINE else "core"


def closest(name: str) -> str:
    """Return the innermost of the places that have their own libraries."""
    inner = ".".join(name.split(".")[1:4])
    return inner if inner in THIRD_PARTY else place(name)


def layer(name: str) -> int:
    return LAYERS.index(place(name).partition(".")[0])


def imports(path: Path) -> list[Import]:
    """Return all imports of a file, wherever they stand."""
    found = []

    def visit(node: ast.AST, lazy: bool, only_for_types: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, 0, lazy, only_for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found.extend(Import(name, node.lineno, node.level, lazy, only_for_types) for name in names)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typed = only_for_types or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            visit(child, inside, typed)

    visit(ast.parse(path.read_text()), lazy=False, only_for_types=False)
    return found


def all_imports() -> Iterator[tuple[str, str, Import]]:
    """Yield module, "file:line" and import for all that is installed."""
    for module, path in MODULES.items():
        for found in imports(path):
            yield module, f"{path.relative_to(ROOT)}:{found.line}", found


def is_third_party(found: Import) -> bool:
    return found.top not in sys.stdlib_module_names | {"translution"}


def wanted(*, without: str | None = None) -> list[Requirement]:
    """Return what the package asks for, with all extras but one."""
    project = PYPROJECT["project"]
    extras = (texts for extra, texts in project["optional-dependencies"].items() if extra != without)
    everything = [*project["dependencies"], *(text for texts in extras for text in texts)]
    return [Requirement(text) for text in everything if not text.startswith("translution[")]


def pins() -> dict[str, str]:
    """Return distribution -> version from requirements/; anything that is not an exact pin is an error."""
    found = {}
    for file in sorted((ROOT / "requirements").glob("*.txt")):
        for text in file.read_text().splitlines():
            if text and not text.startswith(("#", "-r ")):
                requirement = Requirement(text)
                (specifier,) = requirement.specifier
                assert specifier.operator == "==", f"{file.name}: {text} is not pinned"
                found[canonicalize_name(requirement.name)] = specifier.version
    return found


def python(code: str, *, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a new, isolated interpreter, away from the work tree."""
    command = [sys.executable, "-I", "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=60)


# What is installed


def test_packages_are_exactly_the_folders_on_disk() -> None:
    on_disk = {name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in MODULES.items()}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == on_disk
    assert all((path.parent / "__init__.py").exists() for path in MODULES.values())


@pytest.mark.parametrize("package", PYPROJECT["tool"]["setuptools"]["packages"])
def test_installed_package_is_the_tree(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    installed = {path.name: path.read_bytes() for path in Path(spec.origin).parent.glob("*.py")}
    in_tree = {path.name: path.read_bytes() for path in MODULES[package].parent.glob("*.py")}
    assert installed.keys() == in_tree.keys()
    assert [name for name in in_tree if installed[name] != in_tree[name]] == []


def test_nothing_but_translution_at_top_level(tmp_path: Path) -> None:
    names = sorted({Path(folder).parts[0] for folder in FOLDERS.values()})
    find = f"from importlib.util import find_spec; print([name for name in {names} if find_spec(name)])"
    assert python(find, folder=tmp_path).stdout.strip() == "[]"

    files = importlib.metadata.files("translution")
    assert files is not None
    tops = {path.parts[0] for path in files if path.parts[0] not in ("..", "__pycache__")}
    ours = re.compile(r"translution(-[\d.]+\.dist-info)?|__editable__.*")
    assert [top for top in tops if not ours.fullmatch(top)] == []


def test_typing_marker_is_shipped() -> None:
    assert (importlib.resources.files("translution") / "py.typed").is_file()


def test_schemas_are_shipped() -> None:
    in_tree = {path.name for path in (ROOT / "spec" / "schema").glob("*.json")}
    shipped = {item.name for item in (importlib.resources.files("translution.spec") / "schema").iterdir()}
    assert in_tree
    assert in_tree <= shipped


def test_no_tests_in_installed_folders() -> None:
    patterns = re.compile(r"test_.*|.*_test|conftest")
    assert [str(path) for path in MODULES.values() if patterns.fullmatch(path.stem)] == []


def test_version_is_declared_once() -> None:
    version = PYPROJECT["project"]["version"]
    assert importlib.metadata.version("translution") == version
    headings = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == version
    again = re.compile(r"__version__\s*(:\s*\w+\s*)?=\s*[\"']")
    assert [name for name, path in MODULES.items() if again.search(path.read_text())] == []


def test_pins_are_within_the_declared_bounds() -> None:
    pinned = pins()
    unmet = [str(item) for item in wanted() if pinned[canonicalize_name(item.name)] not in item.specifier]
    assert unmet == []


def test_ci_calls_what_the_readme_shows() -> None:
    shown = set(re.findall(r"^make \w+", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    assert {"make verify", "make test"} <= shown
    assert shown <= set((ROOT / ".ci" / "run").read_text().splitlines())


# Who may import whom


def test_imports_are_absolute() -> None:
    assert [where for _, where, found in all_imports() if found.level] == []


def test_imports_go_one_way() -> None:
    wrong = [
        f"{where}: {place(module)} imports {found.name}"
        for module, where, found in all_imports()
        if found.top == "translution" and layer(found.name) > layer(module)
    ]
    assert wrong == []


def test_command_line_is_lazy_about_the_layers_below() -> None:
    wrong = [
        f"{where}: {found.name}"
        for module, where, found in all_imports()
        if place(module) == "cli"
        and found.top == "translution"
        and found.is_eager
        and place(found.name) not in ("spec", "core", "cli")
    ]
    assert wrong == []


def test_no_backend_imports_another() -> None:
    wrong = [
        f"{where}: {place(module)} imports {found.name}"
        for module, where, found in all_imports()
        if place(module).startswith("backends")
        and place(found.name).startswith("backends.")
        and found.top == "translution"
        and place(module) != place(found.name)
    ]
    assert wrong == []


def test_optional_libraries_are_imported_where_they_belong() -> None:
    wrong = [
        f"{where}: {place(module)} imports {found.name}"
        for module, where, found in all_imports()
        if is_third_party(found) and found.is_eager and found.top not in THIRD_PARTY[closest(module)]
    ]
    assert wrong == []


def test_every_import_is_declared() -> None:
    declared = {canonicalize_name(item.name) for item in wanted(without="dev")}
    wrong = [
        f"{where}: {found.name}"
        for _, where, found in all_imports()
        if is_third_party(found) and canonicalize_name(DISTRIBUTIONS.get(found.top, found.top)) not in declared
    ]
    assert wrong == []


def test_the_import_reader_sees_every_kind_of_import(tmp_path: Path) -> None:
    source = """
import a.b
from .c import d
if TYPE_CHECKING:
    import e
class C:
    import f
    def g(self):
        from translution.backends import torch
"""
    (tmp_path / "module.py").write_text(source)
    assert imports(tmp_path / "module.py") == [
        Import("a.b", 2, 0, lazy=False, only_for_types=False),
        Import("c.d", 3, 1, lazy=False, only_for_types=False),
        Import("e", 5, 0, lazy=False, only_for_types=True),
        Import("f", 7, 0, lazy=False, only_for_types=False),
        Import("translution.backends.torch", 9, 0, lazy=True, only_for_types=False),
    ]


ONLY_NUMPY = """
import sys

class OnlyNumPy:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in sys.stdlib_module_names | {"numpy", "translution"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, OnlyNumPy())
"""
WITHOUT_OPTIONAL = (
    "translution", "translution.spec", "translution.backends.reference", "translution.backends.numpy",
    "translution.paper",
)  # fmt: skip


@pytest.mark.parametrize("module", WITHOUT_OPTIONAL)
def test_import_needs_numpy_alone(module: str, tmp_path: Path) -> None:
    result = python(f"{ONLY_NUMPY}\nimport {module}", folder=tmp_path)
    assert result.returncode == 0, result.stderr


def test_the_import_blocker_blocks(tmp_path: Path) -> None:
    result = python(f"{ONLY_NUMPY}\nimport rich", folder=tmp_path)
    assert "rich is blocked" in result.stderr


def test_import_loads_numpy_alone(tmp_path: Path) -> None:
    """Nothing optional is imported just because it happens to be installed."""
    code = """
import sys
before = set(sys.modules)
import translution
tops = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(tops - sys.stdlib_module_names - {"numpy", "translution"}))
"""
    result = python(code, folder=tmp_path)
    assert result.stdout.strip() == "[]", result.stderr


# The command


COMMANDS = {
    "script": [str(Path(sysconfig.get_path("scripts")) / "translution")],
    "module": [sys.executable, "-m", "translution"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_answers_at_once(name: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """The bound is on processor time, which a busy neighbour can't stretch; wall time is reported beside it."""
    wall, processor = [], []
    for _ in range(7):
        start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [*COMMANDS[name], "--help"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
        wall.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor.append(after.ru_utime - used.ru_utime + after.ru_stime - used.ru_stime)
        assert result.returncode == 0, result.stderr
        assert "verify" in result.stdout
    medians = f"{statistics.median(wall):.2f} wall, {statistics.median(processor):.2f} processor"
    record_property("median seconds", medians)
    assert statistics.median(processor) < 0.5


def test_help_loads_no_heavy_library(tmp_path: Path) -> None:
    heavy = {"torch", "triton", "transformers", "matplotlib", "hypothesis", "scipy", "pandas"}
    code = f"""
import sys
from translution.cli import main
sys.argv = ["translution", "--help"]
try:
    main()
except SystemExit as ended:
    assert not ended.code
print({heavy} & set(sys.modules), file=sys.stderr)
"""
    result = python(code, folder=tmp_path)
    assert result.stderr.strip() == "set()"
