"""The Triton kernel under Triton's interpreter, in its own process: triton decides at import whether it interprets.

``python -m translution.conformance.interpreted CASES`` prints the rows as JSON.
"""

import json
import os
import subprocess
import sys

from translution.conformance.results import Row
from translution.conformance.verify_reductions import verify_reductions

ALGORITHM = "fused, interpreted"


def start(cases: int) -> subprocess.Popen[str]:
    """Begin the interpreted run beside this process."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "translution.conformance.interpreted", str(cases)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> list[Row]:
    """Its rows; a run that broke is a row that failed."""
    printed, errors = process.communicate()
    if process.returncode:
        last = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        return [Row("reductions", "every reduction", "triton", ALGORITHM, 0, 0.0, 0.0, False, last[0])]
    return [Row(**row) for row in json.loads(printed)]


def main() -> None:
    """Float32 values; the interpreter costs milliseconds per program, hence few cases."""
    found = verify_reductions(backends=("triton",), cases=int(sys.argv[1]), dtypes=("float32",))
    rows = [row.as_json() | ({"algorithm": ALGORITHM} if row.algorithm == "fused" else {}) for row in found]
    sys.stdout.write(json.dumps(rows))


if __name__ == "__main__":
    main()
