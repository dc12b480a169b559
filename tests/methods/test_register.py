"""Methods of another package, and CONTRIBUTING's example as it stands there: each needs only its own two classes."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Collection, Generator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxadapt
from jaxadapt import Config, ConfigError, methods
from jaxadapt.adapters.peft_tensors import split_adapter_name
from jaxadapt.configs.base import MethodConfig
from jaxadapt.configs.prompts import PromptLearningConfig
from jaxadapt.configs.table import FACTS, MethodFacts
from jaxadapt.methods import METHODS, Effects, Method, describe_methods
from jaxadapt.methods.base import tensor_roles
from jaxadapt.methods.matrix import Draw, MatrixMethod, MethodTensor, own_tensor
from jaxadapt.methods.prompt import EMBEDDINGS, BaseSizes, PromptMethod, fill_in

X = np.random.default_rng(0).standard_normal((3, 8)).astype("float32")


@contextlib.contextmanager
def registered(method: Method, **facts: Any) -> Generator[Method]:
    """A method of this process, and none afterwards."""
    try:
        yield methods.register(method, MethodFacts(**facts))
    finally:
        METHODS.loaded.pop(method.peft_type, None)
        FACTS.pop(method.peft_type, None)
        Config.classes.pop(method.peft_type, None)


class Net(nnx.Module):
    """8 -> 16 -> 8."""

    def __init__(self) -> None:
        self.q, self.up = nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.Linear(16, 8, rngs=nnx.Rngs(1))

    def __call__(self, x: Any) -> Any:
        return self.up(jnp.tanh(self.q(x)))


def test_a_method_is_told_whether_each_layer_has_a_bias():
    """Targets and initial values of a model in which one layer has a bias and the other none."""

    class Mixed(nnx.Module):
        def __init__(self) -> None:
            self.q = nnx.Linear(8, 16, use_bias=False, rngs=nnx.Rngs(0))
            self.up = nnx.Linear(16, 8, rngs=nnx.Rngs(1))

    method, seen, told = make_shared(), {}, {}

    class Asks(type(method)):  # type: ignore[misc]
        def own(self, config: Any, target: Any) -> None:
            seen[target.leaf] = target.has_bias

        def init(self, config: Any, tensor: MethodTensor, start: Any) -> Draw:
            told[start.module] = start.target and start.target.has_bias
            return super().init(config, tensor, start)

    with registered(Asks()):
        config = method.config(target_modules=["q", "up"])  # type: ignore[attr-defined]
        adapter = jaxadapt.init(nnx.state(Mixed()), config, key=jax.random.key(0))
        assert seen == {"q.kernel": False, "up.kernel": True}
        assert told == {"q": False, "up": True, "": None}  # "" for the shared tensor
        seen.clear()
        jaxadapt.to_peft(jaxadapt.Adapter(config, adapter.params))  # no base in sight
        assert seen == {"q.kernel": None, "up.kernel": None}


# ---- a method with a shared tensor -------------------------------------------------------------------------------


def test_a_method_that_says_it_changes_the_bias_must_define_how(monkeypatch: pytest.MonkeyPatch):
    """Merged without, the bias would stay as it was, while the layer's output changes."""
    model = jaxadapt.adapt(Net(), jaxadapt.RoadConfig(target_modules=["q"], group_size=8), rngs=nnx.Rngs(2))
    monkeypatch.delattr(type(METHODS["ROAD"]), "shift")
    with pytest.raises(jaxadapt.AttachError, match="ROAD: .* must define `shift`"):
        jaxadapt.merge(model)


def make_shared() -> Method:
    @dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
    class CodeConfig(MethodConfig):
        """Code: every row of a weight gets a multiple of one row that all modules share."""

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


@pytest.mark.parametrize("peft_type", ["IA3", "VERA"])
def test_a_method_that_was_used_may_be_registered_again(peft_type: str):
    used = METHODS[peft_type]
    assert used.has_shared is (peft_type == "VERA")
    again = type(used)()
    assert methods.register(again) == used
    assert vars(again) == vars(used) == {}
    METHODS.loaded[peft_type] = used


