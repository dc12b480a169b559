"""A keymap applied to concrete shapes: a bijection between leaves and keys, checked before any data is read or written.

    sites + a method's tensors ──make_plan──► PlanEntry per leaf ──encode──► {key: array}
                                                                 ◄─decode──

It works on shapes, and on NumPy and JAX arrays: anything with `transpose`, `reshape` and indexing. A `PlanEntry` has
the layout of one method tensor at one matched leaf: its axes and keys, and the sizes of the base leaf's axes.

PyTorch's `nn.MultiheadAttention` stores queries, keys and values in one tensor, and mixtures of experts store gate and
up in one (concatenated; in GPT-OSS interleaved). JAX libraries use an array for each. So that a plan remains a
bijection, its keys denote parts of such tensors: "key[0/3]" is the first third of the rows, "key[1:0/2]" the first half
along axis 1, "key[0::2]" every second row, and "key[=0/3]" a tensor that all parts share. The tensors are split and
joined when a file is read or written.

    plan.encode ──► {"attn.lora_B.weight[0/3]": …, …} ──join_parts──► {"attn.lora_B.weight": …}
    plan.decode ◄──                                   ◄──cut_parts──
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxadapt.arrays.layout import RANK, Array, FileLayout, part_sizes
from jaxadapt.arrays.tensor_source import TensorSource, TensorSpec, common_dtype
from jaxadapt.core import paths
from jaxadapt.core.errors import KeyMapError, MismatchError, raise_listed
from jaxadapt.core.lazy import np
from jaxadapt.keymaps.keymap import KeyMap, Match, index_entries, shape_problem
from jaxadapt.keymaps.weight import MethodTensor

# ---------------------------------------------------------------- parts


_PART_KEY = re.compile(r"(?P<key>.*)\[(?P<same>=?)(?:(?P<axis>\d+):)?(?P<i>\d+)(?P<how>/|::)(?P<n>\d+)\]")


class Part(NamedTuple):
    """Part `i` of `n` of a file tensor; a whole tensor is part 0 of 1.

    Attributes:
        key: the file tensor.
        axis: the axis along which it is split; None if all parts share the tensor.
        i: the number of the part.
        n: the number of parts.
        turns: True if the parts are interleaved, False if they are concatenated.
    """

    key: str
    axis: int | None = None
    i: int = 0
    n: int = 1
    turns: bool = False


def part_key(key: str, axis: int | None, part: str) -> str:
    """Return the plan's key of a part ("0/3" or "0::2") along an axis; without an axis, all parts share the tensor.

    >>> part_key("b.weight", 0, "1/3"), part_key("w", 2, "0::2"), part_key("a.weight", None, "1/3")
    ('b.weight[1/3]', 'w[2:0::2]', 'a.weight[=1/3]')
    """
    prefix = "=" if axis is None else f"{axis}:" if axis else ""
    return f"{key}[{prefix}{part}]"


def parse_part_key(key: str) -> Part:
    """Return the part that a plan's key denotes."""
    match = _PART_KEY.fullmatch(key) if key.endswith("]") else None
    if match is None:
        return Part(key)
    axis = None if match["same"] else int(match["axis"] or 0)
    return Part(match["key"], axis, int(match["i"]), int(match["n"]), match["how"] == "::")


def has_parts(keys: Iterable[str]) -> bool:
    """Return True if some of a plan's keys denote parts of file tensors."""
    return any(key.endswith("]") for key in keys)


def file_key(key: str) -> str:
    """Return the key of the file tensor of a plan's key.

    >>> file_key("attn.in_proj_weight[0/3]"), file_key("head.weight")
    ('attn.in_proj_weight', 'head.weight')
    """
    return parse_part_key(key).key


def group_by_file_key(keys: Iterable[str]) -> dict[str, list[str]]:
    """Return `{file key: keys of a plan that are its parts}`, the parts in order.

    >>> group_by_file_key(["w[10/12]", "w[2/12]", "b"])
    {'w': ['w[2/12]', 'w[10/12]'], 'b': ['b']}
    """
    groups = paths.group((file_key(key), key) for key in keys)
    return {name: sorted(parts, key=lambda part: parse_part_key(part).i) for name, parts in groups.items()}


