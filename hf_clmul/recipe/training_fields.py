"""The fields of `transformers.TrainingArguments` as a table, so that a recipe can be checked without
importing torch. FIELDS is written by scripts/make_training_fields.py; REMOVED and OURS are kept by hand. No
logic."""

# generated: begin
TRANSFORMERS_VERSION = "5.23.0"
FIELDS: dict[str, str] = {
    "output_dir": "str | None",
    "per_device_train_batch_size": "int",
    "num_train_epochs": "float",
    "max_steps": "int",
    "learning_rate": "float",
    "lr_scheduler_type": (
        "Literal['linear', 'cosine', 'cosine_with_restarts', 'polynomial', 'constant', "
        "'constant_with_warmup', 'inverse_sqrt', 'reduce_lr_on_plateau', 'cosine_with_min_lr', "
        "'cosine_warmup_with_min_lr', 'warmup_stable_decay', 'greedy']"
    ),
    "lr_scheduler_kwargs": "dict | str | None",
    "warmup_steps": "float",
    "optim": (
        "Literal['adamw_torch', 'adamw_torch_fused', 'adamw_torch_xla', 'adamw_torch_npu_fused', "
        "'adafactor', 'adamw_anyprecision', 'adamw_torch_4bit', 'adamw_torch_8bit', 'ademamix', 'sgd', "
        "'adagrad', 'adamw_bnb_8bit', 'adamw_8bit', 'ademamix_8bit', 'lion_8bit', 'lion_32bit', "
        "'paged_adamw_32bit', 'paged_adamw_8bit', 'paged_ademamix_32bit', 'paged_ademamix_8bit', "
        "'paged_lion_32bit', 'paged_lion_8bit', 'rmsprop', 'rmsprop_bnb', 'rmsprop_bnb_8bit', "
        "'rmsprop_bnb_32bit', 'galore_adamw', 'galore_adamw_8bit', 'galore_adafactor', "
        "'galore_adamw_layerwise', 'galore_adamw_8bit_layerwise', 'galore_adafactor_layerwise', 'lomo', "
        "'adalomo', 'grokadamw', 'schedule_free_radam', 'schedule_free_adamw', 'schedule_free_sgd', "
        "'apollo_adamw', 'apollo_adamw_layerwise', 'stable_adamw']"
    ),
    "optim_args": "str | None",
    "weight_decay": "float",
    "adam_beta1": "float",
    "adam_beta2": "float",
    "adam_epsilon": "float",
    "optim_target_modules": "str | list[str] | None",
    "gradient_accumulation_steps": "int",
    "average_tokens_across_devices": "bool",
    "max_grad_norm": "float",
    "label_smoothing_factor": "float",
    "bf16": "bool",
    "fp16": "bool",
    "bf16_full_eval": "bool",
    "fp16_full_eval": "bool",
    "tf32": "bool | None",
    "activation_checkpointing": "bool | None",
    "activation_checkpointing_kwargs": "dict | str | None",
    "gradient_checkpointing": "bool | None",
    "gradient_checkpointing_kwargs": "dict | str | None",
    "torch_compile": "bool",
    "torch_compile_backend": "str | None",
    "torch_compile_mode": "str | None",
    "use_liger_kernel": "bool",
    "liger_kernel_config": "dict | None",
    "use_cache": "bool",
    "neftune_noise_alpha": "float | None",
    "torch_empty_cache_steps": "int | None",
    "auto_find_batch_size": "bool",
    "logging_strategy": "Literal['no', 'steps', 'epoch']",
    "logging_steps": "float",
    "logging_first_step": "bool",
    "log_on_each_node": "bool",
    "logging_nan_inf_filter": "bool",
    "include_num_input_tokens_seen": "str | bool",
    "log_level": "Literal['detail', 'debug', 'info', 'warning', 'error', 'critical', 'passive']",
    "log_level_replica": "Literal['detail', 'debug', 'info', 'warning', 'error', 'critical', 'passive']",
    "disable_tqdm": "bool | None",
    "report_to": "str | list[str] | None",
    "run_name": "str | None",
    "project": "str",
    "trackio_space_id": "str | None",
    "trackio_bucket_id": "str | None",
    "trackio_static_space_id": "str | Literal[False] | None",
    "eval_strategy": "Literal['no', 'steps', 'epoch']",
    "eval_steps": "float | None",
    "eval_delay": "float",
    "per_device_eval_batch_size": "int",
    "prediction_loss_only": "bool",
    "eval_on_start": "bool",
    "eval_do_concat_batches": "bool",
    "eval_use_gather_object": "bool",
    "eval_accumulation_steps": "int | None",
    "include_for_metrics": "list[str]",
    "batch_eval_metrics": "bool",
    "save_only_model": "bool",
    "save_strategy": "Literal['no', 'steps', 'epoch', 'best']",
    "save_steps": "float",
    "save_on_each_node": "bool",
    "save_total_limit": "int | None",
    "enable_jit_checkpoint": "bool",
    "push_to_hub": "bool",
    "hub_token": "str | None",
    "hub_private_repo": "bool | None",
    "hub_model_id": "str | None",
    "hub_strategy": "Literal['end', 'every_save', 'checkpoint', 'all_checkpoints']",
    "hub_always_push": "bool",
    "hub_revision": "str | None",
    "load_best_model_at_end": "bool",
    "metric_for_best_model": "str | None",
    "greater_is_better": "bool | None",
    "ignore_data_skip": "bool",
    "restore_callback_states_from_checkpoint": "bool",
    "full_determinism": "bool",
    "seed": "int",
    "data_seed": "int | None",
    "use_cpu": "bool",
    "accelerator_config": "dict | str | None",
    "parallelism_config": "Any",
    "dataloader_drop_last": "bool",
    "dataloader_num_workers": "int",
    "dataloader_pin_memory": "bool",
    "dataloader_persistent_workers": "bool",
    "dataloader_prefetch_factor": "int | None",
    "dataloader_multiprocessing_context": "Literal['fork', 'spawn', 'forkserver'] | None",
    "dataloader_in_order": "bool",
    "remove_unused_columns": "bool",
    "label_names": "list[str] | None",
    "train_sampling_strategy": "Literal['random', 'sequential', 'group_by_length', 'batch_rebalance']",
    "length_column_name": "str",
    "ddp_find_unused_parameters": "bool | None",
    "ddp_bucket_cap_mb": "int | None",
    "ddp_broadcast_buffers": "bool | None",
    "ddp_static_graph": "bool | None",
    "ddp_backend": "Literal['nccl', 'gloo', 'mpi', 'xccl', 'hccl', 'cncl', 'mccl'] | None",
    "ddp_timeout": "int",
    "fsdp": "bool | str | None",
    "fsdp_config": "dict | str | None",
    "deepspeed": "dict | str | None",
    "debug": "str | list[str]",
    "skip_memory_metrics": "bool",
    "do_train": "bool",
    "do_eval": "bool",
    "do_predict": "bool",
    "resume_from_checkpoint": "str | None",
    "local_rank": "int",
}
# generated: end

