"""Takes system calls and files away from a Linux process for good. No privilege is needed for this.

`seccomp_filter` makes a filter of system calls. It forbids calls that start processes, send signals, trace, open
sockets, change another process's limits or reach rarely used parts of the kernel; these calls fail with EPERM.
bubblewrap (bwrap) loads the filter. Without bwrap, `apply` loads it with more calls forbidden, and Landlock limits
files to reading the interpreter's folders and writing the scratch folder. The numbers of the calls are known here for
x86-64 and arm64. References: seccomp(2), landlock(7).
"""

import ctypes
import os
import platform
import signal
import struct
import sys
from collections.abc import Sequence

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1), "arm64": (0xC00000B7, 1)}
# name -> its numbers on (x86-64, arm64); None where the call does not exist
_ALWAYS = {
    "fork": (57, None), "vfork": (58, None), "unshare": (272, 97), "setns": (308, 268),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "socket": (41, 198), "connect": (42, 203), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsmount": (432, 432), "bpf": (321, 280), "perf_event_open": (298, 241),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
}  # fmt: skip
# Forbidden only without bwrap: changes to files that Landlock does not cover, and starting programs of the system.
_BARE = {
    "execve": (59, 221), "execveat": (322, 281), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
    "fchmodat2": (452, 452), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setpriority": (141, 140),
}  # fmt: skip
_CLONE, _CLONE3, _PRLIMIT, _CAPSET = (56, 220), (435, 435), (302, 261), (126, 91)
_CLONE_THREAD = 0x10000
_ALLOW, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data

# Landlock rights. _READ: read files, list folders. _WRITE: every right of version 1 except to execute files.
_READ, _WRITE = 0b1100, (1 << 13) - 1 - 0b1


def seccomp_filter(bare: bool = False) -> bytes | None:
    """Returns the filter as a BPF program, or None on a machine whose system calls are not known here.

    Args:
      bare: whether to forbid also what only a sandbox without bwrap needs to forbid.

    Returns:
      Instructions of 8 bytes (struct sock_filter), as prctl(2) and `bwrap --seccomp` take them.
    """
    if not sys.platform.startswith("linux") or platform.machine() not in _ARCHITECTURES:
        return None
    code, column = _ARCHITECTURES[platform.machine()]
    forbidden = [n[column] for n in (_ALWAYS | (_BARE if bare else {})).values()]
    instructions = [
        (_LOAD, 0, 0, _ARCHITECTURE), (_JUMP_EQUAL, 1, 0, code), (_RETURN, 0, 0, _EPERM),
        (_LOAD, 0, 0, _NUMBER), (_JUMP_GREATER_EQUAL, 0, 1, 0x40000000), (_RETURN, 0, 0, _EPERM),  # x32 calls
    ]  # fmt: skip
    for number in forbidden:
        if number is not None:
            instructions += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _EPERM)]
    # A filter cannot see the flags of clone3. ENOSYS makes glibc call clone instead, which may start threads only.
    instructions += [(_JUMP_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ENOSYS)]
    instructions += [(_JUMP_EQUAL, 0, 4, _CLONE[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT)]
    instructions += [(_JUMP_SET, 0, 1, _CLONE_THREAD), (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _EPERM)]
    # prlimit is allowed for process 0, the caller itself: glibc's getrlimit and setrlimit use it.
    instructions += [(_JUMP_EQUAL, 0, 3, _PRLIMIT[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT)]
    instructions += [(_JUMP_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)


def apply(readable: Sequence[str], writable: str, deadline: int) -> list[str]:
    """Confines this process for good.

    Args:
      readable: folders and files that may be read.
      writable: the scratch folder.
      deadline: seconds after which the kernel ends this process, even if its parent has died.

    Returns:
      What could not be confined: some of "network", "files", "processes", "signals".
    """
    signal.setitimer(signal.ITIMER_REAL, deadline)
    program = seccomp_filter(bare=True)
    if program is None:
        return ["network", "files", "processes", "signals"]
    libc = ctypes.CDLL(None, use_errno=True)
    column = _ARCHITECTURES[platform.machine()][1]
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which Landlock and the filter require
    version = struct.pack("=II", 0x20080522, 0)
    libc.syscall(_CAPSET[column], version, bytes(24))  # drops all capabilities, in case this is the superuser
    missing = [] if _landlock(libc, readable, writable) else ["files"]
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("=HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    if libc.prctl(22, 2, header, 0, 0) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        missing += ["network", "processes", "signals"]
    return missing


def _landlock(libc: ctypes.CDLL, readable: Sequence[str], writable: str) -> bool:
    create, add, restrict = 444, 445, 446
    version = libc.syscall(create, None, 0, 1)
    if version < 3:  # earlier versions cannot forbid truncating files
        return False
    handled = (1 << 15) - 1  # all rights of version 3
    attributes = struct.pack("=Q", handled)
    rules = libc.syscall(create, attributes, len(attributes), 0)
    if rules < 0:
        return False
    null = os.devnull
    rights = [*((p, _READ) for p in readable), (writable, _WRITE | 1 << 14), (null, 0b110)]
    for path, allowed in rights:
        if not os.path.exists(path):
            continue
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            allowed &= 0b111 | 1 << 14
        done = libc.syscall(add, rules, 1, struct.pack("=Qi", allowed, fd), 0)
        os.close(fd)
        if done != 0:
            return False
    done = libc.syscall(restrict, rules, 0)
    os.close(rules)
    return done == 0