def joined_shape(parts: Sequence[str], shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a file tensor from the keys of its parts and the shape of one part.

    >>> joined_shape(["w[1:0/2]", "w[1:1/2]"], (4, 3))
    (4, 6)
    """
    first = parse_part_key(parts[0])
    return tuple(size * first.n if axis == first.axis else size for axis, size in enumerate(shape))


def cut_parts(tensors: Mapping[str, Array], keys: Iterable[str]) -> dict[str, Array]:
    """Return the tensors of a file under the keys of a plan; the parts of arrays in memory are views.

    A tensor that cannot be split keeps its name, so that it is reported with the other tensors that do not fit.
    """
    groups = group_by_file_key(key for key in keys if key.endswith("]"))
    out: dict[str, Any] = {}
    for name in tensors:
        value = tensors[name]
        names = groups.get(name, ())
        parts = {key: value for key in names if parse_part_key(key).axis is None} | {
            key: value[index] for key, (_, index) in locate_parts({name: value.shape}, names).items()
        }
        out |= parts if names and parts.keys() >= set(names) else {**parts, name: value}
    return out


def locate_parts(
    shapes: Mapping[str, tuple[int, ...]], keys: Iterable[str]
) -> dict[str, tuple[str, tuple[slice, ...]]]:
    """Return `{part key: (file key, index of the part)}` for the parts of tensors whose shapes can be split.

    >>> locate_parts({"w": (4, 6)}, ["w[1:1/2]", "v"])
    {'w[1:1/2]': ('w', (slice(None, None, None), slice(3, 6, None)))}
    """
    out: dict[str, tuple[str, tuple[slice, ...]]] = {}
    for key in keys:
        part = parse_part_key(key)
        if part.axis is None or part.key not in shapes:
            continue
        shape, axis = shapes[part.key], part.axis
        if len(shape) > axis and shape[axis] % part.n == 0:
            size = shape[axis] // part.n
            rows = slice(part.i, None, part.n) if part.turns else slice(part.i * size, (part.i + 1) * size)
            out[key] = part.key, (*(slice(None) for _ in range(axis)), rows)
    return out


def join_parts(parts: Sequence[Array], keys: Collection[str], xp: Any) -> Array:
    """Return a file tensor from its parts in order; `xp` is `numpy` or `jax.numpy`."""
    part = parse_part_key(next(iter(keys)))
    if part.axis is None:
        return parts[0]
    if not part.turns:
        return xp.concatenate(parts, axis=part.axis)
    return xp.stack(parts, axis=part.axis + 1).reshape(joined_shape(tuple(keys), parts[0].shape))


# ---------------------------------------------------------------- tensor layout


Layout = tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]


def tensor_layout(match: Match, tensor: MethodTensor) -> Layout:
    """Return a tensor's axis names in the model (stacked axes at the base weight's positions) and in the file.

    The method's own axes are marked "~", because a base weight may have an axis called "r" as well.
    """
    cache = match.weight.layout_cache  # all layers share one entry of the keymap
    if tensor not in cache:
        cache[tensor] = _make_layout(match, tensor)
    return cache[tensor]


def _make_layout(match: Match, tensor: MethodTensor) -> Layout:
    if tensor.is_copy:
        return match.weight.left, match.weight.right

    def expand(names: Iterable[str], roles: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
        return tuple(n for name in names for n in roles.get(name, (f"~{name}",)))

    left = list(expand(tensor.axes, match.roles))
    for axis in match.stack:  # ascending, so that each insertion is at the base weight's position
        if axis > len(left):
            raise KeyMapError(
                f"parameter {match.leaf!r} stacks its layers on axis {axis}, but its {tensor.name} has only"
                f" {len(left)} axes; stack the layers on an axis from 0 to {len(left)}"
            )
        left.insert(axis, match.weight.left[axis])
    torch = match.weight.torch_roles
    right: list[tuple[str, ...]] = []
    for group in tensor.torch:
        if match.weight.kind == "conv" and "in" in group:
            channels, *window = match.weight.right[1:]
            right += [expand((name for name in group if name != "in"), torch) + channels, *window]
        else:
            right.append(expand(group, torch))
    return tuple(left), tuple(right)


def scale_factor(keymap: KeyMap, match: Match, tensor: MethodTensor, sizes: Mapping[str, int]) -> float:
    """Return the factor by which to multiply the file's tensor to get the model's.

    Raises `KeyMapError` if the base weight is scaled and the effect on this tensor is not defined.
    """
    if match.weight.scale is None or tensor.scale_power == 0:
        return 1.0
    if tensor.scale_power is None:
        raise KeyMapError(
            f"cannot convert {tensor.name} of parameter {match.leaf!r}: the keymap {keymap.name!r} defines it as"
            " PyTorch's weight times a factor, and the effect of a factor on this tensor is not defined. Exclude"
            " the module, or use a method such as LORA"
        )
    return match.weight.factor(sizes) ** tensor.scale_power


def tensor_key(prefix: str, match: Match, tensor: MethodTensor, text: Mapping[str, str]) -> str:
    """Return the key of one tensor in the file, a part key if the file tensor holds several leaves.

    The name of the root module is empty.
    """
    weight = match.weight
    module, parameter = match.parameter(text)
    if not tensor.is_copy and weight.kind != "experts":
        module = match.module(text)
    middle = ".base_layer.out_proj" if not tensor.is_copy and weight.products == 2 else ""
    key = f"{prefix}{module}".rstrip(".") + middle + tensor.suffix
    key = paths.join(key, parameter) if tensor.is_copy else key
    if not weight.part:
        return key
    axes = tensor_layout(match, tensor)[1]
    return part_key(key, next((i for i, axis in enumerate(axes) if axis == weight.part_axis), None), weight.part)


def model_shape(match: Match, tensor: MethodTensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of one tensor in the model."""
    all_sizes = {**sizes, **{f"~{name}": size for name, size in tensor.own}}
    if match.parts is not None:
        all_sizes[match.roles["fused"][0]] = len(match.parts)
    return tuple(all_sizes[n] for n in tensor_layout(match, tensor)[0])


