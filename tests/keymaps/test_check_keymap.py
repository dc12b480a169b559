"""`jaxadapt check-keymap`: what a family's table makes of a model's shapes and a checkpoint's names.

That it has nothing to say against the real models is in tests/keymaps/families/test_proof.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save_file

from jaxadapt.cli import main
from jaxadapt.core.paths import unflatten
from jaxadapt.demo import llama

SIZES = llama.LlamaConfig(32, 16, 24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4)
TENSORS = {key: np.zeros(shape, "f4") for key, shape in llama.hf_shapes(SIZES).items()}
LEAVES = dict(llama.make_leaves(SIZES, TENSORS))
K, UP = "model.layers.1.self_attn.k_proj", "model.layers.0.mlp.up_proj"


@pytest.fixture
def checkpoint(tmp_path):
    def write(tensors, name="model"):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        return tmp_path / name

    return write


@pytest.fixture
def shapes(tmp_path):
    def write(leaves):
        (tmp_path / "shapes.json").write_text(json.dumps({path: x.shape for path, x in leaves.items()}))
        return tmp_path / "shapes.json"

    return write


def run(*args):
    return CliRunner().invoke(main, ["check-keymap", *map(str, args)])


def found(*args, status):
    result = run(*args, "--json")
    assert result.exit_code == status, result.output
    data = json.loads(result.stdout)
    kinds = ("unclaimed", "missing", "twice", "misshapen")
    return data, {kind: data[kind] for kind in kinds if data[kind]}


def test_a_checkpoint_that_fits(checkpoint):
    folder = checkpoint(TENSORS)
    data, problems = found("llama", "--checkpoint", folder, status=0)
    assert not problems
    assert data["claimed"][f"{K}.kernel"] == [f"{K}.weight"]
    assert sum(map(len, data["claimed"].values())) == len(TENSORS)
    result = run("llama", "--checkpoint", folder)
    assert result.exit_code == 0
    assert f"{len(TENSORS)} tensors, {len(TENSORS)} matched" in result.output
    assert "fits" in result.output


def test_what_a_checkpoint_has_too_little_and_too_much(checkpoint):
    wrong = {key: x for key, x in TENSORS.items() if not key.startswith(K)}
    folder = checkpoint({**wrong, f"{UP}.weight": np.zeros(3, "f4"), "vision.weight": np.zeros(3, "f4")})
    _, problems = found("llama", "--checkpoint", folder, status=1)
    assert problems.pop("misshapen")[0].startswith(f"{UP}.weight: its shape is 3, but")
    assert problems == {"unclaimed": ["vision.weight"], "missing": [f"{K}.weight"]}
    text = run("llama", "--checkpoint", folder).output
    assert "does not fit" in text
    for line in (
        "matched by no entry of the keymap: 1\n  vision.weight",
        f"missing in the checkpoint: 1\n  {K}.weight",
    ):
        assert line in text


def test_another_family(checkpoint):
    """Gemma 3 has norms that Llama lacks; GPT-2 has no name in common with it."""
    folder = checkpoint(TENSORS)
    _, problems = found("tunix:gemma3", "--checkpoint", folder, status=1)
    assert problems.keys() == {"missing"}
    assert "which tunix:gemma3 always has" in problems["missing"][0]
    result = run("gpt2", "--checkpoint", folder)
    assert result.exit_code == 1
    assert "no entry of the keymap 'gpt2' matches any weight" in result.output


def test_a_model_and_a_checkpoint(checkpoint, shapes):
    data, problems = found("auto", "--model", shapes(LEAVES), "--checkpoint", checkpoint(TENSORS), status=0)
    assert (data["family"], problems) == ("llama", {})
    wrong = {**LEAVES, f"{UP}.kernel": np.zeros((16, 20)), f"{K}.kernel": np.zeros(7), "gate.w": np.zeros(3)}
    more = {**TENSORS, "lm_head.weight": TENSORS["model.embed_tokens.weight"]}
    del more["model.norm.weight"]
    _, problems = found("llama", "--model", shapes(wrong), "--checkpoint", checkpoint(more, "more"), status=1)
    line, both = problems.pop("misshapen")
    assert K in line
    assert (
        both == f"{UP}.weight: the model's weight has shape 20×16 in PyTorch's layout, but the checkpoint's has 24×16"
    )
    assert problems == {"unclaimed": ["gate.w"], "missing": ["model.norm.weight"]}  # a tied head may be there


def test_the_help_shows_how_shapes_are_written(tmp_path):
    """The lines of the help, run: what they write is what --model takes."""
    text = CliRunner().invoke(main, ["check-keymap", "--help"]).output
    lines = [line.strip() for line in text.splitlines()]
    start = next(i for i, line in enumerate(lines) if re.fullmatch(r"from jaxadapt[\w.]* import paths", line))
    code = "\n".join(lines[start : start + 3]).replace("shapes.json", str(tmp_path / "shapes.json"))
    exec(code, {"json": json, "params": unflatten({leaf: np.zeros(x.shape) for leaf, x in LEAVES.items()})})
    done = CliRunner().invoke(main, ["check-keymap", "auto", "--model", str(tmp_path / "shapes.json")])
    assert done.exit_code == 0, done.output


def test_shapes_are_read_as_json_from_a_file_of_any_name(tmp_path):
    """As from a pipe, such as /dev/stdin. A slash belongs to the name of a leaf."""
    leaves = {leaf: x.shape for leaf, x in LEAVES.items()}
    for name, separator, status in (("pipe", ".", 0), ("shapes.txt", ".", 0), ("slashes.json", "/", 1)):
        (tmp_path / name).write_text(json.dumps({leaf.replace(".", separator): x for leaf, x in leaves.items()}))
        assert run("auto", "--model", tmp_path / name).exit_code == status


def test_what_is_claimed_twice(shapes):
    """A model that holds k and v together and by themselves."""
    layer = {"attn.kv_einsum.w": (2, 1, 8, 4), "attn.q_einsum.w": (2, 8, 4), "attn.qkv_einsum.w": (3, 2, 8, 4)}
    leaves = {f"layers.0.{name}": np.zeros(shape) for name, shape in layer.items()}
    _, problems = found("tunix:gemma3", "--model", shapes(leaves), status=1)
    assert len(problems["twice"]) == 3
    assert all("qkv_einsum" in line for line in problems["twice"])


@pytest.mark.parametrize("kind", ["safetensors", "orbax", "nnx"])
def test_where_a_models_shapes_come_from(kind, checkpoint, tmp_path):
    if kind == "safetensors":
        path = tmp_path / "leaves.safetensors"
        save_file({key.replace(".", "/"): x.copy() for key, x in LEAVES.items()}, path)
    else:
        path = tmp_path / "orbax"
        params = LEAVES if kind == "orbax" else {f"{key}.value": x for key, x in LEAVES.items()}
        tree = {"params": unflatten(params), "opt_state": {"mu": np.zeros(3)}} if kind == "orbax" else unflatten(params)
        ocp.save(path, tree)
    data, problems = found("auto", "--model", path, "--checkpoint", checkpoint(TENSORS), status=0)
    assert not problems
    assert data["claimed"].keys() == LEAVES.keys()


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": "b"}', '{"a": [1.5]}'])
def test_shapes_that_are_none(tmp_path, text):
    (tmp_path / "shapes.json").write_text(text)
    result = run("llama", "--model", tmp_path / "shapes.json")
    assert result.exit_code == 1
    assert "FormatError" in result.output
    assert "shapes.json" in result.output


def test_used_wrongly(tmp_path, shapes):
    assert run("llama").exit_code == 2
    assert run("auto", "--checkpoint", tmp_path).exit_code == 2
    assert run("lama", "--model", shapes(LEAVES)).exit_code == 1
    for place in (tmp_path, tmp_path / "nowhere", "org/name"):  # an empty folder, and missing ones
        result = run("llama", "--checkpoint", place)
        assert result.exit_code == 1
        assert "download a model of the Hub with `hf download ORG/NAME --local-dir FOLDER`" in result.output


def test_as_a_process_it_loads_no_jax(checkpoint):
    code = (
        "import sys; from jaxadapt.cli import main\n"
        "try: main(['check-keymap', 'llama', '--checkpoint', sys.argv[1]])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'jax', 'flax'} & set(sys.modules); assert not heavy, heavy"
    )
    command = [sys.executable, "-c", code, str(checkpoint(TENSORS))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


OWN = """
from jaxadapt import KeyMap, Weight

