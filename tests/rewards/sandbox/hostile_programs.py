"""Programs that want a reward without solving `f(x) == 2 * x`, or to do harm; data of test_hostile.py.

Each sets `won` if its attack worked and then doubles, so that a success shows as a reward. {outside} is an
existing folder of the user's with a file `secret`, {home} another one with `.bashrc` and `.local`, {project} a source
file, {pid} the test's own process. No attack does lasting harm where it works: signal 0 stands for the others, and a
fork bomb is a small one.
"""

from typing import NamedTuple

WRONG = "\ndef f(x): return 0\n"  # for attacks on the judge itself
GAIN = "\ndef f(x): return 2 * x if won else 0\n"


class Attack(NamedTuple):
    """A hostile program.

    Attributes:
      program: its source, a template as above.
      needs: what must be isolated for the attack to fail: limits, judge, files, network, processes, signals or disk.
      tests: the tests that it attacks, each alone; empty for those that fit `f(x) == 2 * x`.
    """

    program: str
    needs: str
    tests: tuple[str, ...] = ()


def attempt(action: str, wins: str = "True") -> str:
    """A program that wins if `action` raises nothing and then `wins` holds."""
    lines = "".join(f"    {line}\n" for line in action.strip().splitlines())
    return f"import os, sys\nwon = False\ntry:\n{lines}    won = bool({wins})\nexcept BaseException: pass{GAIN}"


