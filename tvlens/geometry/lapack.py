"""A part of the spectrum of a symmetric matrix, while other threads go on.

``scipy.linalg.eigh`` holds the interpreter's lock as long as LAPACK works, so that threads which
work side by side (``tvlens.threads``) wait for each other. Its routine, ``?syevr``, is therefore
called where ``scipy.linalg.cython_lapack`` publishes it for compiled code, through ctypes, which
lets the lock go. Where it is published with other arguments than those known here,
``scipy.linalg.eigh`` is called.
"""

import ctypes
import re
from collections.abc import Callable
from functools import cache

import numpy as np
from jaxtyping import Float
from scipy import linalg
from scipy.linalg import cython_lapack  # type: ignore[attr-defined]  # compiled: no stub

ROUTINES = {"float64": "dsyevr", "float32": "ssyevr"}
"""Routine by the name of a dtype."""
ARGUMENTS = "cccirirriirirriiriiii"
"""What ``?syevr`` takes pointers to: characters, integers, reals of its precision."""
WORK = 72
"""Reals of work space a row: a block of up to 64 columns and six vectors."""
INTEGERS = 10
"""Integers of work space a row."""

Pairs = tuple[Float[np.ndarray, " found"], Float[np.ndarray, "size vector"]]


def eigenpairs_above(matrix: Float[np.ndarray, "size size"], bound: float) -> Pairs:
    """The eigenvalues that exceed ``bound``, in ascending order, and their vectors.

    Args:
        matrix: Symmetric and finite, its lower triangle is read.
        bound: Of the eigenvalues.

    Raises:
        numpy.linalg.LinAlgError: LAPACK does not find them.
    """
    if (routine := published(matrix.dtype.name)) is None:
        return _of_scipy(matrix, subset_by_value=(bound, np.inf))
    return _called(routine, matrix, b"V", bound=bound)


def largest_eigenpairs(
    matrix: Float[np.ndarray, "size size"], count: int, *, vectors: bool = True
) -> Pairs:
    """The ``count`` largest eigenvalues, in ascending order, and their vectors.

    Args:
        matrix: Symmetric and finite, its lower triangle is read.
        count: From 1 to the number of rows.
        vectors: False for none.

    Raises:
        numpy.linalg.LinAlgError: LAPACK does not find them.
    """
    first = len(matrix) - count
    if (routine := published(matrix.dtype.name)) is None:
        by_index = (first, len(matrix) - 1)
        return _of_scipy(matrix, vectors=vectors, subset_by_index=by_index)
    return _called(routine, matrix, b"I", first=first + 1, vectors=vectors)


def _of_scipy(
    matrix: Float[np.ndarray, "size size"], *, vectors: bool = True, **subset: object
) -> Pairs:
    options = {"driver": "evr", "check_finite": False, "eigvals_only": not vectors, **subset}
    found = linalg.eigh(matrix, **options)
    return found if vectors else (found, np.empty((len(matrix), 0), matrix.dtype))


@cache
def published(dtype: str) -> Callable[..., None] | None:
    """The routine for a dtype, None where scipy has none with the arguments known here."""
    capsule = cython_lapack.__pyx_capi__.get(ROUTINES[dtype])
    if capsule is None:
        return None
    name, pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    signature = name(capsule)
    if kinds(signature.decode()) != ARGUMENTS:
        return None
    types = [ctypes.c_void_p] * len(ARGUMENTS)
    return ctypes.CFUNCTYPE(None, *types)(pointer(capsule, signature))


def kinds(signature: str) -> str:
    """A published signature in the letters of ``ARGUMENTS``; what is something else is ``?``."""
    known = {"char *": "c", "int *": "i"}
    real = re.compile(r"__pyx_t_\w*cython_lapack_[sd] \*")
    arguments = signature.removeprefix("void (").removesuffix(")").split(", ")
    return "".join(known.get(one) or ("r" if real.fullmatch(one) else "?") for one in arguments)


def _called(
    routine: Callable[..., None],
    matrix: Float[np.ndarray, "size size"],
    select: bytes,
    *,
    bound: float = 0.0,
    first: int = 1,
    vectors: bool = True,
) -> Pairs:
    size, real = len(matrix), matrix.dtype.type
    values, rows = np.empty(size, real), size if vectors else 1
    directions = np.empty((rows, size), real)  # rows of numpy are columns of LAPACK
    found, status = np.zeros(1, np.intc), np.zeros(1, np.intc)
    space, integers = np.empty(WORK * size, real), np.empty(INTEGERS * size, np.intc)
    arguments = [
        *((b"V" if vectors else b"N"), select, b"U"),  # U: the lower triangle, as LAPACK sees it
        *(size, np.array(matrix, order="C"), size),  # a copy: it is overwritten
        *(real(bound), np.finfo(real).max, first, size, real(0)),
        *(found, values, directions, size, np.empty(2 * size, np.intc)),
        *(space, len(space), integers, len(integers), status),
    ]
    held = [_addressed(one) for one in arguments]
    routine(*(one.ctypes.data for one in held))
    if status[0]:
        raise np.linalg.LinAlgError(f"LAPACK gave no eigenvalues (info {status[0]}).")
    count = int(found[0])
    return values[:count], directions[: count if vectors else 0].T


def _addressed(value: bytes | int | np.generic | np.ndarray) -> np.ndarray:
    """What has an address: LAPACK reads and writes there."""
    if isinstance(value, bytes):
        return np.frombuffer(value, np.uint8)
    return np.array(value, np.intc) if isinstance(value, int) else np.asarray(value)
