"""The table of methods: one row a type, with its configuration's class and the facts that other packages read.

The method of the type VERA is in the file `vera.py` of `jaxadapt.methods`. All other parts of jaxadapt read this table,
and load a class or a method on first use. PEFT's own figures are those of its benchmark `method_comparison/MetaMathQA`:
Llama 3.2 3B, 5,000 steps of 4 examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Targets = Mapping[str, Mapping[str, Any]]

_NO_FIELDS: Mapping[str, Any] = {}


class MethodFacts(NamedTuple):
    """The facts of one method.

    Attributes:
        module: the module of the configuration's class in `jaxadapt.configs`; "" for a method of another package.
        config: the name of the class.
        trains: the trained tensors of the demo's configuration; "" if not stated.
        rows: "call" if the rows of a batch may each have their own adapter, chosen in the call; "put" if a server must
            prepare the adapter for it; "no" if they cannot.
        merges: False if no weight has the method's effect.
        merges_files: False if only a model in memory can be merged: the change depends on the order of the modules, or
            starts from values of the base.
        learning_rate: AdamW's peak learning rate in `jaxadapt demo`.
        demo: the fields of the configuration there, besides the targets.
        accuracy: the share of right answers in PEFT's benchmark; None if it has no figure. LoRA's is 0.478.
        time: the training time in PEFT's benchmark, divided by LoRA's; None if it has no figure.
        tensor_prefix: the start of the names of the file's tensors; "" for the type in lower case and "_".
        file_tensors: the keys of the file's tensors if they belong to the whole adapter and no module has any.
        tensor_parts: the names of file tensors that consist of parts: the name is followed by the part's, not by an
            adapter's.
        tensor_pairs: tensors of a module that a file has only together, in pairs.
        new_values: {tensor of a module in a file: its value in a new adapter that changes nothing}; training changes
            it.
        main_fields: the fields that a card shows also where they have their default.
        target_is_expression: False if a string in target_modules is the end of a name and no expression.
        shortens_targets: False if PEFT stores the full names of the modules that "all-linear" selects, however many
            they are.
        default_targets: {pattern of a keymap's name: field values}: PEFT's defaults for models of that type, if no
            targets are given.
    """

    module: str = ""
    config: str = ""
    trains: str = ""
    rows: Literal["call", "put", "no"] = "no"
    merges: bool = True
    merges_files: bool = True
    learning_rate: float = 1e-3
    demo: Mapping[str, Any] = _NO_FIELDS
    accuracy: float | None = None
    time: float | None = None
    tensor_prefix: str = ""
    file_tensors: tuple[str, ...] = ()
    tensor_parts: tuple[str, ...] = ()
    tensor_pairs: tuple[tuple[str, str], ...] = ()
    new_values: Mapping[str, float] = _NO_FIELDS
    main_fields: tuple[str, ...] = ("r", "alpha")
    target_is_expression: bool = True
    shortens_targets: bool = True
    default_targets: Targets = _NO_FIELDS


# PEFT has no defaults for GPT-OSS, DeepSeek, Qwen 3 MoE and the language model of Llama 4.
QUERY_AND_VALUE: Targets = {
    "gpt2": {"target_modules": ("c_attn",)},
    "bert|roberta": {"target_modules": ("query", "value")},
    "t5": {"target_modules": ("q", "v")},
    "gpt_neo(?!x)|gptj": {"target_modules": ("q_proj", "v_proj")},
    r"llama(?!4)|mi[sx]tral|qwen(?!\d_moe)|gemma": {"target_modules": ("q_proj", "v_proj")},
}
"""The projections of queries and values: PEFT's default targets of many methods."""

_OUTPUT_IN_GPT2: Targets = {**QUERY_AND_VALUE, "gpt2": {"target_modules": ("mlp.c_proj",)}}
_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")

NO_FACTS = MethodFacts()


class _Facts(dict[str, MethodFacts]):
    def __missing__(self, peft_type: str) -> MethodFacts:
        return NO_FACTS


# The keymap "llama" also serves Qwen2, which has other defaults in PEFT for IA3 and LN_TUNING, so only numbered Llamas
# have one there.
FACTS = _Facts(
    {
        "ADALORA": MethodFacts(
            "low_rank",
            "AdaLoraConfig",
            trains="lora_A, lora_B, lora_E",
            rows="call",
            learning_rate=3e-2,
            accuracy=0.373,
            time=1.24,
            new_values={"lora_E": 0.0},
            tensor_pairs=(("lora_A", "lora_B"), ("lora_A", "lora_E")),
            tensor_prefix="lora_",
            default_targets={
                "mt5": {"target_modules": ("q", "k", "v", "o", "wi_0", "wi_1", "wo")},
                "t5": {"target_modules": ("q", "k", "v", "o", "wi", "wo")},
                "roberta": {"target_modules": ("query", "key", "value", "dense")},
                **QUERY_AND_VALUE,
            },
        ),
        "ADAPTION_PROMPT": MethodFacts(
            "prompts",
            "AdaptionPromptConfig",
            trains="adaption_gate, adaption_prompt",
            merges=False,
            learning_rate=0.1,
            demo={"target_modules": "self_attn", "adapter_len": 10, "adapter_layers": 20},
            accuracy=0.384,
            time=1.21,
            tensor_prefix="adaption_",
            target_is_expression=False,
            new_values={"adaption_gate": 0.0},
            default_targets={"": {"target_modules": "self_attn"}},
            main_fields=("adapter_len", "adapter_layers"),
        ),
        "BEFT": MethodFacts(
            "full_rank",
            "BeftConfig",
            trains="beft_bias",
            rows="call",
            learning_rate=1e-2,
            accuracy=0.321,
            time=0.94,
            new_values={"beft_bias": 0.0},
            default_targets={
                "bert|roberta": {"target_modules": ("value",)},
                "t5": {"target_modules": ("v",)},
                r"gpt_neo(?!x)|gptj|llama|mi[sx]tral|qwen(?!\d_moe)|gemma": {"target_modules": ("v_proj",)},
            },
        ),
        "BOFT": MethodFacts(
            "full_rank",
            "BOFTConfig",
            trains="boft_R, boft_s",
            rows="call",
            accuracy=0.343,
            time=7.35,
            default_targets=QUERY_AND_VALUE,
        ),
        "C3A": MethodFacts(
            "fixed_bases",
            "C3AConfig",
            trains="c3a_kernel",
            rows="call",
            learning_rate=0.1,
            demo={"block_size": 64},
            accuracy=0.487,
            time=1.24,
            new_values={"c3a_kernel": 0.0},
            default_targets=_OUTPUT_IN_GPT2,
        ),
        "CARTRIDGE": MethodFacts(
            "prompts",
            "CartridgeConfig",
            trains="trainable_embedding",
            merges=False,
            learning_rate=3e-2,
            file_tensors=("prompt_embeddings",),
        ),
        "CPT": MethodFacts(
            "prompts",
            "CPTConfig",
            trains="delta_embedding",
            merges=False,
            learning_rate=1e-2,
            demo={"cpt_token_ids": tuple(range(32, 48)), "opt_projection_epsilon": 10.0},
            file_tensors=("prompt_embeddings",),
        ),
        "DEFT": MethodFacts(
            "low_rank",
            "DeftConfig",
            trains="deft_P, deft_R",
            rows="call",
            accuracy=0.482,
            time=1.1,
            default_targets=QUERY_AND_VALUE,
        ),
        "DELORA": MethodFacts(
            "low_rank",
            "DeloraConfig",
            trains="delora_A, delora_B, delora_lambda",
            rows="call",
            demo={"delora_lambda": 2.0},
            accuracy=0.468,
            time=1.1,
            new_values={"delora_B": 0.0},
            default_targets=QUERY_AND_VALUE,
        ),
        "FOURIERFT": MethodFacts(
            "fixed_bases",
            "FourierFTConfig",
            trains="fourierft_spectrum",
            rows="call",
            learning_rate=0.1,
            accuracy=0.096,
            time=1.83,
            new_values={"fourierft_spectrum": 0.0},
            default_targets=_OUTPUT_IN_GPT2,
        ),
        "GRALORA": MethodFacts(
            "low_rank",
            "GraloraConfig",
            trains="gralora_A, gralora_B",
            rows="call",
            accuracy=0.495,
            time=1.16,
            default_targets=QUERY_AND_VALUE,
        ),
        "HIRA": MethodFacts(
            "low_rank",
            "HiraConfig",
            trains="hira_A, hira_B",
            learning_rate=1e-2,
            accuracy=0.513,
            time=1.4,
            new_values={"hira_B": 0.0, "hira_embedding_A": 0.0},
            tensor_pairs=(("hira_A", "hira_B"),),
            default_targets=QUERY_AND_VALUE,
        ),
        "HRA": MethodFacts("full_rank", "HRAConfig", trains="hra_u", rows="call", default_targets=QUERY_AND_VALUE),
        "IA3": MethodFacts(
            "full_rank",
            "IA3Config",
            trains="ia3_l",
            rows="call",
            learning_rate=2e-2,
            demo={"target_modules": ("k_proj", "v_proj", "down_proj"), "feedforward_modules": ("down_proj",)},
            accuracy=0.455,
            time=1.13,
            shortens_targets=False,
            new_values={"ia3_l": 1.0},
            default_targets={
                "gpt2": {"target_modules": ("c_attn", "mlp.c_proj"), "feedforward_modules": ("mlp.c_proj",)},
                "bert|roberta": {
                    "target_modules": ("key", "value", "output.dense"),
                    "feedforward_modules": ("output.dense",),
                },
                "gpt_neo(?!x)": {"target_modules": ("q_proj", "v_proj", "c_proj"), "feedforward_modules": ("c_proj",)},
                "gptj": {"target_modules": ("q_proj", "v_proj", "fc_out"), "feedforward_modules": ("fc_out",)},
                r"llama[123]|mistral": {
                    "target_modules": ("k_proj", "v_proj", "down_proj"),
                    "feedforward_modules": ("down_proj",),
                },
                r"qwen(?!\d_moe)|gemma": {
                    "target_modules": ("q_proj", "v_proj", "down_proj"),
                    "feedforward_modules": ("down_proj",),
                },
            },
        ),
        "LN_TUNING": MethodFacts(
            "full_rank",
            "LNTuningConfig",
            trains="all tensors of the target modules",
            demo={"target_modules": (*_NORMS, "norm")},
            learning_rate=5e-3,
            accuracy=0.0,
            time=0.97,
            default_targets={
                "gpt2": {"target_modules": ("ln_1", "ln_2", "ln_f")},
                "gptj": {"target_modules": ("ln_1", "ln_f")},
                "t5": {"target_modules": ("layer_norm", "final_layer_norm")},
                "gemma[23]": {
                    "target_modules": (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm", "norm")
                },
                r"llama[123]|mistral|gemma": {"target_modules": (*_NORMS, "norm")},
                r"qwen[23](?!_moe)": {"target_modules": ("post_attention_layernorm",)},
            },
        ),
        "LOHA": MethodFacts(
            "low_rank",
            "LoHaConfig",
            trains="hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b",
            rows="put",
            learning_rate=2e-2,
            accuracy=0.393,
            time=1.48,
            tensor_prefix="hada_",
            new_values={"hada_w2_b": 0.0},
            tensor_pairs=(("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"), ("hada_w1_a", "hada_w2_a")),
            default_targets=QUERY_AND_VALUE,
        ),
        "LOKR": MethodFacts(
            "low_rank",
            "LoKrConfig",
            trains="lokr_w1, lokr_w2_a, lokr_w2_b",
            rows="call",
            learning_rate=1e-2,
            accuracy=0.466,
            time=1.37,
            new_values={"lokr_w1": 0.0, "lokr_w1_a": 0.0, "lokr_w2": 0.0, "lokr_w2_b": 0.0},
            default_targets=QUERY_AND_VALUE,
        ),
        "LORA": MethodFacts(
            "lora",
            "LoraConfig",
            trains="lora_A, lora_B",
            rows="put",
            demo={"r": 8, "lora_alpha": 16},
            accuracy=0.478,
            time=1.0,
            new_values={"lora_B.weight": 0.0, "lora_embedding_A": 0.0},
            tensor_pairs=(("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")),
            tensor_parts=("lora_monteclora_sampler",),
            main_fields=("r", "lora_alpha"),
            default_targets=QUERY_AND_VALUE,
        ),
        "MISS": MethodFacts(
            "low_rank",
            "MissConfig",
            trains="miss_block",
            rows="call",
            accuracy=0.487,
            time=0.95,
            new_values={"miss_block": 0.0},
            default_targets=QUERY_AND_VALUE,
        ),
        "MULTITASK_PROMPT_TUNING": MethodFacts(
            "prompts",
            "MultitaskPromptTuningConfig",
            trains="prefix_task_cols, prefix_task_rows, prompt_embeddings",
            merges=False,
            learning_rate=3e-2,
            file_tensors=("prompt_embeddings", "prefix_task_cols", "prefix_task_rows"),
        ),
        "OFT": MethodFacts(
            "full_rank",
            "OFTConfig",
            trains="oft_R",
            rows="call",
            accuracy=0.491,
            time=1.27,
            main_fields=("r", "oft_block_size"),
            new_values={"oft_R.weight": 0.0},
            default_targets=QUERY_AND_VALUE,
        ),
        "OSF": MethodFacts(
            "full_rank",
            "OSFConfig",
            trains="osf_svd_params_S_low, osf_svd_params_U_low, osf_svd_params_V_low",
            merges_files=False,
            learning_rate=1e-4,
            accuracy=0.427,
            time=2.82,
            tensor_parts=("osf_svd_params",),
            default_targets={
                "gpt2": {"target_modules": ("c_attn", "c_proj")},
                "gptj": {"target_modules": ("q_proj", "v_proj", "k_proj", "out_proj", "fc_in", "fc_out")},
                r"llama|mi[sx]tral|qwen[23](?!_moe)|gemma": {"target_modules": _LLAMA},
                ".*": {"target_modules": "all-linear"},
            },
        ),
        "PEANUT": MethodFacts(
            "low_rank",
            "PeanutConfig",
            trains="peanut_A, peanut_B",
            accuracy=0.449,
            time=1.42,
            new_values={"peanut_B.weight": 0.0},
            tensor_parts=("peanut_encoders", "peanut_decoders"),
            default_targets=QUERY_AND_VALUE,
        ),
        "PREFIX_TUNING": MethodFacts(
            "prompts",
            "PrefixTuningConfig",
            trains="prompt_embeddings",
            merges=False,
            learning_rate=1e-2,
            demo={"init_weights": "zero"},
            accuracy=0.416,
            time=0.93,
            file_tensors=("prompt_embeddings",),
        ),
        "PROMPT_TUNING": MethodFacts(
            "prompts",
            "PromptTuningConfig",
            trains="prompt_embeddings",
            merges=False,
            learning_rate=3e-2,
            demo={"prompt_tuning_init": "SAMPLE_VOCAB"},
            accuracy=0.343,
            time=1.52,
            file_tensors=("prompt_embeddings",),
        ),
        "PVERA": MethodFacts(
            "fixed_bases",
            "PveraConfig",
            trains="pvera_lambda_b, pvera_lambda_d",
            rows="call",
            learning_rate=2e-2,
            accuracy=0.353,
            time=1.15,
            new_values={"pvera_lambda_b": 0.0},
            default_targets=QUERY_AND_VALUE,
        ),
        "P_TUNING": MethodFacts(
            "prompts",
            "PromptEncoderConfig",
            trains="all tensors of the encoder",
            merges=False,
            accuracy=0.35,
            time=0.97,
            file_tensors=("prompt_embeddings",),
        ),
        "RANDLORA": MethodFacts(
            "fixed_bases",
            "RandLoraConfig",
            trains="randlora_gamma, randlora_lambda",
            rows="call",
            accuracy=0.478,
            time=1.51,
            new_values={"randlora_lambda": 0.0},
            default_targets=QUERY_AND_VALUE,
        ),
        "ROAD": MethodFacts(
            "full_rank",
            "RoadConfig",
            trains="road_alpha, road_theta",
            rows="call",
            learning_rate=1e-2,
            accuracy=0.385,
            time=1.04,
            default_targets=QUERY_AND_VALUE,
        ),
        "SHIRA": MethodFacts(
            "full_rank",
            "ShiraConfig",
            trains="shira_weight",
            accuracy=0.51,
            time=1.06,
            new_values={"shira_weight": 0.0},
            default_targets=QUERY_AND_VALUE,
        ),
        "SUPERTUNING": MethodFacts(
            "full_rank",
            "SupertuningConfig",
            trains="supertuning_values",
            learning_rate=1e-2,
            default_targets=QUERY_AND_VALUE,
        ),
        "TINYLORA": MethodFacts(
            "fixed_bases",
            "TinyLoraConfig",
            trains="tinylora_v",
            rows="put",
            merges_files=False,
            learning_rate=1e-3,
            accuracy=0.012,
            time=1.1,
            tensor_parts=("tinylora_v",),
            default_targets=QUERY_AND_VALUE,
        ),
        "TRAINABLE_TOKENS": MethodFacts(
            "full_rank",
            "TrainableTokensConfig",
            trains="trainable_tokens_delta",
            demo={"target_modules": ("embed_tokens",), "token_indices": tuple(range(64))},
            accuracy=0.246,
            time=1.04,
            default_targets={
                "gpt2|gptj|gpt_neo(?!x)": {"target_modules": ("wte",)},
                "gpt_neox": {"target_modules": ("embed_in",)},
                "bert|roberta|bloom|falcon": {"target_modules": ("word_embeddings",)},
                "t5": {"target_modules": ("shared",)},
                "": {"target_modules": ("embed_tokens",)},
            },
        ),
        "UNILORA": MethodFacts(
            "fixed_bases",
            "UniLoraConfig",
            trains="unilora_theta_d",
            rows="put",
            merges_files=False,
            learning_rate=1.0,
            accuracy=0.002,
            time=1.14,
            default_targets=QUERY_AND_VALUE,
        ),
        "VBLORA": MethodFacts(
            "fixed_bases",
            "VBLoRAConfig",
            trains="vblora_logits_A, vblora_logits_B, vblora_vector_bank",
            rows="put",
            learning_rate=1e-2,
            demo={"vector_length": 64},
            accuracy=0.334,
            time=1.27,
            default_targets={**QUERY_AND_VALUE, "t5": {"target_modules": ("q", "k", "v", "o", "wi", "wo")}},
        ),
        "VERA": MethodFacts(
            "fixed_bases",
            "VeraConfig",
            trains="vera_lambda_b, vera_lambda_d",
            rows="call",
            learning_rate=2e-2,
            accuracy=0.354,
            time=1.07,
            new_values={"vera_lambda_b": 0.0},
            tensor_pairs=(("vera_lambda_b", "vera_lambda_d"),),
            default_targets=QUERY_AND_VALUE,
        ),
        "WAVEFT": MethodFacts(
            "fixed_bases",
            "WaveFTConfig",
            trains="waveft_spectrum",
            rows="call",
            accuracy=0.403,
            time=2.24,
            new_values={"waveft_spectrum": 0.0},
            default_targets=_OUTPUT_IN_GPT2,
        ),
    }
)
"""{type: facts}; any other type has the default facts. `jaxadapt.methods.register` adds methods of other packages."""


def config_places() -> list[tuple[str, str]]:
    """Return the module and the name of each configuration's class in this package, before other methods register."""
    return [(f"{__package__}.{facts.module}", facts.config) for facts in FACTS.values()]
