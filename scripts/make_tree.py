"""Lay out build/tree/translution as it is installed: one symlink per module.

Type checkers can't follow an editable install whose folders are mapped to other names.
"""

import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "tree"


def make_tree() -> int:
    """Build the tree anew and return its number of modules."""
    folders: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    shutil.rmtree(TREE, ignore_errors=True)
    modules = 0
    for package, folder in folders.items():
        for source in (ROOT / folder).rglob("*.py"):
            link = TREE.joinpath(*package.split("."), source.relative_to(ROOT / folder))
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source)
            modules += 1
    (TREE / "translution" / "py.typed").symlink_to(ROOT / folders["translution"] / "py.typed")
    return modules


if __name__ == "__main__":
    print(f"{make_tree()} modules under {TREE.relative_to(ROOT)}")
