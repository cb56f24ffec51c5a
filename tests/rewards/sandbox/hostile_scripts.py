"""Hostile programs that read standard input, and hostile tests; data of test_hostile.py."""

from tests.rewards.sandbox.hostile_programs import Attack

CASES = [{"stdin": f"{x}\n", "stdout": f"{2 * x}\n"} for x in (4, 5, 6)]


def _once(before: str, finds: str, leaves: str) -> Attack:
    """A script that is right in the first case, leaves something, and is right in later cases only if it finds that."""
    program = (
        f"import os, sys\nx = int(sys.stdin.readline())\nwon = x == 4\n{before}\n"
        f"if not won:\n    try: won = bool({finds})\n    except BaseException: pass\n"
        "if x == 4:\n    try:\n"
        + "".join(f"        {line}\n" for line in leaves.split("\n"))
        + "    except OSError: pass\n"
        "print(2 * x if won else 'no')\n"
    )
    return Attack(program, "files")


_FOUND = "[n for d, _, ns in [*os.walk('.'), *os.walk('/tmp')] for n in ns if 'left' in n]"

# Each gets CASES and scores if it passes all of them.
SCRIPTS: dict[str, Attack] = {
    "file left in the scratch folder": _once("", _FOUND, "open('left', 'w').close()"),
    "file left in /tmp": _once("", _FOUND, "open('/tmp/left', 'w').close()"),
    "file left deep below": _once("", _FOUND, "os.makedirs('a/b/c/d')\nopen('a/b/c/d/left', 'w').close()"),
    "file left in a folder without modes": _once(
        "", "os.path.isdir('a')", "os.makedirs('a/b')\nopen('a/b/left', 'w').close()\nos.umask(0o777)\nos.mkdir('a/z')"
    ),
    "file left behind names that cleaning could use": _once(
        "",
        _FOUND,
        "for b in ('/tmp', '.'):\n    for i in range(60):\n"
        "        try: os.makedirs(f'{{b}}/.{{os.getppid()}}-{{i}}/x')\n"
        "        except OSError: pass\nopen('left', 'w').close()",
    ),
    "file left behind 3,000 nested folders": _once(
        "", _FOUND, "open('left', 'w').close()\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')"
    ),
    "file left behind 20,000 files": _once(
        "", _FOUND, "open('left', 'w').close()\nfor i in range(20000): os.mkdir(str(i))"
    ),
    "name left as a link": _once("", "os.path.lexists('s')", "os.symlink('/usr/lib', 's')"),
    "scratch folder replaced": _once(
        "",
        "os.path.exists(os.getcwd() + 'left') or os.listdir('.')",
        "w = os.getcwd()\nos.rename(w, w + 'left')\nos.mkdir(w)",
    ),
    "thread left": _once(
        "import threading, time",
        "threading.active_count() > 1",
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    ),
    "state left in a module": _once(
        "", "getattr(os, 'left', 0) or 'left' in sys.modules", "os.left = 1\nsys.modules['left'] = os"
    ),
    "shared memory left": _once(
        "import ctypes\nshm = ctypes.CDLL(None).shmget", "shm(0x4d44, 4096, 0) >= 0", "shm(0x4d44, 4096, 0o1600)"
    ),
    "name of the process left": _once(
        "import ctypes\nlibc = ctypes.CDLL(None)\nname = ctypes.create_string_buffer(16)\nlibc.prctl(16, name)",
        "name.value == b'left'",
        "libc.prctl(15, b'left')",
    ),
    "limits left": _once(
        "import resource as r", "r.getrlimit(r.RLIMIT_NOFILE)[0] == 33", "r.setrlimit(r.RLIMIT_NOFILE, (33, 33))"
    ),
    "descriptor left": _once(
        "", "[n for n in range(3, 250) if os.fstat(n)]", "os.dup2(os.open('left', os.O_CREAT | os.O_RDWR), 40)"
    ),
    "lock left": _once(
        "import fcntl\nfd = os.open('/usr/lib', os.O_RDONLY)",
        "not fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB) and False",
        "fcntl.flock(fd, fcntl.LOCK_EX)",
    ),
    "inputs of other cases": Attack(
        "import os, sys\nx = int(input())\nfound = []\nfor n in range(3, 250):\n"
        " try: found.append(os.pread(n, 99, 0))\n except OSError: pass\n"
        "print(2 * x if any(b'5' in t for t in found) else 'no')",
        "judge",
    ),
    "answers of earlier cases": Attack("x = input()\nprint(8)\nprint(10)\nprint(12)", "judge"),
    "input read again and again": Attack(
        "import os, sys\nx = int(input())\nos.lseek(0, 0, 0)\nrest = sys.stdin.read()\nprint(rest * 2)", "judge"
    ),
    "input overwritten": Attack(
        "import os\nx = int(input())\nos.pwrite(0, b'0' * 99, 0)\nos.ftruncate(0, 1)\nprint(0)", "judge"
    ),
    "more input than there is": Attack("while True: print(2 * int(input()))", "judge"),
    "output without end": Attack("while True: print('8' * 10**5)", "limits"),
    "10 GB of output in native writes": Attack("import os\nx = bytes(1 << 16)\nwhile True: os.write(1, x)", "limits"),
    "output before the exit by a signal": Attack(
        "import ctypes\nprint(2 * int(input()), flush=True)\nctypes.string_at(0)", "judge"
    ),
    "output before an exception": Attack("print(2 * int(input()), flush=True)\nraise ValueError", "judge"),
    "output before a loop": Attack("print(2 * int(input()), flush=True)\nwhile True: pass", "limits"),
    "output before a sleep": Attack("import time\nprint(2 * int(input()), flush=True)\ntime.sleep(100)", "limits"),
    "output closed, then a sleep": Attack(
        "import os, time\nprint(2 * int(input()), flush=True)\nos.close(1)\ntime.sleep(100)", "limits"
    ),
    "output closed before it is written": Attack("import os\nx = int(input())\nprint(2 * x)\nos.close(1)", "judge"),
    "every descriptor closed": Attack(
        "import os, time\nprint(2 * int(input()), flush=True)\nos.closerange(0, 256)\ntime.sleep(100)", "limits"
    ),
    "output with terminal controls": Attack("print(2 * int(input()), '\\x1b[2K\\r\\b' * 9)", "judge"),
    "output of no text": Attack("import os\nos.write(1, bytes(range(128, 256)) * 99)", "judge"),
    "output with a null": Attack("print(2 * int(input()), '\\0')", "judge"),
    "every number": Attack("print(*range(200))", "judge"),
    "number that is no number": Attack("print('nan inf -inf 1e9999 0x8 8_ ٨'.split()[int(input()) % 7])", "judge"),
    "number with a huge exponent": Attack("print('1e999999999')", "judge"),
    "output in many lines": Attack("print('8\\n' * 10**6)", "judge"),
    "verdict as the exit status": Attack("import os\nos._exit(0)", "judge"),
    "memory status": Attack("import os\nprint(2 * int(input()), flush=True)\nos._exit(77)", "judge"),
    "status of a broken sandbox": Attack("import os\nprint(0, flush=True)\nos._exit(1)", "judge"),
}

