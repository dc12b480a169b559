"""What people type who come from PEFT, Tunix or Qwix: the error says what it is called here."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import AttachError, ConfigError, IA3Config, LoraConfig
from jaxadapt.core.lazy import OTHER_NAMES
from tests.support import small
from tests.system.test_public import PACKAGES, PUBLIC


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("get_peft_model", r"jaxadapt\.adapt\(model, config, rngs"),
        ("PeftModel", r"jaxadapt\.load\(path, model\)"),
        ("LoRAConfig", r"jaxadapt\.LoraConfig\(r=8"),
        ("PeftConfig", r"jaxadapt\.read_config"),
        ("LoraProvider", r"jaxadapt\.LoraConfig"),
        ("from_pretrained", r"jaxadapt\.load"),
        ("save_pretrained", r"jaxadapt\.save"),
        ("merge_and_unload", r"jaxadapt\.merge\(model\)"),
        ("print_trainable_parameters", r"jaxadapt\.summary"),
        ("set_adapter", r"jaxadapt\.activate"),
        ("attention", r"jaxadapt\.models\.attention"),
        ("Loraconfig", r"did you mean 'LoraConfig'\?"),
    ],
)
def test_a_name_of_another_library(name: str, says: str):
    with pytest.raises(AttributeError, match=rf"no attribute '{name}'.*{says}"):
        getattr(jaxadapt, name)
    assert not hasattr(jaxadapt, name)
    assert getattr(jaxadapt, name, None) is None


def test_a_name_of_the_root_is_named_where_another_package_is_asked_for_it():
    for package, name in ((jaxadapt.models, "adapt"), (jaxadapt.merging, "merge")):
        with pytest.raises(AttributeError, match=rf"no attribute '{name}'; here it is jaxadapt\.{name}"):
            getattr(package, name)


def test_exchanged_arguments_say_the_order():
    """The model comes first; an adapter's name is a keyword."""
    model, base, config = small.trained(), small.base()["params"], small.LORA
    adapter = jaxadapt.extract(model)
    for call in (jaxadapt.adapt, jaxadapt.init, jaxadapt.select, jaxadapt.initializers.start):
        with pytest.raises(
            ConfigError, match=rf"found dict\. The model comes first, .*{call.__name__}\(model, config\)"
        ):
            call(config, base)
    for call in (jaxadapt.inject, jaxadapt.merge, jaxadapt.unmerge):
        with pytest.raises(AttachError, match=r"found dict\. .* The model comes first, as in inject\(model, adapter\)"):
            call(adapter, {"params": base})
    for call in (jaxadapt.extract, jaxadapt.to_peft, jaxadapt.delete):
        with pytest.raises(TypeError, match="positional argument"):
            call(model, "default")


def test_an_import_says_it_too(root: Path):
    for line in ("from jaxadapt import get_peft_model", "from jaxadapt import LoraConfig, get_peft_model"):
        code = f"try:\n    {line}\nexcept ImportError as error:\n    print(error)"
        done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
        assert "here it is jaxadapt.adapt(model, config" in done.stdout
    with pytest.raises(ImportError, match="cannot import name 'nothing_here'"):
        exec("from jaxadapt import nothing_here")


def test_every_name_that_the_documentation_translates_is_known(root: Path):
    held: dict[str, str] = OTHER_NAMES
    table = (
        (root / "docs" / "from_peft.md")
        .read_text(encoding="utf-8")
        .rpartition("| PEFT | NNX | Linen |")[2]
        .partition("\n\n")[0]
    )
    theirs = re.findall(
        r"`(?:\w+\.)*(\w+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    )
    assert len(theirs) > 20
    assert set(theirs) <= held.keys()
    assert not held.keys() & PUBLIC
    advised = {name for text in held.values() for name in re.findall(r"jaxadapt\.(\w+)", text)}
    assert advised <= {*PUBLIC, *PACKAGES}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LoraConfig(alpha=8), "LoraConfig has no field 'alpha'; it is called lora_alpha"),
        (lambda: LoraConfig(rank=8), "no field 'rank'; it is called r$"),
        (
            lambda: LoraConfig(lora_rank=8, dropout=0.1),
            "'dropout'; it is called lora_dropout\n.*'lora_rank'; it is called r$",
        ),
        (lambda: LoraConfig(module_path=".*q"), "it is called target_modules"),
        (lambda: LoraConfig(target_module=["q"]), "it is called target_modules"),
        (lambda: IA3Config(feed_forward_modules=["q"]), "IA3Config has no field.*it is called feedforward_modules"),
        (lambda: LoraConfig(nonsense=1), r"its fields are task_type, .*extra=\{…\}"),
        (lambda: LoraConfig(8), r"keyword arguments only; write for example LoraConfig\(.*=…\)"),
        (lambda: LoraConfig().replace(alpha=2), "it is called lora_alpha"),
    ],
)
def test_a_field_of_another_name(make: Any, says: str):
    with pytest.raises(ConfigError, match=says):
        make()


