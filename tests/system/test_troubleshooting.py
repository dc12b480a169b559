"""docs/troubleshooting.md quotes messages: each is raised here through public calls, and begins as the page says.

An entry of the page is `(id)=`, a heading with the beginning of the message in which … stands for what varies, and a
text that begins with the kind of the message. The function of the same id, below, makes the mistake. A row of the
page's table names a command and what it prints; `SILENT` makes the mistake and runs the command. The page alone has the
texts.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from click.testing import CliRunner
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt.cli import main
from tests.support import small

LORA = jaxadapt.LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
BOTH = ["q_proj", "up_proj"]
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ENTRY = re.compile(
    r"^\((?P<id>[a-z-]+)\)=\n### `(?P<begins>[^`\n]+)`\n\n(?:`(?P<error>\w+)`|(?P<warning>Warning))\. ", re.M
)
ENTRIES = {found["id"]: found for found in ENTRY.finditer(PAGE)}
ROW = re.compile(r"^\|[^|]+\|[^|]+\| `[^`|]+`: `(?P<prints>[^`|]+)` \|[^|]+\|$", re.M)
PRINTED = [found["prints"] for found in ROW.finditer(PAGE)]
CASES: dict[str, Callable[[Path], Any]] = {}


def entry(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    CASES[make.__name__.replace("_", "-")] = make
    return make


def saved(folder: Path, config: Mapping[str, Any] | None = None, like: Any = LORA) -> Path:
    """A folder of a new adapter for `small.net()`; with changes of its configuration, written as PEFT writes it."""
    jaxadapt.save(jaxadapt.init(linen(), like, key=jax.random.key(0)), folder)
    if config is not None:
        path = folder / small.CONFIG
        fields = json.loads(path.read_text("utf-8")) | config
        path.write_text(json.dumps(fields), "utf-8")
        rewrite(folder)
    return folder


def rewrite(folder: Path, change: Callable[[str, Any], tuple[str, Any]] = lambda key, x: (key, x)) -> Path:
    """Write the tensors of a folder again as PEFT does, without a copy of the configuration."""
    path = folder / small.WEIGHTS
    save_file(dict(change(key, x) for key, x in load_file(path).items()), path, {"format": "pt"})
    return folder


@contextlib.contextmanager
def missing(package: str) -> Iterator[None]:
    """Let an import of this package fail, as where it is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, package, None)
        yield


def linen() -> Any:
    return small.base()["params"]


# ---------------------------------------------------------------- install and imports


@entry
def name_of_another_library(folder: Path):
    exec("from jaxadapt import PeftModel")


@entry
def extra_of_a_store(folder: Path):
    with missing("adlfs"):
        jaxadapt.load("az://bucket/adapter", small.net())


