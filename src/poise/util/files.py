"""Files that others name: regular files alone, read up to a limit, and written so that they appear whole or not at all.

What ``stat`` says of a device, a FIFO or a file of ``/proc`` is not what reading it gives, and opening a FIFO waits for
a writer. So a file is opened without waiting, looked at once it is open, and never read beyond what the caller allows.
What is written is written beside its place and renamed (:func:`replacing`, :func:`new_folder`): whoever reads sees one
whole file, what was there before or the new one, whatever becomes of the writer.
"""

from __future__ import annotations

import io
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from poise.util.errors import InputError
from poise.util.words import closest

READ_BYTES = 1 << 20
KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
         (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))  # fmt: skip
MAX_LINKS = 40
MAX_NAMES = 10_000
"""Files of a folder among which a name that is not there is looked for."""
ACL = "system.posix_acl_access"
NEW_FILE, NEW_FOLDER = "name a file in a folder that exists", "name a new folder"


@contextmanager
def open_regular(path: str | Path, error: type[InputError], *, hint: str = "") -> Iterator[BinaryIO]:
    """A regular file, or a link to one, opened for reading; an OSError while it is open becomes ``error`` too.

    Raises
    ------
    InputError : of the type ``error``: there is no such file, it may not be read, or it is a folder, pipe, socket or
        device, which are not waited for.
    """
    try:
        with _opened(path, error, hint) as stream:
            yield stream
    except OSError as problem:
        raise _cannot(path, problem, error, hint) from None


def read_bounded(path: str | Path, most: int, error: type[InputError], *, hint: str = "") -> bytes:
    """All bytes of a regular file.

    Parameters
    ----------
    path : the file.
    most : bytes that it may have; a file that turns out longer costs no more memory than these.
    error : what is raised.
    hint : how to mend a file that cannot be read.

    Raises
    ------
    InputError : of the type ``error``: it has more, or as :func:`open_regular`.
    """
    with open_regular(path, error, hint=hint) as stream:
        said = os.fstat(stream.fileno()).st_size
        data = b"" if said > most else read_at_most(stream, most)
    if max(said, len(data)) > most:
        held = said if said > most else f"more than {most}"
        raise error(f"{str(path)[:200]!r} has {held} bytes, at most {most} are read")
    return data


def read_at_most(stream: BinaryIO, most: int) -> bytes:
    """What is left of a stream, cut after ``most`` + 1 bytes; memory grows with what comes, not with ``most``."""
    data = io.BytesIO()  # gives its bytes away without copying them
    while data.tell() <= most:
        piece = stream.read(min(READ_BYTES, most + 1 - data.tell()))
        if not piece:
            break
        data.write(piece)
    return data.getvalue()


def regular_size(path: str | Path, error: type[InputError]) -> int:
    """Bytes that a regular file says it has. Raises as :func:`open_regular`."""
    with open_regular(path, error) as stream:
        return os.fstat(stream.fileno()).st_size


def _opened(path: str | Path, error: type[InputError], hint: str) -> BinaryIO:
    try:
        mode = os.stat(path).st_mode  # before it is opened: opening a device can do something
        if stat.S_ISREG(mode):
            number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            mode = os.fstat(number).st_mode
            if stat.S_ISREG(mode):
                return os.fdopen(number, "rb")
            os.close(number)
    except (OSError, ValueError) as problem:  # ValueError: a zero byte in the name
        raise _cannot(path, problem, error, hint) from None
    raise error(f"cannot read {str(path)[:200]!r}: it is {_kind(mode)}, not a file", hint=hint)


def _cannot(path: str | Path, problem: Exception, error: type[InputError], hint: str) -> InputError:
    why = "no such file" if isinstance(problem, FileNotFoundError) else getattr(problem, "strerror", None) or problem
    if isinstance(problem, FileNotFoundError):
        hint = _near(path) or hint
    return error(f"cannot read {str(path)[:200]!r}: {why}", hint=hint)


def _near(path: str | Path) -> str:
    """The hint on a name that is not there: what lies in its folder under one that is close to it."""
    folder, name = os.path.split(path)
    try:
        with os.scandir(folder or ".") as held:
            close = closest(name, [one.name for one in islice(held, MAX_NAMES)])
    except (OSError, ValueError):  # no such folder; a zero byte in the name
        return ""
    return f"did you mean {os.path.join(folder, close)}?" if close else ""


