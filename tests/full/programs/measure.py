"""Log-probabilities of exported adapters in the programs themselves, beside PEFT's on the same base."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import load_file, save_file

from jaxadapt import AdapterError
from jaxadapt.core.errors import no_report
from jaxadapt.demo.smollm2 import SmolLM2
from jaxadapt.export import export_adapter, gguf_files, merge_files
from tests.export import test_adapter_export as tiny
from tests.full.programs import environments

HERE = Path(__file__).parent
TARGETS = tiny.LINEAR
TEXT = "The capital of France is Paris, and that of"


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model: its folder, its GGUF file, and the tokens of the prompt."""

    folder: Path
    gguf: Path
    tokens: list[int]

    def model(self) -> Any:
        return copy.deepcopy(_loaded(self.folder))


@functools.cache
def _loaded(folder: Path) -> Any:
    # The default attention, PyTorch's own, leaves out Gemma 2's softcapping.
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def smollm2(work: Path) -> Base:
    """SmolLM2-135M-Instruct in float32, as a folder and as a GGUF file."""
    packed = SmolLM2.open()
    folder, path = work / "base", work / "base.gguf"
    (work / "base").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(packed.config.to_hf()))
    weights = {key: np.array(x, "float32") for key, x in packed.weights().items()}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    model.load_state_dict({key: torch.from_numpy(x) for key, x in weights.items()}, strict=False)
    model.save_pretrained(folder)
    # transformers 5 writes rope_theta into rope_parameters, where mlx-lm does not look for it.
    (folder / "config.json").write_text(json.dumps(packed.config.to_hf()))
    file = gguf_files.File(packed.path)
    fields = dict(file.fields)
    architecture = fields.pop("general.architecture").value
    fields["general.file_type"] = gguf_files.Field(0, "UINT32")
    specs = {name: ("F32", tensor.shape) for name, tensor in file.tensors.items()}
    gguf_files.write(path, architecture, fields, specs, file.read, no_report, "export")
    return Base(folder, path, packed.tokenizer().encode(TEXT).ids)


def small(work: Path, programs: Path, family: str) -> Base:
    """A tiny random model of a family; llama.cpp's own converter writes its GGUF file."""
    folder, path = work / "base", work / "base.gguf"
    tiny.model_of(family).save_pretrained(folder)
    command = [sys.executable, HERE / "convert_base.py", environments.llama_sources(programs), folder, path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return Base(folder, path, [3, 7, 1, 9, 4, 20, 11, 2])


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    x = logits.astype("float64")
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def peft_logits(model: Any, base: Base) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([base.tokens])).logits[0].numpy()


def read_by_peft(base: Base, adapter: Path) -> np.ndarray:
    """Return the log-probabilities (tokens, vocabulary) that PEFT computes from an adapter's folder."""
    return log_probabilities(peft_logits(peft.PeftModel.from_pretrained(base.model(), adapter).eval(), base))


def run(program: str, programs: Path, model: Path, adapters: list[str | None], base: Base, out: Path) -> np.ndarray:
    """Return the log-probabilities (adapters, tokens, vocabulary) that a program computes."""
    return log_probabilities(logits(program, programs, model, adapters, base, out))


def logits(program: str, programs: Path, model: Path, adapters: list[str | None], base: Base, out: Path) -> np.ndarray:
    """Return the logits (adapters, tokens, vocabulary) that a program computes."""
    request = {"model": str(model), "adapters": adapters, "tokens": base.tokens, "out": str(out)}
    python = programs / program / "bin/python"
    done = subprocess.run([python, HERE / f"run_{program}.py", json.dumps(request)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return np.load(out)


def train_in_mlx(base: Base, programs: Path, adapters: dict[str, Any], vocabulary: int) -> None:
    """Train adapters with mlx-lm, from `{name: settings}`, beside the base's folder, on tokens below `vocabulary`."""
    request = {"model": str(base.folder), "vocabulary": vocabulary, "adapters": adapters}
    command = [programs / "mlx/bin/python", HERE / "train_mlx.py", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=base.folder.parent)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]


def trained(base: Base, folder: Path, *, seed: int = 1, size: float = 0.02, **fields: Any) -> np.ndarray:
    """Write PEFT's adapter with random values to a folder, its start to `folder`-first; return PEFT's results.

    The values depend on the seed alone, so that programs measured in several runs read the same adapter.
    """
    low = fields.pop("low", None)
    kind = peft.IA3Config if fields.pop("ia3", False) else peft.LoraConfig
    defaults = {} if kind is peft.IA3Config else {"r": 8, "lora_alpha": 16}
    config = kind(**{"target_modules": TARGETS, "task_type": "CAUSAL_LM", **defaults, **fields})
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = peft.get_peft_model(base.model(), config).eval()
        model.save_pretrained(f"{folder}-first")
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=generator) * size
        model.save_pretrained(folder)
        if low:
            dtype = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[low]
            path = folder / "adapter_model.safetensors"
            save_file({key: x.astype(dtype) for key, x in load_file(path).items()}, path)
            model = peft.PeftModel.from_pretrained(base.model(), folder).eval()
        return log_probabilities(peft_logits(model, base))


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "rank and alpha patterns": {"rank_pattern": {"k_proj": 4, "up_proj": 12}, "alpha_pattern": {"o_proj": 3.5}},
    "patterns by layer": {"alpha_pattern": {r"model\.layers\.1\..*": 40, r".*\.0\.mlp\.up_proj": 4}},
    "a float alpha": {"lora_alpha": 13.37},
    "an expression": {"target_modules": r".*\.(0|1)\.self_attn\.(q|k|o)_proj"},
    "layers_to_transform": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "bfloat16, rsLoRA": {"low": "bfloat16", "use_rslora": True},
    "float16, alpha 24": {"low": "float16", "lora_alpha": 24},
    "MiCA": {"init_lora_weights": "mica"},
    "BD-LoRA": {"use_bdlora": {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2},
                "target_modules": ["q_proj", "o_proj"]},
    "PiSSA": {"init_lora_weights": "pissa", "size": 0.005},
    "OLoRA": {"init_lora_weights": "olora", "size": 0.005},
    "DoRA": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "a copy of the embedding": {"modules_to_save": ["embed_tokens"]},
    "copies of norms": {"modules_to_save": ["input_layernorm"]},
    "target embed_tokens (tied)": {"target_modules": ["q_proj", "embed_tokens"]},
    "trainable tokens": {"trainable_token_indices": [1, 2, 3]},
    "IA3": {"ia3": True, "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"],
            "size": 0.1},
    "aLoRA": {"alora_invocation_tokens": [1, 2]},
}  # fmt: skip
"""{name: fields of PEFT's configuration}."""


