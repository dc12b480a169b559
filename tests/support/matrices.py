"""Which cases of the long matrices run in CI; the others are marked `full`, and tests/full/README.md has their command.

`CI` maps a test to a regular expression of the ids that run in CI. Of each kind of proof at least one case does.
.ci/quick runs the tests of `EVERY_TYPE` for some methods only, at least one of each kind: `QUICK` matches their ids.
"""

from __future__ import annotations

import collections
import re
import zlib
from collections.abc import Iterable

EXAMPLE = "-0$"  # the first of a method's `examples`

CI = {
    # A library's keymap with its classes here; those that are recorded take no time.
    "tests/keymaps/families/test_proof.py::test_a_peft_adapter_gives_pefts_logits": (
        r"^(?!tunix-(gemma-m|gemma2|gemma4|qwen3_moe|llama3|qwen2|gemma3$)|maxtext-gemma3-"
        r"|(deepseek_v3|qwen3_moe|llama4|mixtral|gpt2-dense)$)"
    ),
    "tests/arrays/test_quantized.py::test_over_devices_adapters_lie_as_on_the_dense_base": "^linen-int8-layout2",
    "tests/demo/test_demo.py::test_a_trainer_lowers_the_loss_and_leaves_the_base": "^(nnx-lora|linen-ia3)$",
    "tests/demo/test_demo.py::test_what_a_trainer_saves_either_api_loads": "^(nnx-ia3|linen-prompt_tuning)$",
    "tests/demo/test_demo_model.py::test_gradients_agree_between_apis": "scan",
    "tests/demo/test_demo_model.py::test_logits_equal_transformers": "^untied$",
    "tests/demo/test_demo_model.py::test_both_apis_make_the_same_leaves": "^(tied-{}|untied-.*1, 'remat.*)$",
    "tests/adapters/test_sharding.py::test_explicit_meshes": "^2x2x2-both$",
    "tests/adapters/test_sharding.py::test_no_collective_that_hand_written_lora_lacks": "^layout[04]",
    "tests/adapters/test_sharding.py::test_no_collective_that_hand_written_lora_lacks_on_an_explicit_mesh": (
        "^4x2-both$"
    ),
    "tests/analysis/test_norms.py::test_a_picture_of_any_shape_is_whole": (
        "^(trained-(deep|one cell)|fresh-(wide|one row))$"
    ),
    "tests/core/test_progress.py::test_true_draws_nothing_where_nobody_sees_it": (
        "^(load, (NNX|Orbax)|save, Linen|merge)$"
    ),
    "tests/core/test_progress.py::test_an_exception_of_the_function_ends_the_work_with_nothing_half_done": (
        "^(load, Linen|merge of files|manager, .*|save, (NNX|Orbax))$"
    ),
    "tests/initializers/test_start.py::test_base_and_adapter_together_are_what_the_base_was": (
        "^(True-False|gaussian-True|pissa-True|pissa_niter_4-False|olora-True|orthogonal-False)$"
    ),
    "tests/merging/test_combine.py::test_densities_at_the_ends": r"^0\.05$",
    "tests/merging/test_combine.py::test_equal_to_peft": r"^(cat|svd|dare_linear)-total$|^ties-frequency$",
    "tests/merging/test_combine_kinds.py::test_of_adapters_that_agree_nothing_is_lost": (
        "^(linear-experts|ties-turned, stacked|ties_svd-conv|magnitude_prune_svd-attention)$"
    ),
    "tests/merging/test_combine_kinds.py::test_the_sum": "^(cat-(conv|experts)|svd-(attention|turned, stacked))$",
    "tests/merging/test_low_rank_form.py::test_a_plain_lora_of_the_methods_rank_changes_the_weights_alike": ("^LOHA$"),
    "tests/merging/test_combine.py::test_rslora_where_peft_is_wrong": "^cat$",
    "tests/merging/test_combine.py::test_stacked_fused_and_split_axes_give_what_plain_matrices_give": "^svd$",
    "tests/merging/test_resize.py::test_every_module_gets_its_best_approximation": "^(False-3|True-7)$",
    "tests/methods/test_conformance.py::test_a_fresh_adapter_leaves_the_output_alone_where_the_method_says_so": EXAMPLE,
    "tests/methods/test_conformance.py::test_eight_devices": EXAMPLE,
    "tests/methods/test_conformance.py::test_every_layout_gives_the_same_weight_from_the_same_file": "-0-|-split$",
    "tests/methods/test_conformance.py::test_initial_values_follow_the_key": EXAMPLE,
    "tests/methods/test_conformance.py::test_a_method_is_stateless_and_its_tensors_are_consistent": EXAMPLE,
    "tests/methods/test_conformance.py::test_unmerging_gives_the_weight_back_or_is_refused": EXAMPLE,
    "tests/methods/test_conformance.py::test_nnx_and_linen_agree_and_merging_equals_applying": EXAMPLE,
    "tests/methods/test_conformance.py::test_outputs_and_weights_keep_the_bases_dtype": "-0-bfloat16-float32$",
    "tests/methods/test_conformance.py::test_parts_of_a_fused_weight_are_modules_of_their_own": "-0-fused$",
    "tests/methods/test_conformance.py::test_several_adapters_and_deletion": EXAMPLE,
    "tests/methods/test_conformance.py::test_stacked_layers_are_the_layers_one_by_one": EXAMPLE,
    "tests/methods/test_conformance.py::test_training_in_nnx_changes_the_trained_tensors_only": EXAMPLE,
    "tests/methods/test_conformance.py::test_transformations_of_jax": EXAMPLE,
    "tests/methods/test_conformance_model.py::test_eight_devices": "^PREFIX_TUNING-0-nnx$",
    "tests/methods/test_conformance_model.py::test_rows_can_be_mapped_and_the_base_can_have_16_bits": (
        "^MULTITASK_PROMPT_TUNING-0-nnx$"
    ),
    "tests/methods/test_conformance_peft.py::test_peft_opens_our_files": EXAMPLE,
    "tests/methods/test_conformance_peft.py::test_pefts_file_gives_pefts_logits_and_gradients": EXAMPLE,
    "tests/methods/test_conformance_peft.py::test_redundant_tensors_may_be_missing": EXAMPLE,
    "tests/methods/test_conformance_peft.py::test_the_variables_of_an_nnx_model_have_pefts_gradients": EXAMPLE,
    "tests/methods/test_conformance_peft.py::test_several_active_adapters_give_pefts_logits": (
        "^(BOFT|C3A|HRA|IA3|OFT|OSF|ROAD|VERA)-0$"
    ),
    "tests/methods/test_conformance_peft.py::test_scanned_layers_give_pefts_logits": "^(LORA|VERA)-0-0$",
    "tests/persistence/test_load_attached.py::test_every_method_loads_as_if_it_were_planned_again": "-0-nnx$",
    "tests/methods/test_other_kinds.py::test_pefts_file_gives_pefts_outputs_and_gradients": (
        "^(ADALORA conv2d|HIRA embedding|LOKR conv1d full)$"
    ),
    "tests/methods/test_loha.py::test_a_convolution_has_pefts_tensors_and_weight": (
        "^(window0.*plain|window3.*effective)$"
    ),
    "tests/methods/test_lora_and_ia3.py::test_a_fresh_adapter_changes_nothing": "^(LORA0|IA31)-",
    "tests/methods/test_lora_and_ia3.py::test_the_output_is_that_of_the_effective_weight": (
        "^(LORA0|IA31)-.*-straight$|^(LORA1|IA30)-.*-transposed$"
    ),
    "tests/persistence/test_sharded_files.py::test_orbax_from_every_layout_to_every_other": "^2x2x2-both$",
    "tests/reference/test_layer_choices.py::test_training_is_the_unrolled_models_and_leaves_the_rest_alone": (
        "^everything$"
    ),
    "tests/reference/test_layer_choices.py::test_linen_gradients_are_zero_where_nothing_is_adapted": "^(dora|ia3)$",
    "tests/reference/test_alora.py::test_outputs_gradients_and_files_are_pefts": "^(nnx-False|linen-True)$",
    "tests/reference/test_dora_layers.py::test_pefts_dora_gives_its_output_gradients_and_file": (
        "^(attention-nnx|experts-linen|some of each-nnx)$"
    ),
    "tests/reference/test_dora_layers.py::test_peft_opens_our_dora": (
        "^(attention-linen|experts-nnx|some of each-linen)$"
    ),
    "tests/reference/test_experts.py::test_a_layer_of_experts_computes_what_its_merged_weights_do": (
        "^(einsum-e o i|per_expert-e i o|ragged-e o i|sliced-e i o)$"
    ),
    "tests/reference/test_experts.py::test_gate_and_up_apart_are_one_parameter_in_peft": (
        "^maxtext-(gpt_oss-plain|qwen3_moe-scan1-ranks)$"
    ),
    "tests/reference/test_interchange.py::test_all_linear_is_saved_resolved": "^(llama-linen-scan1|gpt2-nnx-scan1)$",
    "tests/reference/test_interchange.py::test_the_table_named_outright_is_the_one_found": (
        "^(llama-(linen|nnx-scan0|linen-scan1)|gpt2-(nnx|linen-scan1))$"
    ),
    "tests/reference/test_strict.py::test_what_is_missing_begins_as_in_peft": (
        "^(module-(nnx-0|linen-None)|dora-(linen-0|nnx-None)|B-(linen-0|nnx-None))$"
    ),
    "tests/reference/test_parts_under_jit.py::test_experts_inside_jit": "^(tunix-qwen3_moe|maxtext-qwen3_moe-scan1)$",
    "tests/reference/test_initializers.py::test_a_base_left_by_loftq_is_held_in_four_bits_as_it_is": "linen",
    "tests/serving/test_row_methods.py::test_each_row_is_as_with_its_adapter_alone": "^(LOKR-0|MISS-1)$",
    "tests/serving/test_row_methods.py::test_each_row_is_as_in_a_model_that_its_adapter_is_merged_into": (
        "^(HRA-0-linen-True|ROAD-0-nnx-True)$"
    ),
    "tests/serving/test_bank.py::test_each_row_is_as_with_its_adapter_alone": "^(nnx-True|linen-False)$",
    "tests/serving/test_bank.py::test_nothing_is_compiled_again": "^(nnx-False|linen-True)$",
    "tests/serving/test_bank.py::test_on_eight_devices_the_arrays_are_sharded_as_the_base": "^True$",
    "tests/serving/test_generation.py::test_answers_are_those_of_transformers": "^nnx",
    "tests/serving/test_generation.py::test_each_row_has_its_own_adapter": "^linen$",
    "tests/serving/test_mixed_peft.py::test_a_mixed_batch_is_as_in_peft": "^(nnx-1|linen-0)$",
    "tests/serving/test_selection.py::test_fused_parts_have_the_adapters_of_their_rows": "0$",
    "tests/serving/test_shared_tensors.py::test_each_row_is_as_with_its_adapter_alone_and_nothing_is_compiled_again": (
        "^(nnx-True|linen-False)$"
    ),
    "tests/serving/test_mixed_peft.py::test_rows_of_several_veras_are_as_each_alone_in_peft": "^nnx",
    "tests/serving/test_shared_tensors.py::test_the_projections_are_held_once": "^(nnx-True|linen-False)$",
    "tests/serving/test_ways_out.py::test_put_works_or_its_error_names_a_way_that_works": "^BEFT$",
    "tests/models/foreign/test_dialects.py::test_inside_jit": (
        "^(qwix-(dot_general-o|einsum-(q|experts)|scan1-(dense|einsum-q))|gemma-(q|gate|dense)|nnx.LoRA-LoRALinear"
        "|maxtext-out|levanter-q|lorax-weight|keras-out)$"
    ),
    "tests/models/foreign/test_real.py::test_trained_and_loaded_again": "^tunix-qwen3-tied$",
    "tests/models/foreign/test_trained.py::test_peft_opens_what_they_trained": r"^(nnx\.LoRA|qwix-linen-scan1)$",
    "tests/models/foreign/test_product.py::test_there_and_back": "^(?!maxtext:gemma3)",
    "tests/models/test_layer_choices.py::test_a_fresh_adapter_changes_nothing_and_draws_each_module_as_its_rank_asks": (
        "^(ranks|dora)$"
    ),
    "tests/models/test_layer_choices.py::test_every_layer_part_and_expert_gets_its_own_change": "^dora-1$",
    "tests/models/test_layer_choices.py::test_shards_and_jit_give_the_same_tensors": "^dora$",
    "tests/models/test_layer_choices.py::test_training_keeps_unused_entries_at_zero": "^ranks$",
    "tests/models/test_linen_gemma.py::test_adapts_equals_merged_and_costs_what_hand_written_costs": "^attention",
    "tests/models/test_linen_gemma.py::test_fused_parts": "^(LORA-targets2|IA3-targets1)$",
    "tests/models/test_linen_wrapper.py::test_init_on_parameters_gives_the_specs_of_the_wrapper": "^1$",
    "tests/models/test_linen_wrapper.py::test_all_linear_and_what_init_resolved_it_to": "^ia3$",
    "tests/models/test_linen_wrapper.py::test_no_gradient_of_a_frozen_weight": "^(mha|scan0_remat)$",
    "tests/models/test_nnx.py::test_dropout_in_stacked_layers": "^1$",
    "tests/models/test_nnx_training.py::test_the_demo_llama_scanned_and_rematerialized": "^1$",
    "tests/models/test_linen_registry.py::test_computes_what_the_merged_weights_compute": "LORA$|^(dense|mha)-IA3$",
    "tests/reference/test_initializers.py::test_a_converted_adapter_applies_to_the_original_base_in_peft": (
        "^(False-pissa|True-olora)$"
    ),
    "tests/reference/test_initializers.py::test_an_unconverted_file_changes_the_base_on_request_as_in_peft": (
        "^(nnx-None-pissa|linen-0-olora)$"
    ),
    "tests/reference/test_initializers.py::test_eva_finds_the_components_and_ranks_that_peft_finds": "^nnx",
    "tests/reference/test_initializers.py::test_what_is_taken_out_of_the_base_is_what_peft_takes": (
        "^(corda|lora_ga)-llama-nnx-None$|^pissa_niter_2"
    ),
    "tests/reference/test_layer_choices.py::test_a_file_computes_the_same_and_comes_back": (
        "^(everything|ia3)-.*1$|^(ranks|alphas|copies|dora|layers)-nnx-0$"
    ),
    "tests/reference/test_adaption_prompt.py::test_peft_and_jaxadapt_open_each_others_files": (
        "^(nnx-False|linen-True)$"
    ),
    "tests/reference/test_prompts_bart.py::test_pefts_adapter_gives_pefts_logits": "^nnx$",
    "tests/reference/test_prompts_gpt2.py::test_pefts_adapter_gives_pefts_logits": "^(prefix-nnx|prompt-linen)$",
    "tests/reference/test_prompts_heads.py::test_peft_and_jaxadapt_open_each_others_files": "^prefix-nnx$",
    "tests/reference/test_prompts_t5.py::test_a_mask_of_the_decoder_is_extended_as_pefts": "^tasks$",
    "tests/reference/test_prompts_t5.py::test_a_new_prefix_has_the_depth_of_the_decoder_and_peft_opens_it": "1, 2",
    "tests/reference/test_prompts_t5.py::test_generation_as_peft_generates": "^prefix$",
    "tests/reference/test_prompts_t5.py::test_peft_and_jaxadapt_open_each_others_files": "^prompt-linen$",
    "tests/reference/test_quantized.py::test_trains_saves_and_merges_as_peft_does_on_the_dense_base": (
        "^(ours-nf4-nnx|qwix-nf4-linen)$"
    ),
    "tests/storage/test_location.py::test_several_processes_in_a_store": "^s3$",
    "tests/storage/test_orbax.py::test_the_adapter_out_of_a_whole_checkpoint": (
        "^(linen variables-save_v1|linen train state-save_v0_manager|linen collection-save_v0|nnx state-save_v1_items"
        "|nnx pure dict-save_v1|nnx model and optimizer-(save_v1|save_v0_manager))$"
    ),
    "tests/system/test_benchmarks.py::test_it_runs": "^(codec|fingerprint|paper)$",
    "tests/system/test_freed.py::test_adapters_that_come_and_go_leave_no_pages_behind": "^load$",
    "tests/system/test_full_disk.py::test_what_the_kernel_refuses": (
        "^(adapter-kernel|manager-permission|orbax-kernel)$"
    ),
    "tests/training/test_checkpoint.py::test_a_killed_training_resumes_bit_for_bit": "^nnx$",
    "tests/training/test_checkpoint.py::test_leaving_without_waiting_lands_the_checkpoint": "^(end|exception)-",
    "tests/training/test_checkpoint.py::test_sigterm_saves_and_leaves": "^sigterm (in|with a)",
    "tests/training/test_checkpoint_tunix.py::test_resuming_inside_tunix": "^2$",
    "tests/training/test_optim.py::test_gradients_are_pefts": "^False$",
    "tests/training/test_optim.py::test_lora_fa_takes_pefts_steps": "^scan$",
    "tests/training/test_optim.py::test_lora_plus_takes_pefts_steps": "^nnx$",
    "tests/models/test_nnx_custom.py::test_tunix": "^qwen3$",
    "tests/models/foreign/test_real.py::test_they_compute_what_peft_computes": "^(?!tunix-gemma3$)",
    "tests/models/foreign/test_real.py::test_peft_computes_what_they_compute": "^(?!tunix-gemma3$)",
    "tests/methods/prompt/test_cache.py::test_decoding_with_a_cache": "^(PREFIX_TUNING-RelativeNet|PROMPT_TUNING-Net)$",
    "tests/methods/test_rotations.py::test_a_convolution_has_pefts_merged_kernel": "^(BOFT|HRA orthogonal)$",
    "tests/methods/test_rotations.py::test_an_embedding_is_rotated_after_the_lookup": "^exact$",
    "tests/methods/test_lora_and_ia3.py::test_dora_is_the_direction_times_the_magnitude": (
        "^(plain|heads in|mixed|fused|scaled|two parts)-straight$|^(turned|split|one part|heads out)-transposed$"
    ),
    "tests/methods/test_lora_and_ia3.py::test_unweight_inverts_weight": "^(LORA1|IA30)-",
    "tests/reference/test_interchange.py::test_we_load_what_peft_saves": (
        "^(gpt2-nnx-scan1-lora|gpt2-linen-lora-patterns|llama-linen-ia3|llama-nnx-(scan0-ia3|lora-regex))$"
    ),
    "tests/reference/test_interchange.py::test_peft_loads_what_we_save": (
        "^(gpt2-linen-lora-patterns|gpt2-nnx-scan1-lora|llama-nnx-(scan0-ia3|lora-regex))$"
    ),
    "tests/reference/test_variants.py::test_pefts_file_computes_here_what_it_computes_there": (
        "^(kasa-linen-scan0|kasa_patterns-linen|mica-nnx-scan1)$"
    ),
    "tests/reference/test_ia3_conv.py::test_pefts_file_computes_here_what_it_computes_there": (
        "^(conv3d.*|conv2d_groups_feedforward-nnx-None|conv2d_groups-nnx-1|conv2d-linen-0)$"
    ),
    "tests/storage/test_location.py::test_a_killed_save_leaves_the_old_or_the_new": "^s3-folder$",
    "tests/system/test_full_disk.py::test_a_small_file_system_that_is_full": "^(adapter|orbax)$",
    "tests/persistence/test_sharded_files.py::test_saved_anywhere_it_is_one_file": (
        "^(8-fsdp-True|8-tp-False|4x2-both-True|4x2-fsdp-False|2x2x2-(tp-False|both-True))$"
    ),
    "tests/arrays/test_quantized.py::test_computes_what_the_dense_base_does": (
        "^(nnx-nf4-(lora|dora)|nnx-int8-(ia3|one)|linen-int8-(lora|dora)|linen-nf4-(ia3|copy|one))$"
    ),
    "tests/arrays/test_quantized.py::test_blocks_run_in_the_order_that_is_asked_for_and_within_each_layer": "^nf4$",
    "tests/export/test_base_weights_transformers.py::test_transformers_reads_the_merged_model_and_we_read_its": (
        "^(flax-(gpt2|bert|roberta-classifier)|tunix-qwen3-tied|gemma-gemma3|maxtext-llama3.1-scan1)$"
    ),
    "tests/reference/test_interchange.py::test_one_file_fits_every_twin": "^(llama-lora|gpt2-ia3)$",
    "tests/reference/test_interchange.py::test_a_rank_of_one_layer": "^(linen-1|nnx-None)$",
    "tests/storage/test_orbax.py::test_saved_by_any_loaded_by_all": "^(linen-ia3|nnx-lora|nnx state-ia3|adapter-lora)$",
    "tests/models/test_nnx_registry.py::test_equals_the_effective_weight": (
        r"^(?!(general_first_axis|general_out|general_unsorted|einsum_ellipsis|scan1_remat|remat)-).*lora$"
        "|^(linear|mha)-ia3$"
    ),
}


