"""An edition is a fixed exam: which laws, how many cases, and what is asked in them, written down as fingerprints.

``edition-2026.1.json`` beside this file holds them. A release that asks something else makes a new edition.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import json
from typing import Any

from translution.conformance.exam.draws import Rejected
from translution.conformance.exam.examine import EDITION, draws_for
from translution.conformance.exam.law import QUICK, Law, Trial
from translution.conformance.exam.question import Question
from translution.conformance.exam.subject import LiveSubject, NotClaimed
from translution.registry import get_backend
from translution.spec.serialization import operator_to_data


def written(edition: str = EDITION) -> dict[str, Any]:
    """What was written down: law id to ``quick``, ``full`` and ``questions``."""
    file = importlib.resources.files("translution.conformance.exam") / f"edition-{edition}.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _told(question: Question) -> list[Any]:
    """Structure, not values: these come from NumPy's generators, which may change between its versions."""
    arrays = (question.x, question.y, question.mask, question.cotangent)
    shapes = [None if array is None else [array.dtype.name, *array.shape] for array in arrays]
    return [operator_to_data(question.operator), shapes, question.return_weights]


def fingerprint(law: Law, edition: str = EDITION) -> str:
    """What the first quick cases of a law ask in float64, as a hash of the operators and the shapes."""
    subject = LiveSubject(get_backend("numpy"), "pairwise", "float64")
    if not law.applies_to("float64"):
        subject = LiveSubject(get_backend("numpy"), "pairwise", (law.dtypes or ("float32",))[0])
    digest = hashlib.sha256()
    for number in range(law.cases[QUICK]):
        trial = Trial(subject, draws_for(law, number, edition))
        with contextlib.suppress(NotClaimed, Rejected):
            law.body(trial)
        digest.update(json.dumps([_told(question) for question in trial.asked], sort_keys=True).encode())
    return digest.hexdigest()[:16]
