"""What is known to fail on the way to production, often silently, found before training from shapes and names alone.
Each rule was seen to hold with the versions that it names (docs/deployment.md)."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from formtune.base.folder import skeleton
from formtune.errors import UserError
from formtune.export.quantize import GROUPS, SCHEMES, linear_layers
from formtune.model.lora import Lora, lora_config

MERGED = ("merge", *SCHEMES)  # every scheme begins with the merged model
CALIBRATED = ("gptq", "awq")
VLLM = ("vllm",)
TARGETS = (*MERGED, *VLLM)
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank; 16 is its default


class Plan:
    """A base, with or without weights, and PEFT's configuration of the adapter, as far as rules look at them."""

    def __init__(self, model: Any, adapter: Any, qlora: bool = False) -> None:
        from peft.tuners.tuners_utils import check_target_module_exists

        self.adapter = adapter
        self.qlora = qlora  # whether training quantizes the base to 4 bits
        self.vllm_rank = next((rank for rank in VLLM_RANKS if rank >= adapter.r), None)
        quantization = getattr(model.config, "quantization_config", None) or {}
        quantization = quantization if isinstance(quantization, dict) else quantization.to_dict()
        self.quantized = quantization.get("quant_method")  # on disk
        self.conv1d = any(type(module).__name__ == "Conv1D" for module in model.modules())
        layers = linear_layers(model)
        # The first layer of which a part does not fit: None if all do.
        self.off_group = _first_misfit(layers, GROUPS[-1], 1)
        self.off_width = _first_misfit(layers, 1, 16)
        self.off_kernels = _first_misfit(layers, 128, 64)
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        paths = [path for path, module in model.named_modules() if any(module is end for end in ends)]
        tied = model.config.get_text_config().tie_word_embeddings and adapter.target_modules != "all-linear"
        self.tied_targets = [path for path in paths if tied and check_target_module_exists(adapter, path)]


def _first_misfit(layers: dict[str, tuple[int, int]], inputs: int, outputs: int) -> str | None:
    """A layer whose numbers of inputs and outputs are not multiples of these, in words."""
    misfits = (f"{path} ({i} in, {o} out)" for path, (i, o) in layers.items() if i % inputs or o % outputs)
    return next(misfits, None)


class Rule(NamedTuple):
    name: str
    severity: Literal["error", "warning"]
    targets: Sequence[str]
    versions: str
    applies: Callable[[Plan], Any]
    line: str  # what, why and the remedy; may name `p`, the plan, and `a`, the adapter's configuration


def before_training(base: str, lora: Lora) -> list[str]:
    """What to know before training, a line each.

    Raises:
        UserError: The adapter would merge into another model, or not at all.
    """
    plan = read_plan(base, lora)
    refuse(plan, ["merge"])
    return [line for rule, line in check(plan, VLLM) if rule.severity == "error"]


def check(plan: Plan, targets: Sequence[str]) -> list[tuple[Rule, str]]:
    """The rules that apply, each with its line; errors first."""
    rules = (rule for rule in RULES if set(rule.targets) & set(targets) and rule.applies(plan))
    return [(rule, rule.line.format(p=plan, a=plan.adapter)) for rule in rules]


def refuse(plan: Plan, targets: Sequence[str]) -> None:
    """Raise a UserError if a rule finds an error."""
    for rule, line in check(plan, targets):
        if rule.severity == "error":
            raise UserError(line)


def read_plan(base: str, lora: Lora, quantize: str | None = None) -> Plan:
    model = skeleton(base)
    return Plan(model, lora_config(model, lora), bool(quantize))


_PEFT, _VLLM, _GPTQMODEL = "peft 0.21.2", "vllm 0.33.0", "gptqmodel 7.6.0"

# fmt: off
RULES = (
    Rule("tied embeddings", "error", MERGED, _PEFT, lambda p: p.tied_targets,
         "model.lora.targets: LoRA on {p.tied_targets[0]}, whose weights this base shares between input and output, "
         "silently merges into another model; leave it out of model.lora.targets"),
    Rule("quantized base", "error", MERGED, _PEFT, lambda p: p.quantized,
         "model.base: weights quantized by {p.quantized} cannot be merged into; take the base that it was made from"),
    Rule("initialization", "error", VLLM, _VLLM, lambda p: p.adapter.init_lora_weights in ("pissa", "olora"),
         "model.lora.initialization: {a.init_lora_weights} changes the base's weights; a server that adds BA to the "
         "original base silently answers as another model; take true, gaussian or orthogonal, or serve the merged "
         "model (--as merged)"),
    Rule("rank", "error", VLLM, _VLLM, lambda p: not p.vllm_rank,
         "model.lora.r: rank {a.r} is more than vLLM takes; take 512 at most, or serve the merged model (--as merged)"),
    Rule("DoRA", "error", VLLM, _VLLM, lambda p: p.adapter.use_dora,
         "model.lora.dora is not supported by vLLM; set model.lora.dora: false, or serve the merged model (--as "
         "merged)"),
    Rule("modules_to_save", "error", VLLM, _VLLM, lambda p: p.adapter.modules_to_save,
         "model.lora.modules_to_save: {a.modules_to_save} is refused by vLLM; serve the merged model (--as merged)"),
    Rule("Conv1D", "error", CALIBRATED, _GPTQMODEL, lambda p: p.conv1d,
         "a base with Conv1D layers (GPT-2) is saved and cannot be loaded again; take int8 or nf4, or another base"),
    Rule("group size", "error", CALIBRATED, _GPTQMODEL, lambda p: p.off_group,
         f"{{p.off_group}} has inputs that are not a multiple of {GROUPS[-1]}: it is quantized and saved silently, and "
         "fails at the first input; take int8 or nf4, or another base"),
    Rule("output width", "error", CALIBRATED, _GPTQMODEL, lambda p: p.off_width,
         "{p.off_width} has outputs that are not a multiple of 16: it is quantized and saved silently, and fails when "
         "it is loaded; take int8 or nf4, or another base"),
    Rule("kernels", "warning", CALIBRATED, _VLLM, lambda p: p.off_kernels,
         "{p.off_kernels} does not fit vLLM's fast kernels (128 in, 64 out, on each GPU of several); expect the slow "
         "ones"),
    Rule("4-bit training", "warning", MERGED, "bitsandbytes 0.50.2", lambda p: p.qlora,
         "model.quantize: an adapter of a 4-bit base must be merged into the full-precision base, and tested there; "
         "formtune export does so"),
    Rule("rank flag", "warning", VLLM, _VLLM, lambda p: (p.vllm_rank or 0) > 16,
         "rank {a.r}: start vLLM with --max-lora-rank {p.vllm_rank}, it takes 16 by default; or choose a lower rank"),
)
# fmt: on
