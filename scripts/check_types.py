"""Run mypy (strict) and pyright over build/tree, and check that each of them saw every module."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from make_tree import ROOT, TREE, make_tree

BIN = Path(sys.executable).parent


def run_mypy() -> tuple[bool, int]:
    """Return whether mypy found nothing and how many files it checked."""
    command = [BIN / "mypy", TREE / "translution"]
    environment = os.environ | {"MYPYPATH": str(TREE)}
    result = subprocess.run(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, check=False)
    print(f"mypy: {result.stdout}", end="")
    counted = re.search(r"(?:checked |in )(\d+) source files?", result.stdout)
    return result.returncode == 0, int(counted[1]) if counted else 0


def run_pyright() -> tuple[bool, int]:
    """Return whether pyright found nothing and how many files it checked."""
    command = [BIN / "pyright", "--pythonpath", sys.executable, "--outputjson"]
    result = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=False)
    report = json.loads(result.stdout)
    for found in report["generalDiagnostics"]:
        path = Path(found["file"])
        line = found.get("range", {"start": {"line": 0}})["start"]["line"] + 1
        print(f"{path.relative_to(ROOT)}:{line}: {found['severity']}: {found['message']} ({found.get('rule', '-')})")
    summary = report["summary"]
    print(f"pyright: {summary['errorCount']} errors, {summary['filesAnalyzed']} files")
    return result.returncode == 0, summary["filesAnalyzed"]


def main() -> int:
    """Return 0 if both are content with every module."""
    modules = make_tree()
    failures = []
    for name, check in (("mypy", run_mypy), ("pyright", run_pyright)):
        content, files = check()
        if not content:
            failures.append(f"{name} found errors")
        if files != modules:
            failures.append(f"{name} checked {files} of {modules} modules")
    print("\n".join(failures) or f"types hold in {modules} modules")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
