"""Whatever is wrong with a folder: an `AdapterError` that names the file, the tensor, what was expected and
found, and a way out; and nothing is half-done, neither in the model nor on the disk."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import AdapterError, ConfigError, FileError, FormatError, MismatchError
from jaxadapt.storage import safetensors
from tests.support import small
from tests.support.small import CONFIG, IA3, LORA, WEIGHTS, files, same

PREFIX = "base_model.model."
A = f"{PREFIX}q_proj.lora_A.weight"


@pytest.fixture
def good(tmp_path) -> Path:
    """A folder as somebody else's PEFT leaves it: our header's copy of the configuration is not there."""
    here = tmp_path / "good"
    jaxadapt.save(small.adapter(), here)
    plainly(here, dict(jaxadapt.read(here).tensors))
    return here


def plainly(here: Path, tensors: dict[str, np.ndarray]) -> None:
    specs = {k: (v.dtype, v.shape) for k, v in tensors.items()}
    safetensors.write(here / WEIGHTS, specs, tensors.__getitem__, {"format": "pt"})


def edit(here: Path, **changes) -> None:
    values = json.loads((here / CONFIG).read_text())
    (here / CONFIG).write_text(json.dumps({k: v for k, v in (values | changes).items() if v != "gone"}))


def with_header(here: Path, change) -> None:
    """The same bytes under another header."""
    raw = (here / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    (here / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def offsets(start, stop):
    return lambda header: header[A].update(data_offsets=[start, stop])


def refuses(here, kind, *says, target=None, **options) -> None:
    """`load` refuses in NNX and Linen alike, saying all that, and leaves the targets as they were."""
    model = small.net() if target is None else target
    graph, state = nnx.graphdef(model), nnx.to_pure_dict(nnx.state(model))
    variables = small.base()
    for aim in (model, variables, nnx.eval_shape(small.net)):
        with pytest.raises(kind) as caught:
            jaxadapt.load(here, aim, **options)
        assert isinstance(caught.value, AdapterError)
        text = str(caught.value)
        assert str(here) in text
        for part in says:
            assert part in text, text
    assert nnx.graphdef(model) == graph
    assert same(nnx.to_pure_dict(nnx.state(model)), state)
    assert set(variables) == {"params"}


# ---- the folder --------------------------------------------------------------------------------------------


def everywhere(here, kind, *says) -> None:
    """`read`, `inspect` and `load` refuse alike."""
    for look in (jaxadapt.read, jaxadapt.inspect):
        with pytest.raises(kind) as caught:
            look(here)
        for part in (str(here), *says):
            assert part in str(caught.value), str(caught.value)
    refuses(here, kind, *says)


def test_a_wrong_path(tmp_path):
    everywhere(tmp_path / "nowhere", FileError, "no such folder", WEIGHTS)
    with pytest.raises(FileError, match="no such folder"):
        jaxadapt.read_config(tmp_path / "nowhere")


def test_an_empty_folder(tmp_path):
    everywhere(tmp_path, FileError, f"no {CONFIG} and no {WEIGHTS}", "an empty folder")


def test_a_folder_of_folders_names_them(good):
    everywhere(good.parent, FileError, "subfolders contain adapters: good")


def test_a_configuration_without_weights(good):
    (good / WEIGHTS).unlink()
    everywhere(good, FileError, f"no {WEIGHTS}", CONFIG)


def test_weights_without_a_configuration(good):
    (good / CONFIG).unlink()
    everywhere(good, FileError, f"no {CONFIG}", WEIGHTS)
    jaxadapt.save(small.adapter(), good)
    (good / CONFIG).unlink()
    with pytest.warns(UserWarning, match=f"{CONFIG} is missing; using the copy"):  # in the header of our files
        assert jaxadapt.read_config(good) == LORA
    (good / WEIGHTS).rename(good / "adapter_model.bin")
    everywhere(good, FileError, f"no {CONFIG}", "adapter_model.bin")


def test_a_file_where_a_folder_should_be(good):
    everywhere(good / WEIGHTS, FileError, "expected a folder", "found a file", "pass its folder")
    with pytest.raises(FileError, match=f"{WEIGHTS}"):
        jaxadapt.save(small.adapter(), good / WEIGHTS)
    with pytest.raises(FileError, match=f"{WEIGHTS}"):
        jaxadapt.save(small.adapter(), good / WEIGHTS / "below")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_folder_where_a_file_should_be(name, good):
    (good / name).unlink()
    (good / name).mkdir()
    everywhere(good, FileError, name)
    with pytest.raises(FileError, match=name):
        jaxadapt.save(small.adapter(), good)


def test_a_path_with_a_nul(tmp_path):
    with pytest.raises(FileError):
        jaxadapt.read(f"{tmp_path}/a\0b")
    with pytest.raises(FileError):
        jaxadapt.save(small.adapter(), f"{tmp_path}/a\0b")


# ---- the configuration -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "expected JSON"),
        (b"{", "line 1"),
        (b"[]", "expected a JSON object, found a list"),
        (b'{"r": 8}', "expected a peft_type, found none"),
        (b'{"peft_type": "lora"}', 'write "LORA"'),
        (b'{"peft_type": "LORA", "r": "8"}', "r: expected a positive integer, found '8'"),
        (b'{"peft_type": "LORA", "r": 8, "r": 4}', "found twice: r"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_a_broken_configuration(text, says, good):
    (good / CONFIG).write_bytes(text)
    everywhere(good, ConfigError, CONFIG, says)


def test_a_method_that_cannot_be_applied(good):
    edit(good, peft_type="XLORA")
    refuses(good, ConfigError, "cannot apply peft_type 'XLORA'")
    assert jaxadapt.read(good).config.peft_type == "XLORA"


def test_a_field_that_would_be_ignored(good):
    edit(good, use_qalora=True)
    refuses(good, ConfigError, "use_qalora=True", "are not supported")


def test_a_dora_file_without_magnitudes(good):
    edit(good, use_dora=True)
    refuses(good, MismatchError, "missing from", "lora_magnitude_vector")


# ---- the bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_weights(keep, good):
    raw = (good / WEIGHTS).read_bytes()
    (good / WEIGHTS).write_bytes(raw[:keep])
    everywhere(good, FormatError, WEIGHTS)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (offsets(-4, 44), A),
        (offsets(0, 10**11), A),
        (offsets(0, 96), A),
        (offsets(48, 0), A),
        (lambda h: h[A].update(shape=[2, 7]), A),
        (lambda h: h[A].update(shape=[10**6, 10**6]), A),
        (lambda h: h[A].update(dtype="F33"), "F33"),
        (lambda h: h[A].update(dtype=5), A),
        (lambda h: h[A].pop("shape"), A),
        (lambda h: h.update({A: 5}), A),
    ],
    ids="negative 100GB overlapping backwards shape huge dtype no-dtype no-shape number".split(),
)
def test_a_lying_header(change, says, good):
    with_header(good, change)
    everywhere(good, FormatError, WEIGHTS, says)


def test_a_header_length_of_100_gb(good):
    raw = (good / WEIGHTS).read_bytes()
    (good / WEIGHTS).write_bytes(struct.pack("<Q", 10**11) + raw[8:])
    everywhere(good, FormatError, WEIGHTS)


def test_damaged_metadata_of_our_own(good):
    with_header(good, lambda h: h["__metadata__"].update(jaxadapt="{"))
    everywhere(good, FormatError, WEIGHTS, "metadata 'jaxadapt'", "damaged")
    for text in ("[]", '{"config": 3}', '{"config": {"peft_type": 1}}', "[" * 10**5):
        with_header(good, lambda h, text=text: h["__metadata__"].update(jaxadapt=text))
        everywhere(good, FormatError, WEIGHTS, "damaged")


def test_no_tensor_at_all(good):
    plainly(good, {})
    with pytest.raises(MismatchError, match=f"{WEIGHTS}: no tensors in the file"):
        jaxadapt.read(good)
    refuses(good, MismatchError, WEIGHTS)


def test_a_bin_that_is_none(good):
    (good / WEIGHTS).rename(good / "adapter_model.bin")
    everywhere(good, FormatError, "adapter_model.bin")


# ---- the tensors -------------------------------------------------------------------------------------------


def test_a_wrong_dtype(good):
    tensors = dict(jaxadapt.read(good).tensors)
    tensors[A] = tensors[A].astype("int32")
    plainly(good, tensors)
    refuses(good, MismatchError, f"{A}: int32, expected floats")
    assert jaxadapt.read(good).tensors[A].dtype == "int32"


def test_a_rank_that_contradicts_the_tensors(good):
    edit(good, r=4)
    refuses(good, MismatchError, f"{A}: expected [4, 6], found [2, 6]", "4 wrongly shaped", "r and keymap=")


def test_an_adapter_for_another_model(good, tmp_path):
    other = tmp_path / "other"
    params = {"attn": {"wide": {"kernel": np.zeros((6, 8), "f4")}}}
    config = jaxadapt.LoraConfig(r=2, target_modules=["wide"])
    jaxadapt.save(jaxadapt.init(params, config, key=jax.random.key(0)), other)
    refuses(other, jaxadapt.TargetError, "wide", "q_proj")
    # The names fit and the sizes do not.
    params = {n: {"kernel": np.zeros((5, 5), "f4")} for n in ("q_proj", "up_proj")}
    jaxadapt.save(jaxadapt.init(params, LORA, key=jax.random.key(0)), other)
    refuses(other, MismatchError, f"{A}: expected [2, 6], found [2, 5]", "for this base model")


def test_missing_unexpected_and_misshaped_tensors_stand_in_one_error(good):
    tensors = dict(jaxadapt.read(good).tensors)
    tensors["base_model.model.k_proj.lora_A.weight"] = tensors.pop(A)
    key = f"{PREFIX}up_proj.lora_B.weight"
    tensors[key] = tensors[key].T.copy()
    plainly(good, tensors)
    refuses(
        good,
        MismatchError,
        f"1 missing from {good} (the model expects them):\n  {A}",
        "1 unexpected (no parameter of the model uses them):\n  base_model.model.k_proj.lora_A.weight",
        f"1 wrongly shaped:\n  {key}: expected [6, 2], found [2, 6]",
    )


def test_a_target_that_is_no_model(good):
    for target, says in (
        (small.LinenNet(), "pass the variables"),
        (jaxadapt.adapt(small.LinenNet(), LORA), "pass the variables"),
        (3, "found int"),
        (None, "found NoneType"),
    ):
        with pytest.raises(AdapterError, match=says):
            jaxadapt.load(good, target)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: jax.Array


@pytest.mark.parametrize(
    ("base", "says"),
    [
        (Layer(jnp.ones((4, 6))), "as nested mappings, .*found Layer"),
        ({"layers": [{"q_proj": {"kernel": jnp.ones((4, 6))}}]}, r'a list as \{"0": …, "1": …\}[^\n]*\n  layers: list'),
    ],
    ids=["a dataclass", "a list"],
)
def test_parameters_that_are_no_nested_mappings(base, says):
    for verb in (lambda: jaxadapt.init(base, LORA), lambda: jaxadapt.models.quantize(base, "int8")):
        with pytest.raises(jaxadapt.AttachError, match=says):
            verb()


def test_an_adapter_that_was_donated_is_not_injected():
    adapter, model = small.adapter(), small.trained()
    jax.jit(lambda adapter: jax.tree.map(jnp.sin, adapter), donate_argnums=0)(adapter)
    y = model(small.X)
    for tree in (model, {**small.base(), **small.adapter().collection}):
        with pytest.raises(jaxadapt.AttachError, match=r"(?s)donated.*tree\.map\(jnp\.copy.*q_proj\.kernel\.lora_A"):
            jaxadapt.inject(tree, adapter)
    np.testing.assert_array_equal(model(small.X), y)


def test_an_adapted_model_keeps_its_adapter_when_loading_fails(good):
    for changes in ({"r": 4}, {"use_dora": True}, {"lora_alpha": 5}):
        edit(good, r=2, use_dora=False, lora_alpha=6)
        edit(good, **changes)
        model = small.trained(seed=4)
        refuses_model(good, model)
        refuses_model(good, model, replace="lora_alpha" not in changes)
        refuses_model(good, model, name="second", keymap="llama/scan0x")


def refuses_model(here, model, **options) -> None:
    graph, state = nnx.graphdef(model), nnx.to_pure_dict(nnx.state(model))
    with pytest.raises(AdapterError):
        jaxadapt.load(here, model, **options)
    assert nnx.graphdef(model) == graph
    assert same(nnx.to_pure_dict(nnx.state(model)), state)


@pytest.mark.parametrize("attached", [False, True])
def test_a_failure_while_attaching_attaches_nothing(attached, good):
    """Rngs without a stream for dropout."""
    edit(good, lora_dropout=0.1)
    model = small.trained() if attached else small.net()
    graph, state = nnx.graphdef(model), nnx.to_pure_dict(nnx.state(model))
    with pytest.raises(jaxadapt.AttachError, match='stream "dropout" or "default"'):
        jaxadapt.load(good, model, rngs=nnx.Rngs(params=0), replace=True)
    with pytest.raises(jaxadapt.AttachError, match='stream "dropout" or "default"'):
        jaxadapt.adapt(model, LORA.replace(lora_dropout=0.1), name="other", rngs=nnx.Rngs(params=0))
    assert nnx.graphdef(model) == graph
    assert same(nnx.to_pure_dict(nnx.state(model)), state)
    jaxadapt.load(good, model, rngs=nnx.Rngs(0), replace=True)
    assert jaxadapt.extract(model).config.lora_dropout == 0.1


# ---- writing -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_files():
    """Sets the size over which no file may grow: writes then fail as on a full disk, with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_leaves_the_old_adapter(good, small_files):
    jaxadapt.save(small.adapter(), good)
    before = files(good)
    size = (good / WEIGHTS).stat().st_size
    for limit, name in ((100, CONFIG), ((good / CONFIG).stat().st_size, WEIGHTS), (size - 1, WEIGHTS)):
        small_files(limit)
        with pytest.raises(FileError, match=name) as caught:
            jaxadapt.save(small.adapter(LORA.replace(lora_alpha=1)), good)
        small_files(resource.RLIM_INFINITY)
        assert "cannot write" in str(caught.value)
        assert files(good) == before


