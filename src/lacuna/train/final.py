"""A folder of weights: whole or not there, on the disk before it has its name, readable by whom the umask allows."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lacuna.errors import RunError
from lacuna.runs.final import sync


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A hidden folder to write into, which gets its name when all is written and on the disk, and goes with any error.

    Raises RunError for what the file system refuses: also tokenizers and safetensors, which have classes of their own
    for that.
    """
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        _settle(partial)
        partial.rename(final)
        sync(final.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError) or (type(error) is Exception and "(os error" in str(error)):
            raise RunError(f"{final}: cannot be written: {error}; make room and run the same command again") from error
        raise


def _settle(folder: Path) -> None:
    """Files as any program makes them (some libraries make theirs for the owner alone), and all on the disk."""
    mask = os.umask(0)
    os.umask(mask)
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(0o666 & ~mask)
        sync(path)
