"""What bitsandbytes and PEFT's LoftQ make of one weight: `python tests/reference/record_bitsandbytes.py` notes it.

Needs bitsandbytes beside PEFT and torch, which only records. PEFT sends its weights to a GPU, and here they stay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "recorded_bitsandbytes.safetensors"
SHAPE, RANK = (24, 40), 4  # 960 numbers: 15 blocks of 64, which straddle the rows
LOFTQ = [(4, 1), (4, 3), (8, 2)]  # bits and iterations


def main() -> None:
    import bitsandbytes as bnb
    import torch
    from peft.utils.loftq_utils import loftq_init
    from safetensors.torch import save_file
    from torch.overrides import TorchFunctionMode

    class OnCpu(TorchFunctionMode):
        def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return f(*("cpu" if a == "cuda" else a for a in args), **_on_cpu(kwargs or {}))

    def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
        return {k: "cpu" if isinstance(v, str) and v == "cuda" else v for k, v in kwargs.items()}

    torch.manual_seed(0)
    w = torch.randn(SHAPE) * torch.logspace(-2, 1, SHAPE[0])[:, None]
    out = {"weight": w}
    codes, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=False)
    out |= {"nf4.codes": codes, "nf4.absmax": state.absmax, "nf4.dense": bnb.functional.dequantize_4bit(codes, state)}
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(w)
    out |= {"int8.codes": codes, "int8.absmax": scales}
    out["int8.dense"] = bnb.functional.int8_vectorwise_dequant(codes, scales)
    for bits, steps in LOFTQ:
        with OnCpu():
            dense, a, b = loftq_init(w, bits, RANK, steps)
        out |= {f"loftq.{bits}.{steps}.base": dense, f"loftq.{bits}.{steps}.product": b @ a}
    print(bnb.__version__, {k: (tuple(v.shape), v.dtype) for k, v in out.items()})
    save_file({k: v.contiguous() for k, v in out.items()}, RECORDED, {"bitsandbytes": bnb.__version__})


if __name__ == "__main__":
    main()
