"""Carries plain data between a program in its sandbox and the tests outside it: JSON lines over two pipes.

Only data travels, at most 4 MiB in one line: None, numbers, texts, bytes, lists, tuples, dicts, sets, dates, and the
names of builtin types. An instance of a subclass of a number, a text or a container (a named tuple, a Counter, an `int`
whose `__eq__` is always true) arrives as the builtin type, so that no code of the sender comes along. Any other object
stays where it is. Its number travels instead, and the other end makes a stand-in of it, a `Foreign`.

Both ends import this file. A bubblewrap sandbox lacks most of the package, so the file imports nothing from it.
"""

import builtins
import json
import os
import sys
from collections.abc import Callable
from typing import Any

_MOST_BYTES = 4 << 20  # in one line; limits how much a program can make the other end read into memory
_PLAIN_BITS = 8192  # longer integers travel in hexadecimal, because Python limits the length of decimal ones
_BUILTIN_TYPES = {v: k for k, v in vars(builtins).items() if isinstance(v, type) and v is not type}
_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_FIELDS = {  # classes of the standard library, with the attributes that make one anew
    "date": ("year", "month", "day"),
    "datetime": ("year", "month", "day", "hour", "minute", "second", "microsecond"),
    "time": ("hour", "minute", "second", "microsecond"),
    "timedelta": ("days", "seconds", "microseconds"),
    "Fraction": ("numerator", "denominator"),
    "range": ("start", "stop", "step"),
}
_MODULES = {"Fraction": "fractions", "Decimal": "decimal", "deque": "collections", "range": "builtins"}


class Gone(BaseException):
    """The other end has left or broken the protocol.

    It is a BaseException, so that no `except Exception` hides it.
    """


