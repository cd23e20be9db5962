"""What the system refuses or lacks, in words: permissions, disks, limits, libraries are the user's to mend,
not our fault."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from partita.base.errors import PartitaError, UsageError, WriteError

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
FORBIDDEN = (errno.EACCES, errno.EPERM)
NO_PLACE = (errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
TOO_MANY = (errno.EMFILE, errno.ENFILE)
SERVING = ("fastapi", "starlette", "uvicorn", "prometheus_client", "llguidance")  # of the extra
PROC = Path("/proc/self/stat")


def refused(error: OSError) -> PartitaError | None:
    """The error that tells the user what he can mend, None where it may be our own fault."""
    file = str(error.filename or "") or None
    if error.errno in TOO_MANY:
        return UsageError(f"{error.strerror}{_limit()}: raise it (`ulimit -n 4096`)", file=file)
    if error.errno in DISK:
        return WriteError(f"cannot write{f' {file}' if file else ''}: {error.strerror}", file=file)
    if file is None:
        return None
    if error.errno in FORBIDDEN:
        return _forbidden(Path(file))
    if error.errno in NO_PLACE:
        return UsageError(f"{file}: {error.strerror}", file=file)
    return None


def not_installed(error: ModuleNotFoundError) -> PartitaError | None:
    """The error that tells which library to install; None for a file of ours, which is our own fault."""
    name = (error.name or "").partition(".")[0]
    if name in ("", "partita"):
        return None
    pip = name.replace("_", "-")
    extra = "[serve]" if name in SERVING else ""
    brings = f"`pip install 'partita{extra}'` brings all that it needs"
    return UsageError(f"{name} is not installed in {sys.prefix}: `pip install {pip}`; {brings}")


def require_proc(stat: Path = PROC) -> None:
    """Raises UsageError where Linux shows no processes: torch and psutil read processors, memory and
    processes there, and fail in words of their own."""
    if sys.platform == "linux" and not stat.exists():
        text = f"no {stat} on this host: processors, memory and processes are read there"
        raise UsageError(f"{text}; mount it (`mount -t proc proc /proc`)", file=str(stat))


def _limit() -> str:
    try:
        import resource
    except ImportError:  # a system that has none
        return ""
    return f", this process may have {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} (`ulimit -n`)"


def _forbidden(path: Path) -> PartitaError:
    """From the root down: the first folder that shuts the path off, else the path itself."""
    for folder in reversed(path.absolute().parents):
        if folder.is_dir() and not os.access(folder, os.X_OK):
            return UsageError(
                f"{path} is out of reach: no permission to enter {folder}", file=str(path)
            )
    if path.exists() and not os.access(path, os.R_OK):
        return UsageError(f"{path} cannot be read: no permission", file=str(path))
    return WriteError(f"{path} cannot be written: no permission", file=str(path))
