"""Functions of the user's own: found by ``package.module:function``, and named so in tables."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def imported(spec: str) -> Any:
    """What ``package.module:function`` names, found as Python finds modules, or else here.

    The working directory is looked in last, so that a file beside the study needs no installing.

    Raises:
        ImportError: There is no such module.
        AttributeError: It has no such function.
    """
    module, _, attribute = spec.partition(":")
    if not module or not attribute:
        raise ImportError(f"{spec!r} is not of the form package.module:function")
    with _working_directory():
        found: Any = importlib.import_module(module)
    for step in attribute.split("."):
        found = getattr(found, step)
    return found


@contextmanager
def _working_directory() -> Iterator[None]:
    here = os.getcwd()
    known = here in sys.path or "" in sys.path
    if not known:
        sys.path.append(here)
    try:
        yield
    finally:
        if not known:
            sys.path.remove(here)


def name_of(function: Callable[..., Any]) -> str:
    """``package.module:function``; of an object without a name that of its class."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def spec_of(function: Callable[..., Any]) -> str | None:
    """What ``imported`` finds the very function by; None where there is no such name."""
    spec = name_of(function)
    if spec.startswith("__main__:"):
        return None
    try:
        return spec if imported(spec) is function else None
    except (ImportError, AttributeError):
        return None
