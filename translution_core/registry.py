"""Backends by name: the four of the library, or any ``package.module:attribute``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Protocol, runtime_checkable

from translution.algorithms import Request
from translution.arrays import Array, Kind
from translution.errors import NotSupported, UnknownName
from translution.inputs import Inputs

BACKENDS = {
    "reference": "translution.backends.reference",
    "numpy": "translution.backends.numpy",
    "torch": "translution.backends.torch",
    "triton": "translution.backends.triton",
}

EXTRAS = ("torch", "triton")


@dataclass(frozen=True, slots=True)
class Gradients:
    """Gradients of <cotangent, out>: by parameter name, for x, for y (None in the self case, where x holds both)."""

    params: Mapping[str, Array]
    x: Array
    y: Array | None


@dataclass(frozen=True, slots=True)
class Claims:
    """What a backend says of its numbers, as its attribute ``claims``; without it these defaults are claimed.

    ``gradient_order``: 0, no gradients; 1, ``vjp``; 2, a second derivative by torch's autograd too.
    ``deterministic``: the same call gives the same bits, on every device or on those that it names, ``("cpu",)``.
    ``arithmetic``: dtypes that are not computed in themselves, ``{"float32": "tf32"}``.
    """

    gradient_order: int = 1
    deterministic: bool | tuple[str, ...] = True
    arithmetic: Mapping[str, str] = field(default_factory=dict)

    def is_deterministic(self, device: str) -> bool:
        """Whether the same call gives the same bits on that device."""
        return self.deterministic if isinstance(self.deterministic, bool) else device in self.deterministic


def claims_of(backend: "Backend") -> Claims:
    """The backend's own claims, or the defaults."""
    found = getattr(backend, "claims", Claims())
    if not isinstance(found, Claims):
        raise TypeError(f"{backend.name}.claims is a {type(found).__name__}, expected a translution.Claims")
    return found


@runtime_checkable
class Backend(Protocol):
    """What a backend provides. Arrays are of its ``kind``; :class:`Inputs` are checked and have one batch dimension.

    ``algorithms`` lists what it can run, preferred first; ``dtypes`` what it claims for tokens and parameters. It may
    have ``dry_run(request, algorithm) -> Cost`` as well: what a call costs, without computing it.
    """

    name: str
    kind: Kind
    algorithms: tuple[str, ...]
    dtypes: tuple[str, ...]

    def unavailable(self) -> list[str]:
        """Reasons why nothing runs on this machine; empty where it does."""
        ...

    def not_supported(self, request: Request, algorithm: str) -> list[str]:
        """Every reason why this request cannot run with ``algorithm``; empty where it can. Computes nothing."""
        ...

    def forward(
        self, request: Request, algorithm: str, params: Mapping[str, Array], inputs: Inputs
    ) -> tuple[Array, Array | None]:
        """out [B, Nq, F] in the dtype of x, and weights [B, H, Nq, Nk] where the request asks for them."""
        ...

    def vjp(
        self, request: Request, algorithm: str, params: Mapping[str, Array], inputs: Inputs, cotangent: Array
    ) -> tuple[Array, Gradients]:
        """out, and the gradients of <cotangent, out>; y's gradient apart from x's even in the self case."""
        ...


def get_backend(name: str | Backend) -> Backend:
    """The backend of that name; a missing optional library is named, any other failure is the backend's own error.

    A backend that is given as itself is returned.
    """
    if not isinstance(name, str):
        if isinstance(name, Backend):
            return name
        raise UnknownName("backend", name, BACKENDS, "A backend is given by name, or as an object that has all of one.")
    module, _, attribute = f"{BACKENDS[name]}:backend".partition(":") if name in BACKENDS else name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise UnknownName("backend", name, BACKENDS, "Another package's backend is written package.module:attribute.")
    try:
        home = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise UnknownName("backend", name, BACKENDS, f"There is no module {error.name}.") from error
        if error.name in EXTRAS:
            raise NotSupported(
                name, None, [f"{error.name} is not installed; pip install 'translution[{error.name}]'"]
            ) from error
        raise
    if not hasattr(home, attribute):
        raise UnknownName("attribute", attribute, [n for n in vars(home) if not n.startswith("_")], f"In {module}.")
    found = getattr(home, attribute)
    if not isinstance(found, Backend):
        raise TypeError(
            f"{name} is a {type(found).__name__}, not a backend: see translution.Backend for what it must provide"
        )
    return found