TABLE = KeyMap("mine", (
    Weight("embed", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
    Weight("blocks.{l}.q", "model.layers.{l}.q_proj.weight", "d n h -> (n h) d"),
    Weight("blocks.{l}.kv", "model.layers.{l}.{p}_proj.weight", "{p} d k h -> (k h) d", p=("k", "v")),
    Weight("blocks.{l}.o", "model.layers.{l}.o_proj.weight", "n h d -> d (n h)"),
    Weight("blocks.{l}.norm", "model.layers.{l}.norm.weight", "d -> d"),
))
"""
MINE = {"embed": (11, 4)}
THEIRS = {"model.embed_tokens.weight": np.zeros((11, 4), "f4")}
LAYER = {"q": (4, 3, 2), "kv": (2, 4, 1, 2), "o": (3, 2, 4), "norm": (4,)}
MODULES = {"q_proj": (6, 4), "k_proj": (2, 4), "v_proj": (2, 4), "o_proj": (4, 6), "norm": (4,)}
for at in "01":
    MINE |= {f"blocks.{at}.{name}": shape for name, shape in LAYER.items()}
    THEIRS |= {f"model.layers.{at}.{name}.weight": np.zeros(shape, "f4") for name, shape in MODULES.items()}


@pytest.mark.parametrize(
    ("right", "slip", "wrong"),
    [
        ("", "", None),
        ("d n h -> (n h) d", "d n h -> d (n h)", "blocks.{l}.q"),  # the sides swapped
        ("layers.{l}.o_proj", "layers.{l}.out_proj", "blocks.{l}.o"),  # another name
        ("n h d -> d (n h)", "n h -> n h", "blocks.{l}.o"),  # an axis too few
        ('p=("k", "v")', 'p=("k", "v", "w")', "blocks.{l}.kv"),  # a part too many
    ],
)
def test_a_table_of_ones_own_and_the_line_that_is_wrong(checkpoint, tmp_path, right, slip, wrong):
    (tmp_path / "mine.py").write_text(OWN.replace(right, slip) if right else OWN)
    (tmp_path / "shapes.json").write_text(json.dumps(MINE))
    where = (f"{tmp_path / 'mine.py'}:TABLE", "--model", tmp_path / "shapes.json", "--checkpoint", checkpoint(THEIRS))
    data, problems = found(*where, status=0 if wrong is None else 1)
    assert [line["leaf"] for line in data["wrong"]] == ([] if wrong is None else [wrong])
    assert bool(problems) == (wrong is not None)
    if wrong:
        assert f"wrong entries: none of their matches fits: 1\n  {wrong} -> " in run(*where).output


@pytest.mark.parametrize(
    ("right", "slip", "near"),
    [
        ('"blocks.{l}.norm"', '"blocks.{l}.nrom"', "blocks.{l}.norm"),
        ("layers.{l}.norm", "layers.{l}.nrom", "model.layers.{l}.norm.weight"),
    ],
)
def test_a_mistyped_line_of_ones_own_is_no_choice_of_the_family(checkpoint, tmp_path, monkeypatch, right, slip, near):
    monkeypatch.setenv("COLUMNS", "200")  # long names are folded to the terminal
    (tmp_path / "mine.py").write_text(OWN.replace(right, slip))
    (tmp_path / "shapes.json").write_text(json.dumps(MINE))
    where = ("--model", tmp_path / "shapes.json") if "blocks" in right else ("--checkpoint", checkpoint(THEIRS))
    result = run(f"{tmp_path / 'mine.py'}:TABLE", *where)
    assert result.exit_code == 1
    assert "not an error" not in result.output
    assert re.search(r"entries that match nothing.*: 1\n.*nrom.*near: " + re.escape(near), result.output)
    assert "not an error" in run("llama", "--checkpoint", checkpoint(TENSORS, "llama")).output


def test_a_python_file_without_that_table_says_so(tmp_path, checkpoint):
    (tmp_path / "mine.py").write_text("TABLE = 3")
    (tmp_path / "wrong.py").write_text("import jaxadapt\nT = jaxadapt.KeyMap('t', ())\n")
    (tmp_path / "fails.py").write_text("TABLE = 3\nimport nothing_here")
    (tmp_path / "half.py").write_text("TABLE = (")
    (tmp_path / "refused.py").write_text("import jaxadapt\n\nTABLE = jaxadapt.Weight('a', 'b', 'x y')\n")
    folder = checkpoint(THEIRS)
    for text, says in ((f"{tmp_path / 'mine.py'}:TABLE", "expected a jaxadapt.KeyMap called 'TABLE', found int"),
                           (f"{tmp_path / 'wrong.py'}:TABLE", "called 'TABLE', found T"),
                           (f"{tmp_path / 'fails.py'}:TABLE", "fails.py: cannot be run: line 2: ModuleNotFoundError"),
                           (f"{tmp_path / 'refused.py'}:TABLE", "refused.py: cannot be run: line 3: KeyMapError"),
                           (f"{tmp_path / 'half.py'}:TABLE", "half.py: cannot be run: SyntaxError"),
                       (f"{tmp_path / 'none.py'}:TABLE", "none.py")):  # fmt: skip
        result = run(text, "--checkpoint", folder)
        assert result.exit_code != 0
        assert says in result.output.replace("\n", " ")
