"""Names of a package that load on first use (PEP 562), so that importing the package stays fast."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazy_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` for the names that a package imports under `TYPE_CHECKING`.

    A package lists each public name once, as an import that only type checkers follow. This function reads these
    imports from the package's source and runs each import on first use of its name.

    Args:
        package: the package's `__name__`. Its `__init__.py` holds one `if TYPE_CHECKING:` block, whose imports have the
            form `from module import name as name`.

    >>> import jaxadapt.core
    >>> load, names, public = lazy_names("jaxadapt")
    >>> "LoraConfig" in public, load("LoraConfig").__name__
    (True, 'LoraConfig')
    """
    homes = typed_imports(package)
    public = sorted(homes)

    def load(name: str) -> Any:
        home = homes.get(name)
        if home is None:
            hint = _explain(name, public) if package == "jaxadapt" else ""
            text = f"module {package!r} has no attribute {name!r}{hint}"
            # `from jaxadapt import name` calls this first, and would drop the text of an AttributeError.
            caller = sys._getframe(1).f_globals.get("__name__")  # pyright: ignore[reportPrivateUsage]
            if hint and caller in ("importlib._bootstrap", "_frozen_importlib"):
                raise ImportError(text, name=package)
            raise AttributeError(text, name=name)
        module, attribute = home
        if module == package:  # a package or module inside this one
            value = importlib.import_module(f"{module}.{attribute}")
        else:
            source = importlib.import_module(module)
            is_loaded = attribute in vars(source)
            value = vars(source)[attribute] if is_loaded else importlib.import_module(f"{module}.{attribute}")
        setattr(sys.modules[package], name, value)  # the next use does not call this function
        return value

    return load, lambda: [*public, "__version__"] if package == "jaxadapt" else public, public


def _explain(name: str, public: list[str]) -> str:
    """Return a hint with the jaxadapt name for `name` of PEFT, Tunix or Qwix; "" for an unknown name."""
    from jaxadapt.core.other_names import OTHER_NAMES

    if name in OTHER_NAMES:
        return f"; here it is {OTHER_NAMES[name]}"
    similar = next((known for known in public if known.lower() == name.lower()), None)
    return f"; did you mean {similar!r}?" if similar else ""


def typed_imports(package: str) -> dict[str, tuple[str, str]]:
    """Return {name: (module, name there)} of the imports in a module's `if TYPE_CHECKING:` block.

    `from module import *` stands for the imports in that module's block.
    """
    spec = sys.modules[package].__spec__
    loader: Any = spec.loader if spec else None
    homes: dict[str, tuple[str, str]] = {}
    for node in ast.parse(loader.get_source(package)).body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for statement in node.body:
                if isinstance(statement, ast.ImportFrom) and statement.module and statement.names[0].name == "*":
                    importlib.import_module(statement.module)
                    homes |= typed_imports(statement.module)
                elif isinstance(statement, ast.ImportFrom) and statement.module:
                    homes |= {a.asname or a.name: (statement.module, a.name) for a in statement.names}
    return homes
