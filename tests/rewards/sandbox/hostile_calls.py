"""Hostile programs that use system calls, files of others and resources; data of test_hostile.py.

They are written as those of `hostile_programs.py`. The numbers of system calls are those of x86-64; on another machine
these programs do nothing. A call that could do harm gets an argument that the kernel refuses after it has looked at the
caller's rights, such as a wrong magic number for `reboot`.
"""

from tests.rewards.sandbox.hostile_programs import GAIN, WRONG, Attack, attempt

_NATIVE = "assert os.uname().machine == 'x86_64'\nimport ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"


def call(number: int, arguments: str = "", wins: str = "r >= 0", before: str = "") -> str:
    """A program that wins if a system call, made past the C library's function for it, leaves `wins` true."""
    comma = ", " if arguments else ""
    action = f"{_NATIVE}{before}\nr = libc.syscall({number}{comma}{arguments})\nerror = ctypes.get_errno()"
    return attempt(action, wins)


def machine_code(code: str, wins: str) -> str:
    """A program that calls machine code, given in hexadecimal, which leaves its result `r` in eax."""
    action = (
        "import mmap, ctypes\nassert os.uname().machine == 'x86_64'\n"
        "page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)\n"
        f"page.write(bytes.fromhex('{code}'))\n"
        "r = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()"
    )
    return attempt(action, wins)


_PARENT = "os.getppid()"
_ALLOWED_IF = "error not in (1, 38)"  # neither EPERM nor ENOSYS: the kernel took the caller for one with the right
_OWN_FILE = "open('own', 'w').close()"
_LINK = (
    "import stat\ndef is_socket(n):\n try: return stat.S_ISSOCK(os.fstat(n).st_mode)\n except OSError: return False\n"
    "link = next(n for n in range(3, 64) if is_socket(n))"
)

