"""Write the tuned adapter as a plain PEFT folder, with everything needed to use and to evaluate it."""

from __future__ import annotations

import shutil
from pathlib import Path

from formtune.files import write_json
from formtune.model import FormatModule
from formtune.training.manifest import write_manifest


def export_adapter(module: FormatModule, folder: Path, config: Path, data: str | None) -> None:
    """Write adapter, tokenizer with its chat template, format, configuration and manifest into a new folder.

    PEFT alone loads it: `PeftModel.from_pretrained(base_model, folder)`. The folder appears only when it is complete.
    """
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    # False: PEFT would otherwise ask a hub whether the base's vocabulary was resized.
    module.model.save_pretrained(partial, safe_serialization=True, save_embedding_layers=False)
    module.renderer.tokenizer.save_pretrained(partial)
    write_json(partial / "format.json", module.format.to_dict())
    shutil.copyfile(config, partial / "config.yaml")
    (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
    write_manifest(partial, "adapter", module.base, data)
    partial.replace(folder)
