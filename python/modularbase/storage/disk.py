"""Where data lies, and what is said when it cannot be written there."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from modularbase.errors import InstallError

HOME_VARIABLE = "MODULARBASE_HOME"

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def data_folder() -> Path:
    """The folder all data lies in: $MODULARBASE_HOME, else the platform's place for user data."""
    home = os.environ.get(HOME_VARIABLE)
    return Path(home).expanduser() if home else platformdirs.user_data_path("modularbase")


@contextlib.contextmanager
def disk_errors(name: str, path: Path) -> Iterator[None]:
    """Turns the operating system's refusals into an InstallError that says what to do."""
    try:
        yield
    except OSError as error:
        place = str(error.filename or path)
        if error.errno in _FULL:
            reason = f"the disk is full ({error.strerror}); free some space and try again"
            raise InstallError(reason, "disk_full", name=name, path=place) from error
        reason = (
            f"cannot write there ({error.strerror}); choose another place ({HOME_VARIABLE} names "
            "the folder that all data goes to)"
        )
        raise InstallError(reason, "unwritable", name=name, path=place) from error


def check_space(name: str, folder: Path, n_bytes: int) -> None:
    """Raises an InstallError where the disk of a folder has fewer bytes free."""
    n_free = shutil.disk_usage(folder).free
    if n_free < n_bytes:
        reason = f"the disk has {n_free} bytes free, {n_bytes} are needed"
        raise InstallError(reason, "disk_full", name=name, path=str(folder))