# Of these tests, CI runs a sixth of the methods each: every test meets about six methods, and every method several of
# the tests.
SHARED_OUT = (
    "tests/methods/test_conformance.py::test_transformations_of_jax",
    "tests/methods/test_conformance.py::test_parts_of_a_fused_weight_are_modules_of_their_own",
    "tests/methods/test_conformance.py::test_training_in_nnx_changes_the_trained_tensors_only",
    "tests/methods/test_conformance.py::test_stacked_layers_are_the_layers_one_by_one",
    "tests/methods/test_conformance.py::test_eight_devices",
    "tests/methods/test_conformance.py::test_every_layout_gives_the_same_weight_from_the_same_file",
    "tests/methods/test_conformance_peft.py::test_pefts_file_gives_pefts_logits_and_gradients",
    "tests/methods/test_conformance_peft.py::test_redundant_tensors_may_be_missing",
    "tests/methods/test_bias.py::test_the_biases_of_adapted_modules_are_trained_and_saved_as_peft_does",
    "tests/methods/test_tools.py::test_everything_around_a_method",
    "tests/methods/test_conformance.py::test_a_fresh_adapter_leaves_the_output_alone_where_the_method_says_so",
)
# The first of these tests compares a method's logits and gradients with PEFT's in NNX, the second in Linen, which takes
# twice as long. CI runs the first for the methods that it leaves out of the second.
NNX_GRADIENTS = "tests/methods/test_conformance_peft.py::test_the_variables_of_an_nnx_model_have_pefts_gradients"
LINEN_GRADIENTS = "tests/methods/test_conformance_peft.py::test_pefts_file_gives_pefts_logits_and_gradients"
# Of the cases of these long tests, CI runs a fifth.
FIFTHS = (
    "tests/merging/test_combine_kinds_peft.py::test_equal_to_peft",
    "tests/models/test_linen_registry.py::test_computes_what_the_merged_weights_compute",
    "tests/reference/test_ia3_conv.py::test_pefts_file_computes_here_what_it_computes_there",
    "tests/reference/test_interchange.py::test_peft_loads_what_we_save",
    "tests/reference/test_interchange.py::test_we_load_what_peft_saves",
    "tests/reference/test_lora_bf16.py::test_bfloat16_is_as_near_to_float32_as_pefts",
    "tests/reference/test_lora_matrix.py::test_pefts_file_computes_here_what_it_computes_there",
    "tests/reference/test_interchange.py::test_our_config_is_the_json_peft_writes",
    "tests/models/test_tracing.py::test_einsum",
    "tests/models/foreign/test_product.py::test_there_and_back",
    "tests/models/test_layer_registry.py::test_nnx",
    "tests/models/test_nnx_registry.py::test_equals_the_effective_weight",
)

