"""Carries plain data between the process that holds a program and the process that holds its tests: JSON lines.

Only data travels, at most 16 MiB in one line: None, numbers, texts, bytes, containers, dates, numpy arrays, text
buffers and the names of builtin types. An instance of a program's subclass of a number, a text or a container (an
`int` whose `__eq__` is always true) arrives as the builtin type, so that no code of the sender comes along. A named
tuple arrives as a named tuple with the same fields, and a member of an IntEnum or StrEnum as a number or text with
`name` and `value`. What is no plain data stays where it is. Its number travels instead, and each end says by
`_describe` and `_stand_in` what that means (`guest.py`, `tester.py`).

A line holds a message and a table of the mutable objects in it, so that shared and circular references arrive as such.
The answer to a request holds the new contents of those objects of the request that have changed, and the asking end
changes its own objects in place. A call may therefore change its arguments, as in one process.

Both ends import this file. A sandbox lacks the package, so the file imports nothing from it.
"""

import base64
import builtins
import collections
import io
import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

_MOST_BYTES = 16 << 20  # in one line; limits how much a program can make the other end read into memory
_PLAIN_BITS = 8192  # longer integers travel in hexadecimal, because Python limits the length of decimal ones
_BUILTIN_TYPES = {v: k for k, v in vars(builtins).items() if isinstance(v, type) and v is not type}
_FIELDS = {  # classes of the standard library, with the attributes that make one anew
    "date": ("year", "month", "day"),
    "datetime": ("year", "month", "day", "hour", "minute", "second", "microsecond"),
    "time": ("hour", "minute", "second", "microsecond"),
    "timedelta": ("days", "seconds", "microseconds"),
    "Fraction": ("numerator", "denominator"),
    "range": ("start", "stop", "step"),
    "slice": ("start", "stop", "step"),
}
_MODULES = {"Fraction": "fractions", "Decimal": "decimal", "range": "builtins", "slice": "builtins"}
# The mutable kinds. The first class that a value is an instance of gives the kind.
_MUTABLE: dict[str, Any] = {
    "list": list, "set": set, "Counter": collections.Counter, "OrderedDict": collections.OrderedDict,
    "defaultdict": collections.defaultdict, "dict": dict, "deque": collections.deque, "bytearray": bytearray,
    "StringIO": io.StringIO, "BytesIO": io.BytesIO,
}  # fmt: skip
_HASHED = {"set", "Counter", "OrderedDict", "defaultdict", "dict"}
_MUTABLE_TYPES = tuple(_MUTABLE.values())
_ARRAY_KINDS = "biufcSUmM"  # numpy's kinds of plain data


class Gone(BaseException):
    """The other end has left or broken the protocol.

    It is a BaseException, so that no `except Exception` hides it.
    """


class Unsupported(BaseException):
    """The tests ask for something that no plain data can carry. It says nothing about the program.

    It is a BaseException, so that no `except Exception` hides it.
    """


class _Int(int):
    """A member of an integer enumeration, as plain data."""

    name: str
    value: int


class _Str(str):
    """A member of a text enumeration, as plain data."""

    name: str
    value: str