# name -> (number, arguments, what holds after it, what comes before it, what has to be isolated)
_RAW: dict[str, tuple[int, str, str, str, str]] = {
    # -- new processes
    "fork by clone": (56, "17, 0, 0, 0, 0", "r > 0 or os._exit(0)", "", "processes"),
    "fork by clone3": (
        435,
        "ctypes.create_string_buffer(bytes(32) + bytes([17]) + bytes(31)), 64",
        "r > 0 or os._exit(0)",
        "",
        "processes",
    ),
    "fork by vfork": (58, "", "r > 0 or os._exit(0)", "", "processes"),
    "execve": (59, "b'/nonexistent', 0, 0", "error == 2", "", "processes"),
    "execveat of a file in memory": (
        322,
        "fd, b'', 0, 0, 0x1000",
        "error == 8",
        "fd = os.memfd_create('x')",
        "processes",
    ),
    # -- signals and other processes
    "tkill": (200, f"{_PARENT}, 0", "r == 0", "", "signals"),
    "tgkill": (234, f"{_PARENT}, {_PARENT}, 0", "r == 0", "", "signals"),
    "rt_sigqueueinfo": (
        129,
        f"{_PARENT}, 0, ctypes.create_string_buffer(bytes(8) + b'\\xff' * 4 + bytes(116))",
        "r == 0",
        "",
        "signals",
    ),
    "rt_tgsigqueueinfo": (
        297,
        f"{_PARENT}, {_PARENT}, 0, ctypes.create_string_buffer(bytes(8) + b'\\xff' * 4 + bytes(116))",
        "r == 0",
        "",
        "signals",
    ),
    "pidfd_open": (434, f"{_PARENT}, 0", "r >= 0", "", "signals"),
    "signal by the peer's pidfd": (
        424,
        "fd, 0, 0, 0",
        "r == 0",
        "import socket\na, b = socket.socketpair()\nfd = a.getsockopt(1, 77)",
        "signals",
    ),
    "pidfd_getfd": (
        438,
        "fd, 0, 0",
        "r >= 0",
        "import socket\nfd = socket.socketpair()[0].getsockopt(1, 77)",
        "signals",
    ),
    "timer_create": (
        222,
        "0, 0, ctypes.byref(ctypes.c_long())",
        "r == 0",
        "",
        "signals",
    ),
    "alarm": (37, "0", "r >= 0 and error == 0", "", "signals"),
    "process_madvise": (440, "fd, 0, 0, 20, 0", "r == 0", "fd = os.pidfd_open(os.getpid())", "signals"),
    "process_mrelease": (448, "-1, 0", "error == 9", "", "signals"),
    "kcmp": (312, f"os.getpid(), {_PARENT}, 1, 0, 0", "r >= 0", "", "signals"),
    "process_vm_readv": (310, f"{_PARENT}, 0, 0, 0, 0, 0", "r == 0", "", "signals"),
    "move_pages of the parent": (279, f"{_PARENT}, 0, 0, 0, 0, 0", "r == 0", "", "signals"),
    "migrate_pages": (256, f"{_PARENT}, 1, 0, 0", "r >= 0", "", "signals"),
    # -- scheduling
    "sched_setattr": (
        314,
        "0, ctypes.create_string_buffer((48).to_bytes(4, 'little') + (3).to_bytes(4, 'little') + bytes(40)), 0",
        "r == 0",
        "",
        "processes",
    ),
    "ioprio_set": (251, "1, 0, 0x4000", "r == 0", "", "processes"),
    "set_mempolicy": (238, "0, 0, 0", "r == 0", "", "processes"),
    "personality": (135, "0x0040000", "r >= 0", "", "processes"),
    "modify_ldt": (154, "0, ctypes.create_string_buffer(64), 64", "r >= 0", "", "processes"),
    "mlockall": (151, "1", "r == 0", "", "limits"),
    "remap_file_pages": (
        216,
        "address, 4096, 0, 0, 0",
        "r == 0",
        "import mmap\nm = mmap.mmap(-1, 8192)\n"
        "address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(m)))",
        "processes",
    ),
    # -- the kernel's large interfaces
    "userfaultfd": (323, "1", "r >= 0", "", "processes"),
    "io_uring": (425, "4, ctypes.create_string_buffer(120)", "r >= 0", "", "processes"),
    "bpf": (
        321,
        "0, ctypes.create_string_buffer((2).to_bytes(4, 'little') + (4).to_bytes(4, 'little') * 3 + bytes(112)), 128",
        "r >= 0",
        "",
        "processes",
    ),
    "perf_event_open": (
        298,
        "ctypes.create_string_buffer((1).to_bytes(4, 'little') + (112).to_bytes(4, 'little') + bytes(104)), "
        "0, -1, -1, 0",
        "r >= 0",
        "",
        "processes",
    ),
    "add_key": (248, "b'user', b'mdrl', b'x', 1, -3", "r >= 0", "", "processes"),
    "keyctl": (250, "0, -3, 0", "r >= 0", "", "processes"),
    "request_key": (249, "b'user', b'mdrl', 0, -3", "error == 126", "", "processes"),
    "memfd_secret": (447, "0", "r >= 0", "", "limits"),
    "seccomp": (
        317,
        "1, 0, ctypes.create_string_buffer((1).to_bytes(8, 'little') + address.to_bytes(8, 'little'))",
        "r == 0",
        "code = ctypes.create_string_buffer(bytes.fromhex('0600000000000000')[:4] + bytes.fromhex('0000ff7f'))\n"
        "address = ctypes.addressof(code)",
        "processes",
    ),
    "fanotify": (300, "0, 0", "r >= 0", "", "files"),
    "inotify": (294, "0", "r >= 0", "", "files"),
    # -- memory that processes share
    "SysV shared memory": (29, "0, 4096, 0o1600", "r >= 0 and libc.syscall(31, r, 0, 0) == 0", "", "processes"),
    "SysV messages": (68, "0, 0o1600", "r >= 0 and libc.syscall(71, r, 0, 0) == 0", "", "processes"),
    "SysV semaphores": (64, "0, 1, 0o1600", "r >= 0 and libc.syscall(66, r, 0, 0, 0) == 0", "", "processes"),
    "POSIX messages": (240, "b'mdrl', 0o102, 0o600, 0", "r >= 0 and libc.syscall(241, b'mdrl') == 0", "", "processes"),
    # -- files by unusual ways
    "openat2 outside": (
        437,
        "-100, b'{outside}/secret', ctypes.create_string_buffer(24), 24",
        "r >= 0",
        "",
        "files",
    ),
    "open_by_handle_at": (
        304,
        "3, handle, 0",
        "r >= 0 or error == 116",
        "handle = ctypes.create_string_buffer((8).to_bytes(4, 'little') + (1).to_bytes(4, 'little') + bytes(136))\n"
        "libc.syscall(303, -100, b'{outside}', handle, ctypes.byref(ctypes.c_int()), 0)\nos.dup2(os.open('.', 0), 3)",
        "files",
    ),
    "name_to_handle_at": (
        303,
        "-100, b'{outside}', ctypes.create_string_buffer((128).to_bytes(4, 'little') + bytes(140)), "
        "ctypes.byref(ctypes.c_int()), 0",
        "r == 0",
        "",
        "files",
    ),
    "truncate outside": (76, "b'{outside}/secret', 6", "r == 0", "", "files"),
    "setxattr outside": (
        188,
        "b'{outside}/secret', b'user.x', b'1', 1, 0",
        "r == 0",
        "",
        "files",
    ),
    "setxattrat": (
        463,
        "-100, b'own', 0, b'user.x', "
        "ctypes.create_string_buffer(address.to_bytes(8, 'little') + bytes([1]) + bytes(7)), 16",
        "r == 0",
        f"{_OWN_FILE}\nvalue = ctypes.create_string_buffer(b'1')\naddress = ctypes.addressof(value)",
        "files",
    ),
    "getxattrat": (
        464,
        "-100, b'own', 0, b'user.x', ctypes.create_string_buffer(16), 16",
        "error in (61, 95)",
        _OWN_FILE,
        "files",
    ),
    "listxattrat": (465, "-100, b'own', 0, 0, 0", "r >= 0", _OWN_FILE, "files"),
    "removexattrat": (466, "-100, b'own', 0, b'user.x'", "error == 61", _OWN_FILE, "files"),
    "open_tree_attr": (467, "-100, b'.', 0, 0, 0", "r >= 0", "", "files"),
    "file_getattr": (468, "-100, b'own', ctypes.create_string_buffer(24), 24, 0", "r == 0", _OWN_FILE, "files"),
    "file_setattr": (
        469,
        "-100, b'own', attributes, 24, 0",
        "r == 0",
        f"{_OWN_FILE}\nattributes = ctypes.create_string_buffer(24)\n"
        "libc.syscall(468, -100, b'own', attributes, 24, 0)",
        "files",
    ),
    "fchmodat2 outside": (452, "-100, b'{outside}/secret', 0o644, 0", "r == 0", "", "files"),
    "utimensat outside": (280, "-100, b'{outside}/secret', 0, 0", "r == 0", "", "files"),
    "chown outside": (92, "b'{outside}/secret', -1, -1", "r == 0", "", "files"),
    # -- mounts
    "umount": (166, "b'.', 0", "error == 22", "", "processes"),
    "pivot_root": (155, "b'/nonexistent', b'/nonexistent'", "error == 2", "", "processes"),
    "chroot": (161, "b'.'", "r == 0", "", "processes"),
    "fsopen": (430, "b'tmpfs', 0", "r >= 0", "", "processes"),
    "open_tree": (428, "-100, b'.', 1", "r >= 0", "", "processes"),
    "move_mount": (429, "-1, b'', -1, b'', 0", "error not in (1, 38)", "", "processes"),
    "mount_setattr": (
        442,
        "-100, b'.', 0, ctypes.create_string_buffer(32), 32",
        "r == 0 or error == 22",
        "",
        "processes",
    ),
    "statmount": (457, "0, 0, 0, 0", _ALLOWED_IF, "", "files"),
    "listmount": (458, "0, 0, 0, 0", _ALLOWED_IF, "", "files"),
    "setns": (308, "-1, 0", "error == 9", "", "processes"),
    # -- the machine
    "quotactl": (179, "0x800002 << 8, b'/nonexistent', 0, 0", "error not in (1, 38)", "", "processes"),
    "swapon": (167, "b'/nonexistent', 0", "error == 2", "", "processes"),
    "swapoff": (168, "b'/nonexistent'", "error == 2", "", "processes"),
    "reboot with a wrong magic number": (169, "0, 0, 0, 0", "error == 22", "", "processes"),
    "init_module": (175, "0, 0, b''", _ALLOWED_IF, "", "processes"),
    "finit_module": (313, "-1, b'', 0", _ALLOWED_IF, "", "processes"),
    "delete_module": (176, "b'nonexistent', 0", "error == 2", "", "processes"),
    "kexec_load": (246, "0, 0, 0, 0xff", _ALLOWED_IF, "", "processes"),
    "acct": (163, "b'/nonexistent'", "error == 2", "", "processes"),
    "sethostname": (170, "b'x', -1", "error == 22", "", "processes"),
    "settimeofday": (164, "0, 0", "r == 0", "", "processes"),
    "adjtimex": (159, "ctypes.create_string_buffer(256)", "r >= 0", "", "processes"),
    "read the kernel's log": (103, "3, ctypes.create_string_buffer(64), 64", "r >= 0", "", "files"),
    "iopl": (172, "0", "r == 0", "", "processes"),
    "ioperm": (173, "0x80, 1, 0", "r == 0", "", "processes"),
    # -- rights
    "setuid": (105, "0", "r == 0 and os.geteuid() == 0", "", "processes"),
    "setresuid": (117, "0, 0, 0", "r == 0 and os.geteuid() == 0", "", "processes"),
    "setgroups": (116, "1, ctypes.byref(ctypes.c_int(0))", "r == 0", "", "processes"),
    "setfsuid": (122, "0", "r >= 0 and error != 38 and libc.syscall(122, -1) == 0", "", "processes"),
    "capset": (
        126,
        "ctypes.create_string_buffer((0x20080522).to_bytes(4, 'little') + bytes(4)), "
        "ctypes.create_string_buffer(b'\\x01\\0\\0\\0' * 2 + bytes(16))",
        "r == 0",
        "",
        "processes",
    ),
    # -- calls of other architectures
    "x32 call": (0x40000000 + 39, "", "r == os.getpid()", "", "processes"),
}

