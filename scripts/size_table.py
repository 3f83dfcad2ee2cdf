"""Print the size of each folder, and the files over the soft cap: 400 lines, 700 for kernels."""

import ast
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("spec", "translution_core", "backends", "conformance", "paper", "tests", "benchmarks", "scripts")


def docstring_lines(source: str) -> int:
    """Count the lines inside docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    total = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            total += (first.end_lineno or first.lineno) - first.lineno + 1
    return total


def main() -> None:
    """Print the table."""
    print(f"{'folder':<18}{'files':>6}{'lines':>8}{'median':>8}{'max':>6}{'comment%':>10}{'doc%':>6}")
    over = []
    for folder in FOLDERS:
        sources = {path: path.read_text() for path in sorted((ROOT / folder).rglob("*.py"))}
        sizes = {path: len(source.splitlines()) for path, source in sources.items()}
        lines = sum(sizes.values())
        if not lines:
            continue
        comments = sum(line.lstrip().startswith("#") for source in sources.values() for line in source.splitlines())
        documented = sum(map(docstring_lines, sources.values()))
        print(
            f"{folder:<18}{len(sizes):>6}{lines:>8}{statistics.median(sizes.values()):>8.0f}{max(sizes.values()):>6}"
            f"{100 * comments / lines:>10.0f}{100 * documented / lines:>6.0f}"
        )
        over += [(path, size) for path, size in sizes.items() if size > (700 if "triton" in path.parts else 400)]
    for path, size in sorted(over, key=lambda item: -item[1]):
        print(f"over the soft cap: {path.relative_to(ROOT)} ({size} lines)")


if __name__ == "__main__":
    main()