def test_a_configuration_without_a_docstring_has_no_summary():
    method = make_shared()
    method.config.__doc__ = None  # type: ignore[attr-defined]
    with registered(method, rows="call"):
        assert {info.peft_type: info.summary for info in describe_methods()}["CODE"] == ""


def test_a_registered_method_works_everywhere_and_leaves_no_trace(tmp_path: Path):
    method = make_shared()
    with registered(method, rows="call"):
        config = method.config(target_modules=["q", "up"])  # type: ignore[attr-defined]
        assert {info.peft_type: info.facts.rows for info in describe_methods()}["CODE"] == "call"
        model = jaxadapt.adapt(Net(), config, rngs=nnx.Rngs(2))
        np.testing.assert_array_equal(model(X), Net()(X))
        adapter = jaxadapt.extract(model)
        assert adapter.shared.keys() == {"code_c"}
        c = np.asarray(adapter.shared["code_c"])
        values = jax.tree.map(lambda x: x, adapter.params)
        a = {name: np.arange(1, n + 1, dtype="float32") / 20 for name, n in (("q", 16), ("up", 8))}
        for name, x in a.items():
            values[name]["kernel"]["code_a"] = jnp.asarray(x)
        jaxadapt.inject(model, jaxadapt.Adapter(config, values, adapter.keymap))
        q, up = Net().q, Net().up
        h = np.tanh(X @ (np.asarray(q.kernel) + np.outer(c[:8], a["q"])) + np.asarray(q.bias))
        want = h @ (np.asarray(up.kernel) + np.outer(c, a["up"])) + np.asarray(up.bias)
        np.testing.assert_allclose(model(X), want, rtol=1e-5, atol=1e-5)  # products in another order
        jaxadapt.save(model, tmp_path / "file")
        assert jaxadapt.read(tmp_path / "file").tensors.keys() == {
            "base_model.code_c", "base_model.model.q.code_a", "base_model.model.up.code_a",
        }  # fmt: skip
        card = (tmp_path / "file" / "README.md").read_text()
        assert "CODE" in card
        assert "PeftModel.from_pretrained" not in card
        assert "unknown-method" in [found.code for found in jaxadapt.verify(tmp_path / "file")]
        again = jaxadapt.load(tmp_path / "file", Net())
        np.testing.assert_array_equal(again(X), model(X))
        np.testing.assert_allclose(jaxadapt.merge(again)(X), want, rtol=1e-5, atol=1e-5)
        with pytest.raises(ConfigError, match="the type has a method already"):
            methods.register(type("Other", (type(method),), {})())
    assert "CODE" not in METHODS
    assert type(Config.from_dict({"peft_type": "CODE"})).__name__ == "GenericConfig"


def test_a_key_that_was_seen_before_its_method_is_known_afterwards():
    key = "base_model.model.q.code_a.fr"
    assert split_adapter_name(key) is None
    with registered(make_shared(), rows="call"):
        assert split_adapter_name(key) == ("fr", "base_model.model.q.code_a")
    assert split_adapter_name(key) is None


def test_a_misspelt_role_is_refused():
    misspelt = type("Misspelt", (type(METHODS["IA3"]),), {"roles": tensor_roles(AA="ia3_l")})()
    with pytest.raises(ConfigError, match="(?s)expected the roles A, B, .*, other, found:\n  ia3_l: 'AA'"):
        methods.register(misspelt)


# ---- a method on the model ---------------------------------------------------------------------------------------


def make_model_scope() -> Method:
    @dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
    class NoteConfig(PromptLearningConfig):
        """Note: embeddings before those of the tokens, doubled."""

        peft_type: str = "NOTE"

    class Note(PromptMethod):
        """Twice the trained embeddings, before those of the tokens."""

        peft_type = "NOTE"
        adds = "embeddings"
        config = NoteConfig

        def complete(self, config: Any, sizes: BaseSizes) -> Config:
            return fill_in(config, {"token_dim": sizes.token_dim})

        def shapes(self, config: Any, *, stored: bool) -> dict[str, tuple[int, ...]]:
            return {EMBEDDINGS: (config.num_virtual_tokens, config.token_dim)}

        def draw(self, config: Any, name: str) -> Draw:
            return Draw("normal", 1.0)

        def stored(self, config: Any, shared: Any) -> dict[str, Any]:
            return {EMBEDDINGS: shared[EMBEDDINGS]}

        def tokens(self, config: Any, params: Any, data: Any) -> Any:
            return 2 * params[EMBEDDINGS]

    return Note()