class Kept:
    """Marks an object that stays where it is, even if it could travel as plain data."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Shared:
    """Stands for a class that both ends have, by its number."""

    def __init__(self, number: int) -> None:
        self.number = number


class Foreign:
    """Stands for an object that stayed at the other end.

    Its own attributes have names that no program uses, since all others are the object's.

    Args:
      peer: this end of the connection.
      number: the object's number at the other end.
    """

    __slots__ = ("_mdrl_peer", "_mdrl_number")
    _mdrl_peer: "Peer"
    _mdrl_number: int

    def __init__(self, peer: "Peer", number: int) -> None:
        object.__setattr__(self, "_mdrl_peer", peer)
        object.__setattr__(self, "_mdrl_number", number)


class Peer:
    """One end of the connection.

    Args:
      read_fd, write_fd: the file descriptors from and to the other end.
    """

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._fds = read_fd, write_fd
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._strangers: dict[int, Any] = {}
        self._unread = b""

    # The two ends define these methods differently.

    def _serve(self, op: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Carries out a request of the other end, also while this end waits for an answer."""
        raise NotImplementedError

    def _describe(self, value: Any) -> list[Any] | None:
        """Describes an object that stays here to the other end; None if the other end may not have it."""
        raise NotImplementedError

    def _stand_in(self, number: int, description: list[Any]) -> Any:
        """Makes what stands here for an object of the other end."""
        raise NotImplementedError

    def _class_number(self, kind: type) -> int | None:
        """Returns the number of a class that both ends have; None for another class."""
        return None

    def _give(self, kind: type) -> int | None:
        """Returns the same for a class that this end gives to the other one, itself or by an instance."""
        return self._class_number(kind)

    def _class_of(self, number: int) -> Any:
        """Returns the class of that number that both ends have."""
        raise ValueError(number)

    def _stranger_class(self, kind: type) -> list[Any] | None:
        """Encodes a class of the standard library by its name; None for a class that stays here."""

    def _import(self, module: str, name: str) -> Any:
        """Returns a class of the standard library that the other end names."""
        raise ValueError(module)

    def _may_set(self, value: Any, name: str) -> bool:
        """Whether the other end may set this attribute of an object of a class that both ends have."""
        return True

    def _theirs(self, value: Any) -> int | None:
        """Returns the number at the other end of an object that is no `Foreign`; None for an object of this end."""
        return None

    def _error(self, name: str, text: str, stranger: Any) -> BaseException:
        """Makes the exception that the other end reports."""
        return _exception(name, text)

    # Requests and answers.

    def ask(self, op: str, *args: Any, **kwargs: Any) -> Any:
        """Sends a request and returns the answer of the other end, serving its requests in the meantime.

        What the operation changes in mutable arguments is changed here too, in place, also if it raises.

        Args:
          op: the operation, such as "call" or "getattr".
          *args: its arguments.
          **kwargs: its keyword arguments.

        Returns:
          Plain data, or what `_stand_in` makes of an object that stays there.

        Raises:
          Exception: the builtin exception that the other end reports; RuntimeError or ValueError in place of one that
            would end the tests early or cannot be made from a text. The tester makes exceptions of the program's own
            classes, and of those of the tests, too.
          Unsupported: if an argument cannot travel, or the other end changed an array or an object of the tests in a
            way that cannot be copied.
          Gone: if the other end has left or broken the protocol.
        """
        table = _Table(self)
        message = [op, [table.encode(a) for a in args], {k: table.encode(v) for k, v in kwargs.items()}]
        self._write(json.dumps([message, table.contents()]))
        while True:
            match self.receive():
                case [["ok", value], list(nodes)]:
                    return _Reader(self, nodes, table.objects).decode(value)
                case [["raise", str(name), str(text), stranger], list(nodes)]:
                    reader = _Reader(self, nodes, table.objects)
                    raise self._error(name, text, reader.decode(stranger))
                case message:
                    self._answer(message)

    def serve_forever(self) -> None:
        """Answers requests until the other end leaves. What a request raises is part of its answer.

        Raises:
          Gone: always, when the other end has left or broken the protocol.
          Unsupported: before that, if an object of a request or of an answer cannot travel.
        """
        while True:
            self._answer(self.receive())

    def _answer(self, message: Any) -> None:
        try:
            (op, args, kwargs), nodes = message
            reader = _Reader(self, nodes, [])
            args, kwargs = [reader.decode(a) for a in args], {str(k): reader.decode(v) for k, v in kwargs.items()}
        except Exception as e:
            raise Gone(f"the line is no request: {type(e).__name__}") from e
        table = _Table(self, reader.objects, nodes)
        try:
            answer: list[Any] = ["ok", table.encode(self._serve(op, args, kwargs))]
            reply = json.dumps([answer, table.contents()])
        except (Gone, Unsupported):
            raise
        except BaseException as e:
            table = _Table(self, reader.objects, nodes)
            answer = ["raise", builtin_name(type(e)), _text(e), self._own_error(e, table)]
            reply = json.dumps([answer, table.contents()])
        self._write(reply)

    def _own_error(self, error: BaseException, table: "_Table") -> Any:
        """Encodes an exception of a class that the other end does not have; None for the others."""

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
          Gone: if the other end has closed its side, or the line is too long or not JSON.
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
                raise Gone("the other end has closed its side" if not chunk else "a line is too long")
            line.append(chunk)
        text, _, self._unread = b"".join(line).partition(b"\n")
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as e:
            raise Gone("a line is not JSON") from e

    def number(self, value: Any) -> int:
        """Returns the number of an object that stays here, and keeps the object for the rest of the connection.

        The numbers begin at 0. The same object always has the same number, and equal objects have different ones.
        """
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)  # keeps the object alive, so that no other object gets its id
        return self._numbers[id(value)]


