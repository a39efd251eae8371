"""A trained adapter that training begins from: a run's, or a folder or hub id of PEFT's. Only safetensors are read."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from formtune.base.folder import check_base
from formtune.base.identity import identity
from formtune.configuration.yaml_file import is_set
from formtune.errors import UserError, first_line
from formtune.model.lora import Lora, lora_config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEYS = {"r": "r", "lora_alpha": "alpha", "use_rslora": "rslora", "use_dora": "dora"}  # PEFT's, and those of model.lora
# Settings of PEFT that do not change what the adapter computes, or that the names of its weights show.
FREE = {
    "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "task_type", "inference_mode",
    "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "runtime_config",
}  # fmt: skip
ADDED = (True, False, None, "gaussian", "orthogonal", "eva")  # initializations that leave the base's weights alone
MERGE = "merge it (formtune export RUN --as merged) and set model.base to the result"


class TrainedAdapter:
    """An adapter on disk: its settings, and its weights."""

    def __init__(self, name: str) -> None:
        from peft import PeftConfig
        from safetensors.torch import load

        self.name, folder = name, _folder(name)
        try:
            self.config: Any = PeftConfig.from_pretrained(str(folder))
            content, manifest = (folder / WEIGHTS).read_bytes(), folder / "manifest.json"
            self.weights, self.hash = load(content), hashlib.sha256(content).hexdigest()
            self._base = json.loads(manifest.read_bytes())["base"].get("identity") if manifest.is_file() else None
        except Exception as error:  # a damaged file can raise anything
            raise UserError(f"model.adapter: {folder} cannot be read ({first_line(error)})") from None
        if self.config.peft_type != "LORA":
            raise UserError(f"model.adapter: {name} is {self.config.peft_type}, not LoRA; {MERGE}")
        if not all(torch.isfinite(tensor).all() for tensor in self.weights.values()):
            raise UserError(f"model.adapter: {name} has non-finite weights")

    @property
    def settings(self) -> dict[str, Any]:
        """The values of `model.lora` that it was trained with."""
        values = {key: getattr(self.config, field) for field, key in KEYS.items()}
        values["alpha"] = None if values["alpha"] == 2 * values["r"] else values["alpha"]
        targets = self.config.target_modules
        # PEFT may write a pattern, or the path of each layer.
        if isinstance(targets, str) or any("layers." in target for target in targets):
            targets = {name.partition(".lora_")[0].rpartition(".")[2] for name in self.weights}
        return values | {"targets": sorted(targets)}

    def check(self, model: nn.Module, lora: Lora) -> None:
        """Refuse other settings than `model.lora`, and weights that are not those of adapters on this model."""
        from peft import get_peft_model, get_peft_model_state_dict

        expected, how = lora_config(model, lora), self.config.init_lora_weights
        given = vars(self.config) | {"init_lora_weights": how in ADDED or how}
        for field in (it.name for it in fields(expected) if it.name not in FREE):
            if (given[field] or None) != (getattr(expected, field) or None):
                key = f"model.lora.{KEYS[field]}" if field in KEYS else "model.adapter"
                remedy = f"set {key}: {str(given[field]).lower()}" if field in KEYS else MERGE
                raise UserError(f"{key}: {self.name} was trained with {field}: {given[field]}; {remedy}")
        expected.init_lora_weights = False  # there are no weights
        adapted = get_peft_model(model, expected, low_cpu_mem_usage=True)  # type: ignore[arg-type]
        states = (get_peft_model_state_dict(adapted, save_embedding_layers=False), self.weights)
        shapes = ({(name, tensor.shape) for name, tensor in state.items()} for state in states)
        if different := set.symmetric_difference(*shapes):
            raise UserError(
                f"model.lora.targets: the adapter {self.name} has different layers (first {min(different)[0]}); set "
                f"model.lora.targets: [{', '.join(self.settings['targets'])}], and model.base to its own base"
            )

    def check_base(self, base: str, base_identity: str) -> None:
        """Refuse another base than the adapter's: by its weights where these are known, else by its name."""
        name = str(self.config.base_model_name_or_path)
        recorded = self._base or (identity(name) if Path(name).is_dir() else None)
        if recorded != base_identity if recorded else name != base:
            raise UserError(
                f"model.base: {self.name} was trained on {name}, not on {base}; set model.base: {name}, or, if {base} "
                f"is a copy of it, write that path into base_model_name_or_path of the adapter's {CONFIG}"
            )

    def load(self, model: Any) -> None:
        """Put the weights into the adapters of a model."""
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, self.weights)


def take_settings(model: Any) -> None:
    """Set the keys of `model.lora` that the user does not set to what `model.adapter` was trained with."""
    missing = [key for key in (*KEYS.values(), "targets") if not is_set(f"model.lora.{key}")]
    if model.adapter and missing:
        settings = TrainedAdapter(model.adapter).settings
        for key in missing:
            model.lora[key] = settings[key]


def _folder(name: str) -> Path:
    """The folder of an adapter: a run's `adapter`, the folder itself, or that of a hub id in the local cache."""
    from transformers.utils.hub import cached_file

    run = Path(name, "adapter")
    source = str(run) if run.is_dir() else check_base(name, "model.adapter")
    try:
        return [Path(str(cached_file(source, file))).parent for file in (CONFIG, WEIGHTS)][-1]
    except OSError as error:
        what = first_line(error).partition(". ")[0]
        remedy = "name a finished run, or a PEFT adapter saved as safetensors"
        raise UserError(f"model.adapter: {what}; {remedy}") from None
