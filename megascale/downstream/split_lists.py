"""Splits by list: text files, at any path or URL, that name the recordings of each side."""

from collections import defaultdict
from collections.abc import Iterable

from pydantic import Field

from megascale import storage
from megascale.config import Section
from megascale.errors import DataError


class ListsConfig(Section):
    """Text files of one relative file name a line, such as `blues/blues.00029.wav`; `#` begins a comment line."""

    train: str | None = Field(None, description="lists: path or URL of the list that is trained on")
    valid: str | None = Field(None, description="lists: path or URL of the list that chooses the model")
    test: str | None = Field(None, description="lists: path or URL of the list that is tested")


def match_lists(config: ListsConfig, sources: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Find the recording that each listed name means: the one whose path is that name, or ends in it.

    Args:
        config: all three lists.
        sources: paths of the recordings, relative to the corpus.

    Returns:
        The side of each source that is listed, and the names that no source fits, in the order of the lists.

    Raises:
        StorageError: a list cannot be read.
        DataError: a recording stands in two lists, or a name fits several recordings; names the list.
    """
    by_ending: dict[str, list[str]] = defaultdict(list)
    for source in sorted(set(sources)):
        parts = source.split("/")
        for start in range(len(parts)):
            by_ending["/".join(parts[start:])].append(source)
    side_of: dict[str, str] = {}
    for side, url in config.model_dump().items():
        assert url is not None, "the task's validator asks for all lists"
        for name in _read(url):
            found = by_ending.get(name, [])
            if len(found) > 1:
                raise DataError(f"{url}: {name!r} fits several recordings, such as {found[0]!r} and {found[1]!r}")
            other = side_of.setdefault(found[0] if found else name, side)
            if other != side:
                raise DataError(f"{url}: {name!r} is in the {other} list, too")
    known = {name: side for name, side in side_of.items() if name in by_ending}
    return known, [name for name in side_of if name not in by_ending]


def _read(url: str) -> list[str]:
    lines = (line.strip().removeprefix("./") for line in storage.read_text(url).splitlines())
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
