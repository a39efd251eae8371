"""Known failures on the way to production, often silent, checked before training by shapes and names."""

from typing import Any

from formtune.base.folder import meta_model
from formtune.errors import UserError
from formtune.export.quantize import SCHEMES
from formtune.model.lora import Lora, lora_config

MERGED = ("merge", *SCHEMES)  # every scheme begins with the merged model
TARGETS = (*MERGED, "vllm")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank; 16 is its default
RULES = {  # message by rule, with the version where it was seen; `{value}` breaks it
    "tied embeddings": "model.lora.targets: LoRA on {value}, whose weights this base shares between input and output, "
    "silently merges into a different model; remove it from model.lora.targets (peft 0.21.2)",
    "quantized base": "model.base: weights quantized by {value} cannot be merged into; use the original base "
    "(peft 0.21.2)",
    "rank": "model.lora.r: rank {value} is more than vLLM supports; use at most 512, or serve the merged model "
    "(vllm 0.33.0)",
    "DoRA": "model.lora.dora is not supported by vLLM; set model.lora.dora: false, or serve the merged model "
    "(vllm 0.33.0)",
}


def before_training(base: str, lora: Lora) -> list[str]:
    """Warnings before training, a line each; a UserError if the adapter would merge into another model."""
    model = meta_model(base)
    adapter = lora_config(model, lora)
    refuse(model, adapter, "merge")
    return [line for _, line in check(model, adapter, "vllm")]


def refuse(model: Any, adapter: Any, target: str) -> None:
    """Raise a UserError if a rule is broken."""
    for _, line in check(model, adapter, target):
        raise UserError(line)


def check(model: Any, adapter: Any, target: str) -> list[tuple[str, str]]:
    """Name and message of each rule that a base (without weights) and an adapter's configuration break."""
    violations: dict[str, Any] = {}
    if target in MERGED:
        config = getattr(model.config, "quantization_config", None) or {}
        method = (config if isinstance(config, dict) else config.to_dict()).get("quant_method")
        violations = {"tied embeddings": _tied_target(model, adapter), "quantized base": method}
    if target == "vllm":
        violations = {"rank": None if vllm_rank(adapter.r) else adapter.r, "DoRA": adapter.use_dora}
    return [(name, RULES[name].format(value=value)) for name, value in violations.items() if value]


def vllm_rank(rank: int) -> int | None:
    """The lowest --max-lora-rank that allows a rank; None if there is none."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def _tied_target(model: Any, adapter: Any) -> str | None:
    """An embedding with LoRA that input and output share."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if not model.config.get_text_config().tie_word_embeddings or adapter.target_modules == "all-linear":
        return None
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    paths = [path for path, module in model.named_modules() if any(module is end for end in ends)]
    return next((path for path in paths if check_target_module_exists(adapter, path)), None)
