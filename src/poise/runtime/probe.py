"""A few tokens through an experts module's own code and through the code that will run in its place.

In float64 with random weights, so that nothing hides behind weights that are 0 or not there yet (meta device), and with
tokens of several magnitudes, so that a clamp shows. Of large experts no copies are made: all share one buffer, each
begins at another place of it. The module, its weights and everyone's random numbers stay as they are.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from poise.util.errors import ModelError, told

NamedTensors = Mapping[str, Tensor]
MAGNITUDES = (1.0, 50.0, 1e-3, 1e6)
LIMITS = {torch.float64: (1e-9, 1e-7), torch.float32: (3e-5, 1e-3), torch.bfloat16: (3e-2, 1e-1)}
"""Largest relative difference of a token's output and of a gradient. The second where a module computes in float32
whatever it is given, or cannot compute in float64; the third of those that do in bfloat16, or can do nothing else.
"""
SMALL = 2**22
"""Weights (in numbers) that are made for all experts."""
GRADIENTS = 2**27
"""Numbers that a backward pass may write: PyTorch makes a gradient of all experts for every single one."""
MOST, WORK = 64, 2**29
"""Experts that are tried, and multiplications of a run, about: of large experts not all are tried."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is compared.

    Parameters
    ----------
    name : for messages.
    own : (weights name -> [E, ...], tokens [T, d], ids [T, K], weights [T, K]) -> [T, d], as the module computes.
    one : (weights of one expert, tokens [n, d]) -> [n, d], as will be computed.
    shapes : per-expert shape of every weight.
    experts : E.
    hidden : widths that tokens may have, the likely ones first.
    parts : modules whose ``training`` is set for a run and put back after it.
    device : where the module lies; the CPU is tried first.
    """

    name: str
    own: Callable[[NamedTensors, Tensor, Tensor, Tensor], Any]
    one: Callable[[dict[str, Tensor], Tensor], Any]
    shapes: Mapping[str, tuple[int, ...]]
    experts: int
    hidden: Sequence[int]
    parts: Sequence[nn.Module]
    device: torch.device


@dataclass(frozen=True, slots=True)
class Found:
    """What a probe has seen: the width of the tokens, whether random numbers are drawn in training, whether id E is
    known to mean no expert, and a number that differs for other code or constants.
    """

    hidden: int
    random: bool
    leaves_out: bool
    mark: float


def prove(subject: Subject, doubtful: Iterable[int] = ()) -> Found:
    """Compare what a module computes, and its gradients, with what will run in its place.

    Parameters
    ----------
    doubtful : experts that must be among those tried, however large they are.

    Raises
    ------
    ModelError : they differ; the module cannot be called, is random when evaluated, keeps a state, changes its input,
        or looks at more than one token at once.
    """
    devices = [torch.device("cpu")] + ([subject.device] if subject.device.type not in ("cpu", "meta") else [])
    tries = [(device, dtype) for dtype in LIMITS for device in devices]
    first: Exception | None = None
    for device, dtype in tries:
        for hidden in subject.hidden:
            try:
                with _undisturbed(device), _threads(subject):
                    return _Trial(subject, device, dtype, hidden, doubtful).run()
            except ModelError:
                raise
            except Exception as error:  # the code of others, with types or on a device that it may not be made for
                first = first or error
    assert first is not None
    raise ModelError(
        f"{subject.name} cannot be run on a few tokens: {told(first)}",
        hint="experts are called as experts(tokens [T, d], ids [T, K], weights [T, K]), those of a list with tokens",
    ) from first


class _Trial:
    def __init__(
        self, subject: Subject, device: torch.device, dtype: torch.dtype, hidden: int, doubtful: Iterable[int]
    ) -> None:
        self.subject, self.hidden = subject, hidden
        self.limit, self.gradient_limit = LIMITS[dtype]
        like: dict[str, Any] = {"device": device, "dtype": dtype, "generator": torch.Generator(device).manual_seed(1)}
        numel = sum(torch.Size(shape).numel() for shape in subject.shapes.values())
        small = numel * subject.experts <= SMALL
        self.by_weights = small and numel * subject.experts**2 <= GRADIENTS
        self.weights = {name: _stack(shape, subject.experts, small, like)
                        for name, shape in subject.shapes.items()}  # fmt: skip
        tried = min(subject.experts, MOST, max(3, WORK // (numel * 8 * len(MAGNITUDES))))
        chosen = {round(number) for number in np.linspace(0, subject.experts - 1, tried)} | set(doubtful)
        self.experts = sorted(chosen)
        count = len(self.experts)
        scale = torch.tensor(MAGNITUDES, dtype=dtype, device=device).repeat(count)
        self.x = torch.empty(len(scale), hidden, device=device, dtype=dtype).normal_(generator=like["generator"])
        self.x *= scale[:, None]
        first = torch.arange(count, device=device).repeat_interleave(len(MAGNITUDES))
        ids = torch.stack([(first + k) % count for k in range(min(2, count))], dim=1)
        self.ids = torch.tensor(self.experts, device=device)[ids]
        self.w = 10 ** (torch.rand(ids.shape, **like) * 3.5 - 3)  # small and above 1, and no sum is 1
        self.pull = torch.randn(self.x.shape, **like)

    def run(self) -> Found:
        evaluated, changes = self._repeat(False)
        if changes:
            raise ModelError(
                f"{self.subject.name} {changes} also when it is evaluated",
                hint="F.dropout drops unless training=self.training is given",
            )
        self._compare(evaluated, self.ids, False)
        leaves_out = self._try_other_ids()
        trained, changes = self._repeat(True)
        if not changes:
            self._compare(trained, self.ids, True)
        self._compare_gradients(not changes)
        mark = self._mark(evaluated) + (0.0 if changes else 0.37 * self._mark(trained))
        return Found(self.hidden, bool(changes), leaves_out, mark)

    def _mark(self, y: Tensor) -> float:
        """A number that differs for other code: a sum of positive numbers, so that it is as exact as they are."""
        size = self.x.norm(dim=1, keepdim=True)
        return float((y.nan_to_num().to(self.x.dtype) * self.pull / size).abs().asinh().sum())

    def _try_other_ids(self) -> bool:
        """All tokens to the same experts, of which none may be left out; and whether id E means no expert."""
        same, none = self.ids.clone(), self.ids.clone()
        same[:] = self.ids[0]
        none[::2, -1] = self.subject.experts
        with _mode(self.subject.parts, False), torch.no_grad():
            own = self.subject.own(self.weights, self.x.clone(), same, self.w)
            self._compare(self._checked(own, self.x), same, False)
            if self.x.is_cuda:  # a module that does not know it would end the process
                return False
            try:
                with _empty_is_nan():
                    own = self._checked(self.subject.own(self.weights, self.x.clone(), none, self.w), self.x)
            except Exception:
                return False
            ours = self._ours(self.x, self.w, self.weights, none)
        if (_apart(own[::2] - ours[::2], self.x[::2] * self.w[::2, -1:]) < 1e-6).any():
            raise ModelError(f"{self.subject.name} has identity experts beside its own, which are not run",
                             hint="its traffic can be recorded and planned for")  # fmt: skip
        return bool(_apart(ours, own).max() <= self.limit)

    def _own(self, x: Tensor, w: Tensor, weights: NamedTensors) -> Tensor:
        return self._checked(self.subject.own(weights, x, self.ids, w), x)

    def _checked(self, y: Any, x: Tensor) -> Tensor:
        name = self.subject.name
        if not isinstance(y, Tensor):
            raise ModelError(
                f"{name} gives a {type(y).__name__}", hint="experts give one tensor, as wide as their tokens"
            )
        if y.shape != x.shape:
            raise ModelError(f"{name} gives {tuple(y.shape)} for tokens {tuple(x.shape)}", hint="they must be equal")
        return y

    def _repeat(self, training: bool) -> tuple[Tensor, str]:
        """The module's output, and why it would not be the same every time ("": it would)."""
        with _mode(self.subject.parts, training), _Types() as types, torch.no_grad():
            x, before = self.x.clone(), _random_states(self.x.device)
            y = self._own(x, self.w, self.weights)
            if _random_states(self.x.device) != before:
                return y, "draws random numbers"
            if not torch.equal(x, self.x):
                raise ModelError(f"{self.subject.name} changes its input in place", hint="work on a copy")
            if not _apart(self._own(x, self.w, self.weights), y).max() <= self.limit:  # GPUs add in any order
                return y, "gives another result the second time"
        if types.shortest is not None:
            self.limit, self.gradient_limit = (max(two) for two in zip(
                LIMITS[types.shortest], (self.limit, self.gradient_limit), strict=True))  # fmt: skip
        return y, ""

    def _ours(self, x: Tensor, w: Tensor, weights: NamedTensors, ids: Tensor | None = None) -> Tensor:
        """The output by ``one``, with every expert's tokens in two calls: tokens must not depend on each other."""
        tokens, out = [], []
        for e in self.experts:
            token, k = torch.where((self.ids if ids is None else ids) == e)
            mine = {name: rows[e] for name, rows in weights.items()}
            for part in (slice(0, 1), slice(1, None)):
                given = x[token[part]]
                before = given.detach().clone()
                y = self._checked(self.subject.one(mine, given), given)
                if not torch.equal(before, given):
                    raise ModelError(f"an expert of {self.subject.name} changes its input in place",
                                     hint="work on a copy")  # fmt: skip
                tokens.append(token[part])
                out.append(y * w[token[part], k[part], None])
        return torch.zeros_like(x).index_add(0, torch.cat(tokens), torch.cat(out).to(x.dtype))

    def _compare(self, own: Tensor, ids: Tensor, training: bool) -> None:
        with _mode(self.subject.parts, training), torch.no_grad():
            ours = self._ours(self.x, self.w, self.weights, ids)
        if not own.isfinite().all(dim=1).any():
            raise ModelError(f"{self.subject.name} gives no finite number for random weights and tokens")
        apart = _apart(ours, own.to(ours.dtype))
        if not apart.max() <= self.limit:
            token = int(apart.nan_to_num(nan=torch.inf).argmax())
            mode = "in training" if training else "when evaluated"
            raise ModelError(
                f"{self.subject.name} computes something else than its experts one by one, "
                f"weighted by the router, {mode}: {apart[token].item():.2g} apart, {self.limit:g} allowed "
                f"(ids {ids[token].tolist()} of {self.subject.experts} experts)",
                hint="what runs is down(gate(up(x))) of stacked weights, or each module of a list by itself",
            )

    def _compare_gradients(self, training: bool) -> None:
        found = []
        for run in (self._own, self._ours):
            with _mode(self.subject.parts, training), torch.enable_grad():
                x, w = self.x.clone().requires_grad_(), self.w.clone().requires_grad_()
                weights = {name: value.clone().requires_grad_() if self.by_weights else value
                           for name, value in self.weights.items()}  # fmt: skip
                leaves = [x, w, *(weights.values() if self.by_weights else ())]
                y = run(x, w, weights)
                total = (y.to(self.x.dtype) / self.x.norm(dim=1, keepdim=True) * self.pull).sum()
                if not total.requires_grad:
                    raise ModelError(f"{self.subject.name} gives nothing that gradients could go through")
                got = torch.autograd.grad(total, leaves, allow_unused=True)
                found.append(
                    [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(leaves, got, strict=True)]
                )
        names = ["the tokens", "the router's weights", *self.weights]
        for name, own, ours in zip(names, *found, strict=False):
            apart = _apart(ours.flatten(1), own.flatten(1))
            if not apart.max() <= self.gradient_limit:
                raise ModelError(
                    f"gradients of {name} through {self.subject.name} are {apart.nan_to_num(nan=torch.inf).max():.2g} "
                    f"apart from those of its experts one by one, {self.gradient_limit:g} allowed",
                    hint="is something detached, scaled or clipped on the way back?",
                )


