"""Problems that are judged by standard input and output: data of test_cases.py.

Each has a right program, wrong ones, and cases whose outputs were worked out by hand or by the law in the comment.
"""

from typing import Any, NamedTuple


class Contest(NamedTuple):
    """One problem. options: further keys of the check, such as "tolerance"."""

    right: str
    wrong: list[str]
    cases: list[tuple[str, str]]
    options: dict[str, Any] = {}


PROBLEMS: dict[str, Contest] = {
    "sum of two numbers": Contest(
        "a, b = map(int, input().split())\nprint(a + b)",
        ["a, b = map(int, input().split())\nprint(a - b)", "print(3)", "a, b = input().split()\nprint(a + b)", ""],
        [("1 2\n", "3\n"), ("-5 5", "0"), ("1000000000000 1\n", "1000000000001\n")],
    ),
    "read everything at once": Contest(
        "import sys\ndata = sys.stdin.read().split()\nprint(sum(map(int, data[1:])))",
        ["import sys\ndata = sys.stdin.read().split()\nprint(sum(map(int, data)))"],
        [("3\n1 2 3\n", "6\n"), ("2\n4\n5\n", "9"), ("0\n", "0")],
    ),
    "read lines until the end": Contest(
        "import sys\nfor line in sys.stdin: print(line.strip()[::-1])",
        ["print(input()[::-1])", "import sys\nfor line in sys.stdin: print(line.strip())"],
        [("abc\nde\n", "cba\ned\n"), ("x\n", "x\n"), ("ab\ncd\nef", "ba\ndc\nfe")],
    ),
    "read bytes of descriptor 0": Contest(
        "import os\ndata = b''\nwhile part := os.read(0, 65536): data += part\nprint(len(data.split()))",
        ["import os\nprint(len(os.read(0, 4).split()))"],
        [("a b c\n", "3"), ("\n", "0"), ("one two three four five", "5")],
    ),
    "read by open(0)": Contest(
        "lines = open(0).read().splitlines()\nprint(max(map(int, lines[1].split())))",
        ["lines = open(0).read().splitlines()\nprint(max(lines[1].split()))"],
        [("3\n9 10 2\n", "10"), ("1\n7\n", "7"), ("2\n-3 -10\n", "-3")],
    ),
    "write by sys.stdout": Contest(
        "import sys\nn = int(sys.stdin.readline())\nsys.stdout.write('\\n'.join(str(i * i) for i in range(n)))",
        ["import sys\nn = int(sys.stdin.readline())\nsys.stdout.write(''.join(str(i * i) for i in range(n)))"],
        [("3\n", "0\n1\n4\n"), ("1", "0"), ("0", "")],
    ),
    "yes or no": Contest(
        "print('YES' if int(input()) % 2 == 0 else 'NO')",
        ["print('YES')", "print('Yes' if int(input()) % 2 == 0 else 'No')"],
        [("4", "YES"), ("7", "NO"), ("0", "YES")],
    ),
    "several test cases": Contest(
        "for _ in range(int(input())):\n    n = int(input())\n    print(n * (n + 1) // 2)",
        [
            "n = int(input())\nprint(n * (n + 1) // 2)",
            "for _ in range(int(input())):\n    print(sum(range(int(input()))))",
        ],
        [("2\n3\n4\n", "6\n10\n"), ("1\n1\n", "1"), ("3\n0\n10\n100\n", "0\n55\n5050\n")],
    ),
    "root with a tolerance": Contest(
        "print(float(input()) ** 0.5)",
        ["print(round(float(input()) ** 0.5, 2))", "print(int(float(input()) ** 0.5))"],
        [("2", "1.41421356"), ("9", "3.0000000"), ("2000000", "1414.2135623731")],
        {"tolerance": 1e-6},
    ),
    "number without its zeros": Contest(
        "print(int(input()) / 2)",
        ["print(int(input()) // 2)"],
        [("4", "2"), ("5", "2.50"), ("0", "0.0")],
    ),
    "words on any lines": Contest(
        "print(*sorted(map(int, open(0).read().split())), sep='\\n')",
        ["print(*sorted(open(0).read().split()), sep='\\n')"],
        [("3 1 2", "1 2 3"), ("10 9", "9 10"), ("5", "5\n")],
        {"layout": "words"},
    ),
    "matrix": Contest(
        "n = int(input())\nrows = [list(map(int, input().split())) for _ in range(n)]\n"
        "for col in zip(*rows): print(*col)",
        ["n = int(input())\nfor _ in range(n): print(input())"],
        [("2\n1 2\n3 4\n", "1 3\n2 4\n"), ("1\n5\n", "5"), ("2\n1 0\n2 0", "1 2\n0 0")],
    ),
    "shortest path": Contest(
        "from collections import deque\nn, m = map(int, input().split())\nadj = [[] for _ in range(n + 1)]\n"
        "for _ in range(m):\n    a, b = map(int, input().split())\n    adj[a].append(b); adj[b].append(a)\n"
        "far = {1: 0}\nq = deque([1])\nwhile q:\n    a = q.popleft()\n    for b in adj[a]:\n"
        "        if b not in far: far[b] = far[a] + 1; q.append(b)\nprint(far.get(n, -1))",
        ["n, m = map(int, input().split())\nprint(n - 1)", "print(-1)"],
        [("3 3\n1 2\n2 3\n1 3\n", "1"), ("4 2\n1 2\n3 4\n", "-1"), ("3 2\n1 2\n2 3\n", "2")],
    ),
    "coins": Contest(
        "n = int(input())\nways = [1] + [0] * n\nfor c in map(int, input().split()):\n"
        "    for x in range(c, n + 1): ways[x] += ways[x - c]\nprint(ways[n])",
        ["n = int(input())\ncoins = list(map(int, input().split()))\nprint(sum(n % c == 0 for c in coins))"],
        [("4\n1 2 3\n", "4"), ("10\n2 5 3 6\n", "5"), ("3\n2\n", "0")],
    ),
    "deep recursion in a thread": Contest(
        "import sys, threading\nsys.setrecursionlimit(10 ** 6)\nthreading.stack_size(1 << 27)\n"
        "def f(n): return 0 if n == 0 else 1 + f(n - 1)\n"
        "def main(): print(f(int(input())))\nt = threading.Thread(target=main)\nt.start()\nt.join()",
        ["def f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(f(int(input())))"],
        [("5", "5"), ("50000", "50000"), ("0", "0")],
    ),
    "exit before the end": Contest(
        "import sys\nn = int(input())\nif n < 0:\n    print('negative')\n    sys.exit()\nprint('fine')",
        ["n = int(input())\nif n < 0: raise ValueError\nprint('fine')", "import sys\nsys.exit()"],
        [("-1", "negative"), ("1", "fine"), ("0", "fine")],
    ),
    "main guard": Contest(
        "def main():\n    print(input().upper())\n\n\nif __name__ == '__main__':\n    main()",
        ["def main():\n    print(input().upper())"],
        [("abc", "ABC"), ("a b", "A B"), ("É", "É")],
    ),
    "longest word": Contest(
        "print(max(input().split(), key=len))",
        ["print(max(input().split()))", "print(len(max(input().split(), key=len)))"],
        [("a bbb cc", "bbb"), ("z", "z"), ("the quick brown", "quick")],
    ),
    "primes up to n": Contest(
        "n = int(input())\nprint(*[p for p in range(2, n + 1) if all(p % d for d in range(2, int(p ** 0.5) + 1))])",
        ["n = int(input())\nprint(*[p for p in range(2, n + 1) if p % 2 or p == 2])"],
        [("10", "2 3 5 7"), ("2", "2"), ("20", "2 3 5 7 11 13 17 19")],
    ),
    "triangle of stars": Contest(
        "n = int(input())\nfor i in range(1, n + 1): print('*' * i)",
        ["n = int(input())\nfor i in range(1, n + 1): print('*' * n)", "n = int(input())\nprint('*' * n)"],
        [("3", "*\n**\n***\n"), ("1", "*"), ("2", "*\n**")],
    ),
    "brackets": Contest(
        "stack, good = [], True\nfor c in input():\n    if c in '([': stack.append(c)\n"
        "    else: good = good and bool(stack) and stack.pop() + c in ('()', '[]')\n"
        "print('ok' if good and not stack else 'bad')",
        ["s = input()\nprint('ok' if s.count('(') == s.count(')') else 'bad')"],
        [("()[]", "ok"), ("([)]", "bad"), (")(", "bad"), ("((", "bad")],
    ),
    "large output": Contest(
        "n = int(input())\nprint('\\n'.join(map(str, range(n))))",
        ["n = int(input())\nprint('\\n'.join(map(str, range(n - 1))))"],
        [("3", "0\n1\n2"), ("100000", "\n".join(map(str, range(100000))) + "\n"), ("1", "0")],
    ),
}
