"""Writing a file so that a reader sees the old one or the new one, never a part.

The bytes go to a temporary file in the same folder, reach the disk, and only then take the name:
a full disk, a crash or a kill on the way leaves the old file as it was.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

__all__ = ["atomic_write"]


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Makes ``data`` the content of ``path``, wholly or not at all.

    A new file gets the usual permissions, an existing one keeps its own; a symbolic link stays a
    link and its target is replaced.

    Raises:
        OSError: the folder does not exist or cannot be written, or the disk is full. The old file
            is intact and the temporary one is removed.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:200]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    # Not tempfile: its files are private (0600), whatever the user's umask says.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            if target.exists():
                os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Makes the renaming itself last through a power cut, where the system can do that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # a folder that may be written but not read: the file itself is safe
        return
    try:
        os.fsync(handle)
    except OSError:  # some network file systems refuse it
        pass
    finally:
        os.close(handle)
