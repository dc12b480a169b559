"""Memory and time are bounded by the size of a file, as SECURITY.md promises: sizes are checked before work begins."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import jaxadapt
from jaxadapt import Config, MismatchError
from jaxadapt.analysis import diff, measure_norms
from jaxadapt.cli import main
from tests.support import small
from tests.support.small import CONFIG, WEIGHTS


def folder_of(here: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    here.mkdir()
    (here / CONFIG).write_text(json.dumps(config))
    save_file(tensors, here / WEIGHTS, {"format": "pt"})
    return here


def test_projections_are_not_drawn_before_the_files_tensors_fit(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxadapt.methods.matrix.TorchRandom", lambda *_: pytest.fail("drawn"))
    config = {"peft_type": "VERA", "r": 10**8, "target_modules": ["q_proj"]}
    one = {"base_model.model.q_proj.vera_lambda_d": np.ones(2, "f4")}
    here = folder_of(tmp_path / "vera", config, one)
    for saved in (True, False):
        (here / CONFIG).write_text(json.dumps(config | {"save_projection": saved}))
        for strict in (True, False):
            with pytest.raises(MismatchError, match=r"vera_lambda_d: expected \[100000000\], found \[2\]"):
                jaxadapt.load(here, small.net(), strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_a_rank_that_no_tensor_of_the_file_confirms_is_bounded_by_the_base(strict, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxadapt.methods.unilora.deal_indices", lambda *_: pytest.fail("drawn"))
    config = {"peft_type": "UNILORA", "r": 10**8, "theta_d_length": 4, "target_modules": ["q_proj"]}
    here = folder_of(tmp_path / "unilora", config, {"base_model.unilora_theta_d": np.ones(4, "f4")})
    with pytest.raises(MismatchError, match="2800000000 values that the file lacks: expected at most 16777216"):
        jaxadapt.load(here, small.net(), strict=strict)


# ---- GGUF files, whose counts and lengths are their own ------------------------------------------------------


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def number(name: str, kind: int, form: str, value: object) -> bytes:
    return text(name.encode()) + struct.pack(f"<I{form}", kind, value)


STRING, ARRAY = struct.pack("<I", 8), struct.pack("<I", 9)
ARCHITECTURE = text(b"general.architecture") + STRING + text(b"llama")
BLOCKS, HEADS = number("llama.block_count", 4, "I", 1), number("llama.attention.head_count", 4, "I", 2)
NO_AXES = text(b"blk.0.attn_q.weight") + struct.pack("<IIQ", 0, 0, 0)


def write_gguf(path: Path, fields: list[bytes], tensors: tuple[bytes, ...] = ()) -> Path:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)) + b"".join((*fields, *tensors))
    path.write_bytes(head + bytes(-len(head) % 32 + 64))
    return path


@pytest.mark.parametrize(
    ("fields", "tensors", "says"),
    [
        ([text(b"general.architecture") + STRING + text(b"\xff\xfe")], (), "expected a GGUF file"),
        ([text(b"\xff\xfe") + STRING + text(b"x")], (), "expected a GGUF file"),
        ([text(b"general.architecture") + ARRAY + struct.pack("<IQ", 8, 0)], (), "for the architecture []"),
        ([ARCHITECTURE, BLOCKS, HEADS], (NO_AXES,), "a tensor of 0 axes"),
        ([ARCHITECTURE, BLOCKS, number("llama.attention.head_count", 7, "?", True)], (), "head_count=True"),
        ([ARCHITECTURE, number("llama.block_count", 10, "Q", 4 * 10**9), HEADS], (), "tensors of 4000000000 layers"),
    ],
    ids="value name list axes bool layers".split(),
)
def test_a_damaged_gguf_file_is_an_error_that_names_it(fields, tensors, says, tmp_path, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("gguf"), "get_tensor_name_map", lambda *_: pytest.fail("as many layers"))
    write_gguf(tmp_path / "base.gguf", fields, tensors)
    arguments = ["merge", tmp_path / "base.gguf", tmp_path, "--out", tmp_path / "out.gguf"]
    run = CliRunner().invoke(main, list(map(str, arguments)))
    assert (run.exit_code, type(run.exception)) == (1, SystemExit), run.exception
    assert "base.gguf" in run.stderr
    assert says in run.stderr


def test_strings_of_a_gguf_file_take_memory_in_proportion(tmp_path):
    gguf_files = pytest.importorskip("jaxadapt.export.gguf_files")
    empty = text(b"x") + ARRAY + struct.pack("<IQ", 8, 50_000) + text(b"") * 50_000
    path = write_gguf(tmp_path / "base.gguf", [ARCHITECTURE, empty])
    tracemalloc.start()
    try:
        assert gguf_files.File(path).value("x") == [""] * 50_000
        assert tracemalloc.get_traced_memory()[1] < 8 * path.stat().st_size
    finally:
        tracemalloc.stop()


def test_a_gguf_file_is_read_as_its_package_reads_it(tmp_path):
    gguf = pytest.importorskip("gguf")
    from jaxadapt.export import gguf_files

    kinds = gguf.GGUFValueType
    values = {
        "STRING": "é", "UINT8": 200, "INT8": -3, "UINT16": 60000, "INT16": -300, "UINT32": 2**31, "INT32": -(2**30),
        "UINT64": 2**63, "INT64": -(2**62), "FLOAT32": 0.5, "FLOAT64": 1e300, "BOOL": True,
    }  # fmt: skip
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for name, value in values.items():
        writer.add_key_value(name, value, kinds[name])
    for name, items in (("strings", ["a", "", "é"]), ("floats", [0.5, 2.0]), ("ints", [1, -2])):
        writer.add_array(name, items)
    random = np.random.default_rng(0).standard_normal((2, 64)).astype("float32")
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0"):
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(name, gguf.quants.quantize(random, kind), raw_dtype=kind)
    for part in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{part}_to_file")()
    writer.close()
    ours, theirs = gguf_files.File(tmp_path / "x.gguf"), gguf.GGUFReader(tmp_path / "x.gguf")
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    types = {name: [kind.name for kind in field.types] for name, field in fields.items()}
    assert ours.fields == {
        name: (field.contents(), types[name][0], types[name][1] if len(types[name]) > 1 else None)
        for name, field in fields.items()
    }
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].kind == tensor.tensor_type.name
        np.testing.assert_array_equal(
            ours.read(tensor.name), gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(2, 64)
        )


def test_the_layers_that_a_configuration_states_are_not_gone_through(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    made = gguf.get_tensor_name_map
    monkeypatch.setattr(
        gguf, "get_tensor_name_map", lambda arch, n: made(arch, n) if n < 100 else pytest.fail("as many layers")
    )
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    module = "base_model.model.model.layers.11.self_attn.q_proj"
    pair = {f"{module}.lora_A.weight": np.ones((1, 4), "f4"), f"{module}.lora_B.weight": np.ones((4, 1), "f4")}
    folder_of(tmp_path / "lora", config, pair)
    base = {"model_type": "llama", "num_attention_heads": 2, "num_hidden_layers": 4 * 10**9}
    for layers, heads, says in ((4 * 10**9, 2, ""), (11, 2, "has no such tensor"), (12, 0, "a positive integer")):
        (tmp_path / "config.json").write_text(
            json.dumps(base | {"num_hidden_layers": layers, "num_attention_heads": heads})
        )
        arguments = ["export", tmp_path / "lora", "--for", "gguf", "--base", tmp_path, "--out", tmp_path / "x.gguf"]
        run = CliRunner().invoke(main, list(map(str, arguments)))
        assert (run.exit_code, says in run.stderr) == (int(bool(says)), True), run.stderr
    assert [tensor.name for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors] == [
        "blk.11.attn_q.weight.lora_a", "blk.11.attn_q.weight.lora_b",
    ]  # fmt: skip


# ---- shapes that do not fit each other ------------------------------------------------------------------------


def misshapen(tensors: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    for key, x in tensors.items():
        for changed in (np.zeros((), x.dtype), x[:0], x[1:], x.T.copy(), x.ravel()):
            yield {**tensors, key: changed}
    yield {key: x[..., :0] for key, x in tensors.items()}


@pytest.mark.parametrize("name", ["LORA", "LOHA", "LOKR", "VERA", "C3A", "OFT"])
def test_tensors_that_do_not_fit_are_left_out_or_an_error(name):
    """`inspect --norms`, `diff` and `load`."""
    method = jaxadapt.methods.METHODS[name]
    config = type(Config.from_dict({"peft_type": name}))(target_modules=["q_proj"], **method.examples[0])
    base = {"q_proj": {"kernel": np.ones((6, 8), "f4")}}
    good = jaxadapt.to_peft(jaxadapt.init(base, config, key=jax.random.key(0)))
    for tensors in misshapen({key: np.asarray(x) for key, x in good.tensors.items()}):
        bad = jaxadapt.PeftTensors(config, tensors, "x")
        for look in (
            lambda bad=bad: measure_norms(bad),
            lambda bad=bad: diff(bad, bad),
            lambda bad=bad: diff(good, bad),
            lambda bad=bad: jaxadapt.from_peft(bad, base),
        ):
            with contextlib.suppress(jaxadapt.AdapterError):
                look()


def test_a_grouped_convolution_is_compared_by_its_tensors():
    """A has all ranks, and B those of one group: PEFT's shapes."""
    config = jaxadapt.LoraConfig(r=4, target_modules=["conv"])
    prefix = "base_model.model.conv.lora_"
    first, second = (
        jaxadapt.PeftTensors(config, {f"{prefix}A.weight": a, f"{prefix}B.weight": np.ones((6, 2, 1, 1), "f4")})
        for a in (np.ones((4, 2, 3, 3), "f4"), np.zeros((4, 2, 3, 3), "f4"))
    )
    found = diff(first, second)
    assert {module.module: module.distance for module in found.modules} == {
        "conv.lora_A.weight": 72**0.5,
        "conv.lora_B.weight": 0,
    }


@pytest.mark.parametrize("method", ["P_TUNING", "LN_TUNING", "PREFIX_TUNING", "LORA"])
def test_a_configuration_that_is_nested_deeply_is_an_error(method, tmp_path):
    deep = "[" * 500 + "]" * 500
    for field in ("unknown", "target_modules", "encoder_hidden_size", "auto_mapping"):
        (tmp_path / CONFIG).write_text(f'{{"peft_type": "{method}", "{field}": {deep}}}')
        with pytest.raises(jaxadapt.ConfigError, match="nested too deeply"):
            jaxadapt.read_config(tmp_path / CONFIG)