def _stack(shape: tuple[int, ...], experts: int, small: bool, like: dict[str, Any]) -> Tensor:
    """Random weights [E, ...], uniform, such that a token keeps its size."""
    numel, width = torch.Size(shape).numel(), max(shape, default=1)
    if not small:
        generator = like["generator"]
        plain = {key: value for key, value in like.items() if key != "generator"}
        line = torch.empty(numel + experts - 1, **plain).uniform_(-1, 1, generator=generator)
        line *= (3 / width) ** 0.5
        strides = torch.empty(shape, device="meta").stride()
        return line.as_strided((experts, *shape), (1, *strides))
    return (torch.rand((experts, *shape), **like) * 2 - 1) * (3 / width) ** 0.5


def _apart(ours: Tensor, own: Tensor) -> Tensor:
    """Relative difference of every row; where both are not finite at the same places they count as equal."""
    same = (ours == own) | (ours.isnan() & own.isnan())
    difference = torch.where(same, 0.0, ours - own)
    norm = torch.where(own.isfinite(), own, 0.0).norm(dim=1)
    return torch.where(same.all(dim=1), 0.0, difference.norm(dim=1) / norm)


class _Types(TorchDispatchMode):
    """Notes whether anything is computed in float32, or in less (as bfloat16)."""

    shortest: torch.dtype | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, Tensor) and one.is_floating_point() and one.dtype != torch.float64 and one.numel() > 1:
                less = one.dtype.itemsize < torch.float32.itemsize or self.shortest == torch.bfloat16
                self.shortest = torch.bfloat16 if less else torch.float32
        return out


