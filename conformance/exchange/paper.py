"""What is written where. Everything that a reader in another language has to know stands here.

``exam.json``::

    schema      "translution/exam"
    version     1
    edition, level, dtypes, breadth, chosen_laws, versions
    laws        [{id, statement, clauses}]
    operators   [operator JSON, clause P2]
    questions   [{id, kind, dtype, operator, file, answers}]
    cases       [{law, dtype, number, questions: [id]}]

A question's ``kind`` is ``run`` (answer ``out``), ``weights`` (``out`` and ``weights``) or ``vjp`` (``out`` and a
``gradient.NAME`` for every parameter, for x, and for y where there is a y). ``operator`` is an index into
``operators``; ``answers`` has the shape of every array that is asked for. Questions that several laws ask are written
once: the id is a digest of the question.

``file`` is a safetensors file with

    x             [.., Nq, Cq]
    y             [.., Nk, Ck], or absent where keys and values are x
    mask          BOOL (true = may attend) or a number added to logits, as many axes as [.., H, Nq, Nk], each of full
                  size or 1; or absent
    params.NAME   every parameter
    cotangent     shaped like out; kind ``vjp`` alone
    expected.NAME, bound.NAME
                  F64: what is right for each array of ``answers``, and how far an answer may be from it in each element
                  (NaN and Inf are expected exactly where ``expected`` has them). A backend can check itself with these;
                  what is marked are the laws, which ask for more.

Numbers are F64 for float64, otherwise F32: every float16 and bfloat16 value is a float32 value too. Answers are in the
question's dtype, or for float16 and bfloat16 in F32 that holds only such values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from translution.conformance.exam.question import Array, Question
from translution.spec.serialization import operator_to_data

SCHEMA = "translution/exam"
VERSION = 1
EXAM, QUESTIONS, MANIFEST = "exam.json", "questions", "manifest.json"
SUFFIX = ".safetensors"

Kind = Literal["run", "weights", "vjp"]

# safetensors' name of a dtype, and the NumPy dtype of its bytes.
STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?"}
ACCEPTED = {
    "float64": ("F64",),
    "float32": ("F32",),
    "float16": ("F16", "F32"),
    "bfloat16": ("BF16", "F32"),
}


class ExchangeError(ValueError):
    """The files are not what they should be, in a way that is no backend's failure."""


class Unreadable(Exception):
    """A tensor file that is broken or holds a dtype nobody asked for."""


def arrays_of(question: Question, kind: Kind) -> dict[str, Array]:
    """The arrays of a question by the names in its file, as float64 or bool."""
    found = {f"params.{name}": value for name, value in question.params.items()} | {"x": question.x}
    if question.y is not None:
        found["y"] = question.y
    if question.mask is not None:
        axes = len(question.weights_shape)
        found["mask"] = question.mask.reshape((1,) * (axes - question.mask.ndim) + question.mask.shape)
    if kind == "vjp":
        assert question.cotangent is not None
        found["cotangent"] = question.cotangent
    return found


def answer_shapes(question: Question, kind: Kind) -> dict[str, tuple[int, ...]]:
    """Shape of every array that the question asks for."""
    found = {"out": question.out_shape}
    if kind == "weights":
        found["weights"] = question.weights_shape
    if kind == "vjp":
        found |= {f"gradient.{name}": value.shape for name, value in question.params.items()}
        found["gradient.x"] = question.x.shape
        if question.y is not None:
            found["gradient.y"] = question.y.shape
    return found


def kind_of(question: Question) -> Kind:
    """The kind of a question that asks for no gradients."""
    return "weights" if question.return_weights else "run"


def identity(question: Question, kind: Kind, dtype: str) -> str:
    """The id: equal for equal questions, whichever law asks."""
    told = hashlib.sha256(f"{kind}/{dtype}/".encode())
    told.update(json.dumps(operator_to_data(question.operator)).encode())
    for name, value in sorted(arrays_of(question, kind).items()):
        exact = np.ascontiguousarray(value, "?" if value.dtype == np.bool_ else "<f8")
        told.update(f"{name}{exact.dtype.str}{exact.shape}".encode())
        told.update(exact.tobytes())
    return told.hexdigest()[:16]


def stored(value: npt.ArrayLike, dtype: str) -> Array:
    """``value`` as it is written for a question in ``dtype``."""
    array = np.asarray(value)
    if array.dtype != np.bool_:
        array = array.astype(np.float64 if dtype == "float64" else np.float32)
    return np.ascontiguousarray(array)


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> int:
    """Write a safetensors file; its size in bytes."""
    from safetensors.numpy import save

    data = save(dict(tensors))
    path.write_bytes(data)
    return len(data)


def read_tensors(path: Path) -> dict[str, tuple[str, Array]]:
    """Stored dtype and values of every tensor of a file: float64, or bool.

    Raises:
        Unreadable: it is no such file, or holds a dtype other than those of :data:`STORED`.
    """
    from safetensors import SafetensorError, deserialize

    try:
        parts = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise Unreadable(f"{path.name} is no safetensors file: {error}") from error
    except OSError as error:
        raise Unreadable(f"{path.name} can't be read: {error.strerror or error}") from error
    found = {}
    for name, part in parts:
        kind = part["dtype"]
        if kind not in STORED:
            raise Unreadable(f"{path.name}: {name} is {kind}; expected one of {', '.join(STORED)}")
        array = np.frombuffer(part["data"], STORED[kind]).reshape(part["shape"])
        if kind == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        found[name] = kind, array if kind == "BOOL" else array.astype(np.float64)
    return found


def read_json(path: Path) -> Any:
    """The content of a JSON file; :class:`ExchangeError` where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExchangeError(f"{path}: {error}") from error