EVERY_TYPE = (
    "tests/methods/test_bias.py",
    "tests/methods/test_conformance.py",
    "tests/methods/test_conformance_peft.py",
    "tests/methods/test_other_kinds.py",
    "tests/methods/test_tools.py::test_everything_around_a_method",
)
# On the weight, the input, the output, the bias; copies; one matrix for each block; shared tensors.
QUICK = re.compile(r"^(BEFT|IA3|LN_TUNING|LOKR|LORA|OFT|TRAINABLE_TOKENS|VERA)\b")


def is_of_another_method(nodeid: str) -> bool:
    """True for a case of a method that .ci/quick leaves out."""
    name, _, case = nodeid.partition("[")
    return name.startswith(EVERY_TYPE) and bool(case) and QUICK.match(case) is None


def second_halves(nodeids: Iterable[str]) -> set[str]:
    """Return the cases that the newest jax and flax need not see: half of those of each test with more than three."""
    cases: dict[str, list[str]] = collections.defaultdict(list)
    for nodeid in nodeids:
        cases[nodeid.partition("[")[0]].append(nodeid)
    return {
        nodeid
        for of_test in cases.values()
        for nodeid in (of_test[1:] if len(of_test) > 3 else [])
        if zlib.crc32(nodeid.encode()) % 2
    }


def is_long(nodeid: str) -> bool:
    """True for a case that CI leaves out."""
    name, _, case = nodeid.partition("[")
    case = case.removesuffix("]")
    if name in CI and re.search(CI[name], case) is None:
        return True
    if name in FIFTHS:
        return zlib.crc32(case.encode()) % 5 != 0
    if name == NNX_GRADIENTS:
        return not is_long(f"{LINEN_GRADIENTS}[{case}]")
    if name not in SHARED_OUT:
        return False
    return (zlib.crc32(case.partition("-")[0].encode()) + SHARED_OUT.index(name)) % 6 != 0