@contextmanager
def _mode(parts: Sequence[nn.Module], training: bool) -> Iterator[None]:
    """Set ``training`` of modules for a while, one by one: a module may have a ``train`` of its own."""
    modules = [module for part in parts for module in part.modules()]
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = training
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.training = value


@contextmanager
def _threads(subject: Subject) -> Iterator[None]:
    """One thread where there is little to do: to wake more takes longer than it saves, above all on shared cores."""
    before = torch.get_num_threads()
    if sum(torch.Size(shape).numel() for shape in subject.shapes.values()) < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _random_states(device: torch.device) -> tuple[Any, ...]:
    numpy: Any = np.random.get_state()  # noqa: NPY002  (what modules use)
    states = [torch.get_rng_state().numpy().tobytes(), random.getstate(), numpy[1].tobytes(), numpy[2]]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).numpy().tobytes())
    return tuple(states)


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Keep the caller's random number generators as they are, and its default types, devices and gradient mode out."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    kind = device.type
    try:
        with (
            torch.random.fork_rng(devices=[device] if kind == "cuda" else []),
            torch.inference_mode(False),
            torch.device(device),
            torch.compiler.set_stance("force_eager"),
            torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext(),
        ):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def _empty_is_nan() -> Iterator[None]:
    """Fill new memory with NaN, so that rows that a kernel leaves unwritten are seen.

    Memory that is used again may hold the tokens: unwritten rows would then look like the output of an identity.
    """
    was, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = filled
            torch.use_deterministic_algorithms(was, warn_only=warned)