RIGHT = "def f(x): return 2 * x"


def _attempt(action: str, wins: str = "True") -> Attack:
    """Tests that pass if `action` raises nothing and then `wins` holds."""
    lines = "".join(f"    {line}\n" for line in action.strip().splitlines())
    return Attack(
        f"import os, sys\nassert f(4) == 8\nwon = False\ntry:\n{lines}    won = bool({wins})\n"
        "except (OSError, ImportError): pass\nassert won",
        "",
    )


def _wrong(test: str) -> Attack:
    """Tests that do harm and then fail."""
    return Attack(f"import os, sys\nassert f(4) == 8\n{test}\nassert False", "")


_NATIVE = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
_PIPES = (
    "import stat\nfor n in range(3, 256):\n    try:\n"
    "        if stat.S_ISFIFO(os.fstat(n).st_mode): os.write(n, {text!r})\n"
    "    except OSError: pass\n"
)

# Each runs against RIGHT and scores if its attack works.
TESTS: dict[str, Attack] = {
    "read the user's file": _attempt("text = open('{outside}/secret').read()"),
    "list the user's keys": _attempt("n = os.listdir('{home}')"),
    "read the environment": _attempt("pass", "os.environ.get('MDRL_SECRET') or os.environ.get('PATH')"),
    "read the parents' environment": _attempt("text = open(f'/proc/{{os.getppid()}}/environ').read()"),
    "read passwords": _attempt("text = open('/etc/passwd').read()"),
    "read the project": _attempt("text = open('{project}').read()"),
    "write outside": _attempt("open('{outside}/mark', 'w').close()"),
    "append to the user's shell": _attempt("open('{home}/.bashrc', 'a').close()"),
    "remove the user's file": _attempt("os.remove('{outside}/secret')"),
    "change modes": _attempt("os.chmod('{outside}', 0o777)"),
    "write into a package": _attempt("import numpy\nopen(os.path.dirname(numpy.__file__) + '/mark', 'w').close()"),
    "network": _attempt("import socket\nsocket.create_connection(('1.1.1.1', 80), 1)"),
    "names on the network": _attempt("import socket\nsocket.getaddrinfo('example.com', 80)"),
    "download": _attempt("import urllib.request\nurllib.request.urlopen('http://example.com', timeout=1)"),
    "socket": _attempt("import socket\nsocket.socket(socket.AF_UNIX)"),
    "fork": _attempt("pid = os.fork()\nif pid == 0: os._exit(0)"),
    "shell": _attempt("import subprocess\nsubprocess.run('true', shell=True, check=True)"),
    "os.system": _attempt("status = os.system('true')", "status == 0"),
    "replace the process": _attempt("os.execv(sys.executable, ['python', '-c', ''])"),
    "kill the worker": _attempt("os.kill({pid}, 0)"),
    "kill the parent": _attempt("os.kill(os.getppid(), 9)"),
    "kill everything": _attempt("os.kill(-1, 0)"),
    "trace the parent": _attempt(f"{_NATIVE}r = libc.ptrace(16, os.getppid(), 0, 0)", "r == 0"),
    "write into the parent": _attempt("open(f'/proc/{{os.getppid()}}/mem', 'r+b').close()"),
    "limit the parent": _attempt("import resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))"),
    "reset the deadline": _attempt("import signal\nsignal.setitimer(signal.ITIMER_REAL, 0)"),
    "mount": _attempt(f"{_NATIVE}r = libc.mount(b'none', b'.', b'tmpfs', 0, None)", "r == 0"),
    "new namespaces": _attempt(f"{_NATIVE}r = libc.unshare(0x10000000)", "r == 0"),
    "read the judge": _attempt("from mdrl_jax.rewards import pool", "pool"),
    "open the control socket": _attempt(
        "import stat\nfound = []\nfor n in range(256):\n"
        "    try: found.append(n) if stat.S_ISSOCK(os.fstat(n).st_mode) else 0\n"
        "    except OSError: pass",
        "len(found) > 1",
    ),
    # -- harm to the requests that follow
    "loop for ever": _wrong("while True: pass"),
    "sleep for ever": _wrong("import time\ntime.sleep(1000)"),
    "10 GB of memory": _wrong("x = []\nwhile True: x.append(bytearray(10**7))"),
    "10 GB of output": _wrong("for _ in range(10**4): os.write(1, bytes(10**6))"),
    "thread bomb": _wrong(
        "import threading, time\n"
        "for _ in range(3000): threading.Thread(target=time.sleep, args=(99,), daemon=True).start()"
    ),
    "leave the process": _wrong("os._exit(0)"),
    "leave by a signal": _wrong("import ctypes\nctypes.string_at(0)"),
    "close every descriptor": _wrong("os.closerange(0, 256)"),
    "no verdict and no end": _wrong("import time\nos.closerange(0, 256)\ntime.sleep(1000)"),
    "garbage as the verdict": _wrong(_PIPES.format(text=b"\xff" * 5000) + "os._exit(0)"),
    "a part of a verdict": _wrong(_PIPES.format(text=b"o") + "os._exit(1)"),
    "verdict that says gone": _wrong(_PIPES.format(text=b"gone") + "import time\ntime.sleep(1000)"),
    "leave a file": _wrong("open('left', 'w').close()\nos.makedirs('a/b/c')\nopen('a/b/c/left', 'w').close()"),
    "leave a file that cleaning does not reach": _wrong(
        "for b in ('/tmp', '.'):\n    for i in range(60):\n"
        "        try: os.makedirs(f'{{b}}/.{{os.getppid()}}-{{i}}/x')\n"
        "        except OSError: pass\nopen('left', 'w').close()"
    ),
    "replace the scratch folder": _wrong(
        "w = os.getcwd()\ntry: os.rename(w, w + 'x'); os.symlink('/usr/lib', w)\nexcept OSError: pass\n"
        "for b in ('/tmp', '.'):\n    for i in range(60):\n"
        "        try: os.makedirs(f'{{b}}/.{{os.getppid()}}-{{i}}/x')\n"
        "        except OSError: pass"
    ),
    "leave 60,000 folders": _wrong("for i in range(60000): os.mkdir(f'{{i:x}}')"),
    "leave deeply nested folders": _wrong("while True: os.mkdir('d'); os.chdir('d')"),
    "fill the disk": _wrong("for i in range(400):\n    with open(f'f{{i}}', 'wb') as file: file.write(bytes(10**6))"),
    "patch the harness": _wrong(
        "import gc\nfor o in gc.get_objects():\n"
        "    if type(o).__name__ == 'module' and 'mdrl' in getattr(o, '__name__', ''):\n"
        "        for n in list(vars(o)): setattr(o, n, None)"
    ),
    "garbage for the program": _wrong(
        "import stat\nfor n in range(3, 256):\n    try:\n"
        "        if stat.S_ISSOCK(os.fstat(n).st_mode): os.write(n, b'\\xff' * 10**5)\n"
        "    except OSError: pass"
    ),
}

# What tests see that come after the hostile ones: nothing that those have left.
CLEAN = (
    "import os, threading\nassert f(4) == 8\n"
    "assert not [n for d, _, ns in [*os.walk('.'), *os.walk('/tmp')] for n in ns if 'left' in n]\n"
    "assert os.getcwd() and not os.listdir('.') and threading.active_count() == 1"
)
