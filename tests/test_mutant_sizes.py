"""Mutants that only sizes of real models, recorded gradients or very low masks show (L1, B1, M2)."""

import numpy as np
import pytest
import torch

from translution.conformance.exam.examine import examine
from translution.conformance.exam.law import Trial, law, registered
from translution.conformance.exam.report import Verdict
from translution.conformance.exam.subject import BackendFailure, LiveSubject
from translution.conformance.laws import all_laws
from translution.conformance.laws.sizes import HEAD_DIMS, HEADS, TOKENS
from translution.conformance.mutants.catalogue import catalogue
from translution.conformance.mutants.naive import Naive
from translution.conformance.strategies import random_case
from translution.registry import get_backend

LAWS, MUTANTS = all_laws(), catalogue()
NEW = {
    "SIZES": [name for name, mutant in MUTANTS.items() if mutant.family == "size"],
    "AUTOGRAD": ["autograd-detached", "autograd-halved", "mask-gradient-missing"],
    "FORWARD-MODE": ["forward-mode-zero"],
    "MASK-FINITE": ["large-negative-mask-is-absent"],
}


@pytest.mark.parametrize(("name", "mutant"), [(name, mutant) for name, every in NEW.items() for mutant in every])
def test_only_its_own_law_notices(name: str, mutant: str) -> None:
    """The mistake shows in the law that was made for it, and not where sizes, calls and masks are ordinary."""
    subject = LiveSubject(MUTANTS[mutant].backend, "pairwise", "float64")
    assert examine(LAWS[name], subject, "quick").verdict is Verdict.FAIL
    for other in ("ORACLE", "ORACLE-GRADIENT", "MASK-POLARITY"):
        assert examine(LAWS[other], subject, "quick").verdict is Verdict.PASS, other


def test_every_size_is_asked() -> None:
    """At level full no number of tokens, heads or features is left out."""
    tokens, heads, widths, items, windows = set(), set(), set(), set(), set()

    class Recording(LiveSubject):
        def run(self, question):  # type: ignore[no-untyped-def]
            operator = question.operator
            tokens.update((operator.layout.num_queries, operator.layout.num_keys))
            heads.add(operator.num_heads)
            widths.add(operator.value_head_dim)
            items.add(int(np.prod(question.x.shape[:-2])))
            windows.update(getattr(operator.layout, "kernel_size", None) or ())
            return super().run(question)

    result = examine(LAWS["SIZES"], Recording(get_backend("numpy"), "stream", "float64"), "full")
    assert result.verdict is Verdict.PASS
    assert tokens >= set(TOKENS)
    assert heads >= set(HEADS)
    assert widths >= set(HEAD_DIMS)
    assert items >= {65, 40, 4, 6}
    assert windows >= {5, 6, 7, 9}


# The subject


class Exits(Naive):
    def forward(self, *_arguments: object) -> None:  # type: ignore[override]
        raise SystemExit(3)


class Unreadable(Naive):
    def forward(self, *_arguments: object) -> None:  # type: ignore[override]
        class Strange(Exception):
            def __str__(self) -> str:
                raise ValueError

        raise Strange


@pytest.mark.parametrize(("backend", "message"), [(Exits(), "raised SystemExit: 3"), (Unreadable(), "raised Strange")])
def test_whatever_is_raised_is_a_failure_of_the_backend(backend: Naive, message: str) -> None:
    with pytest.raises(BackendFailure, match=message):
        LiveSubject(backend, "pairwise", "float64").run(random_case(0))


def test_global_settings_of_a_backend_do_not_reach_the_exam() -> None:
    """Warnings that became errors, another default dtype, gradients turned off: as some packages do at import."""
    before = np.seterr(all="raise")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            for name in ("ORACLE", "NAN", "SATURATE", "SECOND-ORDER", "AUTOGRAD"):
                found = examine(LAWS[name], LiveSubject(Naive(), "pairwise", "float32"), "quick")
                assert found.verdict is Verdict.PASS, found.message
            assert not torch.is_grad_enabled()
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
        np.seterr(**before)


def test_results_that_nobody_can_write_to_are_owned() -> None:
    own = get_backend("numpy")

    class ReadOnly(type(own)):  # type: ignore[misc]
        def forward(self, *arguments):  # type: ignore[no-untyped-def]
            out, weights = super().forward(*arguments)
            out.setflags(write=False)
            return out, weights

    assert examine(LAWS["OWNED"], LiveSubject(ReadOnly(), "stream", "float64"), "full").verdict is Verdict.PASS


def test_laws_of_others_are_no_part_of_the_exam() -> None:
    @law("FOREIGN", clauses=())
    def foreign(_trial: Trial) -> None:
        """Somebody else's."""

    assert "FOREIGN" in registered()
    assert "FOREIGN" not in all_laws()


def test_what_another_algorithm_refused_need_not_be_drawn() -> None:
    """Verdicts and cases are the same with and without that memory."""
    backend = get_backend("torch")
    for name in ("TRANSPOSE", "GRADIENT-TIED", "EMPTY", "AUTOGRAD"):
        refused: dict[tuple[str, int], object] = {}
        for algorithm, dtype in (("conv", "float64"), ("sdpa", "float64"), ("conv", "bfloat16"), ("sdpa", "bfloat16")):
            subject = LiveSubject(backend, algorithm, dtype)
            kept = examine(LAWS[name], subject, "quick", refused=refused)  # type: ignore[arg-type]
            alone = examine(LAWS[name], subject, "quick")
            assert (kept.verdict, kept.cases, kept.exact) == (alone.verdict, alone.cases, alone.exact)
            assert set(kept.reasons) == set(alone.reasons)
        assert refused
