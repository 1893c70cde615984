"""Isolate a process from the machine: by namespaces, by limits, and by giving up capabilities."""

import ctypes
import errno
import os
import resource
import socket
import sys

from dnpo.judges.exact.apart import SYSTEM, WORK

# Constants of the system's headers.
_NEW_NS, _NEW_UTS, _NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_KEPT_FLAGS, _RELATIME = 2 | 4 | 8 | 1024 | 2048, 1 << 21  # flags that a new mount must share with the old one
_DETACH = 2
_SET_DEATH_SIGNAL, _SET_DUMPABLE, _SET_NO_NEW_PRIVILEGES = 1, 4, 38
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}
_CAPABILITIES_3 = 0x20080522
_KILL = 9

_DEVICES = ("null", "zero", "full", "random", "urandom")

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args: object) -> None:
    if getattr(_libc, name)(*args) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def limit(limits: dict[str, int]) -> None:
    """Set limits on this process, by their names in :mod:`resource`; no limit is raised."""
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def claim_number(below: int) -> tuple[int, socket.socket]:
    """Claim a number that no other process of this machine has, until the socket is closed or the process ends.

    Raises:
        OSError: all numbers are taken.
    """
    for step in range(below):
        number = (os.getpid() + step) % below
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0dnpo/answer/{number}")  # a name without a file, which the system frees
        except OSError as error:
            claim.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return number, claim
    raise OSError(errno.EAGAIN, f"all {below:,} user ids for answers are in use")


def enter_namespaces() -> bool:
    """Put this process and its children into namespaces without the machine's network, processes and names.

    Returns:
        Whether it is root on the machine, and can become another user.

    Raises:
        OSError: the system does not allow it.
    """
    spaces = _NEW_NS | _NEW_UTS | _NEW_IPC | _NEW_PID | _NEW_NET
    user, group = os.geteuid(), os.getegid()
    if user == 0 and _libc.unshare(spaces) == 0:
        return True
    _call("unshare", spaces | _NEW_USER)
    for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{file}", "w") as opened:
            opened.write(text)
    return False


def enter_root(folder: str, trees: list[str], size: int) -> None:
    """Make a file system with only a few read-only folders and an empty one to work in, even without ``/proc``.

    Args:
        folder: an empty folder, where the file system is mounted for a moment.
        trees: folders that Python needs.
        size: bytes that can be written in all.
    """
    _mount("none", "/", None, _REC | _PRIVATE)
    _mount("tmpfs", folder, "tmpfs", _NOSUID | _NODEV, f"size={size},mode=755")
    for tree in (*SYSTEM, *trees):
        _show(tree, folder)
    for device in _DEVICES:
        _show(f"/dev/{device}", folder, device=True)
    for place in ("/tmp", WORK):
        os.makedirs(folder + place, exist_ok=True)
        os.chmod(folder + place, 0o1777)
    os.chdir(folder)
    number = _PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(f"dnpo cannot change the root folder on {os.uname().machine}")
    _call("syscall", number, b".", b".")
    _call("umount2", b".", _DETACH)
    os.chdir(WORK)


def _show(path: str, folder: str, device: bool = False) -> None:
    """Make a file or folder of the machine appear in the new root, read-only."""
    new = folder + path
    if not os.path.exists(path) or os.path.lexists(new):
        return
    os.makedirs(os.path.dirname(new), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), new)
        return
    if os.path.isdir(path):
        os.mkdir(new)
    else:
        os.close(os.open(new, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(path, new, None, _BIND | _REC)
    found = os.statvfs(new).f_flag
    kept = found & _KEPT_FLAGS | (_RELATIME if found & 4096 else 0)
    if not device:
        _mount("none", new, None, _BIND | _REMOUNT | _RDONLY | _NOSUID | _NODEV | kept)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [word if word is None else word.encode() for word in (source, target, kind)]
    _call("mount", *words, ctypes.c_ulong(flags), None if data is None else data.encode())


def give_up_rights(user: int | None) -> None:
    """Become another user if one is given, and give up all capabilities, for programs started later too."""
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    if sys.platform == "linux":
        header = (ctypes.c_uint32 * 2)(_CAPABILITIES_3, 0)
        _call("capset", header, (ctypes.c_uint32 * 6)())
        _call("prctl", _SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def end_with_parent() -> None:
    """Let the system kill this process when its parent ends."""
    if sys.platform == "linux":
        _call("prctl", _SET_DEATH_SIGNAL, _KILL, 0, 0, 0)


def be_unreadable() -> None:
    """Prevent other processes of the user from tracing this one, or from reading its memory, files and environment."""
    if sys.platform == "linux":
        _call("prctl", _SET_DUMPABLE, 0, 0, 0, 0)


def can_be(user: int) -> bool:
    """Whether the system knows this user: a container may have few users."""
    with open("/proc/self/uid_map") as lines:
        parts = [[int(word) for word in line.split()] for line in lines]
    return any(first <= user < first + count for first, _, count in parts)
