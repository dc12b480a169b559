"""One small network with layers of every kind, in torch, NNX and Linen, with the same weights.

    tokens or signal -> [emb] -> two blocks (one layer each, unrolled or scanned) -> head

`Net.torch()` is what PEFT adapts; `Net.nnx()` and `Net.linen()` are its twins, filled with its weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxadapt
from jaxadapt import Weight
from tests.support.twins import trees

VOCAB, WIDTH, OUT, LAYERS = 11, 8, 3, 2
SPACE = "hwd"


@dataclasses.dataclass(frozen=True)
class Net:
    """What the network is made of.

    Args:
        layer: "linear" or "conv" (of `ndim` spatial axes).
        emb: whether tokens are looked up first.
        tied: whether the table of tokens is the head as well.
        conv: kernel size, stride, padding, dilation and groups of a convolution.
        bias: whether the layers have one.
    """

    layer: str = "linear"
    emb: bool = False
    tied: bool = False
    ndim: int = 1
    size: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    bias: bool = True

    # ---- torch ---------------------------------------------------------------------------------------------

    def torch(self) -> Any:
        import torch

        net = self
        Conv = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[self.ndim - 1]
        torch.manual_seed(7)

        class Block(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                if net.layer == "linear":
                    self.lin = torch.nn.Linear(WIDTH, WIDTH, bias=net.bias)
                else:
                    self.conv = Conv(
                        WIDTH, WIDTH, net.size, net.stride, net.padding, net.dilation, net.groups, bias=net.bias
                    )

            def forward(self, x: Any) -> Any:
                return torch.tanh(self.lin(x) if net.layer == "linear" else self.conv(x))

        class Network(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                if net.emb:
                    self.emb = torch.nn.Embedding(VOCAB, WIDTH)
                self.layers = torch.nn.ModuleList([Block() for _ in range(LAYERS)])
                self.head = torch.nn.Linear(WIDTH, VOCAB if net.tied else OUT, bias=not net.tied)
                if net.tied:
                    self.head.weight = self.emb.weight

            def forward(self, x: Any) -> Any:
                if net.emb:
                    x = self.emb(x)
                for layer in self.layers:
                    x = layer(x)
                if net.layer == "conv":
                    x = x.flatten(2).mean(-1)
                return self.head(x)

        if not self.emb:
            return Network()

        class LanguageModel(Network):
            config: ClassVar[dict[str, Any]] = {"tie_word_embeddings": net.tied, "model_type": "custom"}
            if net.tied:
                _tied_weights_keys: ClassVar[dict[str, str]] = {"head.weight": "emb.weight"}

            def get_input_embeddings(self) -> Any:
                return self.emb

            def get_output_embeddings(self) -> Any:
                return self.head

        return LanguageModel()

    def input(self) -> np.ndarray:
        """As torch takes it: (batch, time) tokens, (batch, time, width) or (batch, width, space...)."""
        rng = np.random.RandomState(3)
        if self.emb:
            return rng.randint(0, VOCAB, (2, 5))
        shape = (2, 5, WIDTH) if self.layer == "linear" else (2, WIDTH, *(6, 5, 4)[: self.ndim])
        return rng.standard_normal(shape).astype("float32")

    # ---- ours ----------------------------------------------------------------------------------------------

    def ours(self, x: np.ndarray) -> jax.Array:
        """torch's input as Flax takes it: channels last."""
        return jnp.asarray(x if self.layer == "linear" or self.emb else np.moveaxis(x, 1, -1))

    def table(self, api: str = "nnx", scan: int | None = None) -> jaxadapt.KeyMap:
        """The table of this network."""
        name = "conv" if self.layer == "conv" else "lin"
        at = f"layers.{{l}}.{name}" if api == "nnx" or scan is not None else f"layers_{{l}}.{name}"
        window = " ".join(SPACE[: self.ndim])
        kernel = f"{window} i o -> o i {window}" if name == "conv" else "i o -> o i"
        conv: Any = {"kind": "conv", "groups": self.groups} if name == "conv" else {}
        lines = [Weight(f"{at}.kernel", f"layers.{{l}}.{name}.weight", kernel, **conv)]
        lines += [Weight(f"{at}.bias", f"layers.{{l}}.{name}.bias", "o -> o")]
        if scan is not None:
            lines = [line.scanned(scan) for line in lines]
        lines += [Weight("emb.embedding", "emb.weight", "v d -> v d", kind="embedding")]
        lines += [Weight("head.kernel", "head.weight", "i o -> o i"), Weight("head.bias", "head.bias", "o -> o")]
        return jaxadapt.KeyMap("tiny", tuple(lines), output="head")

    def _conv(self) -> dict[str, Any]:
        return {
            "kernel_size": (self.size,) * self.ndim,
            "strides": (self.stride,) * self.ndim,
            "padding": [(self.padding, self.padding)] * self.ndim,
            "kernel_dilation": (self.dilation,) * self.ndim,
            "feature_group_count": self.groups,
            "use_bias": self.bias,
        }

    def leaves(self, api: str, scan: int | None, torch_net: Any) -> dict[str, np.ndarray]:
        """The torch network's weights at our paths, by the rules of the two libraries (no table of ours)."""
        out: dict[str, np.ndarray] = {}
        for key, value in torch_net.state_dict().items():
            if self.tied and key == "head.weight":
                continue
            module, _, last = key.rpartition(".")
            array = value.detach().numpy()
            if module == "emb":
                last = "embedding"
            elif last == "weight":
                last, array = "kernel", np.moveaxis(array, (0, 1), (-1, -2))
            out[f"{module}.{last}"] = array
        if scan is not None:
            return {k: np.ascontiguousarray(v) for k, v in trees.stack(out, scan).items()}
        return {k if api == "nnx" else k.replace("layers.", "layers_"): v for k, v in out.items()}

    def nnx(self, torch_net: Any, scan: int | None = None) -> nnx.Module:
        net = self
        axes = nnx.StateAxes({nnx.Param: scan, ...: 0})

        class Block(nnx.Module):
            def __init__(self, rngs: nnx.Rngs) -> None:
                if net.layer == "linear":
                    self.lin = nnx.Linear(WIDTH, WIDTH, use_bias=net.bias, rngs=rngs)
                else:
                    self.conv = nnx.Conv(WIDTH, WIDTH, rngs=rngs, **net._conv())

            def __call__(self, x: jax.Array) -> jax.Array:
                return jnp.tanh(self.lin(x) if net.layer == "linear" else self.conv(x))

        class Network(nnx.Module):
            def __init__(self, rngs: nnx.Rngs) -> None:
                if net.emb:
                    self.emb = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
                if scan is None:
                    self.layers = nnx.List([Block(rngs) for _ in range(LAYERS)])
                else:
                    make = nnx.vmap(Block, in_axes=(0,), out_axes=axes)
                    self.layers = nnx.split_rngs(splits=LAYERS)(make)(rngs)
                if not net.tied:
                    self.head = nnx.Linear(WIDTH, OUT, rngs=rngs)

            def __call__(self, x: jax.Array) -> jax.Array:
                if net.emb:
                    x = self.emb(x)
                if scan is None:
                    for layer in self.layers:
                        x = layer(x)
                else:
                    run = nnx.scan(lambda block, x: block(x), in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
                    x = run(self.layers, x)
                if net.layer == "conv":
                    x = x.reshape(x.shape[0], -1, WIDTH).mean(1)
                return self.emb.attend(x) if net.tied else self.head(x)

        model = Network(nnx.Rngs(0))
        trees.fill(model, self.leaves("nnx", scan, torch_net))
        return model

    def linen(self, scan: int | None = None) -> nn.Module:
        net = self

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                if net.layer == "linear":
                    return jnp.tanh(nn.Dense(WIDTH, use_bias=net.bias, name="lin")(x))
                return jnp.tanh(nn.Conv(WIDTH, name="conv", **net._conv())(x))

        class Network(nn.Module):
            def setup(self) -> None:
                if net.emb:
                    self.emb = nn.Embed(VOCAB, WIDTH)
                if scan is None:
                    self.layers = [Block() for _ in range(LAYERS)]
                else:
                    self.layers = Block()
                if not net.tied:
                    self.head = nn.Dense(OUT)

            def __call__(self, x: jax.Array) -> jax.Array:
                if net.emb:
                    x = self.emb(x)
                if scan is None:
                    for layer in self.layers:
                        x = layer(x)
                else:
                    over = {"params": scan}
                    run = nn.scan(
                        lambda block, x, _: (block(x), None), variable_axes=over, split_rngs={"params": True},
                        length=LAYERS,
                    )  # fmt: skip
                    x, _ = run(self.layers, x, None)
                if net.layer == "conv":
                    x = x.reshape(x.shape[0], -1, WIDTH).mean(1)
                return self.emb.attend(x) if net.tied else self.head(x)

        return Network()