def test_a_configuration_is_made_and_copied_as_ever():
    config = LoraConfig(r=4, target_modules=["q"], extra={"new": 1})
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.replace(r=2).r == 2
    assert LoraConfig.from_dict({"peft_type": "LORA", "alpha": 8}).extra == {"alpha": 8}  # a file's own key is kept


def test_names_in_a_list_as_pefts_set_adapter_takes_them():
    model = small.trained(small.LORA, 1, "a")
    small.trained(small.LORA, 2, "b", model)
    want = jaxadapt.activate(model, "a", "b")(small.X)
    jaxadapt.activate(model)
    assert jnp.array_equal(jaxadapt.activate(model, ["a", "b"])(small.X), want)
    module = jaxadapt.adapt(jaxadapt.adapt(small.LinenNet(), small.LORA, name="a"), small.LORA, name="b")
    assert jaxadapt.activate(module, ["a", "b"]).active == ("a", "b")
    assert jaxadapt.activate(module, ("b",)).active == ("b",)
    assert jaxadapt.activate(module, []).active == ()
    for given in ([1], ["a"], ["a", ["b"]]):
        with pytest.raises(AttachError, match=r"activate\(model, \['a', 'b'\]\)"):
            jaxadapt.activate(module, given, "b")


@pytest.mark.parametrize("name", ["default", "fr"])
def test_the_advice_for_another_configuration_is_for_that_adapter(name: str):
    variables = small.variables(name=name)
    module = jaxadapt.adapt(small.LinenNet(), small.LORA.replace(lora_alpha=7), name=name)
    with pytest.raises(AttachError) as caught:
        module.apply(variables, small.X)
    advice = str(caught.value).rpartition(": ")[2]
    assert advice.startswith("jaxadapt.adapt(")
    again = eval(advice, {"jaxadapt": jaxadapt, "module": small.LinenNet(), "variables": variables})  # noqa: S307 (our own)
    again.apply(variables, small.X)


def test_all_linear_leaves_out_what_is_excluded_without_a_word():
    """Warnings are errors here: the list that "all-linear" becomes holds what exclude_modules leaves out."""
    config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=["up_proj"])
    model = jaxadapt.adapt(small.net(), config, rngs=nnx.Rngs(0))
    assert set(jaxadapt.extract(model).sites) == {"q_proj.kernel"}


def test_no_name_is_its_own_near_miss():
    config = LoraConfig(r=2, target_modules=["h.1.q", "k"], layers_to_transform=[0])
    params = {
        "m": {"h": {str(i): {"q": {"kernel": jnp.ones((2, 2))}, "k": {"kernel": jnp.ones((2, 2))}} for i in (0, 1)}}
    }
    with pytest.warns(UserWarning, match="'h.1.q' matches no module") as caught:
        jaxadapt.init(params, config, key=jax.random.key(0))
    assert all("m.h.1.q" not in str(w.message) for w in caught)


def test_the_way_out_of_all_linear_is_exclude_modules():
    params = {"q": {"kernel": jnp.ones((2, 2))}, "odd": {"kernel": jnp.ones((2, 2, 2))}}
    every = LoraConfig(r=2, target_modules="all-linear")
    with pytest.raises(jaxadapt.KeyMapError, match=r"odd\.kernel(?s:.)*name them in exclude_modules") as caught:
        jaxadapt.init(params, every, key=jax.random.key(0))
    assert "out of target_modules" not in str(caught.value)
    adapter = jaxadapt.init(params, every.replace(exclude_modules=["odd"]), key=jax.random.key(0))
    assert set(adapter.sites) == {"q.kernel"}
    with pytest.raises(jaxadapt.KeyMapError, match="leave them out of target_modules"):
        jaxadapt.init(params, every.replace(target_modules=["q", "odd"]), key=jax.random.key(0))
