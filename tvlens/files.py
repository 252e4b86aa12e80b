"""Files that appear whole or not at all, whatever stops the process that writes them.

A file is written beside its place, under its name with ``.partial`` behind it, and then renamed.
What a killed run left of it is written over by the next.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write what takes the place ``path`` when the block ends well."""
    partial = path.with_name(path.name + PARTIAL)
    yield partial
    partial.replace(path)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write ``content``, text in UTF-8, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
