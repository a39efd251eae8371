"""`transformers serve` for folders in the working directory; adapters of one base share its weights in memory."""

import sys
from typing import Any

import torch
from transformers.cli.serve import ReasoningMode, Serve
from transformers.cli.serving import model_manager

from formtune.export.llama_cpp import HOST


class Models(model_manager.ModelManager):
    """Loads the folders with these names at startup, and no others."""

    names: list[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in self.names:
            self.load_model_and_processor(self.process_model_name(name))

    def process_model_name(self, model_id: str) -> str:  # type: ignore[override]
        from fastapi import HTTPException

        if model_id not in self.names:
            raise HTTPException(404, f"no model {model_id!r}; the models are {', '.join(self.names)}")
        return super().process_model_name(model_id)

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._load_model(*args, **kwargs)
        for first in list(self.loaded_models.values())[:1]:
            share_weights(model, first.model)
        return model

    def get_gen_models(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [{"id": name, "object": "model", "created": 0, "owned_by": "formtune"} for name in self.names]


def share_weights(model: Any, other: Any) -> None:
    """Let a model use the other's parameters where they are equal, with adapters on other layers too."""
    named = other.named_parameters(remove_duplicate=False)
    weights = {path.replace(".base_layer.", "."): parameter for path, parameter in named}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            shared = weights.get(f"{path}.{name}".replace(".base_layer.", "."))
            if shared is not None and parameter is not None and torch.equal(shared, parameter):
                module._parameters[name] = shared


if __name__ == "__main__":  # formtune serve starts it: PORT DTYPE QUANTIZATION REASONING NAME...
    port, dtype, quantization, reasoning, *Models.names = sys.argv[1:]
    model_manager.ModelManager = Models  # type: ignore[misc]
    Serve(
        dtype=dtype, quantization=quantization or None, reasoning=ReasoningMode(reasoning), model_timeout=-1, host=HOST,
        port=int(port),
    )  # fmt: skip
