"""Write down what the exam of this edition asks; for laws that change before the edition is released."""

import json
from pathlib import Path

from translution.conformance.exam.edition import fingerprint
from translution.conformance.exam.examine import EDITION
from translution.conformance.laws import all_laws

FILE = Path(__file__).resolve().parents[1] / "conformance" / "exam" / f"edition-{EDITION}.json"


def main() -> None:
    """Write the file beside the exam."""
    laws = {
        law.id: {"quick": law.cases["quick"], "full": law.cases["full"], "questions": fingerprint(law)}
        for law in all_laws().values()
    }
    FILE.write_text(json.dumps(laws, indent=1) + "\n", encoding="utf-8")
    print(f"{FILE}: {len(laws)} laws")


if __name__ == "__main__":
    main()