_PRCTL = {
    "outlive the parent (prctl)": "1, 0, 0, 0, 0",
    "be traced (prctl)": "4, 1, 0, 0, 0",
    "choose a tracer (prctl)": "0x59616d61, -1, 0, 0, 0",
    "keep capabilities (prctl)": "8, 1, 0, 0, 0",
    "adopt orphans (prctl)": "36, 1, 0, 0, 0",
    "timer slack (prctl)": "29, 10**9, 0, 0, 0",
    "no speculation control (prctl)": "53, 0, 2, 0, 0",
}
_FCNTL = {
    "name a receiver of signals (F_SETOWN)": f"fcntl.fcntl(link, 8, {_PARENT})",
    "name a receiver of signals (F_SETOWN_EX)": "import struct\n"
    f"fcntl.fcntl(link, 15, struct.pack('ii', 1, {_PARENT}))",
    "choose the signal (F_SETSIG)": "fcntl.fcntl(link, 10, 9)",
    "lease (F_SETLEASE)": "fcntl.fcntl(os.open('own', os.O_CREAT), 1024, 0)",
    "watch a folder (F_NOTIFY)": "fcntl.fcntl(os.open('.', 0), 1026, 2)",
    "larger pipe (F_SETPIPE_SZ)": "fcntl.fcntl(os.pipe()[1], 1031, 1 << 20)",
}
_IOCTL = {
    "name a receiver of signals (FIOSETOWN)": "0x8901",
    "name a receiver of signals (SIOCSPGRP)": "0x8902",
}