class _Table:
    """Encodes the values of one message; its mutable objects go into a table.

    Args:
      peer: the sending end.
      objects: the objects of the request that is answered; they keep their places in the table.
      received: their encoded contents as received.
    """

    def __init__(self, peer: Peer, objects: Sequence[Any] = (), received: Sequence[Any] = ()) -> None:
        self.objects: list[Any] = list(objects)
        self._peer, self._received = peer, received
        self._places = {id(value): i for i, value in enumerate(self.objects)}

    def contents(self) -> list[Any]:
        """The encoded contents of the table; None for an object of the request that has not changed."""
        nodes: list[Any] = []
        for value in self.objects:  # grows while the contents are encoded
            node = self._node(value)
            i = len(nodes)
            nodes.append(None if i < len(self._received) and node == self._received[i] else node)
        return nodes

    def encode(self, value: Any) -> Any:
        """Turns a value into JSON. Plain scalars stay as they are; all else becomes a list that begins with a name."""
        if issubclass(type(value), Foreign):  # `isinstance` would ask the other end for the object's class
            return ["yours", value._mdrl_number]
        match value:
            case None | bool():
                return value
            case int():
                number = int.__int__(value)
                plain = number if number.bit_length() < _PLAIN_BITS else ["int", hex(number)]
                return plain if type(value) is int else self._member(value, plain)
            case float():
                return float.__float__(value)
            case str():
                return str.__str__(value) if type(value) is str else self._member(value, str.__str__(value))
            case tuple():
                return self._tuple(value)
            case frozenset():
                return ["frozenset", *map(self.encode, frozenset.__iter__(value))]
            case bytes():
                return ["bytes", bytes.decode(value, "latin1")]
            case complex():
                return ["complex", complex.real.__get__(value), complex.imag.__get__(value)]
            case Kept():
                return self._mine(value.value)
            case Shared():
                return ["class", value.number]
        if isinstance(value, _MUTABLE_TYPES) or _array(value):
            return self.place(value)
        return self._other(value)

    def place(self, value: Any) -> list[Any]:
        """Puts a mutable object into the table, once, and returns the reference to it."""
        if id(value) not in self._places:
            self._places[id(value)] = len(self.objects)
            self.objects.append(value)
        return ["#", self._places[id(value)]]

    def _member(self, value: Any, plain: Any) -> Any:
        if isinstance(value, (_Int, _Str)) or isinstance(value, getattr(sys.modules.get("enum"), "Enum", ())):
            name = getattr(value, "name", None)
            return ["member", plain, name] if type(name) is str else plain
        return plain

    def _tuple(self, value: Any) -> list[Any]:
        items = [self.encode(item) for item in tuple.__iter__(value)]
        fields = getattr(type(value), "_fields", None)
        if type(value) is tuple or not isinstance(fields, tuple) or len(fields) != len(items):
            return ["tuple", *items]
        return ["named", type(value).__name__, [str(field) for field in fields], items]

    def _other(self, value: Any) -> Any:
        kind = type(value)
        if issubclass(kind, type) and value in _BUILTIN_TYPES:
            return ["type", _BUILTIN_TYPES[value]]
        if value is Ellipsis:
            return ["ellipsis"]
        if issubclass(kind, BaseException) and kind in _BUILTIN_TYPES:
            return ["exception", kind.__name__, *map(self.encode, BaseException.args.__get__(value))]  # type: ignore[attr-defined]
        name = kind.__name__
        if kind is getattr(sys.modules.get(_MODULES.get(name, "datetime")), name, None):
            if name in _FIELDS and getattr(value, "tzinfo", None) is None:
                return ["of", name, *(self.encode(getattr(value, f)) for f in _FIELDS[name])]
            if name == "Decimal":
                return ["of", name, str(value)]
        if kind in (type({}.keys()), type({}.items())):
            try:
                return self.encode(set(value))
            except TypeError:  # the items cannot be hashed, so there is no set of them
                pass
        if kind is type({}.values()):
            return self.encode(list(value))
        numpy = sys.modules.get("numpy")
        if numpy is not None and kind.__module__ == "numpy" and isinstance(value, getattr(numpy, "generic", ())):
            return self.encode(value.item())
        theirs = self._peer._theirs(value)
        if theirs is not None:
            return ["yours", theirs]
        if isinstance(value, type):
            number = self._peer._give(value)
            if number is not None:
                return ["class", number]
            return self._peer._stranger_class(value) or self._mine(value)
        if id(value) in self._places:
            return self.place(value)
        number = self._peer._give(kind)
        if number is None:
            return self._mine(value)
        if isinstance(value, getattr(sys.modules.get("enum"), "Enum", ())):
            return ["enum", number, value.name]
        return self.place(value)

    def _mine(self, value: Any) -> list[Any]:
        description = self._peer._describe(value)
        if description is None:
            raise Unsupported(f"a value of type {type(value).__name__} cannot be given to the program")
        return ["mine", self._peer.number(value), description]

    def _node(self, value: Any) -> list[Any]:
        if _array(value):
            return self._array_node(value)
        kind = next((k for k, t in _MUTABLE.items() if isinstance(value, t)), "")
        match kind:
            case "list" | "set":
                return [kind, *map(self.encode, _MUTABLE[kind].__iter__(value))]
            case "deque":
                bound: Any = collections.deque.maxlen
                return [kind, bound.__get__(value), *map(self.encode, collections.deque.__iter__(value))]
            case "bytearray":
                return [kind, bytes(memoryview(value)).decode("latin1")]
            case "StringIO":
                return [kind, io.StringIO.getvalue(value), io.StringIO.tell(value)]
            case "BytesIO":
                return [kind, io.BytesIO.getvalue(value).decode("latin1"), io.BytesIO.tell(value)]
            case "":
                return ["instance", self._peer._class_number(type(value)), *self._state(value)]
        factory = self.encode(_factory(value)) if kind == "defaultdict" else None
        return [kind, factory, *([self.encode(k), self.encode(v)] for k, v in dict.items(value))]

    def _state(self, value: Any) -> list[Any]:
        slots = [n for kind in type(value).__mro__ for n in _names(kind.__dict__.get("__slots__", ()))]
        state = {n: object.__getattribute__(value, n) for n in slots if n != "__dict__" and hasattr(value, n)}
        return [[n, self.encode(v)] for n, v in (state | getattr(value, "__dict__", {})).items()]

    def _array_node(self, value: Any) -> list[Any]:
        shape = [int(n) for n in value.shape]
        if value.dtype.kind == "O":
            return ["objects", shape, *map(self.encode, value.ravel().tolist())]
        return ["array", value.dtype.str, shape, base64.b64encode(value.tobytes()).decode()]


