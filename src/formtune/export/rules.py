"""What is known to fail on the way to production, often silently, found before training from shapes and names alone.
Each rule was seen to hold with the versions that it names (docs/deployment.md)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from formtune.base.folder import skeleton
from formtune.errors import UserError
from formtune.export.quantize import GROUPS, SCHEMES, linear_layers
from formtune.model.lora import Lora, lora_config

MERGED = ("merge", *SCHEMES)  # every scheme begins with the merged model
CALIBRATED = ("gptq", "awq")
VLLM = ("vllm",)
TARGETS = (*MERGED, *VLLM)
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank; 16 is its default


class Rule(NamedTuple):
    name: str
    targets: Sequence[str]
    versions: str
    finds: Callable[[Any, Any], Any]  # what is wrong with a model (weights are not read) and an adapter's configuration
    line: str  # what, why and the remedy; `it` is what was found


def before_training(base: str, lora: Lora) -> list[str]:
    """What to know before training, a line each.

    Raises:
        UserError: The adapter would merge into another model, or not at all.
    """
    model = skeleton(base)
    adapter = lora_config(model, lora)
    refuse(model, adapter, "merge")
    return [line for _, line in check(model, adapter, "vllm")]


def check(model: Any, adapter: Any, target: str) -> list[tuple[str, str]]:
    """The rules that a base and PEFT's configuration of an adapter break: the name of each, and its line."""
    found = [(rule, rule.finds(model, adapter)) for rule in RULES if target in rule.targets]
    return [(rule.name, f"{rule.line.format(it=it)} ({rule.versions})") for rule, it in found if it]


def refuse(model: Any, adapter: Any, target: str) -> None:
    """Raise a UserError if a rule is broken."""
    for _, line in check(model, adapter, target):
        raise UserError(line)


def vllm_rank(rank: int) -> int | None:
    """The lowest --max-lora-rank that takes a rank; None if there is none."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def _tied_target(model: Any, adapter: Any) -> str | None:
    """An embedding with LoRA that input and output share."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if not model.config.get_text_config().tie_word_embeddings or adapter.target_modules == "all-linear":
        return None
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    paths = [path for path, module in model.named_modules() if any(module is end for end in ends)]
    return next((path for path in paths if check_target_module_exists(adapter, path)), None)


def _quantized(model: Any, _: Any) -> str | None:
    """How the base is quantized on disk."""
    config = getattr(model.config, "quantization_config", None) or {}
    return (config if isinstance(config, dict) else config.to_dict()).get("quant_method")


def _misfit(inputs: int, outputs: int) -> Callable[[Any, Any], str | None]:
    """A function that finds a layer whose numbers of inputs and outputs are not multiples of these."""

    def find(model: Any, _: Any) -> str | None:
        layers = linear_layers(model).items()
        return next((f"{path} ({i} in, {o} out)" for path, (i, o) in layers if i % inputs or o % outputs), None)

    return find


# fmt: off
RULES = (
    Rule("tied embeddings", MERGED, "peft 0.21.2", _tied_target,
         "model.lora.targets: LoRA on {it}, whose weights this base shares between input and output, silently merges "
         "into a different model; leave it out of model.lora.targets"),
    Rule("quantized base", MERGED, "peft 0.21.2", _quantized,
         "model.base: weights quantized by {it} cannot be merged into; use the original base"),
    Rule("rank", VLLM, "vllm 0.33.0", lambda _, adapter: None if vllm_rank(adapter.r) else adapter.r,
         "model.lora.r: rank {it} is more than vLLM supports; use 512 at most, or serve "
         "the merged model (--as merged)"),
    Rule("DoRA", VLLM, "vllm 0.33.0", lambda _, adapter: adapter.use_dora,
         "model.lora.dora is not supported by vLLM; set model.lora.dora: false, or serve the merged model (--as "
         "merged)"),
    Rule("Conv1D", CALIBRATED, "gptqmodel 7.6.0",
         lambda model, _: any(type(module).__name__ == "Conv1D" for module in model.modules()),
         "a base with Conv1D layers (GPT-2) is saved and cannot be loaded again; use int8 or nf4, or another base"),
    Rule("group size", CALIBRATED, "gptqmodel 7.6.0", _misfit(GROUPS[-1], 1),
         f"{{it}} has inputs that are not a multiple of {GROUPS[-1]}: it is quantized and saved silently, and fails at "
         "the first input; use int8 or nf4, or another base"),
    Rule("output width", CALIBRATED, "gptqmodel 7.6.0", _misfit(1, 16),
         "{it} has outputs that are not a multiple of 16: it is quantized and saved silently, and fails when it is "
         "loaded; use int8 or nf4, or another base"),
)
# fmt: on