def axis_sizes(match: Match, shape: Sequence[int]) -> dict[str, int]:
    """Return the axis sizes of a base leaf by name; raise `MismatchError` if its entry contradicts the shape."""
    if problem := shape_problem(match, shape):
        raise MismatchError(problem)
    return dict(zip(match.weight.left, shape, strict=True))


def axis_sizes_from_tensors(
    match: Match, tensors: Sequence[MethodTensor], shapes: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """Return the axis sizes by name from the shapes of an adapter's tensors, without the base.

    Raises `MismatchError` if a tensor is missing, unknown or has the wrong number of axes, or if two tensors disagree.
    """
    sizes = {axis: len(match.weight.index_names(axis) or ()) for axis in match.roles["fused"]}
    parts = {axis: size if match.parts is None else len(match.parts) for axis, size in sizes.items()}
    problems = [
        f"{match.leaf}.{name}: the method has no such tensor" for name in shapes if all(t.name != name for t in tensors)
    ]
    for tensor in tensors:
        (left, _), shape = tensor_layout(match, tensor), shapes.get(tensor.name)
        wrong: list[str] = []
        if shape is None:
            wrong += ["missing"] if tensor.trained else []  # a tree may have the trained tensors only
        elif len(shape) != len(left):
            wrong.append(f"expected axes ({' '.join(left).replace('~', '')}), found shape {tuple(shape)}")
        else:
            fixed = {**parts, **{f"~{name}": size for name, size in tensor.own}}
            for name, size in zip(left, shape, strict=True):
                expected = fixed[name] if name in fixed else sizes.setdefault(name, size)
                if expected != size:
                    wrong.append(f"axis {name.strip('~{}')!r} has size {size}, expected {expected}")
                try:
                    part_sizes(name, size, dict(match.weight.sizes))
                except MismatchError as error:
                    wrong.append(str(error))
        problems += [f"{match.leaf}.{tensor.name}: {text}" for text in wrong]
    raise_listed(
        MismatchError,
        "the adapter's tensors contradict each other or its configuration:",
        problems,
        "\nIf several adapters are stacked (for example by vmap), select one: jax.tree.map(lambda x: x[0], tree)",
    )
    return sizes


def stack_sizes(match: Match, tensors: Sequence[MethodTensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the sizes of the numbered axes, from the tensors that have the right number of axes."""
    numbered = [axis for axis in match.braced if match.weight.index_names(axis) is None]
    layouts = [(tensor_layout(match, t)[0], shapes[t.name]) for t in tensors if t.name in shapes]
    fitting = [dict(zip(left, shape, strict=True)) for left, shape in layouts if len(left) == len(shape)]
    return {axis: sizes[axis] for sizes in reversed(fitting) for axis in numbered if axis in sizes}


# ---------------------------------------------------------------- plan


@dataclasses.dataclass(frozen=True)
class PlanEntry:
    """One JAX leaf and its file tensors: one tensor, or one for each stacked layer and fused part.

    Attributes:
        path: the leaf.
        form: the layout of the leaf in the file.
        keys: the tensors, in the order of `form`; more keys than that repeat the same tensors.
    """

    path: str
    form: FileLayout
    keys: tuple[str, ...]

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the leaf."""
        return self.form.shape

    def keys_of(self, i: int) -> tuple[str, ...]:
        """Return the keys of tensor `i` of the layout: one, and those that repeat it."""
        return self.keys[i :: self.form.count]

    def tensor_number(self, key_number: int) -> int:
        """Return the number of the layout's tensor for a key, given by its position in `keys`."""
        return key_number % self.form.count

    def dtype(self, dtypes: Mapping[str, Any]) -> np.dtype[Any]:
        """Return the dtype of the leaf, from the dtypes of its tensors by key: one that represents them all."""
        distinct = {np.dtype(dtypes[key]) for key in self.keys}
        return distinct.pop() if len(distinct) == 1 else common_dtype(distinct)

    def decode(self, tensors: Mapping[str, Array]) -> Array:
        """Return the leaf from `{key: tensor}`, NumPy or JAX arrays (also traced ones); a view where possible."""
        form, file_tensors = self.form, [tensors[key] for key in self.keys[: self.form.count]]
        if not form.split:
            return form.decode(file_tensors[0])
        dtype = self.dtype({key: t.dtype for key, t in zip(self.keys, file_tensors, strict=True)})
        xp = file_tensors[0].__array_namespace__()
        if form.is_partial:
            out = xp.zeros(form.shape, dtype)
            for i, t in enumerate(file_tensors):
                part = form.part_layout(i).decode(t.astype(dtype))
                if isinstance(out, np.ndarray):
                    out[form.index(i)] = part
                else:
                    out = out.at[form.index(i)].set(part)
            return out
        parts = xp.stack([form.decode(t.astype(dtype)) for t in file_tensors])
        parts = parts.reshape(*(form.shape[axis] for axis in form.split), *parts.shape[1:])
        return xp.moveaxis(parts, tuple(range(len(form.split))), form.split)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The checked bijection between the leaves of one adapter and the keys of one file."""

    entries: tuple[PlanEntry, ...]

    @functools.cached_property
    def keys(self) -> dict[str, tuple[PlanEntry, int]]:
        """`{key: (entry, index)}` of the file: the entry that has the key, and its index there."""
        return {key: (entry, i) for entry in self.entries for i, key in enumerate(entry.keys)}

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """`{key: shape}` of the file."""
        return {key: e.form.shape_of(i) for e in self.entries for i, key in enumerate(e.keys)}

    def check(
        self,
        found_shapes: Mapping[str, Sequence[int]],
        source: str = "the file",
        other_problems: Sequence[str] = (),
        keymap_name: str = "",
    ) -> None:
        """Raise one `MismatchError` that lists every missing, unexpected and wrongly shaped tensor.

        Args:
            found_shapes: the shapes of the file's tensors, by key.
            source: the file, for the message.
            other_problems: further problems for the same list.
            keymap_name: the name of the keymap.
        """
        problems = self.list_problems(found_shapes, source, other_problems)
        if problems:
            raise MismatchError(
                f"{source} does not fit the model: of {len(self.shapes)} tensors,\n"
                + "\n".join(problems)
                + "\nCheck that the adapter is for this base model, and that target_modules, r and keymap= are right."
                + (
                    f" (The keymap is {keymap_name!r}; strict=False loads only the tensors that fit.)"
                    if keymap_name
                    else ""
                )
            )

    def list_problems(
        self, found: Mapping[str, Sequence[int]], source: str, other_problems: Sequence[str] = ()
    ) -> list[str]:
        """Return the problems that `check` lists, one text for each kind."""
        if found == self.shapes and not other_problems:
            return []
        expected, given = (
            {k: paths.Spec(tuple(shape)) for k, shape in shapes.items()} for shapes in (self.shapes, found)
        )
        problems = paths.group_findings(
            paths.compare(expected, given),
            f"missing from {source} (the model expects them)",
            "unexpected (no parameter of the model uses them)",
        )
        return (
            [*problems, f"{len(other_problems)} unusable:\n{paths.bullets(other_problems)}"]
            if other_problems
            else problems
        )

    def encode(self, leaves: Mapping[str, Array], host: bool = False) -> Encoded:
        """Return a lazy `{key: array}` from `{path: leaf}`; each look-up computes its array.

        Args:
            leaves: the leaves by path.
            host: return NumPy arrays, also from JAX leaves.
        """
        return Encoded(self, leaves, host)

    def decode(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Return `{path: leaf}` from `{key: array}`."""
        return {e.path: e.decode(tensors) for e in self.entries}


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded(TensorSource):
    """The tensors of a plan under PEFT's names, computed at each look-up and not cached."""

    plan: Plan
    leaves: Mapping[str, Array]
    host: bool = False

    @functools.cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Shapes and dtypes by key; no tensor is computed."""
        return {
            key: TensorSpec(e.form.shape_of(i), dtype)
            for e in self.plan.entries
            for dtype in (np.dtype(self.leaves[e.path].dtype),)
            for i, key in enumerate(e.keys)
        }

    def read(self, key: str) -> Array:
        """Compute one tensor."""
        entry, i = self.plan.keys[key]
        leaf = self.leaves[entry.path]
        # On the host, transposes and reshapes are views where the layouts allow; on a device each is a computation.
        return entry.form.encode(np.asarray(leaf) if self.host else leaf, entry.tensor_number(i))


def plan_entry(
    keymap: KeyMap, match: Match, tensor: MethodTensor, sizes: Mapping[str, int], prefix: str | None = None
) -> PlanEntry:
    """Return the entry of one tensor of one site.

    Args:
        sizes: the sizes of the base leaf's axes, by name.
        prefix: the start of the keys; by default that of the keymap.
    """
    form, texts = _file_layout(keymap, match, tensor, sizes)
    prefix = keymap.prefix if prefix is None else prefix
    path = paths.join(match.leaf, tensor.name) if tensor.name else match.leaf
    return PlanEntry(path, form, tuple(tensor_key(prefix, match, tensor, text) for text in texts))


def _file_layout(
    keymap: KeyMap, match: Match, tensor: MethodTensor, sizes: Mapping[str, int]
) -> tuple[FileLayout, list[dict[str, str]]]:
    """Return the layout of a tensor, and the texts for the holes of the key of each of its file tensors."""
    cache = match.weight.layout_cache
    cache_key = (tensor, match.parts, *sizes.items())
    if cache_key not in cache:
        left, right = tensor_layout(match, tensor)
        only = {match.roles["fused"][0]: match.parts} if match.parts is not None else {}
        split = tuple(i for i, n in enumerate(left) if n.startswith("{"))
        axes = [left[i] for i in split]
        indices = index_entries(match.weight, axes, sizes, only)
        texts = [text for _, text in indices]
        in_file, ranks = None, None
        if tensor.used_sizes is not None:
            order = [match.braced.index(axis) for axis in axes]
            each = zip(index_entries(match.weight, match.braced, sizes, only), tensor.used_sizes, strict=True)
            used = {tuple(index[i] for i in order): size for (index, _), size in each}
            used_sizes = [used[index] for index, _ in indices]
            adapted = tuple(i for i, size in enumerate(used_sizes) if size)
            in_file = None if len(adapted) == len(used_sizes) else adapted
            texts = [texts[i] for i in adapted]
            adapted_ranks = tuple(used_sizes[i] for i in adapted)
            ranks = adapted_ranks if RANK in left and set(adapted_ranks) != {dict(tensor.own)["r"]} else None
        shift = match.weight.shift if tensor.is_copy else 0.0
        form = FileLayout(
            model_shape(match, tensor, sizes),
            left,
            right,
            split,
            scale_factor(keymap, match, tensor, sizes),
            match.weight.sizes,
            shift,
            in_file,
            ranks,
        )
        cache[cache_key] = form, texts
    return cache[cache_key]


def make_plan(entries: Sequence[PlanEntry]) -> Plan:
    """Return the plan of these entries.

    Raises `MismatchError` if several leaves claim one key, or if the parts of one tensor differ in size.
    """
    raise_listed(
        MismatchError,
        "several parameters claim the same tensor; correct the keymap so that each tensor has one parameter:",
        contested_keys(entries),
    )
    plan = Plan(tuple(entries))
    raise_listed(
        MismatchError,
        "these parameters are parts of one tensor in PyTorch, but their shapes there differ, and only equal parts can"
        " be joined and split; leave the module out of target_modules (a whole model cannot be converted):",
        unequal_parts(plan),
    )
    return plan


def unequal_parts(plan: Plan) -> Iterator[str]:
    """Yield the tensors whose parts differ in shape, each with its leaves and their shapes."""
    for key, parts in group_by_file_key(key for key in plan.keys if key.endswith("]")).items():
        shapes = {plan.keys[part][0].path: plan.shapes[part] for part in parts}
        if len(set(shapes.values())) > 1:
            yield f"{key}: {', '.join(f'{leaf} {shape}' for leaf, shape in shapes.items())}"


def contested_keys(entries: Iterable[PlanEntry]) -> list[str]:
    """Return the keys that several leaves claim, each with these leaves."""
    owners = paths.group((key, entry.path) for entry in entries for key in entry.keys)
    return [f"{key}: {', '.join(sorted(leaves))}" for key, leaves in owners.items() if len(leaves) > 1]


def base_plan(keymap: KeyMap, shapes: Mapping[str, Sequence[int]]) -> Plan:
    """Return the plan of the base weights themselves, which verifies a keymap and exports a merged model.

    Raises `KeyMapError` listing every leaf that no entry or several entries match, or whose entry contradicts its
    shape; `MismatchError` if two leaves claim one key, or if the parts of one tensor differ in size.
    """
    entries: list[PlanEntry] = []
    problems: list[str] = []
    for leaf, shape in shapes.items():
        try:
            entry = base_plan_entry(keymap, leaf, shape)
        except KeyMapError as error:
            problems.append(str(error))
        else:
            if entry is None:
                problems.append(f"{leaf} {tuple(shape)}: no entry")
            else:
                entries.append(entry)
    raise_listed(KeyMapError, f"the keymap {keymap.name!r} does not fit these parameters:", problems)
    return make_plan(entries)


_BASE_WEIGHT = MethodTensor("", "", (), (), is_copy=True, scale_power=1)


def base_plan_entry(keymap: KeyMap, leaf: str, shape: Sequence[int]) -> PlanEntry | None:
    """Return the plan entry of one base weight, or None if no entry of the keymap matches it.

    Raises `KeyMapError` if several entries match; `MismatchError` if the entry contradicts the shape.
    """
    match = keymap.match(leaf)
    return None if match is None else plan_entry(keymap, match, _BASE_WEIGHT, axis_sizes(match, shape), "")