def _names(slots: Any) -> list[str]:
    return [slots] if isinstance(slots, str) else list(slots)


def _factory(value: Any) -> Any:
    slot: Any = vars(collections.defaultdict)["default_factory"]
    factory = slot.__get__(value)
    return factory if factory in _BUILTIN_TYPES else None


def _array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return (
        numpy is not None
        and isinstance(value, getattr(numpy, "ndarray", ()))
        and value.dtype.kind in _ARRAY_KINDS + "O"
        and value.dtype.fields is None
    )


class _Reader:
    """Decodes one message.

    Args:
      peer: the receiving end.
      nodes: the message's table.
      known: the objects of the request that the message answers; the first nodes are their new contents.
    """

    def __init__(self, peer: Peer, nodes: Sequence[Any], known: Sequence[Any]) -> None:
        self._peer = peer
        self.objects: list[Any] = list(known)
        try:
            self.objects += [self._empty(node) for node in nodes[len(known) :]]
            # Keys of sets and dicts may be objects whose hash depends on their contents, so they are filled last.
            last = [i for i, node in enumerate(nodes) if node and node[0] in _HASHED]
            first = [i for i, node in enumerate(nodes) if node and node[0] not in _HASHED]
            for i in first + last:
                self._fill(self.objects[i], nodes[i])
        except Unsupported:
            raise
        except Exception as e:
            raise Gone(f"a table cannot be decoded: {type(e).__name__}") from e

    def decode(self, value: Any) -> Any:
        """Returns the value that was encoded. Raises Gone if there is none."""
        if not isinstance(value, list):
            if isinstance(value, dict):
                raise Gone("a value cannot be decoded")
            return value
        try:
            kind, *parts = value
            return self._decode_other(kind, parts)
        except (Gone, Unsupported):
            raise
        except Exception as e:
            raise Gone(f"a value cannot be decoded: {type(e).__name__}") from e

    def _all(self, parts: Iterable[Any]) -> list[Any]:
        return [self.decode(part) for part in parts]

    def _decode_other(self, kind: str, parts: list[Any]) -> Any:
        match kind, parts:
            case "#", [int(place)] if place >= 0:
                return self.objects[place]
            case "tuple", _:
                return tuple(self._all(parts))
            case "frozenset", _:
                return frozenset(self._all(parts))
            case "named", [str(name), list(fields), list(items)]:
                if {"count", "index"} & set(fields):  # they would hide the methods that compare
                    return tuple(self._all(items))
                return collections.namedtuple(name, fields)(*self._all(items))  # type: ignore[misc]
            case "member", [plain, str(name)]:
                value = self.decode(plain)
                member: Any = (_Int if isinstance(value, int) else _Str)(value)
                member.name, member.value = name, value
                return member
            case "int", [str(text)]:
                return int(text, 16)
            case "bytes", [str(text)]:
                return text.encode("latin1")
            case "complex", [real, imag]:
                return complex(real, imag)
            case "ellipsis", []:
                return Ellipsis
            case "exception", [str(name), *args] if issubclass(getattr(builtins, name), BaseException):
                return getattr(builtins, name)(*self._all(args))
            case "type", [str(name)] if getattr(builtins, name) in _BUILTIN_TYPES:
                return getattr(builtins, name)
            case "of", [str(name), *fields] if name in _FIELDS or name in _MODULES:
                module = __import__(_MODULES.get(name, "datetime"))
                return getattr(module, name)(*self._all(fields))
            case "enum", [int(number), str(name)]:
                return self._peer._class_of(number)[name]
            case "import", [str(module), str(name)]:
                return self._peer._import(module, name)
            case "class", [int(number)]:
                return self._peer._class_of(number)
            case "yours", [int(number)] if number >= 0:
                return self._peer._objects[number]
            case "mine", [int(number), list(description)]:
                if number not in self._peer._strangers:
                    self._peer._strangers[number] = self._peer._stand_in(number, description)
                return self._peer._strangers[number]
        raise ValueError(kind)

    def _empty(self, node: list[Any]) -> Any:
        match node:
            case ["deque", (None | int()) as bound, *_]:
                return collections.deque(maxlen=bound)
            case ["defaultdict", factory, *_]:
                return collections.defaultdict(self.decode(factory))
            case ["array", str(dtype), list(shape), str(_)]:
                return _numpy().empty(shape, _plain_dtype(dtype))
            case ["objects", list(shape), *_]:
                return _numpy().empty(shape, object)
            case ["instance", int(number), *_]:
                kind = self._peer._class_of(number)
                return object.__new__(kind)
            case [str(kind), *_]:
                return _MUTABLE[kind]()
        raise ValueError(node)

    def _fill(self, value: Any, node: list[Any]) -> None:
        match node:
            case ["list", *items]:
                value[:] = self._all(items)
            case ["set", *items]:
                set.clear(value)
                set.update(value, self._all(items))
            case ["deque", _, *items]:
                value.clear()
                value.extend(self._all(items))
            case ["bytearray", str(text)]:
                value[:] = text.encode("latin1")
            case ["StringIO" | "BytesIO" as kind, str(text), int(position)]:
                value.seek(0)
                value.truncate()
                value.write(text if kind == "StringIO" else text.encode("latin1"))
                value.seek(position)
            case ["array", str(dtype), list(shape), str(data)]:
                new = _numpy().frombuffer(base64.b64decode(data), _plain_dtype(dtype)).reshape(shape)
                if value.shape != new.shape or value.dtype != new.dtype:
                    raise Unsupported("the program changed the shape or type of an array in place")
                value[...] = new
            case ["objects", list(_), *items]:
                value.ravel()[:] = self._all(items)
            case ["instance", int(_), *pairs]:
                for name in list(getattr(value, "__dict__", {})):
                    object.__delattr__(value, name)
                for name, part in pairs:
                    if not self._peer._may_set(value, str(name)):
                        raise Unsupported(f"the program gives an object of the tests another {name}")
                    object.__setattr__(value, str(name), self.decode(part))
            case [("dict" | "Counter" | "OrderedDict" | "defaultdict"), _, *pairs]:
                dict.clear(value)
                for key, part in pairs:
                    value[self.decode(key)] = self.decode(part)
            case _:
                raise ValueError(node)