def test_a_disk_that_fills_leaves_no_new_folder(tmp_path, small_files):
    small_files(700)
    with pytest.raises(FileError):
        jaxadapt.save(small.adapter(), tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("nth", [1, 2])
def test_an_error_of_the_disk_at_either_file(number, nth, good, monkeypatch):
    """The old adapter is there afterwards, whole: both files are flushed before either takes its place."""
    jaxadapt.save(small.adapter(), good)
    calls, flush = [], os.fsync

    def failing(fd):
        calls.append(fd)
        if len(calls) == nth:
            raise OSError(number, os.strerror(number))
        flush(fd)

    new = small.adapter(LORA.replace(lora_alpha=1), seed=9)
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(FileError, match=os.strerror(number)):
        jaxadapt.save(new, good)
    monkeypatch.undo()
    assert {p.name for p in good.iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    assert same(jaxadapt.from_peft(jaxadapt.read(good), small.base()), small.adapter())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(FileError, match="permission"):
            jaxadapt.save(small.adapter(), tmp_path)
        with pytest.raises(FileError, match="permission"):
            jaxadapt.save(small.adapter(), tmp_path / "below")
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_system_that_says_no(number, good, monkeypatch):
    """As `test_no_permission`, where the tests run as root."""
    before = files(good)
    opened = os.open

    def refusing(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(FileError, match=f"{WEIGHTS}.*{os.strerror(number)}"):
        jaxadapt.save(small.adapter(IA3), good)
    monkeypatch.undo()
    assert files(good) == before


def test_unreadable_files(good, monkeypatch):
    opened = os.open

    def refusing(path, *args, **more):
        if str(path).endswith(CONFIG):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opened(path, *args, **more)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(FileError, match=f"{CONFIG}: cannot read: Permission denied"):
        jaxadapt.read(good)


def test_a_dtype_that_no_file_can_hold(tmp_path):
    tensors = {A: np.zeros((2, 6), "O")}
    with pytest.raises(MismatchError, match="expected floating-point numbers, found:\n.*object"):
        jaxadapt.write(jaxadapt.PeftTensors(LORA, tensors), tmp_path / "out")
    tensors = {"base_model.model.q_proj.weight": np.zeros((2, 6), "O")}
    with pytest.raises(FileError, match="cannot hold it"):
        jaxadapt.write(jaxadapt.PeftTensors(LORA, tensors), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="dtype='no such': expected a floating-point dtype"):
        jaxadapt.save(small.adapter(), tmp_path / "out", dtype="no such")
    assert not (tmp_path / "out").exists()


# ---- arguments ---------------------------------------------------------------------------------------------


def test_what_is_no_base_no_adapter_and_no_sharding_is_said(good):
    module = nnx.Dict(q_proj=nnx.Linear(6, 8, rngs=nnx.Rngs(0)))
    for odd in (None, [1], lambda x: x):
        what = f"found {type(odd).__name__}"
        with pytest.raises(jaxadapt.AttachError, match=rf"expected base parameters as .*{what}"):
            jaxadapt.init(odd, LORA)
        with pytest.raises(jaxadapt.AttachError, match=rf"expected an Adapter, {what}"):
            jaxadapt.inject(module, odd)
    with pytest.raises(jaxadapt.AttachError, match="from_peft"):
        jaxadapt.inject(small.trained(), jaxadapt.read(good))
    with pytest.raises(jaxadapt.AttachError, match="shardings: expected a Sharding, or a tree .*found list"):
        jaxadapt.load(good, small.base(), shardings=[None])
