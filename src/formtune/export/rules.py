"""What is known to fail on the way to production, often silently, found before training from shapes and names alone.

Each rule was seen to hold with the versions that it names (docs/deployment.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

from formtune.base.folder import skeleton
from formtune.errors import UserError
from formtune.export.quantize import CALIBRATED, GROUPS, group_size
from formtune.model.lora import Lora, lora_config

TARGETS = ("merge", "vllm", "int8", "nf4", "gptq", "awq")
MERGED = tuple(target for target in TARGETS if target != "vllm")  # every quantization begins with the merged model
VLLM = ("vllm",)
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank; 16 is its default


class Plan:
    """A base, with or without weights, and PEFT's configuration of the adapter, as far as rules look at them."""

    def __init__(self, model: Any, adapter: Any, qlora: bool) -> None:
        from peft.tuners.tuners_utils import check_target_module_exists

        self.adapter: dict[str, Any] = adapter.to_dict()
        self.rank = max([adapter.r or 1, *(adapter.rank_pattern or {}).values()])
        self.vllm_rank = next((rank for rank in VLLM_RANKS if rank >= self.rank), None)
        self.saved = sorted(adapter.modules_to_save or ())
        self.qlora = qlora  # whether training quantizes the base to 4 bits
        self.tied = bool(model.config.get_text_config().tie_word_embeddings)
        quantization = getattr(model.config, "quantization_config", None) or {}
        quantization = quantization if isinstance(quantization, dict) else quantization.to_dict()
        self.quantized = quantization.get("quant_method")  # on disk
        # Paths of layers. Conv1D is a linear layer with its weight transposed (GPT-2).
        modules, ends = dict(model.named_modules()), (model.get_output_embeddings(), model.get_input_embeddings())
        linear = {path: m for path, m in modules.items() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
        self.embeddings = {path for path, module in modules.items() if any(module is end for end in ends)}
        self.biased = {path for path, module in linear.items() if getattr(module, "bias", None) is not None}
        self.conv1d = any(type(module).__name__ == "Conv1D" for module in linear.values())
        self.layers = {  # inputs and outputs
            path: (m.in_features, m.out_features) if isinstance(m, nn.Linear) else (m.nx, m.nf)
            for path, m in linear.items()
            if path not in self.embeddings
        }
        self.group = group_size(inputs for inputs, _ in self.layers.values())
        targets = adapter.target_modules
        self.adapted = set(self.layers)
        if targets != "all-linear":
            paths = linear.keys() | self.embeddings
            self.adapted = {path for path in paths if targets and check_target_module_exists(adapter, path)}


@dataclass(frozen=True, slots=True)
class Rule:
    """A known failure; `finds` names what in a plan it applies to, of which the first is shown."""

    name: str
    severity: Literal["error", "warning"]
    targets: Sequence[str]
    versions: str
    finds: Callable[[Plan], Iterable[str]]
    reason: str
    remedy: str


class Finding(NamedTuple):
    """A rule that applies, and all that it says in one line."""

    rule: Rule
    line: str


def before_training(base: str, lora: Lora, quantize: str | None) -> list[str]:
    """What to know before training, a line each.

    Raises:
        UserError: The adapter would merge into another model, or not at all.
    """
    plan = read_plan(base, lora, quantize)
    warnings = refuse(plan, ["merge"])
    vllm = [finding for finding in check(plan, VLLM) if finding.rule.severity == "error"]
    return [finding.line for finding in (*warnings, *vllm)]


def check(plan: Plan, targets: Sequence[str]) -> list[Finding]:
    """The rules that apply, errors first."""
    findings = [
        Finding(rule, f"{what} {rule.reason}; {rule.remedy}")
        for rule in RULES
        if set(rule.targets) & set(targets)
        for what in sorted(rule.finds(plan))[:1]
    ]
    return sorted(findings, key=lambda finding: finding.rule.severity)


def refuse(plan: Plan, targets: Sequence[str]) -> list[Finding]:
    """The warnings; UserError if a rule finds an error."""
    findings = check(plan, targets)
    if findings and findings[0].rule.severity == "error":
        raise UserError(findings[0].line)
    return findings


def read_plan(base: str, lora: Lora, quantize: str | None) -> Plan:
    """The plan of a task that is not trained yet."""
    model = skeleton(base)
    return Plan(model, lora_config(model, lora), bool(quantize))


def _key(*keys: str, words: str = "{}") -> Callable[[Plan], Iterable[str]]:
    return lambda plan: [words.format(key) for key in keys if plan.adapter.get(key)]


def _shape(fits: Callable[[int, int], bool]) -> Callable[[Plan], Iterable[str]]:
    return lambda plan: [f"{path} ({i} in, {o} out)" for path, (i, o) in plan.layers.items() if not fits(i, o)]


def _initialization(plan: Plan) -> Iterable[str]:
    method = str(plan.adapter.get("init_lora_weights"))
    changes_base = method.lower().startswith(("pissa", "olora", "corda", "loftq"))
    return [f"model.lora.initialization: {method}"] if changes_base else []


_UNMERGED, _SERVE_MERGED = "merge without it", "serve the merged model (--as merged)"
_PEFT, _VLLM, _GPTQMODEL = "peft 0.21.2", "vllm 0.33.0", "gptqmodel 7.6.0"
_OTHER = "take int8 or nf4, or another base"

# fmt: off
RULES = (
    Rule("tied embeddings", "error", MERGED, _PEFT,
         lambda p: [f"model.lora.targets: LoRA on {path}, whose weights this base shares between input and output,"
                    for path in p.adapted & p.embeddings if p.tied],
         "silently merges into another model", "leave it out of model.lora.targets"),
    Rule("tied embeddings kept", "warning", MERGED, _PEFT,
         lambda p: [f"modules_to_save: {name} of a base with shared embeddings" for name in p.saved
                    if p.tied and name in {path.rpartition(".")[2] for path in p.embeddings}],
         "merges correctly, but unties the embeddings: the model grows by one of them", "leave it out if size matters"),
    Rule("layer_replication", "error", MERGED, _PEFT, _key("layer_replication"),
         "silently merges into another model, which cannot be saved", _UNMERGED),
    Rule("lora_bias", "error", MERGED, _PEFT,
         lambda p: [f"lora_bias on {path}, which has no bias," for path in p.adapted - p.biased
                    if p.adapter.get("lora_bias")],
         "cannot be merged", "leave lora_bias out"),
    Rule("quantized base", "error", MERGED, _PEFT,
         lambda p: [f"model.base: weights quantized by {p.quantized}"] if p.quantized else [],
         "cannot be merged into", "take the base that it was made from"),
    Rule("4-bit training", "warning", MERGED, "bitsandbytes 0.50.2",
         lambda p: ["model.quantize: an adapter of a 4-bit base"] if p.qlora else [],
         "must be merged into the full-precision base, and tested there", "formtune export does so"),
    Rule("initialization", "error", VLLM, _VLLM, _initialization,
         "changes the base's weights; a server that adds BA to the original base silently answers as another model",
         f"take true, gaussian or orthogonal, or {_SERVE_MERGED}"),
    Rule("rank", "error", VLLM, _VLLM, lambda p: [] if p.vllm_rank else [f"model.lora.r: rank {p.rank}"],
         "is more than vLLM takes", f"take 512 at most, or {_SERVE_MERGED}"),
    Rule("rank flag", "warning", VLLM, _VLLM,
         lambda p: [f"rank {p.rank}: start vLLM with --max-lora-rank {p.vllm_rank}, it"] if (p.vllm_rank or 0) > 16
         else [],
         "takes 16 by default", "or choose a lower rank"),
    Rule("DoRA", "error", VLLM, _VLLM, _key("use_dora", words="model.lora.dora"),
         "is not supported by vLLM", f"set model.lora.dora: false, or {_SERVE_MERGED}"),
    Rule("bias", "error", VLLM, _VLLM,
         lambda p: ["lora_bias"] if p.adapter.get("lora_bias") else
         [f"bias: {p.adapter['bias']}"] if p.adapter.get("bias", "none") != "none" else [],
         "is not supported by vLLM", _SERVE_MERGED),
    Rule("replicated layers", "error", VLLM, _VLLM, _key("layer_replication"),
         "is not supported by vLLM", "leave it out"),
    Rule("variant", "error", VLLM, _VLLM, _key("alora_invocation_tokens", "use_qalora", "use_bdlora"),
         "is not supported by vLLM", _SERVE_MERGED),
    Rule("modules_to_save", "error", VLLM, _VLLM,
         lambda p: [] if p.saved in ([], ["classifier", "score"]) else
         [f"model.lora.modules_to_save: {', '.join(p.saved)}"],
         "is refused by vLLM", _SERVE_MERGED),
    Rule("token indices", "error", VLLM, _VLLM, _key("trainable_token_indices"),
         "passes vLLM's check of the configuration and fails when it loads", _SERVE_MERGED),
    Rule("Conv1D", "error", CALIBRATED, _GPTQMODEL,
         lambda p: ["a base with Conv1D layers (GPT-2)"] if p.conv1d else [],
         "is saved and cannot be loaded again", _OTHER),
    Rule("group size", "error", CALIBRATED, _GPTQMODEL, _shape(lambda inputs, _: group_size([inputs]) is not None),
         f"has inputs that are no multiple of {GROUPS[-1]}: it is quantized and saved silently, and fails at the first "
         "input", _OTHER),
    Rule("output width", "error", CALIBRATED, _GPTQMODEL, _shape(lambda _, outputs: outputs % 16 == 0),
         "has outputs that are no multiple of 16: it is quantized and saved silently, and fails when it is loaded",
         _OTHER),
    Rule("kernels", "warning", CALIBRATED, _VLLM,
         _shape(lambda inputs, outputs: inputs % 128 == 0 and outputs % 64 == 0),
         "does not fit vLLM's fast kernels (128 in, 64 out, on each GPU of several)", "expect the slow ones"),
)
# fmt: on
