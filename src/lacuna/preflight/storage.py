"""Whether a folder can be written, how much, and how fast."""

import errno
import os
import shutil
import tempfile
import time
from pathlib import Path

from lacuna.machine.detect import GIB
from lacuna.preflight.check import Check

MEGABYTES = 64
LITTLE, SLOW = 10 * GIB, 20
"""Bytes free, and MB/s, below which checkpoints are trouble: one of a 0.5B model trained in full takes 6 GB."""
REASONS = {
    errno.EROFS: ("the file system is read-only", "choose another output_dir, or mount it for writing"),
    errno.EACCES: ("it may not be written by this user", "chmod or chown it, or choose another output_dir"),
    errno.ENOSPC: ("the disk is full", "make room there, or choose another output_dir"),
    errno.EDQUOT: ("the quota is used up", "make room in your quota, or choose another output_dir"),
    errno.EFBIG: ("files may not be that large", "raise the limit: ulimit -f unlimited"),
}


def nearest_folder(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.expanduser().absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def output_folder(folder: Path, needed: bool) -> Check:
    """Write, sync and delete some data where the folder is, or would be made. needed: a run is to write there."""
    name, place = "output folder", nearest_folder(folder)
    try:
        speed = _write_speed(place)
    except OSError as error:
        reason, mend = REASONS.get(error.errno or 0, (error.strerror or str(error), "choose another output_dir"))
        if error.errno == errno.ENOSPC and os.statvfs(place).f_bavail and not os.statvfs(place).f_favail:
            reason, mend = "no inodes are left: too many files", "delete some of the many small files there"
        return Check(name, "failed", f"{place}: {reason}", mend, needed)
    free = shutil.disk_usage(place).free
    found = f"{place}: {free / GIB:.1f} GiB free, {speed:,.0f} MB/s"
    if free < LITTLE:
        return Check(name, "warning", found, "make room, or choose another output_dir: checkpoints take their place")
    if speed < SLOW:
        return Check(name, "warning", f"{found}: slow", "a local disk; or save seldom (save_every)")
    return Check(name, "ok", found)


def _write_speed(place: Path) -> float:
    """MB/s of a file that has no name, so that nothing is left of it whatever happens. Raises OSError."""
    block = os.urandom(10**6)
    begin = time.perf_counter()
    with tempfile.TemporaryFile(dir=place) as file:
        for _ in range(MEGABYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return MEGABYTES / (time.perf_counter() - begin)