class Foreign:
    """Stands for an object that stayed at the other end.

    Calling it makes the call there; it returns and raises what `Peer.ask` does.

    Args:
      peer: this end of the connection.
      number: the object's number at the other end.
    """

    _peer: "Peer"
    _number: int

    def __init__(self, peer: "Peer", number: int) -> None:
        self.__dict__.update(_peer=peer, _number=number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._peer.ask("call", self, *args, **kwargs)


class Peer:
    """One end of the connection.

    Args:
      read_fd, write_fd: the pipes from and to the other end.
      serve: carries out a request `(op, args, kwargs)` of the other end, also while this end waits for an answer.
      foreign: makes the stand-in of an object of the other end from (peer, number).
    """

    def __init__(
        self,
        read_fd: int,
        write_fd: int,
        serve: Callable[[str, list[Any], dict[str, Any]], Any],
        foreign: Callable[["Peer", int], Any] = Foreign,
    ) -> None:
        self._fds = read_fd, write_fd
        self._serve, self._foreign = serve, foreign
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._unread = b""

    def ask(self, op: str, *args: Any, **kwargs: Any) -> Any:
        """Sends a request and returns the answer of the other end, serving its requests in the meantime.

        Args:
          op: the operation, such as "call" or "getattr".
          *args: its arguments.
          **kwargs: its keyword arguments.

        Returns:
          Plain data, or what `foreign` makes of an object that stays there.

        Raises:
          Exception: the builtin exception that the other end reports; RuntimeError or ValueError in place of one that
            would end the tests early or cannot be made from a text.
          Gone: if the other end has left or broken the protocol.
        """
        self.send([op, [self.encode(a) for a in args], {k: self.encode(v) for k, v in kwargs.items()}])
        while True:
            match self.receive():
                case ["ok", value]:
                    return self._decode(value)
                case ["raise", str(name), str(text)]:
                    raise _exception(name, text)
                case message:
                    self._answer(message)

    def serve_forever(self) -> None:
        """Answers requests until the other end leaves.

        Raises:
          Gone: always, when the other end has left or broken the protocol.
        """
        while True:
            self._answer(self.receive())

    def _answer(self, message: Any) -> None:
        try:
            op, args, kwargs = message
            args, kwargs = [self._decode(a) for a in args], {str(k): self._decode(v) for k, v in kwargs.items()}
        except Exception as e:
            raise Gone(f"the line is no request: {type(e).__name__}") from e
        try:
            reply = json.dumps(["ok", self.encode(self._serve(op, args, kwargs))])
        except Gone:
            raise
        except BaseException as e:
            reply = json.dumps(["raise", _builtin_name(e), _text(e)])
        self._write(reply)

    def send(self, message: Any) -> None:
        """Writes a message as one line.

        Args:
          message: a JSON value. Other values have to be turned into JSON by `encode` before.

        Raises:
          Gone: if the other end no longer reads.
        """
        self._write(json.dumps(message))

    def _write(self, line: str) -> None:
        data = memoryview(line.encode() + b"\n")
        try:
            while data:
                data = data[os.write(self._fds[1], data) :]
        except OSError as e:
            raise Gone("the other end no longer reads") from e

    def receive(self) -> Any:
        """Reads one message and returns its JSON value, in which encoded values are not decoded.

        Raises:
          Gone: if the other end has closed its pipe, or the line is too long or not JSON.
        """
        line = [self._unread]
        size = len(self._unread)
        while b"\n" not in line[-1]:
            try:
                chunk = os.read(self._fds[0], 1 << 16)
            except OSError:
                chunk = b""
            size += len(chunk)
            if not chunk or size > _MOST_BYTES:
                raise Gone("the other end has closed its pipe" if not chunk else "a line is too long")
            line.append(chunk)
        text, _, self._unread = b"".join(line).partition(b"\n")
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as e:
            raise Gone("a line is not JSON") from e

    def encode(self, value: Any) -> Any:
        """Turns a value into JSON. Plain scalars stay as they are; all else becomes a list that begins with a name.

        An object that is no plain data becomes ["mine", its number], and this end keeps it for the rest of the
        connection.
        """
        match value:
            case None | bool():
                return value
            case int():
                number = int.__int__(value)
                return number if number.bit_length() < _PLAIN_BITS else ["int", hex(number)]
            case float():
                return float.__float__(value)
            case str():
                return str.__str__(value)
            case list() | tuple() | set() | frozenset():
                kind = next(k for k in _SEQUENCES.values() if isinstance(value, k))
                return [kind.__name__, *map(self.encode, kind.__iter__(value))]
            case dict():
                return ["dict", *([self.encode(k), self.encode(v)] for k, v in dict.items(value))]
            case bytes() | bytearray():
                return ["bytes", bytes(value).decode("latin1")]
            case complex():
                return ["complex", value.real, value.imag]
            case Foreign():
                return ["yours", value.__dict__["_number"]]
        return self._encode_other(value)

    def _encode_other(self, value: Any) -> Any:
        kind = type(value)
        if issubclass(kind, type) and value in _BUILTIN_TYPES:
            return ["type", _BUILTIN_TYPES[value]]
        name = kind.__name__
        module = _MODULES.get(name, "datetime")
        if kind is getattr(sys.modules.get(module), name, None):
            if name in _FIELDS and getattr(value, "tzinfo", None) is None:
                return ["of", name, *(getattr(value, f) for f in _FIELDS[name])]
            if name == "Decimal":
                return ["of", name, str(value)]
            if name == "deque":
                return ["of", name, self.encode(list(value))]
        if kind in (type({}.keys()), type({}.items())):
            try:
                return self.encode(set(value))
            except TypeError:  # the items cannot be hashed, so there is no set of them
                pass
        if kind.__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
            return self.encode(value.item())
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)  # keeps the object alive, so that no other object gets its id
        return ["mine", self._numbers[id(value)]]

    def _decode(self, value: Any) -> Any:
        if not isinstance(value, list):
            if isinstance(value, dict):
                raise Gone("a value cannot be decoded")
            return value
        try:
            kind, *parts = value
            if kind in _SEQUENCES:
                return _SEQUENCES[kind](map(self._decode, parts))
            return self._decode_other(kind, parts)
        except Exception as e:
            raise Gone(f"a value cannot be decoded: {type(e).__name__}") from e

    def _decode_other(self, kind: str, parts: list[Any]) -> Any:
        match kind, parts:
            case "dict", _:
                return {self._decode(k): self._decode(v) for k, v in parts}
            case "int", [str(text)]:
                return int(text, 16)
            case "bytes", [str(text)]:
                return text.encode("latin1")
            case "complex", [real, imag]:
                return complex(real, imag)
            case "type", [str(name)] if getattr(builtins, name) in _BUILTIN_TYPES:
                return getattr(builtins, name)
            case "of", [str(name), *fields] if name in _FIELDS or name in _MODULES:
                module = __import__(_MODULES.get(name, "datetime"))
                return getattr(module, name)(*map(self._decode, fields))
            case "yours", [int(number)] if number >= 0:
                return self._objects[number]
            case "mine", [int(number)]:
                return self._foreign(self, number)
        raise ValueError(kind)


def _builtin_name(error: BaseException) -> str:
    """Returns the name of the nearest builtin class of an error that is an Exception; else "RuntimeError".

    SystemExit and KeyboardInterrupt thus travel as RuntimeError.
    """
    for kind in type(error).__mro__:
        if kind is StopIteration or (issubclass(kind, Exception) and getattr(builtins, kind.__name__, None) is kind):
            return kind.__name__
    return "RuntimeError"


def _text(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:  # the program may have defined its `__str__`
        return ""


def _exception(name: str, text: str) -> BaseException:
    # A StopIteration or SystemExit raised among the tests would end them early instead of failing them.
    kind = getattr(builtins, name, RuntimeError)
    if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(
        kind, StopIteration | StopAsyncIteration | Warning
    ):
        return RuntimeError(f"{name}: {text}")
    try:
        return kind(text)
    except TypeError:  # UnicodeDecodeError takes five arguments
        return ValueError(text) if issubclass(kind, ValueError) else RuntimeError(text)