@entry
def extra_of_gguf(folder: Path):
    sizes = {"num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    with missing("gguf"):
        jaxadapt.export.export_adapter(saved(folder / "a"), folder / "a.gguf", "gguf", base=folder)


# ---------------------------------------------------------------- targets and models


@entry
def target_matches_nothing(folder: Path):
    jaxadapt.adapt(small.net(), LORA.replace(target_modules=["query"]), rngs=nnx.Rngs(0))


@entry
def one_target_matches_nothing(folder: Path):
    jaxadapt.adapt(small.net(), LORA.replace(target_modules=["q_proj", "v_proj"]), rngs=nnx.Rngs(0))


@entry
def no_targets(folder: Path):
    jaxadapt.adapt(small.net(), jaxadapt.LoraConfig(r=2), rngs=nnx.Rngs(0))


@entry
def rank_pattern_matches_nothing(folder: Path):
    jaxadapt.adapt(small.net(), LORA.replace(rank_pattern={"k_proj": 4}), rngs=nnx.Rngs(0))


@entry
def module_to_save_matches_nothing(folder: Path):
    jaxadapt.adapt(small.net(), LORA.replace(modules_to_save=["score"]), rngs=nnx.Rngs(0))


@entry
def unknown_field(folder: Path):
    jaxadapt.LoraConfig(rank=8, target_modules=["q_proj"])


@entry
def invalid_field(folder: Path):
    jaxadapt.LoraConfig(r=0, target_modules=["q_proj"])


@entry
def kind_is_not_adapted(folder: Path):
    model = nnx.Dict(norm=nnx.LayerNorm(4, rngs=nnx.Rngs(0)), q_proj=nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    jaxadapt.adapt(model, LORA.replace(target_modules=["norm", "q_proj"]), rngs=nnx.Rngs(0))


@entry
def axes_are_not_known(folder: Path):
    jaxadapt.init({"attn": {"q_proj": {"kernel": jnp.ones((4, 2, 3))}}}, LORA, key=jax.random.key(0))


class Tied(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = nn.Dense(4, name="q_proj")
        return layer(x) @ layer.variables["params"]["kernel"]


@entry
def weight_is_read_elsewhere(folder: Path):
    x = jnp.ones((2, 4))
    base = Tied().init(jax.random.key(0), x)["params"]
    module = jaxadapt.adapt(Tied(), LORA)
    module.apply({"params": base, **jaxadapt.init(base, LORA, key=jax.random.key(1)).collection}, x)


@entry
def not_a_model(folder: Path):
    jaxadapt.adapt(7, LORA, rngs=nnx.Rngs(0))


@entry
def all_variables_in_place_of_parameters(folder: Path):
    jaxadapt.init(small.base(), LORA, key=jax.random.key(0))


@entry
def inside_jit(folder: Path):
    model = small.net()

    @nnx.jit
    def step(model: Any) -> None:
        jaxadapt.adapt(model, LORA, rngs=nnx.Rngs(0))

    step(model)


@entry
def name_is_taken(folder: Path):
    jaxadapt.adapt(small.trained(LORA), LORA, rngs=nnx.Rngs(0))


@entry
def no_random_keys(folder: Path):
    jaxadapt.adapt(small.net(), LORA)


# ---------------------------------------------------------------- save and load


@entry
def no_adapter_to_save(folder: Path):
    jaxadapt.save(small.net(), folder)


@entry
def no_configuration_in_the_tree(folder: Path):
    jaxadapt.save({**small.base(), "lora": {"default": dict(small.adapter(LORA).params)}}, folder)


@entry
def order_of_arguments(folder: Path):
    jaxadapt.load(small.net(), folder)


@entry
def no_such_folder(folder: Path):
    jaxadapt.load(folder / "outt", small.net())


@entry
def no_place_in_the_model(folder: Path):
    jaxadapt.load(saved(folder), Embedded())


@entry
def does_not_fit(folder: Path):
    rngs = nnx.Rngs(0)
    jaxadapt.load(saved(folder), nnx.Dict(q_proj=nnx.Linear(4, 8, rngs=rngs), up_proj=nnx.Linear(8, 4, rngs=rngs)))


@entry
def other_configuration(folder: Path):
    jaxadapt.load(saved(folder), small.trained(LORA.replace(r=4)))


@entry
def other_base(folder: Path):
    jaxadapt.save(small.trained(LORA), folder)
    jaxadapt.load(folder, small.net(seed=7))


@entry
def edited_configuration(folder: Path):
    path = saved(folder) / small.CONFIG
    path.write_text(path.read_text("utf-8").replace('"lora_alpha": 8', '"lora_alpha": 32'), "utf-8")
    jaxadapt.load(folder, small.net())


@entry
def missing_configuration(folder: Path):
    (rewrite(saved(folder)) / small.CONFIG).unlink()
    jaxadapt.load(folder, small.net())


@entry
def not_finite(folder: Path):
    jaxadapt.load(rewrite(saved(folder), lambda key, x: (key, np.nan * x)), small.net())


@entry
def truncated(folder: Path):
    path = saved(folder) / small.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    jaxadapt.load(folder, small.net())


@entry
def git_lfs_pointer(folder: Path):
    (saved(folder) / small.WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    jaxadapt.load(folder, small.net())


@entry
def save_to_the_hub(folder: Path):
    jaxadapt.save(small.trained(LORA), "hf://org/name")


@entry
def donated(folder: Path):
    adapter = small.adapter(LORA)
    jax.tree.map(lambda x: x.delete(), adapter)
    jaxadapt.save(adapter, folder)


# ---------------------------------------------------------------- training


@entry
def dropout_without_rngs(folder: Path):
    model = jaxadapt.load(saved(folder, {"lora_dropout": 0.5}), small.net())
    model.train()
    model(jnp.asarray(small.X))


@entry
def dropout_without_a_stream(folder: Path):
    config = LORA.replace(lora_dropout=0.5)
    module = jaxadapt.adapt(small.LinenNet(), config)
    module.apply({**small.base(), **jaxadapt.init(linen(), config, key=jax.random.key(0)).collection}, small.X)


@entry
def optimizer_without_adapter(folder: Path):
    jaxadapt.optim.lora_plus(linen(), optax.adamw, 1e-4, ratio=16)


@entry
def later_steps(folder: Path):
    with jaxadapt.CheckpointManager(folder) as manager:
        manager.save(5, small.trained(LORA))
        manager.save(3, small.trained(LORA))


@entry
def no_checkpoint(folder: Path):
    with jaxadapt.CheckpointManager(folder) as manager:
        manager.restore(small.trained(LORA))


@entry
def checkpoint_does_not_fit(folder: Path):
    model = small.trained(LORA)
    with jaxadapt.CheckpointManager(folder) as manager:
        manager.save(1, model, opt_state=optax.adam(1e-3).init(jnp.zeros(3)))
        manager.wait()
        manager.restore(model, opt_state=optax.sgd(1e-3).init(jnp.zeros(3)))


@entry
def nothing_to_merge(folder: Path):
    model = small.trained(LORA)
    jaxadapt.activate(model)
    jaxadapt.merge(model)


# ---------------------------------------------------------------- shapes, vocabularies, tied heads


class Embedded(nnx.Module):
    def __init__(self, size: int = 10) -> None:
        self.embed_tokens = nnx.Embed(size, 4, rngs=nnx.Rngs(0))
        self.q_proj = nnx.Linear(4, 6, rngs=nnx.Rngs(1))


TOKENS = jaxadapt.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])


@entry
def embedding_in_the_file(folder: Path):
    jaxadapt.save(small.trained(TOKENS, model=Embedded(12)), folder)
    jaxadapt.load(folder, Embedded())


@entry
def other_vocabulary(folder: Path):
    jaxadapt.save(jaxadapt.extract(small.trained(TOKENS, model=Embedded(12))), folder)
    jaxadapt.load(jaxadapt.read(folder, fit_vocabulary=True), Embedded())


@entry
def embedding_may_be_the_head(folder: Path):
    jaxadapt.merge(small.trained(TOKENS, model=Embedded()))


@entry
def embedding_is_the_head(folder: Path):
    base = {"model": {"embed_tokens": {"embedding": jnp.ones((16, 8))}}}
    config = TOKENS.replace(target_modules=["embed_tokens"])
    jaxadapt.merge(base, jaxadapt.init(base, config, key=jax.random.key(0), keymap="llama"))


@entry
def merge_of_a_quantized_base(folder: Path):
    model = nnx.Dict(q_proj=nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
    jaxadapt.merge(
        small.trained(LORA.replace(target_modules=["q_proj"]), model=jaxadapt.models.quantize(model, "int8"))
    )


@entry
def tying_has_no_effect(folder: Path):
    jaxadapt.adapt(small.net(), LORA.replace(ensure_weight_tying=True), rngs=nnx.Rngs(0))


# ---------------------------------------------------------------- other programs' files


@entry
def newer_peft(folder: Path):
    jaxadapt.load(saved(folder, {"peft_version": "9.0.0", "a_new_field": 1}), small.net())


@entry
def state_dict_of_a_whole_model(folder: Path):
    path = rewrite(saved(folder, {}), lambda key, x: (key.replace(".weight", ".default.weight"), x))
    jaxadapt.load(path, small.net())


@entry
def several_adapters_in_one_file(folder: Path):
    path = saved(folder, {}) / small.WEIGHTS
    tensors = load_file(path)
    both = {k.replace(".weight", f".{name}.weight"): x for k, x in tensors.items() for name in ("fr", "de")}
    save_file(both, path)
    jaxadapt.load(folder, small.net())


@entry
def changed_base(folder: Path):
    jaxadapt.load(saved(folder, {"init_lora_weights": "pissa"}), small.net())


@entry
def file_of_mlx(folder: Path):
    (folder / small.CONFIG).write_text('{"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 2}}')
    jaxadapt.read_config(folder)


@entry
def unknown_method(folder: Path):
    jaxadapt.load(saved(folder, {"peft_type": "NEWTUNE"}), small.net())


@entry
def pickle_with_code(folder: Path):
    import pickle

    saved(folder, {})
    (folder / small.WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": print}))
    jaxadapt.load(folder, small.net())


@entry
def alpha_is_unknown(folder: Path):
    names = {"kernel": (4, 6), "kernel_lora_a": (4, 2), "kernel_lora_b": (2, 6)}
    jaxadapt.to_peft({"q_proj": {name: jnp.ones(shape) for name, shape in names.items()}})


@entry
def base_of_a_gguf_file(folder: Path):
    jaxadapt.export.export_adapter(saved(folder / "a"), folder / "a.gguf", "gguf")


@entry
def program_does_not_read_it(folder: Path):
    jaxadapt.export.export_adapter(saved(folder / "a", {"modules_to_save": ["head"]}), folder / "out", "vllm")


# ---------------------------------------------------------------- the Hub and stores


@entry
def hub_cannot_be_reached(folder: Path):
    jaxadapt.load("hf://org/name", small.net())


# ---------------------------------------------------------------- meshes and processes


@entry
def abstract_mesh(folder: Path):
    from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

    mesh = AbstractMesh((2,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), linen())
    jaxadapt.load(saved(folder), {"params": base})


@entry
def wrong_shardings(folder: Path):
    jaxadapt.load(saved(folder), small.net(), shardings=jax.devices())


@entry
def shapes_without_values(folder: Path):
    config = LORA.replace(use_dora=True)
    jaxadapt.init(jax.eval_shape(lambda: linen()), config, key=jax.random.key(0))


# ---------------------------------------------------------------- serving


def bank(model: Any, **options: Any) -> Any:
    return jaxadapt.serving.create(model, LORA, slots=2, **options)


@entry
def no_route(folder: Path):
    model = small.net()
    jaxadapt.serving.attach(model, bank(model))(jnp.asarray(small.X))


@entry
def no_bank(folder: Path):
    model = small.net()
    with jaxadapt.serving.route(model, bank(model).select([0, 0, 1])):
        pass


@entry
def no_room_in_the_bank(folder: Path):
    model = small.net()
    jaxadapt.serving.put(bank(model), 1, small.adapter(LORA.replace(r=4)))


@entry
def no_such_adapter_in_the_pool(folder: Path):
    pool = jaxadapt.serving.AdapterPool(bank(linen()), linen(), saved(folder / "fr").parent)
    with pool.lease(["french"]):
        pass


@entry
def too_few_slots(folder: Path):
    saved(folder / "fr"), saved(folder / "de")
    pool = jaxadapt.serving.AdapterPool(bank(linen()), linen(), folder)
    with pool.lease(["fr", "de"]):
        pass


# ---------------------------------------------------------------- mistakes without a message


def trained_folder(folder: Path, **fields: Any) -> Path:
    jaxadapt.save(jaxadapt.extract(small.trained(LORA.replace(**fields))), folder)
    return folder


def base_file(folder: Path, prefix: str = "", factor: float = 1.0) -> Path:
    """The base of `small.net()` as PyTorch has it."""
    path = folder / "base.safetensors"
    kernels = {f"{prefix}{name}.weight": linen()[name]["kernel"].T for name in BOTH}
    save_file({key: np.ascontiguousarray(factor * x) for key, x in kernels.items()}, path)
    return path


def run(*arguments: object) -> str:
    return CliRunner().invoke(main, [str(each) for each in arguments]).output


def of_another_base(folder: Path) -> str:
    jaxadapt.save(small.trained(LORA), folder / "out")
    return run("verify", folder / "out", "--base", base_file(folder, factor=1.5))


def inactive(folder: Path) -> str:
    model = small.trained(LORA)
    jaxadapt.activate(model)
    return str(jaxadapt.summary(model))


def not_wrapped(folder: Path) -> str:
    with pytest.raises(jaxadapt.AttachError) as caught:
        jaxadapt.summary(small.LinenNet(), small.variables(LORA))
    return str(caught.value)


def never_trained(folder: Path) -> str:
    model = small.trained(LORA)
    with jaxadapt.CheckpointManager(folder) as manager:
        manager.save(1, model)
        manager.save(2, model)
    return run("diff", *sorted(folder.glob("step-*.safetensors")))


def wrapped(folder: Path) -> str:
    rewrite(trained_folder(folder), lambda key, x: (key.replace("model.model.", "model.model._orig_mod."), x))
    return run("verify", folder)


def served(folder: Path) -> str:
    base, expected = [[-1.2, -0.3]], [[-0.9, -0.1]]
    (folder / "served.json").write_text(json.dumps({"base": base, "fr": base}))
    (folder / "expected.json").write_text(json.dumps({"base": base, "fr": expected}))
    return run("compare-logprobs", folder / "served.json", folder / "expected.json")


SILENT: dict[str, Callable[[Path], str]] = {
    "untrained": lambda folder: run("verify", saved(folder)),
    "equal": never_trained,
    "other-base": of_another_base,
    "inactive": inactive,
    "has no adapter": not_wrapped,
    "prefix": lambda folder: run("verify", trained_folder(folder), "--base", base_file(folder, "model.")),
    "wrapper-names": wrapped,
    "misread by": lambda folder: run("inspect", trained_folder(folder, use_dora=True)),
    "not applied": served,
}


# ---------------------------------------------------------------- the page


def test_the_page_and_the_cases_are_complete():
    assert list(ENTRIES) == re.findall(r"^\(([a-z-]+)\)=$", PAGE, re.M)
    assert len(ENTRIES) == PAGE.count("\n### ")
    assert ENTRIES.keys() == CASES.keys()
    assert set(PRINTED) == SILENT.keys()
    assert len(PRINTED) == PAGE.partition("## Nothing happens")[2].partition("\n## ")[0].count("\n| ") - 1


def begins_as(name: str, message: str) -> bool:
    parts = ENTRIES[name]["begins"].split("…")
    return re.match(".+?".join(map(re.escape, parts)), message) is not None


@pytest.mark.parametrize("name", ENTRIES)
def test_message(name: str, tmp_path: Path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = None
        try:
            CASES[name](tmp_path)
        except (jaxadapt.AdapterError, ImportError) as raised:
            error = raised
    if ENTRIES[name]["warning"]:
        assert error is None
        messages = [str(each.message) for each in caught if each.category is UserWarning]
    else:
        assert type(error).__name__ == ENTRIES[name]["error"]
        messages = [str(error)]
    (message,) = messages
    assert begins_as(name, message), message
    assert [other for other in ENTRIES if begins_as(other, message)] == [name]  # a search finds one entry


@pytest.mark.parametrize("prints", SILENT)
def test_silent_mistake(prints: str, tmp_path: Path):
    assert prints in SILENT[prints](tmp_path)