def next_item(iterator: Any) -> list[Any]:
    """Returns the next item alone in a list, or an empty list at the end. Raises what the iterator raises."""
    for item in iterator:
        return [item]
    return []


def _numpy() -> Any:
    import numpy

    return numpy


def _plain_dtype(text: str) -> Any:
    dtype = _numpy().dtype(text)
    if dtype.kind not in _ARRAY_KINDS:
        raise ValueError(text)
    return dtype


def builtin_name(error: type[BaseException]) -> str:
    """Returns the name of the nearest builtin base of an exception class, itself included, that is an Exception.

    If there is none, the name is "RuntimeError". SystemExit and KeyboardInterrupt thus travel as RuntimeError.
    """
    for kind in error.__mro__:
        if kind is StopIteration or (issubclass(kind, Exception) and getattr(builtins, kind.__name__, None) is kind):
            return kind.__name__
    return "RuntimeError"


def _text(error: BaseException) -> str:
    try:
        # A KeyError's text is the repr of its key; its first argument makes the same KeyError anew.
        if type(error) is KeyError and len(error.args) == 1 and type(error.args[0]) is str:
            return error.args[0][:200]
        return str(error)[:200]
    except BaseException:  # the program may have defined its `__str__`
        return ""


def builtin_exception(name: str) -> type[BaseException]:
    """Returns the builtin exception of that name; RuntimeError for one that would end the tests early.

    RuntimeError also takes the place of a warning, and of a name that is no builtin exception.
    """
    # A StopIteration or SystemExit raised among the tests would end them early instead of failing them.
    kind = getattr(builtins, name, RuntimeError)
    if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(
        kind, StopIteration | StopAsyncIteration | Warning
    ):
        return RuntimeError
    return kind


def _exception(name: str, text: str) -> BaseException:
    kind = builtin_exception(name)
    if kind.__name__ != name:
        text = f"{name}: {text}"
    try:
        return kind(text)
    except TypeError:  # UnicodeDecodeError takes five arguments
        return ValueError(text) if issubclass(kind, ValueError) else RuntimeError(text)
