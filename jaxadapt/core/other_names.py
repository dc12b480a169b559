"""Names of PEFT, Tunix and Qwix with their counterparts in jaxadapt, for error messages."""

from __future__ import annotations

_ADAPT, _LOAD = "jaxadapt.adapt(model, config, rngs=nnx.Rngs(0))", "jaxadapt.load(path, model)"
OTHER_NAMES = {
    name: counterpart
    for names, counterpart in {
        "get_peft_model inject_adapter_in_model add_adapter apply_lora_to_model": _ADAPT,
        "PeftModel PeftModelForCausalLM PeftMixedModel PeftAdapterMixin": f"{_LOAD}, or {_ADAPT}",
        "AutoPeftModelForCausalLM AutoPeftModel": f"jaxadapt.export.import_base(path, model), then {_LOAD}",
        "from_pretrained load_adapter load_pretrained load_peft_weights": _LOAD,
        "save_pretrained save_adapter save_lora save_lora_weights save_peft_weights": "jaxadapt.save(model, path)",
        "push_to_hub": "jaxadapt.push(model, 'org/name')",
        "set_adapter set_adapters enable_adapters": "jaxadapt.activate(model, name)",
        "disable_adapter disable_adapters disable_adapter_layers": "with jaxadapt.disable(model)",
        "delete_adapter delete_adapters": "jaxadapt.delete(model, name)",
        "merge_and_unload merge_adapter": "jaxadapt.merge(model)",
        "unmerge_adapter": "jaxadapt.unmerge(model, adapter)",
        "unload": "jaxadapt.detach(model)",
        "add_weighted_adapter": "jaxadapt.combine(adapters, weights, method=…)",
        "print_trainable_parameters get_nb_trainable_parameters get_model_status get_layer_status": "print(jaxadapt"
        ".summary(model))",
        "get_peft_model_state_dict": "jaxadapt.to_peft(model).tensors",
        "set_peft_model_state_dict": "jaxadapt.inject(jaxadapt.from_peft(tensors, model), model)",
        "rescale_adapter_scale": "with jaxadapt.models.rescale(model, factor)",
        "convert_to_lora": "jaxadapt.merging.to_lora",
        "prepare_model_for_kbit_training": "jaxadapt.models.quantize(model, 'nf4')",
        "replace_lora_weights_loftq initialize_lora_eva_weights": "jaxadapt.initializers.start",
        "LoRAConfig LoRaConfig LoraProvider DoraConfig RsLoraConfig QLoraConfig": "jaxadapt.LoraConfig(r=8, "
        "target_modules=[…])",
        "Ia3Config": "jaxadapt.IA3Config",
        "PeftConfig": "jaxadapt.Config; read one with jaxadapt.read_config(path)",
        "TaskType PeftType": "a string, such as task_type='CAUSAL_LM'",
        "LoRAParam LoraParam LoRA Lora": "jaxadapt.AdapterParam, the type of the trained parameters",
        "TrainerCallback PeftSavingCallback": "jaxadapt.CheckpointManager",
    }.items()
    for name in names.split()
}
"""{name in the other library: the call or class of jaxadapt}."""