# Fields of transformers 4 that many recipes and tutorials still name, and what to write today.
REMOVED: dict[str, str] = {
    "adafactor": "write `optim: adafactor`",
    "dispatch_batches": "leave it out; set per_device_train_batch_size",
    "evaluation_strategy": (
        "it is named eval_strategy now and has no effect here, since a request's training has no data to evaluate on: leave it "
        "out; what is measured stands in the section `evaluation`"
    ),
    "fp16_backend": "leave it out; `fp16: true` is enough",
    "fp16_opt_level": "leave it out; `fp16: true` is enough",
    "fsdp_min_num_params": "write `fsdp_config: {min_num_params: ...}`",
    "fsdp_transformer_layer_cls_to_wrap": "write `fsdp_config: {transformer_layer_cls_to_wrap: [...]}`",
    "group_by_length": (
        "it is named train_sampling_strategy now and has no effect here, since the order of examples is fixed by the seed: leave "
        "it out"
    ),
    "half_precision_backend": "leave it out; `fp16: true` is enough",
    "include_inputs_for_metrics": "write `include_for_metrics: [inputs]`",
    "include_tokens_per_second": "write include_num_input_tokens_seen",
    "jit_mode_eval": "leave it out, or use torch_compile",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "mp_parameters": "leave it out",
    "no_cuda": "write `use_cpu: true`",
    "overwrite_output_dir": "leave it out; a finished run is never overwritten, choose another --output",
    "past_index": "leave it out",
    "per_gpu_eval_batch_size": "write per_device_eval_batch_size",
    "per_gpu_train_batch_size": "write per_device_train_batch_size",
    "push_to_hub_model_id": "write hub_model_id",
    "push_to_hub_organization": "write `hub_model_id: ORGANIZATION/NAME`",
    "push_to_hub_token": "leave it out; log in with `hf auth login` or set HF_TOKEN",
    "ray_scope": "leave it out",
    "save_safetensors": "leave it out; models are always saved as safetensors",
    "sharded_ddp": "write fsdp",
    "split_batches": "leave it out; set per_device_train_batch_size",
    "torchdynamo": "write torch_compile_backend",
    "tpu_metrics_debug": "write `debug: tpu_metrics_debug`",
    "tpu_num_cores": "leave it out; the launcher sets it",
    "use_ipex": "leave it out",
    "use_legacy_prediction_loop": "leave it out",
    "use_mps_device": "leave it out; the device is found without it",
    "warmup_ratio": "write warmup_steps, which accepts a fraction such as 0.1",
    "xpu_backend": "write ddp_backend",
}

# Fields of ClmulConfig that TrainingArguments has not; its others have sections of their own in a recipe.
ADDED: dict[str, str] = {"max_length": "int | None", "change_steps": "int"}

# Fields that a recipe must not set, and why.
OURS: dict[str, str] = {
    "output_dir": "each request has its own folder in the run folder; choose the run folder with --output",
    "resume_from_checkpoint": "the same command continues a stopped run by itself",
    "remove_unused_columns": "the columns of each role are needed; it is always off",
    "logging_nan_inf_filter": "it hides a collapse; it is always off",
    "seed": "the recipe's own `seed` is the one: every request derives its seed from it",
    "push_to_hub": "set `export.push_to_hub` to a repository id: the finished model is pushed, with its card",
    "hub_token": "the recipe is saved and shared with the model; log in with `hf auth login` or set HF_TOKEN",
}
