"""A pickle reader that builds only strings, numbers, tuples, lists and dicts.

Python's unpickler calls the functions that a file names. This reader accepts only a list of names, those that PyTorch's
state dicts use, and passes the arguments of a call to its own `rebuild`. Any other name or opcode is an error.
`pickletools` only splits the bytes into opcodes; it executes nothing.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol, cast

__all__ = ["Global", "Stream", "UnsupportedPickle", "load"]


class Stream(Protocol):
    """A source of opcodes. `read` must not allocate more bytes than the file has, whatever size is requested."""

    def read(self, size: int, /) -> bytes: ...

    def readline(self) -> bytes: ...


class UnsupportedPickle(Exception):
    """The bytes are not a pickle, or need more than data. The caller adds the file's name."""


@dataclass(frozen=True, slots=True)
class Global:
    """An allowed name: data, never the object of that name."""

    name: str


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING",
}  # fmt: skip
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The stack and memo of one pickle."""

    def __init__(
        self,
        allowed: Collection[str],
        rebuild: Callable[[str, tuple[object, ...]], object],
        persistent: Callable[[object], object],
    ) -> None:
        self._allowed = allowed
        self._rebuild = rebuild
        self._persistent = persistent
        self._stack: list[object] = []
        self._memo: dict[int, object] = {}

    def pop(self) -> object:
        if not self._stack or self._stack[-1] is _MARK:
            raise UnsupportedPickle("the pickle takes a value from an empty stack")
        return self._stack.pop()

    def _pop_many(self, count: int) -> list[object]:
        return [self.pop() for _ in range(count)][::-1]

    def _pop_to_mark(self) -> list[object]:
        items: list[object] = []
        while self._stack and self._stack[-1] is not _MARK:
            items.append(self._stack.pop())
        if not self._stack:
            raise UnsupportedPickle("the pickle closes a group that was not opened")
        self._stack.pop()
        return items[::-1]

    def _top(self, kind: type) -> object:
        if not self._stack or type(self._stack[-1]) is not kind:
            raise UnsupportedPickle(f"the pickle adds items to a value that is not a {kind.__name__}")
        return self._stack[-1]

    def _set_items(self, items: list[object]) -> None:
        target = cast("dict[str | int, object]", self._top(dict))
        if len(items) % 2:
            raise UnsupportedPickle("the pickle sets a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Other keys are not needed, and hashing deeply nested tuples would overflow the C stack.
            if type(key) is not str and type(key) is not int:
                raise UnsupportedPickle(f"expected keys that are strings, found one of type {type(key).__name__}")
            target[key] = value

    def _global(self, module: object, name: object) -> Global:
        full = f"{module}.{name}" if type(module) is str and type(name) is str else "(not a name)"
        if full not in self._allowed:
            raise UnsupportedPickle(f"it refers to {full!r}, which no state dict needs; nothing in a file is executed")
        return Global(full)

    def step(self, code: str, argument: object) -> None:
        stack, memo = self._stack, self._memo
        if code in _VALUES:
            stack.append(argument)
        elif code in ("BINPUT", "LONG_BINPUT"):
            memo[cast("int", argument)] = stack[-1] if stack else None
        elif code == "MEMOIZE":
            memo[len(memo)] = stack[-1] if stack else None
        elif code in ("BINGET", "LONG_BINGET"):
            if argument not in memo:
                raise UnsupportedPickle(f"the pickle recalls value {argument}, which it never stored")
            stack.append(memo[cast("int", argument)])
        elif code == "MARK":
            stack.append(_MARK)
        elif code == "TUPLE":
            stack.append(tuple(self._pop_to_mark()))
        elif code in _TUPLES:
            stack.append(tuple(self._pop_many(_TUPLES[code])))
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code == "EMPTY_DICT":
            stack.append({})
        elif code == "EMPTY_LIST":
            stack.append([])
        elif code in ("APPEND", "APPENDS"):
            items = self._pop_to_mark() if code == "APPENDS" else [self.pop()]
            cast("list[object]", self._top(list)).extend(items)
        elif code in ("SETITEM", "SETITEMS"):
            self._set_items(self._pop_to_mark() if code == "SETITEMS" else self._pop_many(2))
        elif code == "GLOBAL":
            stack.append(self._global(*str(argument).split(" ", 1)))
        elif code == "STACK_GLOBAL":
            stack.append(self._global(*self._pop_many(2)))
        elif code == "REDUCE":
            function, arguments = self._pop_many(2)
            if type(function) is not Global or type(arguments) is not tuple:
                raise UnsupportedPickle("the pickle calls a value that is not a function")
            stack.append(self._rebuild(function.name, cast("tuple[object, ...]", arguments)))
        elif code == "BINPERSID":
            stack.append(self._persistent(self.pop()))
        elif code == "BUILD":
            self.pop()  # attributes of an OrderedDict, such as `_metadata`: no tensors
            self._top(dict)
        elif code not in ("PROTO", "FRAME"):
            raise UnsupportedPickle(f"it uses the opcode {code}, which no state dict needs")


def load(
    stream: Stream,
    allowed: Collection[str],
    rebuild: Callable[[str, tuple[object, ...]], object],
    persistent: Callable[[object], object],
) -> object:
    """Read one pickle, leaving the stream at its end.

    Args:
        stream: buffered bytes.
        allowed: the dotted names that a pickle may refer to.
        rebuild: called with an allowed name and the arguments of its call; returns the result of the call.
        persistent: called with a persistent id (a storage of PyTorch); returns its value.

    Raises:
        UnsupportedPickle: the pickle uses another name or opcode (which the error names), or is damaged.

    >>> import io, pickle
    >>> load(io.BytesIO(pickle.dumps({"a": (1, [2.5])}, 2)), (), lambda name, args: None, lambda id: None)
    {'a': (1, [2.5])}
    >>> load(io.BytesIO(pickle.dumps(print)), (), lambda name, args: None, lambda id: None)
    Traceback (most recent call last):
    jaxadapt.storage.pickle_ops.UnsupportedPickle: it refers to 'builtins.print', which no state dict needs; ...
    """
    machine = _Machine(allowed, rebuild, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(cast("bytes", stream)):  # accepts streams too
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except (ValueError, EOFError, OverflowError) as error:  # raised by genops for damaged bytes
        raise UnsupportedPickle(f"the pickle is damaged: {error}") from error
    raise UnsupportedPickle("the pickle has no end")