class Reader(nnx.Module):
    """Tokens, or their embeddings, to outputs that depend on all tokens before."""

    def __init__(self) -> None:
        self.embed = nnx.Embed(9, 4, rngs=nnx.Rngs(0))

    def __call__(self, tokens: Any = None, embeddings: Any = None) -> Any:
        return (self.embed(tokens) if embeddings is None else embeddings).cumsum(axis=1)


class LinenReader(nn.Module):
    @nn.compact
    def __call__(self, tokens: Any = None, embeddings: Any = None) -> Any:
        embed = nn.Embed(9, 4, name="embed")
        return (embed(tokens) if embeddings is None else embeddings).cumsum(axis=1)


def test_a_method_on_the_model_works_everywhere_and_leaves_no_trace(tmp_path: Path):
    method, tokens = make_model_scope(), jnp.array([[3, 1, 4], [1, 5, 8]])
    with registered(method, merges=False, file_tensors=(EMBEDDINGS,)):
        config = method.config(num_virtual_tokens=2)  # type: ignore[attr-defined]
        model = jaxadapt.adapt(Reader(), config, rngs=nnx.Rngs(1))
        adapter, table = jaxadapt.extract(model), np.asarray(model.embed.embedding)
        assert adapter.config.token_dim == 4
        note = np.broadcast_to(2 * np.asarray(adapter.shared[EMBEDDINGS]), (2, 2, 4))
        want = np.concatenate([note, table[tokens]], axis=1).cumsum(axis=1)
        np.testing.assert_allclose(model(tokens), want, rtol=1e-5, atol=1e-6)  # sums in another order
        params = {"params": {"embed": {"embedding": jnp.asarray(table)}}}
        module = jaxadapt.adapt(LinenReader(), adapter.config)
        found = jax.jit(module.apply)({**params, **adapter.collection}, tokens)
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
        jaxadapt.save(model, tmp_path)
        assert jaxadapt.read(tmp_path).tensors.keys() == {EMBEDDINGS}
        np.testing.assert_array_equal(jaxadapt.load(tmp_path, Reader())(tokens), model(tokens))
        np.testing.assert_array_equal(jaxadapt.extract(jaxadapt.load(tmp_path, params)).shared[EMBEDDINGS],
                                      adapter.shared[EMBEDDINGS])  # fmt: skip
        with pytest.raises(jaxadapt.AttachError, match="NOTE adds virtual tokens to the input and changes no weight"):
            jaxadapt.merge(model)
        assert (method.rows, FACTS["NOTE"].merges) == ("no", False)
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
    with registered(names["Sketch"]()) as method:
        for fields in method.examples:
            config = names["SketchConfig"](target_modules=["q"], **fields)
            model = jaxadapt.adapt(Net(), config, rngs=nnx.Rngs(2))
            np.testing.assert_array_equal(model(X), Net()(X))
            adapter = jaxadapt.extract(model)
            b = jnp.asarray(np.random.default_rng(1).standard_normal((16, config.r)), "float32")
            values = {"q": {"kernel": {**adapter.params["q"]["kernel"], "sketch_B": b, "sketch_d": 1 + b[:, 0]}}}
            jaxadapt.inject(model, jaxadapt.Adapter(config, values, adapter.keymap))
            scale, a = config.alpha / config.r, np.asarray(values["q"]["kernel"]["sketch_A"])
            plain = Net()
            kernel = np.asarray(plain.q.kernel) + np.asarray(scale * (1 + b[:, :1]) * (b @ a)).T
            want = plain.up(np.tanh(X @ kernel + np.asarray(plain.q.bias)))
            np.testing.assert_allclose(model(X), want, rtol=1e-5, atol=1e-5)
            jaxadapt.save(model, tmp_path)
            np.testing.assert_array_equal(jaxadapt.load(tmp_path, Net())(X), model(X))
            np.testing.assert_allclose(jaxadapt.merge(model)(X), want, rtol=1e-5, atol=1e-5)