@contextmanager
def replacing(path: str | Path, error: type[InputError]) -> Iterator[BinaryIO]:
    """A stream whose bytes replace a file when the block ends, and are gone when it raises.

    They are on the disk before the file has its name, and the rename is what replaces it: any reader at any moment, and
    whoever comes after a kill, a full disk or several writers at once, finds one whole file. A new file has the
    permissions that the umask gives; one that is replaced keeps its mode, owner, group and access list, and where the
    system refuses that, nobody can read it who could not before. A link stays, and what it names is replaced; of a
    file with several hard links only this name is. Where the system has files without a name, ``kill -9`` leaves
    nothing behind; else a file ``.poise-*`` beside.

    Raises
    ------
    InputError : of the type ``error``: as :func:`check_output`, or the system refuses; what was there is as it was.
    """
    place, old = _output(path, error)
    beside = _beside(place)
    try:
        stream, nameless = _scratch(beside, old)
        with stream:
            yield stream
            stream.flush()
            number = stream.fileno()
            if old is not None:
                _keep(number, place, old)
            os.fsync(number)
            if nameless:  # a descriptor given makes it linkat, which follows the link to the file without a name
                os.link(_by_number(number), beside, src_dir_fd=number, follow_symlinks=True)
            os.replace(beside, place)
        _sync(os.path.dirname(place))
    except OSError as problem:
        raise _unwritten(path, problem, error) from None
    finally:
        with suppress(OSError):
            os.unlink(beside)


def write_whole(path: str | Path, text: str, error: type[InputError]) -> None:
    """Write a file of one text, in UTF-8. Raises as :func:`replacing`."""
    with replacing(path, error) as stream:
        stream.write(text.encode())


def check_output(path: str | Path, error: type[InputError]) -> None:
    """Refuse a name under which no file can be written, before the work whose result it is to hold.

    Raises
    ------
    InputError : of the type ``error``: a folder, device, pipe, socket or an open file of a process; a read-only file; a
        file that is mounted by itself; a loop of links; or a folder that is not there or takes no file.
    """
    place, old = _output(path, error)
    beside = _beside(place)
    try:
        _scratch(beside, old)[0].close()
    except OSError as problem:
        raise _unwritten(path, problem, error) from None
    finally:
        with suppress(OSError):
            os.unlink(beside)


