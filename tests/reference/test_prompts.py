"""Prompt methods as PEFT has them: logits, files in both directions, gradients, starts. `tests/full` has every case.

float32; the tolerance 1e-5 of the largest logit covers the order of the sums, which differs between the libraries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import torch
from safetensors.numpy import load_file

import jaxadapt
from jaxadapt import AttachError, ConfigError, MismatchError
from jaxadapt.initializers import start
from tests.support import prompts
from tests.support.prompts import IDS, PREFIX, PROJECTED, TASKS, TYPES, Case
from tests.support.prompts import folders as folders
from tests.support.twins import llama

pytestmark = pytest.mark.peft

each_type = pytest.mark.parametrize("case", TYPES, ids=str)


@each_type
def test_pefts_adapter_gives_pefts_logits(case: Case, folders: Any) -> None:
    """In one API; the gradients below are of the other."""
    i = TYPES.index(case)
    api, padding = [("nnx", "left"), ("linen", "right")][i % 2]
    prompts.check_logits(case, api, i // 2 % 2 == 1, padding, folders)


@each_type
def test_files(case: Case, tmp_path: Path, folders: Any) -> None:
    prompts.check_that_peft_opens_ours(case, ["nnx", "linen"][TYPES.index(case) % 2], tmp_path / "opened")
    prompts.check_files(case, tmp_path / "new", folders)
    prompts.check_round_trip(case, tmp_path / "again", folders)


@each_type
def test_gradients_are_pefts(case: Case) -> None:
    prompts.check_gradients(case, ["linen", "nnx"][TYPES.index(case) % 2])


# ---- starts


class Tokenizer:
    """In place of a tokenizer of the Hub."""

    @classmethod
    def from_pretrained(cls, name: str, **_: Any) -> Any:
        return lambda text: {"input_ids": [5, 2, 7]}


def peft_start(config: Any) -> dict[str, np.ndarray]:
    encoder = peft.get_peft_model(prompts.torch_copy(), config).prompt_encoder["default"]
    values = {name: p.detach().numpy() for name, p in encoder.named_parameters()}
    return {"prompt_embeddings": values.pop("embedding.weight"), **values}


@pytest.mark.parametrize("n", [2, 4])
def test_a_text_gives_pefts_values(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers, "AutoTokenizer", Tokenizer)
    fields = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a", "tokenizer_name_or_path": "t"}
    fields |= {"num_virtual_tokens": n, "task_type": "CAUSAL_LM"}
    want = peft_start(peft.PromptTuningConfig(**fields))["prompt_embeddings"]
    for tokens in ([5, 2, 7], lambda text: [5, 2, 7]):
        model, adapter = start(llama.twin_of(prompts.torch_base()), jaxadapt.PromptTuningConfig(**fields), tokens)
        np.testing.assert_array_equal(adapter.shared["prompt_embeddings"], want)
        assert model(jnp.asarray(IDS)).shape[1] == IDS.shape[1] + n


def test_random_tokens_are_rows_of_the_embedding() -> None:
    config = jaxadapt.PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB")
    twin = llama.twin_of(prompts.torch_base(), "linen")
    one, two = (start(twin[1]["params"], config, key=jax.random.key(i)).adapter for i in (0, 1))
    table = prompts.torch_base().get_input_embeddings().weight.detach().numpy()
    for row in one.shared["prompt_embeddings"]:
        assert (table == np.asarray(row)).all(1).any()
    assert (one.shared["prompt_embeddings"] != two.shared["prompt_embeddings"]).any()


@pytest.mark.parametrize("kind", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_source_tasks_give_pefts_values(kind: str, folders: Any) -> None:
    file = folders(TASKS) / "adapter_model.safetensors"
    fields = {"num_virtual_tokens": prompts.N, "task_type": "CAUSAL_LM", "num_ranks": 2}
    fields |= {
        "prompt_tuning_init": kind,
        "prompt_tuning_init_task": 2,
        "prompt_tuning_init_state_dict_path": str(file),
    }
    want = peft_start(peft.MultitaskPromptTuningConfig(**fields))
    config = jaxadapt.MultitaskPromptTuningConfig(**fields)
    source = jaxadapt.read(folders(TASKS))
    found = start(llama.twin_of(prompts.torch_base()), config, source).adapter.shared
    for name in want if kind != "ONLY_SOURCE_SHARED" else ("prompt_embeddings",):
        np.testing.assert_allclose(found[name], want[name], rtol=1e-6, atol=1e-9, err_msg=name)
    with pytest.raises(MismatchError, match="do not fit the new adapter"):
        start(
            llama.twin_of(prompts.torch_base()),
            config.replace(num_virtual_tokens=9),
            jaxadapt.read(folders(TASKS)),
        )


def test_starts_that_read_the_base_are_refused_by_name_elsewhere() -> None:
    config = jaxadapt.PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB")
    with pytest.raises(ConfigError, match=r'prompt_tuning_init="SAMPLE_VOCAB".*initializers\.start'):
        jaxadapt.adapt(llama.twin_of(prompts.torch_base()), config, rngs=nnx.Rngs(0))
    with pytest.raises(AttachError, match="key is needed"):
        start(llama.twin_of(prompts.torch_base()), config)


# ---- loading, dtypes, transforms


def test_a_file_does_not_fill_an_attached_encoder(tmp_path: Path) -> None:
    model, _ = prompts.fresh(PROJECTED)
    jaxadapt.save(model, tmp_path)
    want = model(jnp.asarray(IDS))
    with pytest.raises(MismatchError, match="has an encoder"):
        jaxadapt.load(tmp_path, model)
    assert "kernel_0" in jaxadapt.extract(model).shared
    assert list(jaxadapt.extract(jaxadapt.load(tmp_path, model, replace=True)).shared) == ["prompt_embeddings"]
    np.testing.assert_allclose(model(jnp.asarray(IDS)), want, rtol=1e-5, atol=1e-5)


def test_a_task_that_does_not_exist() -> None:
    model, _ = prompts.fresh(TASKS)
    with pytest.raises(AttachError, match="expected tasks from 0 to 2"), jaxadapt.models.invoke(model, task_ids=[3, 0]):
        pass

    @nnx.jit
    def run(model: Any, tasks: Any) -> Any:
        with jaxadapt.models.invoke(model, task_ids=tasks):
            return model(jnp.asarray(IDS))

    for tasks in ([3, 0], [-1, 0]):
        assert jnp.isnan(run(model, jnp.array(tasks))).any((1, 2)).tolist() == [True, False]
    with pytest.raises(AttachError, match="no active adapter is one of MULTITASK_PROMPT_TUNING"):  # noqa: SIM117
        with jaxadapt.models.invoke(prompts.fresh(PREFIX)[0], task_ids=[0, 0]):
            pass


@pytest.mark.parametrize("case", [PREFIX], ids=str)
def test_gradients_with_checkpointing(case: Case) -> None:
    """PEFT refuses a prefix with gradient checkpointing; here the gradients are the same."""
    gradients: list[Any] = []
    for remat in (False, True):
        twin = llama.twin_of(prompts.torch_base(), "nnx", scan=True)
        for part in (twin, twin.model):
            part.config = prompts.replace(part.config, remat=remat)
        model = jaxadapt.adapt(twin, case.ours(), rngs=nnx.Rngs(0), example=[jnp.asarray(IDS)])
        wrt = nnx.DiffState(0, jaxadapt.AdapterParam)
        find = nnx.jit(nnx.grad(lambda m: (m(jnp.asarray(IDS)) ** 2).sum(), argnums=wrt))
        (gradient,) = jax.tree.leaves(find(model))
        gradients.append(gradient)
    scale = float(jnp.abs(gradients[0]).max())
    assert scale > 0
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("case", [PREFIX, prompts.PROMPT], ids=str)
def test_bfloat16(case: Case, folders: Any, tmp_path: Path) -> None:
    """Base and adapter in bfloat16 give float32's logits within the rounding, and the file keeps the dtype."""
    want = prompts.peft_logits(case, "full")
    model = jaxadapt.load(folders(case), llama.twin_of(prompts.torch_base()), dtype=jnp.bfloat16)
    params = nnx.state(model, jaxadapt.models.BaseParam)
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    found = model(jnp.asarray(IDS))
    assert np.abs(np.asarray(found, "float32") - want).max() < 0.05 * np.abs(want).max()
    jaxadapt.save(model, tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].dtype == jnp.bfloat16


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_generation_as_peft_generates(folders: Any) -> None:
    """Greedy tokens: PEFT with its cache, here a call of all tokens for each."""
    for case in (PREFIX, prompts.PROMPT):
        ids = torch.tensor(IDS)
        want = prompts.peft_model(case).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
        model = jaxadapt.load(folders(case), llama.twin_of(prompts.torch_base()))
        call = nnx.jit(lambda model, tokens: model(tokens))
        tokens, time = np.zeros(want.shape, int), IDS.shape[1]  # of one length: compiled once
        tokens[:, :time] = IDS
        for at in range(time, tokens.shape[1]):
            logits = np.asarray(call(model, jnp.asarray(tokens)))[:, -tokens.shape[1] :]  # a prompt's own come before
            tokens[:, at] = logits[:, at - 1].argmax(-1)
        np.testing.assert_array_equal(tokens, want.numpy())
