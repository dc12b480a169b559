"""Methods of another package, and CONTRIBUTING's example as it stands there: each needs only its own two classes."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Collection, Generator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import ConfigError, configs, methods
from jaxadapt.arrays.random_draws import Draw
from jaxadapt.configs import listing
from jaxadapt.configs.base import Config
from jaxadapt.configs.facts import MethodFacts
from jaxadapt.configs.method_config import MethodConfig
from jaxadapt.keymaps.tensor_spec import MethodTensor, own_tensor
from jaxadapt.methods import METHODS, Effects, Method
from jaxadapt.methods.matrix import MatrixMethod

X = np.random.default_rng(0).standard_normal((3, 8)).astype("float32")


@contextlib.contextmanager
def registered(method: Method) -> Generator[Method]:
    """A method of this process, and none afterwards."""
    try:
        yield methods.register(method)
    finally:
        METHODS._loaded.pop(method.peft_type, None)
        Config.classes.pop(method.peft_type, None)


class Net(nnx.Module):
    """8 -> 16 -> 8."""

    def __init__(self) -> None:
        self.q, self.up = nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.Linear(16, 8, rngs=nnx.Rngs(1))

    def __call__(self, x: Any) -> Any:
        return self.up(jnp.tanh(self.q(x)))


# ---- a method with a shared tensor -------------------------------------------------------------------------------


def make_shared() -> Method:
    @dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
    class CodeConfig(MethodConfig):
        """Code: every row of a weight gets a multiple of one row that all modules share."""

        facts: ClassVar[MethodFacts] = MethodFacts(rows="call")
        peft_type: str = "CODE"
        target_modules: str | Collection[str] | None = None

    class Code(MatrixMethod):
        """W + a·c, c shared."""

        peft_type = "CODE"
        scaled = frozenset({"code_a"})
        roles = MappingProxyType({"code_a": "vector", "code_c": "vector"})

        def tensors(self, config: Any, target: Any) -> tuple[MethodTensor, ...]:
            return (MethodTensor("code_a", ".code_a", ("batch", "out"), (("out",),), scale_power=0),)

        def shared(self, config: Any, targets: Sequence[Any], found: Mapping[str, Any]) -> tuple[MethodTensor, ...]:
            size = found["code_c"][0] if "code_c" in found else max(t.in_size for t in targets)
            return (own_tensor("code_c", (size,)),)

        def own(self, config: Any, target: Any) -> None:
            return None

        def effect(self, own: Any) -> Effects:
            return Effects("adds", form="weight")

        def init(self, config: Any, tensor: MethodTensor, start: Any) -> Draw:
            return Draw("constant", 0.0) if tensor.name == "code_a" else Draw("normal", 1.0)

        def delta(self, own: Any, params: Any, w: Any) -> Any:
            return params["code_a"][:, None] * params["code_c"][: w.shape[1]]

    Code.config = CodeConfig  # type: ignore[attr-defined]
    return Code()


def test_a_registered_method_works_everywhere_and_leaves_no_trace(tmp_path: Path):
    method = make_shared()
    with registered(method):
        config = method.config(target_modules=["q", "up"])  # type: ignore[attr-defined]
        assert "CODE" in [info.peft_type for info in listing.describe_methods()]
        model = jaxadapt.adapt(Net(), config, rngs=nnx.Rngs(2))
        np.testing.assert_array_equal(model(X), Net()(X))
        adapter = jaxadapt.extract(model)
        assert adapter.shared.keys() == {"code_c"}
        c = np.asarray(adapter.shared["code_c"])
        values = jax.tree.map(lambda x: x, adapter.params)
        a = {name: np.arange(1, n + 1, dtype="float32") / 20 for name, n in (("q", 16), ("up", 8))}
        for name, x in a.items():
            values[name]["kernel"]["code_a"] = jnp.asarray(x)
        jaxadapt.inject(jaxadapt.Adapter(config, values, adapter.keymap), model)
        q, up = Net().q, Net().up
        h = np.tanh(X @ (np.asarray(q.kernel) + np.outer(c[:8], a["q"])) + np.asarray(q.bias))
        want = h @ (np.asarray(up.kernel) + np.outer(c, a["up"])) + np.asarray(up.bias)
        np.testing.assert_allclose(model(X), want, rtol=1e-5, atol=1e-5)  # products in another order
        jaxadapt.save(model, tmp_path / "file")
        assert jaxadapt.read(tmp_path / "file").tensors.keys() == {
            "base_model.code_c", "base_model.model.q.code_a", "base_model.model.up.code_a",
        }  # fmt: skip
        assert "CODE" in (tmp_path / "file" / "README.md").read_text()
        again = jaxadapt.load(tmp_path / "file", Net())
        np.testing.assert_array_equal(again(X), model(X))
        np.testing.assert_allclose(jaxadapt.merge(again)(X), want, rtol=1e-5, atol=1e-5)
        with pytest.raises(ConfigError, match="the type has a method already"):
            methods.register(type("Other", (type(method),), {})())
    assert "CODE" not in METHODS
    assert type(configs.Config.from_dict({"peft_type": "CODE"})).__name__ == "GenericConfig"


# ---- a method on the model ---------------------------------------------------------------------------------------


def make_model_scope() -> Method:
    @dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
    class NoteConfig(MethodConfig):
        """Note: tokens of its own before the input."""

        facts: ClassVar[MethodFacts] = MethodFacts(merges=False)
        peft_type: str = "NOTE"
        width: int = 4
        tokens: int = 3

    class Note(Method):
        """Embeddings of tokens before the input."""

        peft_type = "NOTE"
        scope = "model"
        config = NoteConfig

        def tensors(self, config: Any, target: Any) -> tuple[MethodTensor, ...]:
            return ()

        def shared(self, config: Any, targets: Sequence[Any], found: Mapping[str, Any]) -> tuple[MethodTensor, ...]:
            return (own_tensor("note", found.get("note", (config.tokens, config.width)), "note_embeddings"),)

        def hparams(self, config: Any, target: Any) -> None:
            return None

        def effects(self, hparams: Any) -> Effects:
            return Effects()

        def init(self, config: Any, tensor: MethodTensor, start: Any) -> Draw:
            return Draw("normal", 1.0)

        def output(self, *args: Any) -> Any:
            raise AssertionError("no weight has this method")

        weight = unweight = output

    return Note()


def test_a_method_on_the_model_is_a_value_and_a_file(tmp_path: Path):
    method = make_model_scope()
    with registered(method):
        config = method.config(tokens=2)  # type: ignore[attr-defined]
        tensors = jaxadapt.PeftTensors(config, {"note_embeddings": X[:2, :4]}, "these")
        jaxadapt.write(tensors, tmp_path)
        again = jaxadapt.read(tmp_path)
        assert again.config == config
        np.testing.assert_array_equal(again.tensors["note_embeddings"], X[:2, :4])
        assert (method.rows, config.facts.merges) == ("no", False)
    assert "NOTE" not in METHODS


# ---- CONTRIBUTING ------------------------------------------------------------------------------------------------


def test_the_method_of_contributing_works_as_written(tmp_path: Path):
    page = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    section = page.partition("### A new method\n")[2].partition("\n### ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    assert len(blocks) == 2
    names: dict[str, Any] = {"__name__": __name__}  # the page has every import that its reader needs
    for block in blocks:
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    with registered(names["METHOD"]) as method:
        for fields in method.examples():
            config = names["SketchConfig"](target_modules=["q"], **fields)
            model = jaxadapt.adapt(Net(), config, rngs=nnx.Rngs(2))
            np.testing.assert_array_equal(model(X), Net()(X))
            adapter = jaxadapt.extract(model)
            b = jnp.asarray(np.random.default_rng(1).standard_normal((16, config.r)), "float32")
            values = {"q": {"kernel": {**adapter.params["q"]["kernel"], "sketch_B": b, "sketch_d": 1 + b[:, 0]}}}
            jaxadapt.inject(jaxadapt.Adapter(config, values, adapter.keymap), model)
            scale, a = config.alpha / config.r, np.asarray(values["q"]["kernel"]["sketch_A"])
            plain = Net()
            kernel = np.asarray(plain.q.kernel) + np.asarray(scale * (1 + b[:, :1]) * (b @ a)).T
            want = plain.up(np.tanh(X @ kernel + np.asarray(plain.q.bias)))
            np.testing.assert_allclose(model(X), want, rtol=1e-5, atol=1e-5)
            jaxadapt.save(model, tmp_path)
            np.testing.assert_array_equal(jaxadapt.load(tmp_path, Net())(X), model(X))
            np.testing.assert_allclose(jaxadapt.merge(model)(X), want, rtol=1e-5, atol=1e-5)
