"""Run the self-test of the exam and write its table into docs/conformance.md. Exit code 1: it does not hold."""

import argparse
import sys
from pathlib import Path

from translution.conformance.mutants.selftest import SelfTest, selftest
from translution.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "conformance.md"
BEGIN, END = "<!-- kill table: begin -->", "<!-- kill table: end -->"


def section(found: SelfTest) -> str:
    """What stands between the markers."""
    killed, passed = len(found.tested) - len(found.alive), len(found.sat) - len(found.blamed)
    figures = (
        f"{killed} of {len(found.tested)} mutants are noticed by {len(found.laws)} laws; correct backends pass "
        f"{passed} of {len(found.sat)} times. Cases are those in float64 at level quick where nothing else is said."
    )
    return f"{BEGIN}\n{figures}\n\n{found.markdown_table()}{END}"


def with_section(page: str, new: str) -> str:
    """The page with what is between its markers replaced."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE}: no {BEGIN} .. {END}")
    return f"{before}{new}{after}"


def main() -> int:
    """Run, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    jobs = parser.parse_args().jobs
    with Progress() as progress:
        found = selftest(jobs, progress.update)
    PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), section(found)), encoding="utf-8")
    print("\n".join(found.faults()) or "the self-test holds")
    return not found.holds


if __name__ == "__main__":
    sys.exit(main())
