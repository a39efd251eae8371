"""The trained adapter that training starts from: a run's, or a plain LoRA adapter of PEFT."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from formtune.base.folder import check_base, identity
from formtune.configuration.yaml_file import is_set
from formtune.errors import UserError, as_user_error
from formtune.model.lora import Lora, difference

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_TO_LORA = {"r": "r", "lora_alpha": "alpha", "use_rslora": "rslora", "use_dora": "dora"}
# Settings of PEFT that do not change what the adapter computes, or that the names of its weights show.
IGNORED = {
    "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "task_type", "inference_mode",
    "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "runtime_config",
    "fan_in_fan_out",
}  # fmt: skip
PLAIN_INITIALIZATIONS = (True, False, "gaussian", "orthogonal")  # others change the base too
MERGE = "merge it with PEFT's merge_and_unload and set model.base to the result"


class TrainedAdapter:
    """A plain LoRA adapter on disk; only safetensors are read."""

    def __init__(self, name: str) -> None:
        from peft import LoraConfig, PeftConfig
        from safetensors.torch import load

        self.name, run = name, Path(name, "adapter")
        remedy = "; name a finished run, or a PEFT adapter saved as safetensors"
        with as_user_error(f"model.adapter: {name} cannot be read", remedy):
            folder = run if run.is_dir() else _folder(name)
            self.config: Any = PeftConfig.from_pretrained(str(folder))
            content, manifest = (folder / WEIGHTS).read_bytes(), folder / "manifest.json"
            self.weights, self.hash = load(content), hashlib.sha256(content).hexdigest()
            self._base = json.loads(manifest.read_bytes())["base"].get("identity") if manifest.is_file() else None
        plain = vars(LoraConfig())
        for key, value in vars(self.config).items():
            if key == "init_lora_weights" and value in PLAIN_INITIALIZATIONS:
                continue
            if key not in IGNORED and key not in PEFT_TO_LORA and (value or None) != (plain.get(key) or None):
                raise UserError(f"model.adapter: {name} is not plain LoRA ({key}: {value}); {MERGE}")
        if not all(torch.isfinite(tensor).all() for tensor in self.weights.values()):
            raise UserError(f"model.adapter: {name} has non-finite weights")

    @property
    def settings(self) -> dict[str, Any]:
        """The adapter's values of `model.lora`."""
        values = {key: getattr(self.config, field) for field, key in PEFT_TO_LORA.items()}
        values["alpha"] = None if values["alpha"] == 2 * values["r"] else values["alpha"]
        targets = self.config.target_modules
        if isinstance(targets, str):  # a pattern
            targets = {name.partition(".lora_")[0].rpartition(".")[2] for name in self.weights}
        return values | {"targets": sorted(targets)}

    def check(self, lora: Lora) -> None:
        """Refuse other settings in `model.lora`."""
        settings = {"r": lora.r, "alpha": lora.alpha or 2 * lora.r, "rslora": lora.rslora, "dora": lora.dora}
        for field, key in PEFT_TO_LORA.items():
            if (value := getattr(self.config, field)) != settings[key]:
                remedy = f"set model.lora.{key}: {str(value).lower()}"
                raise UserError(f"model.lora.{key}: {self.name} was trained with {field}: {value}; {remedy}")

    def check_base(self, base: str, base_identity: str) -> None:
        """Refuse another base than the adapter's, compared by its weights if these are known, else by name."""
        name = str(self.config.base_model_name_or_path or "")
        recorded = self._base or (identity(name) if Path(name, "config.json").is_file() else None)
        same = recorded == base_identity if recorded else name == base
        if not same:
            key = f"base_model_name_or_path in the adapter's {CONFIG}"
            remedy = f"set model.base: {name}, or, for a copy of it, {key}" if name else f"set {key}"
            trained_on = f"{name or 'an unnamed base'}, not on {base}"
            raise UserError(f"model.base: {self.name} was trained on {trained_on}; {remedy}")

    def load(self, model: Any) -> None:
        """Load the weights into a model's adapters; refuse the weights of other layers."""
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        if name := difference(get_peft_model_state_dict(model, save_embedding_layers=False), self.weights):
            remedy = f"set model.base to its base, and model.lora.targets: [{', '.join(self.settings['targets'])}]"
            raise UserError(f"model.lora.targets: {self.name} has different layers (first {name}); {remedy}")
        set_peft_model_state_dict(model, self.weights)


def take_settings(model: Any) -> None:
    """Set the keys of `model.lora` that the user leaves unset to the values of `model.adapter`."""
    missing = [key for key in (*PEFT_TO_LORA.values(), "targets") if not is_set(f"model.lora.{key}")]
    if missing:
        settings = TrainedAdapter(model.adapter).settings
        for key in missing:
            model.lora[key] = settings[key]


def _folder(name: str) -> Path:
    from huggingface_hub import snapshot_download

    known = check_base(name, "model.adapter")
    return Path(known if Path(known).is_dir() else snapshot_download(known, allow_patterns=[CONFIG, WEIGHTS]))
