"""Takes system calls and files away from a Linux process for good. No privilege is needed for this.

`confine_files` limits a process and its later children by Landlock to reading the interpreter's folders and to writing
a scratch folder. `confine_calls` loads a filter of system calls (seccomp) into the calling process:

- Calls that computing, threads, pipes and one's own files need are allowed (`_ALLOWED`).
- Calls with a harmful use are allowed for the arguments that programs need (`seccomp_filter`): `clone` starts threads
  that share their files, and no processes, `fcntl` and `ioctl` name no receiver of signals, `prctl` does not change the
  signal that ends the process with its parent, `setitimer` does not move the deadline, `sendto` names no address.
- Calls that were reviewed and refused fail with EPERM (`_REFUSED`).
- Every other call fails with ENOSYS, as on a kernel that does not have it. The kernel may thus grow new calls.

The numbers of the calls are known for x86-64 and arm64. References: seccomp(2), landlock(7), clone(2).
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
_ALLOWED = {  # the frequent ones first: the filter is searched in this order
    "read": (0, 63), "write": (1, 64), "futex": (202, 98), "mmap": (9, 222), "munmap": (11, 215),
    "mprotect": (10, 226), "brk": (12, 214), "madvise": (28, 233), "close": (3, 57), "openat": (257, 56),
    "fstat": (5, 80), "newfstatat": (262, 79), "lseek": (8, 62), "clock_gettime": (228, 113), "getpid": (39, 172),
    "gettid": (186, 178), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "access": (21, None), "arch_prctl": (158, None), "capget": (125, 90), "chdir": (80, 49),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115),
    "copy_file_range": (326, 285), "creat": (85, None), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "epoll_create": (213, None), "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_pwait": (281, 22),
    "epoll_pwait2": (441, 441), "epoll_wait": (232, None), "eventfd": (284, None), "eventfd2": (290, 19),
    "exit": (60, 93), "exit_group": (231, 94), "faccessat": (269, 48), "faccessat2": (439, 439),
    "fadvise64": (221, 223), "fallocate": (285, 47), "fchdir": (81, 50), "fdatasync": (75, 83), "flock": (73, 32),
    "fstatfs": (138, 44), "fsync": (74, 82), "ftruncate": (77, 46), "futex_waitv": (449, 449), "getcpu": (309, 168),
    "getcwd": (79, 17), "getdents": (78, None), "getdents64": (217, 61), "getegid": (108, 177),
    "geteuid": (107, 175), "getgid": (104, 176), "getgroups": (115, 158), "getitimer": (36, 102),
    "getpgid": (121, 155), "getpgrp": (111, None), "getppid": (110, 173), "getpriority": (140, 141),
    "getrandom": (318, 278), "getresgid": (120, 150), "getresuid": (118, 148), "getrlimit": (97, 163),
    "get_robust_list": (274, 100), "getrusage": (98, 165), "getsid": (124, 156), "getsockname": (51, 204),
    "getsockopt": (55, 209), "gettimeofday": (96, 169), "getuid": (102, 174), "link": (86, None),
    "linkat": (265, 37), "lstat": (6, None), "membarrier": (324, 283),
    "mincore": (27, 232), "mkdir": (83, None), "mkdirat": (258, 34), "mremap": (25, 216), "msync": (26, 227),
    "nanosleep": (35, 101), "open": (2, None), "openat2": (437, 437), "pause": (34, None), "pipe": (22, None),
    "pipe2": (293, 59), "poll": (7, None), "ppoll": (271, 73), "pread64": (17, 67), "preadv": (295, 69),
    "preadv2": (327, 286), "pselect6": (270, 72), "pwrite64": (18, 68), "pwritev": (296, 70),
    "pwritev2": (328, 287), "readahead": (187, 213), "readlink": (89, None), "readlinkat": (267, 78),
    "readv": (19, 65), "recvfrom": (45, 207), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "restart_syscall": (219, 128), "rmdir": (84, None), "rseq": (334, 293), "rt_sigpending": (127, 136),
    "rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137), "sched_getaffinity": (204, 123),
    "sched_getparam": (143, 121), "sched_getscheduler": (145, 120), "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126), "sched_rr_get_interval": (148, 127), "sched_yield": (24, 124),
    "select": (23, None), "sendfile": (40, 71), "set_robust_list": (273, 99), "set_tid_address": (218, 96),
    "setrlimit": (160, 164), "setsockopt": (54, 208), "shutdown": (48, 210), "sigaltstack": (131, 132),
    "signalfd": (282, None), "signalfd4": (289, 74), "splice": (275, 76), "stat": (4, None), "statfs": (137, 43),
    "statx": (332, 291), "symlink": (88, None), "symlinkat": (266, 36), "sysinfo": (99, 179), "tee": (276, 77),
    "time": (201, None), "timerfd_create": (283, 85), "timerfd_gettime": (287, 87), "timerfd_settime": (286, 86),
    "times": (100, 153), "truncate": (76, 45), "umask": (95, 166), "uname": (63, 160), "unlink": (87, None),
    "unlinkat": (263, 35), "wait4": (61, 260), "waitid": (247, 95), "writev": (20, 66),
}  # fmt: skip
_REFUSED = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "kill": (62, 129),
    "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "socket": (41, 198), "connect": (42, 203),
    "bind": (49, 200), "listen": (50, 201), "accept": (43, 202), "accept4": (288, 242), "sendmsg": (46, 211),
    "sendmmsg": (307, 269), "recvmsg": (47, 212), "recvmmsg": (299, 243), "unshare": (272, 97), "setns": (308, 268),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "chmod": (90, None),
    "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None),
    "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
    "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "mknod": (133, None),
    "mknodat": (259, 33), "setuid": (105, 146), "setgid": (106, 144), "setreuid": (113, 145),
    "setregid": (114, 143), "setresuid": (117, 147), "setresgid": (119, 149), "setgroups": (116, 159),
    "setpgid": (109, 154), "setsid": (112, 157), "setpriority": (141, 140), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "alarm": (37, None),
}  # fmt: skip
_FILTERED = {
    "clone": (56, 220), "clone3": (435, 435), "close_range": (436, 436), "prctl": (157, 167), "fcntl": (72, 25),
    "ioctl": (16, 29), "setitimer": (38, 103), "prlimit64": (302, 261), "socketpair": (53, 199), "sendto": (44, 206),
}  # fmt: skip
_CAPSET = (126, 91)
_CLONE_THREAD, _CLONE_FILES = 0x10000, 0x400
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032, 1033, 1034)  # duplicates, flags, locks, sizes and seals
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # is it a terminal, its size, bytes waiting, flags
_PRCTL = (2, 3, 15, 16, 21, 39, 0x53564D41)  # read settings; name a thread or a mapping
_ITIMER_REAL, _AF_UNIX, _SOCK_STREAM = 0, 1, 1

_ALLOW, _EPERM, _ENOTTY, _ENOSYS = 0x7FFF0000, 0x00050001, 0x00050019, 0x00050026
_LOAD, _AND, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data

# Landlock rights. _READ: read files, list folders. _LIST: list folders. _WRITE: every right of version 3 except to
# execute files.
_READ, _LIST, _WRITE = 0b1100, 0b1000, (1 << 15) - 1 - 0b1

Instruction = tuple[int, int, int, int]


def supported() -> bool:
    """Whether system calls can be filtered here: on Linux on x86-64 and arm64."""
    return sys.platform.startswith("linux") and platform.machine() in _ARCHITECTURES


def _argument(i: int) -> int:
    """The offset of the lower half of the i-th argument in struct seccomp_data."""
    return 16 + 8 * i


def _only(argument: int, values: Sequence[int], otherwise: int) -> list[Instruction]:
    """Allows the call if the argument's lower half is one of the values; else returns `otherwise`."""
    checks = [(_JUMP_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [(_LOAD, 0, 0, _argument(argument)), *checks, (_RETURN, 0, 0, otherwise), (_RETURN, 0, 0, _ALLOW)]


def seccomp_filter() -> bytes:
    """Returns the filter as a BPF program: instructions of 8 bytes (struct sock_filter), as prctl(2) takes them.

    Raises:
      KeyError: if this machine is neither x86-64 nor arm64 (`supported`).
    """
    code, column = _ARCHITECTURES[platform.machine()]
    bodies: dict[str, list[Instruction]] = {
        "clone": [
            (_LOAD, 0, 0, _argument(0)), (_JUMP_SET, 0, 2, _CLONE_THREAD), (_JUMP_SET, 0, 1, _CLONE_FILES),
            (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _EPERM),
        ],
        # A filter cannot see the flags of clone3. ENOSYS makes the C library call clone instead.
        "clone3": [(_RETURN, 0, 0, _ENOSYS)],
        "close_range": _only(2, (0, 4), _EPERM),  # not a table of descriptors of its own, which would not count
        "prctl": _only(0, _PRCTL, _EPERM),
        "fcntl": _only(1, _FCNTL, _EPERM),
        "ioctl": _only(1, _IOCTL, _ENOTTY),
        "setitimer": [
            (_LOAD, 0, 0, _argument(0)), (_JUMP_EQUAL, 0, 1, _ITIMER_REAL), (_RETURN, 0, 0, _EPERM),
            (_RETURN, 0, 0, _ALLOW),
        ],
        "prlimit64": _only(0, (0,), _EPERM),  # process 0 is the caller itself; getrlimit of the C library asks for it
        # A socket for datagrams could send to any name; a connected stream cannot.
        "socketpair": [
            (_LOAD, 0, 0, _argument(0)), (_JUMP_EQUAL, 1, 0, _AF_UNIX), (_RETURN, 0, 0, _EPERM),
            (_LOAD, 0, 0, _argument(1)), (_AND, 0, 0, 0xF), (_JUMP_EQUAL, 1, 0, _SOCK_STREAM), (_RETURN, 0, 0, _EPERM),
            (_RETURN, 0, 0, _ALLOW),
        ],
        "sendto": [
            (_LOAD, 0, 0, _argument(4)), (_JUMP_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _EPERM),
            (_LOAD, 0, 0, _argument(4) + 4), (_JUMP_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _EPERM),
            (_RETURN, 0, 0, _ALLOW),
        ],
    }  # fmt: skip
    rules = [
        *((numbers, [(_RETURN, 0, 0, _ALLOW)]) for numbers in _ALLOWED.values()),
        *((numbers, bodies[name]) for name, numbers in _FILTERED.items()),
        *((numbers, [(_RETURN, 0, 0, _EPERM)]) for numbers in _REFUSED.values()),
    ]
    instructions: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE), (_JUMP_EQUAL, 1, 0, code), (_RETURN, 0, 0, _EPERM),
        (_LOAD, 0, 0, _NUMBER), (_JUMP_GREATER_EQUAL, 0, 1, 0x40000000), (_RETURN, 0, 0, _ENOSYS),  # x32 calls
    ]  # fmt: skip
    for numbers, body in rules:
        number = numbers[column]
        if number is not None:
            instructions += [(_JUMP_EQUAL, 0, len(body), number), *body]
    instructions.append((_RETURN, 0, 0, _ENOSYS))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent dies. Does nothing on systems other than Linux."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def drop_user(uid: int) -> None:
    """Turns the superuser into the user `uid`, so that the kernel counts its threads (RLIMIT_NPROC).

    `uid` becomes the group too, and there are no further groups. The right to read files is kept, because the
    interpreter may be the superuser's own; mounts or Landlock decide which files those are. All other rights of the
    superuser are lost. This cannot be undone.

    Raises:
      OSError: if the kernel refuses, as it does where the process is not the superuser's.
      KeyError: if this machine is neither x86-64 nor arm64.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    _capabilities(libc, 1 << 2)  # CAP_DAC_READ_SEARCH


def _capabilities(libc: ctypes.CDLL, keep: int) -> None:
    """Drops all capabilities but those of the bit mask `keep`."""
    column = _ARCHITECTURES[platform.machine()][1]
    header = struct.pack("=II", 0x20080522, 0)
    if libc.syscall(_CAPSET[column], header, struct.pack("=6I", keep, keep, 0, 0, 0, 0)) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def confine_calls() -> bool:
    """Loads the filter of system calls into this process. Returns whether the kernel took it.

    The filter holds for the calling thread and for what it starts later, and cannot be undone. The superuser also loses
    all capabilities. Where `supported` is false, nothing happens, and the result is False.

    Raises:
      OSError: if the superuser's capabilities cannot be dropped.
    """
    if not supported():
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0:
        _capabilities(libc, 0)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which the filter requires
    program = seccomp_filter()
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("=HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    return libc.prctl(22, 2, header, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def confine_files(readable: Sequence[str], listed: Sequence[str], writable: str) -> bool:
    """Limits this process, and those that it starts later, to some files (Landlock). This cannot be undone.

    It holds for the calling thread and for what that starts later. The null device may be read and written too.

    Args:
      readable: folders and files that may be read, folders with all below them; absent ones are ignored.
      listed: folders below which folders may be listed and no files read; absent ones are ignored.
      writable: the scratch folder, in which all is allowed but to execute files; an absent one is ignored.

    Returns:
      Whether the kernel took the limits. It does not where `supported` returns False, or where the kernel has no
      Landlock of version 3 (Linux 6.2) or newer; no file is limited then.

    Raises:
      OSError: if a path exists and cannot be opened.
    """
    if not supported():
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which Landlock requires
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
    rights = [
        *((p, _READ) for p in readable),
        *((p, _LIST) for p in listed),
        (writable, _WRITE),
        (null, 0b110),
    ]
    try:
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
        return libc.syscall(restrict, rules, 0) == 0
    finally:
        os.close(rules)
