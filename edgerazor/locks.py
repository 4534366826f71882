"""One writer at a time: a lock file that a process holds while it writes.

The lock is the operating system's (`flock`), so it ends with its process, however that ends; the file only carries it,
and says who holds it. The file is removed at the end, by its holder. So whoever gets a lock looks whether the file
still has its name: if not, the lock is that of a file nobody else will ever open, and another must be asked for.

Some network file systems cannot lock. There a second file, `NAME.lock.owner`, is made by whoever comes first, which
every file system does for one process only. It names the host and the process; one of this host that has ended is
removed by whoever comes next. Of another host nobody can know, so then the sentence says which file to remove.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from edgerazor.errors import UserError, plain

#: What file systems that cannot lock say.
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
#: The folder of a lock may be removed by a holder that made it for the lock alone.
TRIES = 20


class HeldError(UserError):
    """Somebody else holds the lock."""


@contextlib.contextmanager
def hold(path: Path, doing: str, hint: str, keep: Callable[[], bool] | None = None) -> Iterator[None]:
    """Hold a lock as the only process, and in it as the only thread.

    Args:
        path: the lock file; its folder is made where there is none.
        doing: what the holder does, for others ("is writing FILE").
        hint: what those may do.
        keep: asked at the end, whether the file stays there; None for no.

    Raises:
        HeldError: another process, or thread, holds it.
        UserError: there can be no lock file there.
    """
    descriptor = _take(path, doing, hint)
    try:
        yield
    finally:
        if keep is None or not keep():
            path.unlink(missing_ok=True)  # while it is held: nobody else can mean this file
        _owner(path).unlink(missing_ok=True)
        os.close(descriptor)


def _take(path: Path, doing: str, hint: str) -> int:
    """The open lock file, locked."""
    for _ in range(TRIES):
        descriptor = _open(path)
        if descriptor is None:
            continue
        try:
            if _lock(descriptor, path, doing, hint):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise UserError(f"{path.parent} cannot hold a lock file.", "Name a folder you may write to.")


def _open(path: Path) -> int | None:
    """The lock file, made where there is none; None where its folder disappears."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
            raise _no_file(path) from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"There can be no lock file {path}: {error.strerror}.", "Name a folder you may write to."
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _no_file(path)
    return descriptor


def _no_file(path: Path) -> UserError:
    return UserError(f"{path} is in the way: it should be a lock file, but is something else.", "Remove it.")


def _lock(descriptor: int, path: Path, doing: str, hint: str) -> bool:
    """Lock an open lock file; False where that file is not there any more."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _held(_digits(os.pread(descriptor, 64, 0)), doing, hint) from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            error.filename = str(path)
            raise
        _own(_owner(path), doing, hint)
    try:
        still = os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        still = False
    if still:
        with contextlib.suppress(OSError):  # it is only said to others
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    else:
        _owner(path).unlink(missing_ok=True)
    return still


def _held(process: str, doing: str, hint: str) -> HeldError:
    return HeldError(f"Another edgerazor (process {process}) {doing}.", hint)


def _digits(text: bytes) -> str:
    """The number of a process, out of a file that may hold anything."""
    return text.decode() if text.isdigit() else "unknown"


# --- without locks -----------------------------------------------------------------------------


def _owner(path: Path) -> Path:
    return path.with_name(f"{path.name}.owner")


def _own(owner: Path, doing: str, hint: str) -> None:
    """Make the file that only one process can make."""
    if not _make(owner):
        if _has_ended(owner):
            _remove_ended(owner)
        if not _make(owner):
            host, process = _named_in(owner)
            at = f"{process} of {plain(host, 64)}" if host else process
            raise _held(at, doing, f"{hint} If it has ended, remove {owner}.")


def _make(owner: Path) -> bool:
    try:
        descriptor = os.open(owner, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, f"{socket.gethostname()} {os.getpid()}".encode())
    finally:
        os.close(descriptor)
    return True


def _named_in(owner: Path) -> tuple[str, str]:
    """Host and process; an empty host where the file does not say."""
    try:
        host, process = owner.read_bytes()[:512].decode().rsplit(" ", 1)
    except (OSError, ValueError):
        return "", "unknown"
    return host, _digits(process.encode())


def _has_ended(owner: Path) -> bool:
    """Whether the file is of a process of this host that is no more."""
    host, process = _named_in(owner)
    if host != socket.gethostname() or not process.isdecimal():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _remove_ended(owner: Path) -> None:
    """Remove the file of a process that has ended, as the only one to do so: the next may be of a living one."""
    removing = owner.with_name(f"{owner.name}.removing")
    if not _make(removing):
        return
    try:
        if _has_ended(owner):
            owner.unlink(missing_ok=True)
    finally:
        removing.unlink(missing_ok=True)