def export_case(name: str, folder: Path, out: Path, program: str, base: Base) -> str:
    """Export an adapter; return "" or the first line of the refusal."""
    first = {"first": f"{folder}-first"} if name == "PiSSA" else {}
    given = base.folder if program == "gguf" or name == "OLoRA" else base.folder / "config.json"
    if name == "PiSSA":
        _use_configuration_of(folder, Path(f"{folder}-first"))
    try:
        export_adapter(folder, out, program, base=given, **first)
    except AdapterError as error:
        return str(error).partition(": ")[2]  # without the folder
    return ""


def _use_configuration_of(folder: Path, first: Path) -> None:
    """PEFT writes the initial adapter with `init_lora_weights: true`; the rest of the two is equal."""
    (first / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())


FORMS = {"llama": "gguf", "mlx": "mlx", "vllm": "vllm"}
Results = dict[str, dict[str, Any]]


BASE_ALONE = "no adapter"


def _folder(work: Path, name: str) -> Path:
    return work / name.replace(" ", "-").replace(",", "")


def train(base: Base, work: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Write PEFT's adapters into a folder; return `{case: PEFT's log-probabilities}`, those of the base first."""
    warnings.simplefilter("ignore")  # PEFT's and transformers' own, of tied weights
    wanted = {BASE_ALONE: log_probabilities(peft_logits(base.model(), base))}
    return wanted | {name: trained(base, _folder(work, name), **CASES[name]) for name in names}


def effects(wanted: dict[str, np.ndarray]) -> Results:
    """Return `{case: {"effect": the largest change that the adapter makes}}`."""
    return {name: {"effect": float(np.abs(x - wanted[BASE_ALONE]).max())} for name, x in wanted.items()}


def measure(
    base: Base, programs: Path, work: Path, wanted: dict[str, np.ndarray], program: str
) -> dict[str, float | str]:
    """Return `{case: largest difference to PEFT in log-probability, or the refusal}` of one program."""
    found: dict[str, float | str] = {}
    exported: dict[str, str | None] = {BASE_ALONE: None}
    for name in wanted:
        folder = _folder(work, name)
        out = Path(f"{folder}-{program}{'.gguf' if program == 'llama' else ''}")
        if name != BASE_ALONE:
            found[name] = export_case(name, folder, out, FORMS.get(program, program), base)
            if not found[name]:
                exported[name] = str(out)
    if program == "transformers":
        results = [_with_transformers(base, path) for path in exported.values()]
    else:
        model = base.gguf if program == "llama" else base.folder
        results = list(run(program, programs, model, list(exported.values()), base, work / f"{program}.npy"))
    return found | {name: float(np.abs(got - wanted[name]).max()) for name, got in zip(exported, results, strict=True)}


def _with_transformers(base: Base, adapter: str | None) -> np.ndarray:
    model = base.model()
    if adapter is not None:
        model.load_adapter(adapter)
    return log_probabilities(peft_logits(model, base))


def measure_merged(base: Base, programs: Path, work: Path, names: list[str]) -> Results:
    """Return the same for merged models: a folder in transformers, and GGUF files in llama.cpp by dtype."""
    warnings.simplefilter("ignore")
    results: Results = {}
    for name in names:
        folder = work / f"merged-{name.replace(' ', '-')}"
        want = trained(base, folder, **CASES.get(name, {"size": 0}))  # without its values a LoRA changes nothing
        merge_files.merge_folder(base.folder, folder, f"{folder}-model")
        model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}-model", dtype=torch.float32).eval()
        got = log_probabilities(peft_logits(model, base))
        results[name] = {"folder": float(np.abs(got - want).max())}
        for dtype in ("float32", "bfloat16", "float16", "q8_0"):
            path = Path(f"{folder}-{dtype}.gguf")
            merge_files.merge_gguf(base.gguf, folder, path, dtype=dtype)
            (got,) = run("llama", programs, path, [None], base, work / "merged.npy")
            results[name][dtype] = float(np.abs(got - want).max())
    return results
