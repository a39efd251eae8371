"""The short help of the Lightning commands: the keys that matter most, printed without importing torch."""

from __future__ import annotations

# Key, default, meaning. A test compares the defaults with the parser's.
KEYS = (
    ("model.base", "", "folder or hub id of the base model"),
    ("model.lora.r", "16", "rank of the adapters; `formtune sweep` chooses it by evidence"),
    ("model.lora.targets", "attention", "layers with adapters: attention, all-linear, or names"),
    ("model.optimizer.lr", "0.0002", "peak learning rate"),
    ("model.scheduler.warmup", "0.1", "share of all steps in which the learning rate rises"),
    ("model.max_new_tokens", "256", "tokens of the longest answer"),
    ("model.tokens_per_micro_batch", "4096", "tokens computed at once; lower it if memory runs out"),
    ("model.gradient_checkpointing", "false", "less memory, a third slower"),
    ("model.quantize", "null", "4bit: QLoRA"),
    ("model.constrained", "false", "constrained decoding in every evaluation"),
    ("data.train", "", "rows to train on: files, a folder, a glob, a data set's folder or hub id"),
    ("data.validation", "0.1", "the same for validation, or a share of train"),
    ("data.test", "0.1", "the same for the final test, or a share of train"),
    ("data.system", "null", "system prompt; {schema} in it is replaced by the JSON Schema"),
    ("data.format", "", "JsonSchema, Regex, Labels, Tagged, or a class of yours"),
    ("data.columns.prompt", "prompt", "column of the input, or a template such as 'Title: {title}'"),
    ("data.columns.completion", "completion", "column of the target"),
    ("data.rows_per_step", "16", "rows of one optimizer step, over all devices"),
    ("data.max_length", "1024", "tokens of prompt and target; longer rows are not used, never truncated"),
    ("data.bad_rows", "refuse", "rows with an invalid format: refuse to train, or drop and count"),
    ("trainer.max_epochs", "3", "passes over the training rows"),
    ("trainer.val_check_interval", "100", "optimizer steps between validations"),
    ("trainer.precision", "null", "null: bf16-mixed where the hardware has it, else 32-true"),
    ("trainer.devices", "auto", "number of GPUs or processes"),
    ("seed_everything", "0", "seed of adapters, dropout and order"),
)
RUNS = (
    ("task", "the YAML's name", "folder in logs/"),
    ("run", "date and time", "folder in logs/<task>/"),
    ("resume", "false", "continue an interrupted run, with the same result as without the interruption"),
)
USAGE = {
    "train": "formtune train -c TASK.yaml [--quick] [--key value ...]",
    "fit": "formtune fit -c TASK.yaml [--key value ...]",
    "validate": "formtune validate RUN | -c TASK.yaml [--ckpt_path best|last|base|FILE] [--key value ...]",
    "test": "formtune test RUN | -c TASK.yaml [--ckpt_path best|last|base|FILE] [--key value ...]",
    "predict": "formtune predict RUN PROMPTS | -c TASK.yaml [--answers FILE] [--key value ...]",
}


def short_help(command: str, description: str) -> str:
    """What `formtune COMMAND --help` prints."""
    lines = [f"usage: {USAGE[command]}", "", description, "", "the keys that matter most (default):"]
    for key, default, meaning in (*KEYS, *RUNS):
        name = f"--{key}" + (f" ({default})" if default else "")
        lines.append(f"  {name:<46} {meaning}")
    lines += ["", "--help-all lists every key, --print_config=comments prints them as YAML (configs/reference.yaml)."]
    return "\n".join(lines)
