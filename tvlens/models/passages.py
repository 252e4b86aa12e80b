"""Hooks at the edges of modules, for activations that a host has no hook point for.

They take and give what TransformerLens's own hooks do: a function of (activation, hook), whose
result, if it is not None, goes on in the activation's place.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

HookFunction = Callable[..., Any]


class Passage(NamedTuple):
    """An activation that enters or leaves a module.

    Attributes:
        module: The module.
        edge: Whether it enters or leaves.
        arguments: The module's arguments that are this one activation; empty for its first.
        made: What the hooks are given instead, made of the activation; it is only looked at.
        within: The attention of a norm within each head, which is called with one row for each
            prompt, position and head: hooks see [batch, head, pos, d_head].
    """

    module: nn.Module
    edge: Literal["in", "out"]
    arguments: tuple[str, ...] = ()
    made: Callable[[Tensor], Tensor] | None = None
    within: nn.Module | None = None


class Hooked(NamedTuple):
    """What a hook function is told of the place it is called at."""

    name: str


@dataclass
class _Tap:
    """A passage and the functions that are called there.

    Attributes:
        passage: The place.
        name: What it was asked for by.
        fwd: Functions of the activation, in order.
        bwd: Functions of its gradient, in order.
        shape: Prompts and positions of the pass that is under way, for a norm within heads.
    """

    passage: Passage
    name: str
    fwd: list[HookFunction] = field(default_factory=list)
    bwd: list[HookFunction] = field(default_factory=list)
    shape: tuple[int, ...] = ()

    def passed(self, activation: Tensor) -> Tensor:
        """The activation after all functions; those of its gradient wait on what goes on."""
        if self.passage.made is not None:
            for function in self.fwd:
                function(self.passage.made(activation), hook=Hooked(self.name))
            return activation
        seen = self._by_head(activation)
        for function in self.fwd:
            result = function(seen, hook=Hooked(self.name))
            seen = seen if result is None else result
        if self.bwd and seen.requires_grad:
            seen = seen.view_as(seen)  # a node of its own: other uses of the tensor do not count
            seen.register_hook(self._returned)
        return self._as_called(seen)

    def note_shape(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Remember prompts and positions; a pre-hook of the attention around the norm."""
        first = args[0] if args else next(iter(kwargs.values()))
        self.shape = tuple(first.shape[:2])

    def _returned(self, gradient: Tensor) -> Tensor:
        for function in self.bwd:
            result = function(gradient, hook=Hooked(self.name))
            gradient = gradient if result is None else result
        return gradient

    def _by_head(self, activation: Tensor) -> Tensor:
        if self.passage.within is None:
            return activation
        batch, pos = self.shape
        pattern = "(batch pos head) d_head -> batch head pos d_head"
        return rearrange(activation, pattern, batch=batch, pos=pos)

    def _as_called(self, activation: Tensor) -> Tensor:
        if self.passage.within is None:
            return activation
        return rearrange(activation, "batch head pos d_head -> (batch pos head) d_head")


@contextmanager
def hooked_passages(
    passages: Mapping[str, Passage],
    fwd: Iterable[tuple[str, HookFunction]],
    bwd: Iterable[tuple[str, HookFunction]],
) -> Iterator[None]:
    """Hooks at ``passages`` for the time of the block, removed afterwards whatever happens."""
    taps: dict[str, _Tap] = {}
    for direction, hooks in (("fwd", fwd), ("bwd", bwd)):
        for name, function in hooks:
            tap = taps.setdefault(name, _Tap(passages[name], name))
            getattr(tap, direction).append(function)
    # an activation that several arguments share passes before each of them does
    ordered = sorted(taps.values(), key=lambda tap: -len(tap.passage.arguments))
    with ExitStack() as stack:
        for handle in map(_attached, ordered):
            stack.callback(handle.remove)
        for tap in ordered:
            if tap.passage.within is not None:
                pre = tap.passage.within.register_forward_pre_hook(tap.note_shape, with_kwargs=True)
                stack.callback(pre.remove)
        yield


def _attached(tap: _Tap) -> torch.utils.hooks.RemovableHandle:
    if tap.passage.edge == "out":
        return tap.passage.module.register_forward_hook(partial(_leaving, tap))
    return tap.passage.module.register_forward_pre_hook(partial(_entering, tap), with_kwargs=True)


def _leaving(tap: _Tap, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return tap.passed(output)


def _entering(
    tap: _Tap, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    names: Sequence[str] = tap.passage.arguments
    if not names:
        return (tap.passed(args[0]), *args[1:]), kwargs
    passed = tap.passed(kwargs[names[0]])
    return args, {**kwargs, **dict.fromkeys(names, passed)}
