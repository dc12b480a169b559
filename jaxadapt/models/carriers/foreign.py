"""The carrier of a tree with LoRA leaves of another library."""

from __future__ import annotations

from typing import Any

from jax.core import Tracer

from jaxadapt.adapters.adapter import Adapter
from jaxadapt.adapters.sites import make_file_plan, sites_of
from jaxadapt.configs import Config
from jaxadapt.models.carriers.base import Carrier
from jaxadapt.models.foreign import tree as foreign


class Foreign(Carrier):
    """A tree with LoRA leaves of another library, and the carrier of the same tree for all else that it holds."""

    def __init__(self, found: foreign.ForeignTree, whole: Carrier) -> None:
        super().__init__(found.tree)
        self.foreign = self.found = found
        self.whole = whole

    def extract(
        self, name: str, config: Config | None = None, keymap: Any = None, lora_alpha: float | None = None
    ) -> Adapter:
        return foreign.extract_adapter(self.found, config, keymap, lora_alpha)

    def inject(self, adapter: Adapter, name: str, lora_alpha: float | None = None, on_shared: str | None = None) -> Any:
        leaves, dialect = adapter.flat(), self.found.dialect
        host = not any(isinstance(leaf, Tracer) for leaf in leaves.values())
        tensors = make_file_plan(sites_of(adapter)).encode(leaves, host=host)
        same = all(adapter.keymap.match(leaf) for leaf in dialect.claim(self.found.leaves))
        return foreign.fill_tree(
            self.found, adapter.config, tensors, keymap=adapter.keymap if same else None, lora_alpha=lora_alpha,
            on_shared=on_shared, source="this adapter",
        )  # fmt: skip

    def rest(self) -> Any:
        return self.whole.rest()

    def with_rest(self, rest: Any) -> Any:
        return self.whole.with_rest(rest)