@contextmanager
def new_folder(path: str | Path, error: type[InputError]) -> Iterator[Path]:
    """A folder to fill, which gets its name when the block ends, and is gone when it raises.

    It is made beside its place under a name of its own, ``.poise-*``, which only ``kill -9`` leaves behind and nobody
    takes up again. A folder that is there must be empty; its mode, owner and group are kept.

    Raises
    ------
    InputError : of the type ``error``: as :func:`check_new_folder`, or the system refuses; nothing is left.
    """
    place, old = _output_folder(path, error)
    beside = _beside(place)
    try:
        os.mkdir(beside, 0o777 if old is None else 0o700)
        yield Path(beside)
        for root, _, names in os.walk(beside):
            for name in (*names, ""):
                _sync(os.path.join(root, name))
        if old is not None:
            number = os.open(beside, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _keep(number, place, old)
            finally:
                os.close(number)
        os.rename(beside, place)  # onto a folder that another has filled meanwhile it fails
        _sync(os.path.dirname(place))
    except OSError as problem:
        raise _unwritten(path, problem, error) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_new_folder(path: str | Path, error: type[InputError]) -> None:
    """Refuse a name under which no new folder can be made, before the work whose result it is to hold.

    Raises
    ------
    InputError : of the type ``error``: it is there and is no empty folder, or is mounted by itself; a loop of links; or
        the folder that it is to lie in is not there or takes none.
    """
    place, _ = _output_folder(path, error)
    beside = _beside(place)
    try:
        os.mkdir(beside)
    except OSError as problem:
        raise _unwritten(path, problem, error) from None
    finally:
        with suppress(OSError):
            os.rmdir(beside)


def _kind(mode: int) -> str:
    return next((name for is_kind, name in KINDS if is_kind(mode)), "no regular file")


def _beside(place: str) -> str:
    return os.path.join(os.path.dirname(place), f".poise-{secrets.token_hex(6)}")


def _by_number(number: int) -> str:
    return f"/proc/self/fd/{number}"


def _output(path: str | Path, error: type[InputError]) -> tuple[str, os.stat_result | None]:
    """Where a file is to be written, behind all links, and what is there now."""
    place, old = _behind_links(path, error, NEW_FILE)
    if old is None:
        return place, None
    if not stat.S_ISREG(old.st_mode):
        raise error(f"cannot write {str(path)[:200]!r}: it is {_kind(old.st_mode)}, not a file", hint=NEW_FILE)
    if not os.access(place, os.W_OK):
        raise error(f"cannot write {str(path)[:200]!r}: it is there and may not be written", hint="remove it first")
    folder = os.stat(os.path.dirname(place))
    if folder.st_mode & stat.S_ISVTX and os.geteuid() not in (0, old.st_uid, folder.st_uid):
        raise error(
            f"cannot write {str(path)[:200]!r}: it belongs to user {old.st_uid}, whose files nobody else replaces in "
            "this folder", hint=NEW_FILE,
        )  # fmt: skip
    return place, old


def _output_folder(path: str | Path, error: type[InputError]) -> tuple[str, os.stat_result | None]:
    place, old = _behind_links(path, error, NEW_FOLDER)
    if old is None:
        return place, None
    if not stat.S_ISDIR(old.st_mode):
        kind = "a file" if stat.S_ISREG(old.st_mode) else _kind(old.st_mode)
        raise error(f"cannot write {str(path)[:200]!r}: it is {kind}, not a folder", hint=NEW_FOLDER)
    try:
        with os.scandir(place) as held:
            full = next(held, None) is not None
    except OSError as problem:
        raise _unwritten(path, problem, error) from None
    if full:
        raise error(f"cannot write {str(path)[:200]!r}: it exists and is not empty", hint=NEW_FOLDER)
    return place, old


def _behind_links(path: str | Path, error: type[InputError], hint: str) -> tuple[str, os.stat_result | None]:
    """The real place of a name, and what is there; not one that a rename cannot or must not replace."""
    said = f"cannot write {str(path)[:200]!r}"
    try:
        place, links = os.fspath(path), 0
        while True:
            name = os.path.basename(place)
            folder = os.path.realpath(os.path.dirname(place))
            place = os.path.join(folder, name)
            if not os.path.isdir(folder):
                raise error(f"{said}: there is no folder {folder}", hint=hint)
            if os.path.ismount("/proc") and os.stat(folder).st_dev == os.stat("/proc").st_dev:
                raise error(f"{said}: it is an open file of a process, not a file of its own", hint=hint)
            if not os.path.islink(place):
                break
            links += 1
            if links > MAX_LINKS:
                raise error(f"{said}: it is a loop of links", hint=hint)
            place = os.path.join(folder, os.readlink(place))
        try:
            old = os.stat(place)
        except FileNotFoundError:
            return place, None
    except InputError:
        raise
    except (OSError, ValueError) as problem:  # ValueError: a zero byte in the name
        raise _unwritten(path, problem, error, hint) from None
    if _mounted(place):
        raise error(f"{said}: a mount cannot be replaced", hint=f"{hint}, or mount its folder")
    return place, old


def _mounted(place: str) -> bool:
    """A file or folder that is a mount of its own, as containers have them: renaming onto it fails."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return os.path.ismount(place)
    escaped = os.fsencode(place)
    for byte in (b"\\", b" ", b"\t", b"\n"):
        escaped = escaped.replace(byte, b"\\%03o" % ord(byte))
    return any(line.split(b" ", 5)[4] == escaped for line in lines)


def _scratch(beside: str, old: os.stat_result | None) -> tuple[BinaryIO, bool]:
    """A new file in the folder of ``beside``, and whether it has no name; nobody else's until it is in place."""
    mode = 0o666 if old is None else 0o600
    try:
        number = os.open(os.path.dirname(beside), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode)
        if os.path.exists(_by_number(number)):
            return os.fdopen(number, "w+b"), True
        os.close(number)
    except (OSError, AttributeError):  # this system, or the file system, has none
        pass
    return os.fdopen(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, mode), "w+b"), False


def _keep(number: int, place: str, old: os.stat_result) -> None:
    """Give what is open the owner, group, mode and access list of what it replaces; at least nobody new may read."""
    mode = old.st_mode & (0o7777 if stat.S_ISDIR(old.st_mode) else 0o777)
    narrow = mode & ~0o070 | mode & (mode & 0o007) << 3  # what the group may do: no more than all others
    grouped = True
    try:
        os.fchown(number, old.st_uid, old.st_gid)
    except OSError:
        try:
            os.fchown(number, -1, old.st_gid)
        except OSError:
            grouped = False
    with suppress(OSError, AttributeError):  # what the folder bequeaths, or no such lists
        os.removexattr(number, ACL)
    os.fchmod(number, narrow)
    try:
        acl = os.getxattr(place, ACL)
    except (OSError, AttributeError):  # none: the group's bits are the group's
        os.fchmod(number, mode if grouped else narrow)
        return
    if grouped:
        with suppress(OSError):
            os.setxattr(number, ACL, acl)


def _sync(path: str) -> None:
    """Have the disk hold a file or the names in a folder, where it can be told."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _unwritten(path: str | Path, problem: Exception, error: type[InputError], hint: str = "") -> InputError:
    return error(f"cannot write {str(path)[:200]!r}: {getattr(problem, 'strerror', None) or problem}", hint=hint)