_MEMORY_OF_THREADS = """
import ctypes, threading, os, time
libc = ctypes.CDLL(None)
made = []
def hold():
    libc.syscall(436, 1000000, 1000000, 2)
    for _ in range(50):
        fd = libc.syscall(319, b'x', 0)
        try: os.posix_fallocate(fd, 0, 1 << 20)
        except OSError: return
        made.append(fd)
    time.sleep(1)
threading.stack_size(1 << 16)
for _ in range(24):
    try: threading.Thread(target=hold, daemon=True).start()
    except RuntimeError: pass
time.sleep(0.6)
won = len(made) > 512"""

CALLS: dict[str, Attack] = {
    name: Attack(call(number, arguments, wins, before), needs)
    for name, (number, arguments, wins, before, needs) in _RAW.items()
}
CALLS |= {name: Attack(call(157, arguments, "r == 0"), "signals") for name, arguments in _PRCTL.items()}
CALLS |= {name: Attack(attempt(f"import fcntl\n{_LINK}\n{action}"), "signals") for name, action in _FCNTL.items()}
CALLS |= {
    name: Attack(
        attempt(f"import fcntl, struct\n{_LINK}\nfcntl.ioctl(link, {number}, struct.pack('i', {_PARENT}))"), "signals"
    )
    for name, number in _IOCTL.items()
}
CALLS |= {
    "i386 call": Attack(machine_code("b814000000cd80c3", "r == os.getpid()"), "processes"),
    "fork by machine code": Attack(machine_code("b8390000000f05c3", "r > 0 or os._exit(0)"), "processes"),
    # -- limits
    "reset the deadline": Attack(
        attempt("import signal\nsignal.setitimer(signal.ITIMER_REAL, 0)\nsignal.alarm(0)"), "limits"
    ),
    "nice -20": Attack(attempt("os.setpriority(os.PRIO_PROCESS, 0, -20)"), "processes"),
    "slow the parent down": Attack(attempt("os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)"), "processes"),
    "real-time scheduling": Attack(attempt("os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))"), "processes"),
    "choose cores": Attack(attempt("os.sched_setaffinity(0, os.sched_getaffinity(0))"), "processes"),
    "new session": Attack(attempt("os.setsid()"), "processes"),
    "new group": Attack(attempt("os.setpgid(0, 0)"), "processes"),
    "more threads (RLIMIT_NPROC)": Attack(
        attempt("import resource as r\nr.setrlimit(r.RLIMIT_NPROC, (9999, 9999))"), "limits"
    ),
    "more files (RLIMIT_NOFILE)": Attack(
        attempt("import resource as r\nr.setrlimit(r.RLIMIT_NOFILE, (9999, 9999))"), "limits"
    ),
    "core dump": Attack(attempt("import resource as r\nr.setrlimit(r.RLIMIT_CORE, (-1, -1))"), "limits"),
    "memory in descriptors of threads": Attack(_MEMORY_OF_THREADS + GAIN, "limits"),
    "memory in files of memory": Attack(
        attempt("x = [os.memfd_create('x') for _ in range(50)]\nfor fd in x: os.posix_fallocate(fd, 0, 1 << 23)"),
        "limits",
    ),
    "memory in pipes": Attack(
        attempt("x = [os.pipe() for _ in range(5000)]"),
        "limits",
    ),
    "sparse file of 1 TB": Attack(attempt("os.truncate(os.open('x', os.O_CREAT | os.O_RDWR), 1 << 40)"), "limits"),
    "preallocated file": Attack(
        attempt("os.posix_fallocate(os.open('x', os.O_CREAT | os.O_RDWR), 0, 1 << 30)"), "limits"
    ),
    "copies within the kernel": Attack(
        attempt(
            "a = os.open('/dev/zero', 0)\nb = os.open('x', os.O_CREAT | os.O_RDWR)\nn = 0\n"
            "while n < 10**8:\n m = os.sendfile(b, a, None, 1 << 20)\n assert m\n n += m"
        ),
        "limits",
    ),
    "8000 threads": Attack(
        attempt(
            "import _thread, time\n_thread.stack_size(1 << 15)\nfor _ in range(8000):\n"
            " _thread.start_new_thread(time.sleep, (9,))"
        ),
        "limits",
    ),
    "32 busy threads in native code": Attack(
        "import hashlib, threading\ndef work():\n while True: hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**6)\n"
        "for _ in range(20):\n try: threading.Thread(target=work, daemon=True).start()\n except RuntimeError: pass\n"
        "work()",
        "limits",
    ),
    "loop in native code": Attack("def f(x): return sum(iter(int, 1))", "limits"),
    "wait for 100 s": Attack("import time\ndef f(x): time.sleep(100); return 2 * x", "limits"),
    "wait for a lock": Attack("import threading\ndef f(x):\n a = threading.Lock(); a.acquire(); a.acquire()", "limits"),
    "block all signals and wait": Attack(
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\ndef f(x): signal.pause()", "limits"
    ),
    "stack overflow in native code": Attack(
        "import ctypes\nkind = ctypes.CFUNCTYPE(None)\n@kind\ndef again(): again()\ndef f(x): again()", "limits"
    ),
    "zlib bomb": Attack(
        attempt("import zlib\nx = zlib.compress(bytes(1 << 24))\ny = [zlib.decompress(x) for _ in range(40)]"), "limits"
    ),
    "billion laughs": Attack(
        attempt(
            "import xml.etree.ElementTree as e\nx = '<!ENTITY a \"' + 'l' * 10**5 + '\">'\n"
            "for a, b in zip('abcd', 'bcde'): x += '<!ENTITY ' + b + ' \"' + f'&{{a}};' * 50 + '\">'\n"
            "y = e.fromstring('<!DOCTYPE r [' + x + ']><r>&e;</r>').text",
            "len(y) > 10**8",
        ),
        "limits",
    ),
    "numpy array of 1 TB": Attack(attempt("import numpy as np\nx = np.ones(10**11)"), "limits"),
    # -- what the scratch folder holds
    "folders nested 1,000 deep": Attack(
        "import os\nfor _ in range(1000): os.mkdir('d'); os.chdir('d')" + WRONG, "limits"
    ),
    "60,000 folders": Attack("import os\nfor i in range(60000): os.mkdir(f'{{i:x}}')" + WRONG, "disk"),
    "nested folders without modes": Attack(
        "import os\nos.umask(0o777)\nos.makedirs('a', exist_ok=True)\nfor _ in range(30):\n"
        " try: os.mkdir('d'); os.chdir('d')\n except OSError: break" + WRONG,
        "limits",
    ),
    "files without modes": Attack(
        "import os\nos.mkdir('a')\nos.umask(0o777)\nfor i in range(99): os.close(os.open(f'a/{{i}}', os.O_CREAT))"
        + WRONG,
        "limits",
    ),
    "names that cleaning could use": Attack(
        "import os\nfor p in range(1, 9):\n for i in range(40):\n  for n in (os.getppid() + p - 1, p):\n"
        "   try: os.makedirs(f'/tmp/.{{n}}-{{i}}/x')\n   except OSError: pass\n"
        "   try: os.makedirs(f'.{{n}}-{{i}}/x')\n   except OSError: pass" + WRONG,
        "limits",
    ),
    "names of 255 bytes and odd bytes": Attack(
        "import os\nfor i in range(200): os.mkdir(bytes([1 + i % 46]) * 200 + b'\\n\\xff' + str(i).encode())\n" + WRONG,
        "limits",
    ),
    "links outside while the folder is removed": Attack(
        "import os\nfor i in range(200):\n os.symlink('{outside}', f's{{i}}'); os.mkdir(f'd{{i}}')\n"
        " os.symlink('{outside}/secret', f'd{{i}}/s')\n"
        "import threading\ndef swap():\n while True:\n  for i in range(3):\n   try:\n"
        "    os.rename(f'd{{i}}', 'x'); os.symlink('{outside}', f'd{{i}}'); os.unlink(f'd{{i}}')\n"
        "    os.rename('x', f'd{{i}}')\n"
        "   except OSError: pass\n"
        "for _ in range(4): threading.Thread(target=swap, daemon=True).start()\ndef f(x): raise SystemExit",
        "limits",
    ),
    "replace the scratch folder": Attack(
        attempt("w = os.getcwd()\nos.rename(w, w + 'x')\nos.symlink('{outside}', w)\nopen(w + '/mark', 'w').close()"),
        "files",
    ),
    "small files in /tmp": Attack(
        attempt("for i in range(30000):\n with open(f'/tmp/{{i}}', 'w') as file: file.write('x' * 4096)"), "disk"
    ),
    # -- files of others
    "descriptors in /proc": Attack(attempt("n = os.listdir('/proc/self/fd')"), "files"),
    "own memory in /proc": Attack(attempt("open('/proc/self/mem', 'r+b').close()"), "files"),
    "maps in /proc": Attack(attempt("open('/proc/self/maps').read()"), "files"),
    "all processes in /proc": Attack(attempt("", "any(n.isdigit() for n in os.listdir('/proc'))"), "files"),
    "the first process's root": Attack(attempt("os.listdir('/proc/1/root')"), "files"),
    "/sys": Attack(attempt("os.listdir('/sys')"), "files"),
    "/dev/tty": Attack(attempt("os.open('/dev/tty', os.O_RDWR)"), "files"),
    "new terminal": Attack(attempt("os.openpty()"), "files"),
    "/dev/shm": Attack(attempt("open('/dev/shm/mdrl-mark', 'w').close()\nos.remove('/dev/shm/mdrl-mark')"), "files"),
    "shared memory of Python": Attack(
        attempt("from multiprocessing import shared_memory as s\nm = s.SharedMemory('mdrl', True, 9)\nm.unlink()"),
        "files",
    ),
    "all devices": Attack(attempt("", "len(os.listdir('/dev')) > 9"), "files"),
    "kernel messages": Attack(attempt("os.open('/dev/kmsg', os.O_RDONLY)"), "files"),
    "physical memory": Attack(attempt("os.open('/dev/mem', os.O_RDONLY)"), "files"),
    "scratch folders of others": Attack(
        attempt("up = os.path.dirname(os.getcwd())", "up != '/tmp' and len(os.listdir(up))"), "files"
    ),
    "folder above the scratch folders": Attack(
        attempt("open('../mark', 'w').close()\nopen('../../mark', 'w').close()"), "files"
    ),
    "the user's packages": Attack(attempt("os.listdir('{home}/.local')"), "files"),
    "the user's shell": Attack(attempt("open('{home}/.bashrc', 'a').close()"), "files"),
    "packages that are not listed": Attack(attempt("import jax"), "files"),
    "another package that is not listed": Attack(attempt("import transformers"), "files"),
    "pytest": Attack(attempt("import pytest"), "files"),
    "tests of the project": Attack(
        attempt("sys.path[:0] = ['{project}'.rpartition('/tests/')[0]]\nimport tests.rewards.sandbox.forms"), "files"
    ),
    "the project's package": Attack(
        attempt(
            "sys.path[:0] = ['{project}'.rpartition('/tests/')[0], '/mdrl']\nfrom mdrl_jax.rewards import code, outputs"
        ),
        "files",
    ),
    "write into a package": Attack(
        attempt("import numpy\np = os.path.dirname(numpy.__file__) + '/mark'\nopen(p, 'w').close()\nos.remove(p)"),
        "files",
    ),
    "replace the judge's bytecode": Attack(
        attempt("p = '/mdrl/mdrl_jax/rewards/sandbox/tester.py'\nos.stat(p)\nopen(p, 'r+').close()"), "files"
    ),
    "rename out of the user's folder": Attack(attempt("os.rename('{outside}/secret', 'mine')"), "files"),
    "rename into the user's folder": Attack(attempt(f"{_OWN_FILE}\nos.rename('own', '{{outside}}/mark')"), "files"),
    "nameless file outside": Attack(attempt("os.open('{outside}', os.O_TMPFILE | os.O_RDWR)"), "files"),
    "work in the user's folder": Attack(attempt("os.chdir('{outside}')\nos.mkdir('mark')"), "files"),
    "list the user's folder": Attack(attempt("os.listdir('{outside}')"), "files"),
    "by a descriptor of a path": Attack(
        attempt("fd = os.open('{outside}', os.O_PATH)\nos.open('secret', os.O_RDONLY, dir_fd=fd)"), "files"
    ),
    "device node": Attack(attempt("import stat\nos.mknod('null', stat.S_IFCHR | 0o600, os.makedev(1, 3))"), "files"),
    "named pipe": Attack(attempt("os.mkfifo('pipe')"), "files"),
    # -- sockets
    "datagrams": Attack(attempt("import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)"), "network"),
    "packets in sequence": Attack(
        attempt("import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)"), "network"
    ),
    "datagram to a name": Attack(
        attempt(
            "import socket\na, b = socket.socketpair()\n"
            "try: a.sendto(b'x', '\\0mdrl')\nexcept OSError as e: assert e.errno not in (1, 38)"
        ),
        "network",
    ),
    "pass descriptors on": Attack(
        attempt("import socket\na, b = socket.socketpair()\nsocket.send_fds(a, [b'x'], [0])"), "network"
    ),
    "receive descriptors": Attack(
        attempt("import socket\na, b = socket.socketpair()\na.send(b'x')\nsocket.recv_fds(b, 1, 1)"), "network"
    ),
    "many messages at once": Attack(call(307, "0, 0, 0, 0", "error == 88"), "network"),
    "netlink": Attack(attempt("import socket\nsocket.socket(16, socket.SOCK_RAW, 0)"), "network"),
    "raw packets": Attack(attempt("import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)"), "network"),
    "the host of virtual machines": Attack(attempt("import socket\nsocket.socket(socket.AF_VSOCK)"), "network"),
    "IPv6": Attack(attempt("import socket\nsocket.socket(socket.AF_INET6)"), "network"),
    "ciphers of the kernel": Attack(
        attempt("import socket\nsocket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)"), "network"
    ),
    "listen on a connected socket": Attack(
        attempt(
            "import socket\na, b = socket.socketpair()\ntry: a.listen()\nexcept OSError as e: assert e.errno == 22"
        ),
        "network",
    ),
    "event loop with a server": Attack(
        attempt("import asyncio\ns = asyncio.run(asyncio.start_server(print, '127.0.0.1', 0))", "s.sockets"), "network"
    ),
}
