"""Folders that appear whole or not at all.

A folder is written under a hidden name beside its place, every file is flushed to the disk, and one
rename puts it there. Where a folder is to be replaced the two change places in one step
(``renameat2`` of Linux; elsewhere the old one is moved aside first). Whoever writes holds a lock on
the hidden folder, so that what a killed run left behind is known and removed by the next run.
"""

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tvlens.errors import StudyError

try:
    import fcntl
except ImportError:  # not a Unix system: nothing is locked, and leftovers stay
    fcntl = None

PARTIAL = ".partial"
AT_FDCWD, RENAME_EXCHANGE = -100, 2


@contextmanager
def whole_folder(out: Path, *, force: bool, own: str) -> Iterator[Path]:
    """A folder to write into, which takes the place ``out`` when the block ends well.

    Args:
        out: Where it will be.
        force: Replace a folder that is there, if it holds the file ``own``.
        own: The file by which a folder that tvlens wrote is known.

    Raises:
        StudyError: Something is there and may not be replaced, or the disk refuses.
    """
    refuse_existing(out, force=force, own=own)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix=PARTIAL, dir=out.parent))
    except OSError as error:
        raise _unwritable(out, error) from error
    lock = _locked(partial)
    try:
        yield partial
        _flush(partial)
        partial.chmod(0o755)
        _put(partial, out)
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def refuse_existing(out: Path, *, force: bool, own: str) -> None:
    """Refuse to write where something is, unless it is tvlens's own and may be replaced.

    Raises:
        StudyError: It is there.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise StudyError(f"{out} is there already.", hint="Give --force to replace it.")
    if out.is_symlink() or not out.is_dir() or not (out / own).is_file():
        raise StudyError(
            f"{out} was not written by tvlens (it has no {own}), so --force does not replace it.",
            hint="Choose another --out, or remove it yourself.",
        )


def _locked(folder: Path) -> int | None:
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a file system without locks: leftovers there are removed by hand
        os.close(handle)
        return None
    return handle


def _remove_leftovers(out: Path) -> None:
    """Remove hidden folders for ``out`` whose writer is gone."""
    if fcntl is None:
        return
    for folder in out.parent.glob(f".{_escaped(out.name)}-*{PARTIAL}"):
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # it was finished or removed meanwhile, or is no folder
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # another run is writing it, or nothing can be locked here
        finally:
            os.close(handle)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _flush(folder: Path) -> None:
    """Every file and folder to the disk, the innermost first."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _flushed(path)
    _flushed(folder)


def _flushed(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(partial: Path, out: Path) -> None:
    if out.exists():
        if not _exchanged(partial, out):
            aside = partial.with_name(partial.name.removesuffix(PARTIAL) + ".old")
            out.rename(aside)
            partial.rename(out)
            shutil.rmtree(aside, ignore_errors=True)
    else:
        partial.rename(out)
    _flushed(out.parent)


def _exchanged(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    names = os.fsencode(first), os.fsencode(second)
    return rename(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0


def _unwritable(out: Path, error: OSError) -> StudyError:
    return StudyError(
        f"{out} cannot be written: {error.strerror or error}.", hint="Choose another --out."
    )
