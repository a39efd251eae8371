"""The keys that matter most, what other tools call them, and the short help, printed without importing torch."""

# Key, default, meaning, and names in Lightning, transformers, TRL, PEFT, Axolotl, LLaMA-Factory, litgpt and torchtune;
# a name with a dot is meant in its group alone. A test compares the defaults with the parser's.
KEYS = (
    ("model.base", "", "folder or hub id of the base model", "model.name model.path model.id model_name model_id "
     "model_name_or_path pretrained_model_name_or_path base_model model_path checkpoint_dir"),
    ("model.chat_template", "null", "file of a Jinja chat template, in place of the base's own", "chat_template "
     "chat_template_path chat_template_jinja"),
    ("model.lora.r", "16", "rank of the adapters; `formtune sweep` chooses it by evidence", "rank lora_r lora_rank"),
    ("model.lora.alpha", "null", "scale of the adapters; null: twice the rank", "lora_alpha alpha"),
    ("model.lora.dropout", "0.05", "dropout before the adapters", "lora_dropout"),
    ("model.lora.targets", "attention", "layers with adapters: attention, all-linear, or names", "target_modules "
     "lora_target lora_target_modules"),
    ("model.optimizer.lr", "0.0002", "peak learning rate", "lr learning_rate max_lr"),
    ("model.optimizer.weight_decay", "", "weight decay of the adapters", "weight_decay"),
    ("model.optimizer", "", "class of torch.optim, or of yours", "optim optimizer"),
    ("model.scheduler", "", "class of torch.optim.lr_scheduler, or of yours", "lr_scheduler lr_scheduler_type"),
    ("model.scheduler.warmup", "0.1", "share of all steps in which the learning rate rises", "warmup warmup_ratio "
     "warmup_steps num_warmup_steps lr_warmup_steps"),
    ("model.max_grad_norm", "1.0", "norm to which gradients are clipped", "max_grad_norm grad_clip gradient_clip_val "
     "gradient_clipping"),
    ("model.max_new_tokens", "256", "tokens of the longest answer", "max_tokens max_completion_length"),
    ("model.tokens_per_micro_batch", "4096", "tokens computed at once; lower it if memory runs out", "micro_batch_size "
     "per_device_eval_batch_size eval_batch_size val_batch_size"),
    ("model.gradient_checkpointing", "false", "less memory, a third slower", "activation_checkpointing"),
    ("model.quantize", "null", "4bit: QLoRA", "load_in_4bit load_in_8bit quantization_bit"),
    ("model.constrained", "false", "constrained decoding in every evaluation", ""),
    ("data.train", "", "rows to train on: files, a folder, a glob, a data set's folder or hub id", "dataset "
     "dataset_name dataset_path data_path train_file train_data train_dataset data.path"),
    ("data.validation", "0.1", "the same for validation, or a share of train", "val_data validation_file eval_file "
     "eval_dataset val_size val_set_size validation_split val_split_fraction"),
    ("data.test", "0.1", "the same for the final test, or a share of train", "test_file test_data test_size"),
    ("data.system", "null", "system prompt; {schema} in it is replaced by the JSON Schema", "system_prompt "
     "system_message default_system"),
    ("data.format", "", "JsonSchema, ToolCalls, Regex, Labels, Tagged, or a class of yours", ""),
    ("data.columns.prompt", "prompt", "column of the input, or a template such as 'Title: {title}'", "data.text "
     "dataset_text_field text_column"),
    ("data.columns.completion", "completion", "column of the target", "data.label label_column"),
    ("data.rows_per_step", "16", "rows of one optimizer step, over all devices", "batch_size train_batch_size "
     "global_batch_size per_device_train_batch_size gradient_accumulation_steps gradient_accumulation_iters "
     "accumulate_grad_batches"),
    ("data.max_length", "1024", "tokens of prompt and target; longer rows are not used, never truncated", "cutoff_len "
     "max_seq_length max_seq_len sequence_len model_max_length block_size"),
    ("data.bad_rows", "refuse", "rows with an invalid format: refuse to train, or drop and count", ""),
    ("trainer.max_epochs", "3", "passes over the training rows", "epochs epoch num_epochs num_train_epochs"),
    ("trainer.max_steps", "-1", "optimizer steps at most; -1: no limit", "steps num_steps max_train_steps max_iters"),
    ("trainer.val_check_interval", "100", "optimizer steps between validations", "eval_steps val_steps eval_interval"),
    ("trainer.precision", "null", "bf16-mixed, 16-mixed or 32-true; null: bf16-mixed where the hardware has it, else "
     "32-true", "bf16 fp16 dtype torch_dtype mixed_precision"),
    ("trainer.devices", "auto", "number of GPUs or processes", "gpus num_gpus n_gpu num_devices num_processes "
     "nproc_per_node"),
    ("trainer.strategy", "auto", "auto, ddp, or fsdp for a base that one device cannot hold", "deepspeed fsdp"),
    ("trainer.log_every_n_steps", "10", "optimizer steps between logged values", "logging_steps log_interval"),
    ("trainer.logger", "null", "null: TensorBoard; or a class such as WandbLogger", "report_to wandb"),
    ("checkpoint.every_n_seconds", "30.0", "seconds between checkpoints to resume from", "save_steps save_interval"),
    ("overfitting.patience", "null", "validations in a row that find overfitting before training stops; null: never",
     "early_stopping early_stopping_patience patience"),
    ("seed_everything", "0", "seed of adapters, dropout and order", "seed random_seed"),
    ("task", "the YAML's name", "folder in logs/", "project project_name"),
    ("run", "date and time", "folder in logs/<task>/", "output_dir out_dir save_dir log_dir run_name experiment_name"),
    ("resume", "false", "continue an interrupted run, with the same result as without the interruption",
     "resume_from_checkpoint resume_from"),
)  # fmt: skip
# What another tool's name means: the key, and its meaning.
MEANT = {name: (key, meaning) for key, _, meaning, names in KEYS for name in names.split()}
USAGE = {
    "train": "formtune train -c TASK.yaml [--quick] [--key value ...]",
    "fit": "formtune fit -c TASK.yaml [--key value ...]",
    "validate": "formtune validate RUN | -c TASK.yaml [--ckpt_path best|last|base|FILE] [--key value ...]",
    "test": "formtune test RUN | -c TASK.yaml [--ckpt_path best|last|base|FILE] [--key value ...]",
    "predict": "formtune predict RUN PROMPTS | -c TASK.yaml [--answers FILE] [--key value ...]",
}


def short_help(command: str, description: str) -> str:
    lines = [f"usage: {USAGE[command]}", "", description, "", "the keys that matter most (default):"]
    for key, default, meaning, _ in KEYS:
        name = f"--{key}" + (f" ({default})" if default else "")
        lines.append(f"  {name:<46} {meaning}")
    lines += ["", "--help-all lists every key, --print_config=comments prints them as YAML (configs/reference.yaml)."]
    return "\n".join(lines)