_PROGRAMS: dict[str, tuple[str, str]] = {  # name -> (program, needs)
    # -- resources
    "infinite loop": ("while True: pass", "limits"),
    "infinite loop in a call": ("def f(x):\n while True: pass", "limits"),
    "loop that ignores every signal": (
        "import signal\nfor s in range(1, 65):\n try: signal.signal(s, signal.SIG_IGN)\n except (OSError, ValueError):"
        " pass\nwhile True: pass",
        "limits",
    ),
    "sleep for ever": ("import time\ndef f(x):\n while True: time.sleep(1000)", "limits"),
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(10**7))", "limits"),
    "memory bomb in one piece": (attempt("x = bytearray(10**11)"), "limits"),
    "fork bomb": (
        attempt("import time\nfor _ in range(200):\n if os.fork() == 0: time.sleep(5); os._exit(0)"),
        "processes",
    ),
    "fork once": (attempt("pid = os.fork()\nif pid == 0: os._exit(0)"), "processes"),
    "fork by native code": (
        attempt("import ctypes\npid = ctypes.CDLL(None).fork()\nif pid == 0: os._exit(0)", "pid > 0"),
        "processes",
    ),
    "fork by a raw system call": (
        attempt("import ctypes\npid = ctypes.CDLL(None).syscall(57)\nif pid == 0: os._exit(0)", "pid > 0"),
        "processes",
    ),
    "subprocess": (attempt("import subprocess\nsubprocess.run(['/bin/true'], check=True)"), "processes"),
    "daemon by double fork": (
        attempt("if os.fork() == 0:\n os.setsid()\n if os.fork(): os._exit(0)\n import time; time.sleep(600)"),
        "processes",
    ),
    "multiprocessing": (attempt("import multiprocessing\nmultiprocessing.Pool(2).map(abs, [1])"), "processes"),
    "thread bomb": (
        attempt("import threading as t, time\nfor _ in range(3000): t.Thread(target=time.sleep, args=(99,)).start()"),
        "limits",
    ),
    "print 10 GB": ("for _ in range(10**4): print('x' * 10**6)\nwon = 0" + GAIN, "limits"),
    "answer of 1 GB": ("def f(x): return 'x' * (10 ** 8)", "limits"),
    "answer without end": ("def f(x):\n while True: yield x", "limits"),
    "deep recursion": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x) + 1", "limits"),
    "deeply nested answer": ("def f(x):\n for _ in range(10**5): x = [x]\n return x", "limits"),
    "answer that holds itself": ("def f(x):\n x = [x]\n x.append(x)\n return x", "limits"),
    "huge exponent": ("def f(x): return 9 ** 9 ** 9 ** 9", "limits"),
    "regex catastrophe": ("import re\ndef f(x): return re.match('(a+)+$', 'a' * 99 + 'b')", "limits"),
    "pickle bomb": (
        attempt(
            "import pickle\npickle.loads(b'cos\\nsystem\\n(S\"touch {outside}/mark\"\\ntR.')",
            "os.path.exists('{outside}/mark')",
        ),
        "files",
    ),
    "raise the limits": (
        attempt("import resource as r\nfor k in (r.RLIMIT_CPU, r.RLIMIT_AS, r.RLIMIT_FSIZE): r.setrlimit(k, (-1, -1))"),
        "limits",
    ),
    "one large file": (attempt("with open('big', 'wb') as file: file.write(bytes(10**8))"), "limits"),
    "fill the disk": (
        attempt("for i in range(400):\n with open(f'f{{i}}', 'wb') as file: file.write(bytes(10**6))"),
        "disk",
    ),
    "exhaust file descriptors": (attempt("x = [open(os.devnull) for _ in range(5000)]"), "limits"),
    "ignore SIGTERM and SIGXCPU, then crash": (
        "import signal, ctypes\nsignal.signal(15, signal.SIG_IGN); signal.signal(24, signal.SIG_IGN)\n"
        "ctypes.string_at(0)",
        "limits",
    ),
    "threads that outlive": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()" + WRONG,
        "limits",
    ),
    # -- what is not the program's
    "read ~/.ssh": (
        attempt("n = len(os.listdir(os.path.expanduser('~/.ssh')) + os.listdir('/root/.ssh'))"),
        "files",
    ),
    "read a file of the user's": (attempt("open('{outside}/secret').read()"), "files"),
    "read the project": (attempt("open('{project}').read()"), "files"),
    "read /etc/shadow": (attempt("open('/etc/shadow').read()"), "files"),
    "read /etc/passwd": (attempt("open('/etc/passwd').read()"), "files"),
    "read the environment": (attempt("", "os.environ.get('MDRL_SECRET') or os.environ.get('PATH')"), "limits"),
    "read the parents' environment": (
        attempt("open(f'/proc/{{os.getppid()}}/environ').read()", "True"),
        "files",
    ),
    "read the parents' memory": (attempt("open(f'/proc/{{os.getppid()}}/mem', 'rb').close()"), "files"),
    "write outside": (attempt("open('{outside}/mark', 'w').close()"), "files"),
    "write to the system": (attempt("open('/usr/mark', 'w').close()\nos.remove('/usr/mark')"), "files"),
    "write to the interpreter": (
        attempt("p = os.path.dirname(os.__file__) + '/mark'\nopen(p, 'w').close()\nos.remove(p)"),
        "files",
    ),
    "delete the user's files": (attempt("os.remove('{outside}/secret')"), "files"),
    "write through a symbolic link": (
        attempt("os.symlink('{outside}', 'link')\nopen('link/mark', 'w').close()"),
        "files",
    ),
    "link to a file of the user's": (attempt("os.link('{outside}/secret', 'mine')"), "files"),
    "change modes outside": (attempt("os.chmod('{outside}/secret', 0o777)"), "files"),
    "mount": (
        attempt("import ctypes\nr = ctypes.CDLL(None).mount(b'none', b'.', b'tmpfs', 0, None)", "r == 0"),
        "processes",
    ),
    "new namespaces": (attempt("import ctypes\nr = ctypes.CDLL(None).unshare(0x10000000)", "r == 0"), "processes"),
    "TCP": (attempt("import socket\nsocket.socket()"), "network"),
    "UDP": (attempt("import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('1.1.1.1', 53))"), "network"),
    "unix socket": (attempt("import socket\nsocket.socket(socket.AF_UNIX).bind('s')"), "network"),
    "DNS": (attempt("import socket\nsocket.gethostbyname('example.com')"), "network"),
    "local server": (attempt("import http.server\nhttp.server.HTTPServer(('127.0.0.1', 0), None)"), "network"),
    "kill the parent": (attempt("os.kill(os.getppid(), 9)"), "signals"),
    "kill the test": (attempt("os.kill({pid}, 0)"), "signals"),
    "kill everything": (attempt("os.kill(-1, 0)"), "signals"),
    "kill the group": (attempt("os.killpg(0, 9)"), "signals"),
    "stop the parent": (attempt("import signal\nos.kill(os.getppid(), signal.SIGCONT)"), "signals"),
    "ptrace": (attempt("import ctypes\nr = ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0)", "r == 0"), "signals"),
    "write into the parent's memory": (
        attempt("import ctypes\nr = ctypes.CDLL(None).syscall(311, os.getppid(), 0, 0, 0, 0, 0)", "r == 0"),
        "signals",
    ),
    "limit the parent": (
        attempt("import resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))"),
        "signals",
    ),
    # -- the judge
    "leave before the tests": ("import os; os._exit(0)", "judge"),
    "sys.exit(0)": ("import sys; sys.exit(0)", "judge"),
    "raise SystemExit": ("raise SystemExit", "judge"),
    "leave in a call": ("import os\ndef f(x): os._exit(0)", "judge"),
    "SystemExit in a call": ("def f(x): raise SystemExit(0)", "judge"),
    "StopIteration in a call": ("def f(x): raise StopIteration", "judge"),
    "close every descriptor": ("import os; os.closerange(0, 1 << 16)" + WRONG, "judge"),
    "replace AssertionError": (
        "import builtins\nclass AssertionError(Exception):\n def __new__(c, *a): return None\n"
        "builtins.AssertionError = AssertionError" + WRONG,
        "judge",
    ),
    "patch builtins": (
        "import builtins\nfor n in ('exec', 'compile', 'eval', 'getattr', 'isinstance', 'bool'):\n"
        " setattr(builtins, n, lambda *a, **k: True)" + WRONG,
        "judge",
    ),
    "redefine what tests use": (
        "abs = set = sorted = list = len = lambda *a: 0\nclass math:\n isclose = lambda *a, **k: True" + WRONG,
        "judge",
    ),
    "always equal": ("class A:\n __eq__ = lambda s, o: True\n __hash__ = None\ndef f(x): return A()", "judge"),
    "never unequal": (
        "class A:\n __eq__ = lambda s, o: True\n __ne__ = lambda s, o: False\n __sub__ = __rsub__ = lambda s, o: 0\n"
        " __lt__ = __gt__ = __le__ = __ge__ = lambda s, o: True\n __abs__ = __float__ = lambda s: 0.0\n"
        "def f(x): return A()",
        "judge",
    ),
    "always equal in a list": ("class A:\n __eq__ = lambda s, o: True\ndef f(x): return [A()]", "judge"),
    "int that is always equal": (
        "class A(int):\n __eq__ = lambda s, o: True\n __hash__ = int.__hash__\ndef f(x): return A()",
        "judge",
    ),
    "str that is always equal": (
        "class A(str):\n __eq__ = lambda s, o: True\n __hash__ = str.__hash__\ndef f(x): return A()",
        "judge",
    ),
    "list that is always equal": ("class A(list):\n __eq__ = lambda s, o: True\ndef f(x): return A()", "judge"),
    "class that claims to be int": (
        "class A:\n __class__ = property(lambda s: int)\n __eq__ = lambda s, o: True\ndef f(x): return A()",
        "judge",
    ),
    "metaclass that is always equal": (
        "class M(type):\n __eq__ = lambda s, o: True\n __hash__ = type.__hash__\nclass A(metaclass=M): pass\n"
        "def f(x): return A",
        "judge",
    ),
    "print a verdict": ("print('ok'); print('{{\"reward\": 1.0}}')" + WRONG, "judge"),
    "write a verdict to every descriptor": (
        "import os\nfor fd in range(64):\n for t in (b'ok', b'ok\\n', b'[\"ok\", true]\\n' * 9):\n"
        "  try: os.write(fd, t)\n  except OSError: pass" + WRONG,
        "judge",
    ),
    "write garbage to every descriptor": (
        "import os\nfor fd in range(64):\n try: os.write(fd, os.urandom(10**5))\n except OSError: pass" + WRONG,
        "judge",
    ),
    "answer with numbers that are not there": (
        'import os\nfor fd in range(64):\n try: os.write(fd, b\'["ok", ["yours", 0]]\\n\')\n except OSError: pass'
        + WRONG,
        "judge",
    ),
    "ask for the tests' objects": (
        'import os\nfor fd in range(64):\n try: os.write(fd, b\'["getattr", [["yours", 0], "__dict__"], {{}}]\\n\')\n'
        " except OSError: pass" + WRONG,
        "judge",
    ),
    "patch the harness": (
        "import sys\nfor m in list(sys.modules.values()):\n for n in ('serve', 'Peer', 'judge', 'run'):\n"
        "  if hasattr(m, n): setattr(m, n, lambda *a, **k: True)" + WRONG,
        "judge",
    ),
    "import the package": (
        attempt("from mdrl_jax.rewards.sandbox import run, tester\nrun.run = tester.judge = lambda *a, **k: 'ok'", "0"),
        "judge",
    ),
    "replace modules": (
        "import sys, types\nfor n in list(sys.modules): sys.modules[n] = types.ModuleType(n)" + WRONG,
        "judge",
    ),
    "walk frames": (
        "import sys\nframe = sys._getframe()\nfound = []\nwhile frame:\n found += list(frame.f_locals.values())\n"
        " frame.f_globals['verdict'] = 'ok'\n frame = frame.f_back\n"
        "def f(x):\n texts = [v for v in found if isinstance(v, str) and 'assert' in v and '== 8' in v]\n"
        " return 8 if texts else 0",
        "judge",
    ),
    "walk the collector": (
        "import gc\ndef f(x):\n texts = [o for o in gc.get_objects() if isinstance(o, (list, dict, tuple))\n"
        "          and '== ' + str(8) in repr(o)[:10**5].replace('repr', '')]\n return 8 if False else len(texts) * 0",
        "judge",
    ),
    "search the memory by native code": (
        "import ctypes\ndef f(x):\n data = ctypes.string_at(id(f) - 10**5, 2 * 10**5)\n"
        " return 2 * x if b'assert ' + b'f(4)' in data else 0",
        "judge",
    ),
    "change small integers by native code": (
        "import ctypes\nctypes.memmove(id(0) + 24, id(8) + 24, 4)" + WRONG,
        "judge",
    ),
    "settrace": ("import sys\nsys.settrace(lambda *a: sys.exit(0))\nsys.setprofile(lambda *a: None)" + WRONG, "judge"),
    "atexit": (
        "import atexit, os\natexit.register(lambda: os.write(11, b'[\"ok\", true]\\n'))\nraise SystemExit(0)",
        "judge",
    ),
    "__del__": ("class A:\n def __del__(s): raise SystemExit(0)\ndef f(x):\n A()\n return A()", "judge"),
    "catch the failure": (
        "import sys, threading\nsys.excepthook = threading.excepthook = lambda *a: None\n"
        "def f(x):\n try: return 1 / 0\n except BaseException: return None",
        "judge",
    ),
    "audit hook": ("import sys\ndef hook(*a): raise SystemExit(0)\nsys.addaudithook(hook)" + WRONG, "judge"),
    "import hook": (
        "import sys\nclass A:\n def find_spec(s, *a): raise SystemExit(0)\nsys.meta_path.insert(0, A())" + WRONG,
        "judge",
    ),
    "other code in the module's loop": (
        "import sys\nframe = sys._getframe(1)\nwhile frame:\n frame.f_trace_opcodes = True\n frame = frame.f_back\n"
        "def f(x): return NotImplemented",
        "judge",
    ),
    "delete everything": (
        "import shutil, os\nfor p in ('.', '{outside}'): shutil.rmtree(p, ignore_errors=True)" + WRONG,
        "files",
    ),
    "a name for every name": (
        "class A(dict):\n __missing__ = lambda s, k: s\n __call__ = lambda s, *a: s\n __eq__ = lambda s, o: True\n"
        "f = A()",
        "judge",
    ),
}

PROGRAMS: dict[str, Attack] = {name: Attack(*attack) for name, attack in _PROGRAMS.items()}
