"""What is known to go wrong on the way to production, without a word or with one, before anything is trained.

Each rule was seen to hold with the versions that it names (docs/deployment.md); most of them save hours, and the silent
ones save a wrong model. A rule looks at names and shapes alone, so all of them together take no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from formtune.errors import UserError
from formtune.export.plan import Plan
from formtune.export.quantize import CALIBRATED, GROUPS, group_size

TARGETS = ("merge", "vllm", "int8", "nf4", "gptq", "awq")
MERGED = ("merge", "int8", "nf4", "gptq", "awq")  # every quantisation begins with the merged model
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that goes wrong.

    Args:
        name: What it is called.
        severity: `error` where the result is wrong or does not load, `warning` where it needs care.
        targets: The ways to production that it is about.
        reason: What happens, after what it was found on.
        remedy: What to do instead.
        versions: What it was established for.
        found: What of a plan it is found on, in words; None where it does not apply.
    """

    name: str
    severity: Literal["error", "warning"]
    targets: Sequence[str]
    reason: str
    remedy: str
    versions: str
    found: Callable[[Plan], str | None]


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that applies.

    Args:
        rule: The rule.
        targets: The asked-for targets that it is about.
        what: What it was found on.
    """

    rule: Rule
    targets: tuple[str, ...]
    what: str

    @property
    def line(self) -> str:
        """All in one line."""
        return f"{self.what} {self.rule.reason}; {self.rule.remedy}"


def check(plan: Plan, targets: Sequence[str]) -> list[Finding]:
    """The rules that apply, errors first."""
    found = []
    for rule in RULES:
        about = tuple(target for target in targets if target in rule.targets)
        if about and (what := rule.found(plan)) is not None:
            found.append(Finding(rule, about, what))
    return sorted(found, key=lambda finding: finding.rule.severity)


def refuse(plan: Plan, targets: Sequence[str]) -> list[Finding]:
    """The warnings.

    Raises:
        UserError: A rule finds an error.
    """
    found = check(plan, targets)
    if found and found[0].rule.severity == "error":
        raise UserError(found[0].line)
    return found


def _adapter(key: str, words: str) -> Callable[[Plan], str | None]:
    return lambda plan: words if plan.adapter.get(key) else None


def _tied(plan: Plan) -> str | None:
    adapted = sorted(plan.targets & plan.embeddings)
    if adapted and plan.tied:
        return f"model.lora.targets: LoRA on {adapted[0]}, whose weights this base shares between input and output,"
    return None


def _tied_saved(plan: Plan) -> str | None:
    saved = plan.adapter.get("modules_to_save") or ()
    names = sorted(name for name in saved if any(path.rpartition(".")[2] == name for path in plan.embeddings))
    return f"modules_to_save: {names[0]} of a base with shared embeddings" if names and plan.tied else None


def _quantized(plan: Plan) -> str | None:
    return f"model.base: weights quantised by {plan.quantized}" if plan.quantized else None


def _conv1d(plan: Plan) -> str | None:
    return "a base with Conv1D layers (GPT-2)" if plan.conv1d else None


def _lora_bias(plan: Plan) -> str | None:
    bare = sorted(plan.targets - plan.biased)
    return f"lora_bias on {bare[0]}, which has no bias," if plan.adapter.get("lora_bias") and bare else None


def _initialization(plan: Plan) -> str | None:
    method = str(plan.adapter.get("init_lora_weights"))
    changes = method.lower().startswith(("pissa", "olora", "corda", "loftq"))
    return f"model.lora.initialization: {method}" if changes else None


def _rank(plan: Plan) -> int:
    return max([plan.adapter.get("r") or 0, *(plan.adapter.get("rank_pattern") or {}).values()])


def _rank_too_high(plan: Plan) -> str | None:
    return f"model.lora.r: rank {_rank(plan)}" if _rank(plan) > VLLM_RANKS[-1] else None


def _rank_needs_flag(plan: Plan) -> str | None:
    rank = _rank(plan)
    if not 16 < rank <= VLLM_RANKS[-1]:
        return None
    return f"rank {rank}: start vLLM with --max-lora-rank {next(one for one in VLLM_RANKS if one >= rank)}, it"


def _saved(plan: Plan) -> str | None:
    saved = sorted(plan.adapter.get("modules_to_save") or ())
    return None if saved in ([], ["classifier", "score"]) else f"model.lora.modules_to_save: {', '.join(saved)}"


def _bias(plan: Plan) -> str | None:
    if plan.adapter.get("lora_bias"):
        return "lora_bias"
    return f"bias: {plan.adapter['bias']}" if plan.adapter.get("bias", "none") != "none" else None


def _variant(plan: Plan) -> str | None:
    keys = ("alora_invocation_tokens", "use_qalora", "use_bdlora")
    return next((key for key in keys if plan.adapter.get(key)), None)


def _shape(fits: Callable[[int, int], bool]) -> Callable[[Plan], str | None]:
    def found(plan: Plan) -> str | None:
        return next((f"{path} ({a} in, {b} out)" for path, (a, b) in plan.layers.items() if not fits(a, b)), None)

    return found


def _kernel(inputs: int, outputs: int) -> bool:
    return inputs % 128 == 0 and outputs % 64 == 0


def _rules() -> Iterator[Rule]:
    merging, loading = "merge without it", "serve the merged model (--as merged)"
    peft, vllm, gptqmodel = "peft 0.21.2", "vllm 0.33.0", "gptqmodel 7.6.0"
    yield Rule("tied embeddings", "error", MERGED, "merges into another model without a word",
               "leave it out of model.lora.targets", peft, _tied)  # fmt: skip
    yield Rule("tied embeddings kept", "warning", MERGED, "is merged right, but they stand apart then and the model "
               "grows by one of them", "leave it out if size matters", peft, _tied_saved)  # fmt: skip
    yield Rule("layer_replication", "error", MERGED, "merges into another model without a word and cannot be saved",
               merging, peft, _adapter("layer_replication", "layer_replication"))  # fmt: skip
    yield Rule("lora_bias", "error", MERGED, "cannot be merged", "leave lora_bias out", peft, _lora_bias)
    yield Rule("quantised base", "error", MERGED, "cannot be merged into", "take the base that it was made from", peft,
               _quantized)  # fmt: skip
    yield Rule("4-bit training", "warning", MERGED, "does not merge into its 4-bit base but into the whole one, and "
               "must be tested there", "formtune export does so", "bitsandbytes 0.50.2",
               lambda plan: "model.quantize: an adapter of a 4-bit base" if plan.qlora else None)  # fmt: skip
    yield Rule("initialization", "error", ("vllm",), "changes the base's weights, and a server that adds BA to the "
               "base as it was answers as another model without a word",
               f"take true, gaussian or orthogonal, or {loading}", vllm, _initialization)  # fmt: skip
    yield Rule("rank", "error", ("vllm",), "is more than vLLM takes", f"take 512 at most, or {loading}", vllm,
               _rank_too_high)  # fmt: skip
    yield Rule("rank flag", "warning", ("vllm",), "takes 16 by default", "or choose a lower rank", vllm,
               _rank_needs_flag)  # fmt: skip
    yield Rule("DoRA", "error", ("vllm",), "is not supported by vLLM", f"set model.lora.dora: false, or {loading}",
               vllm, _adapter("use_dora", "model.lora.dora"))  # fmt: skip
    yield Rule("bias", "error", ("vllm",), "is not supported by vLLM", loading, vllm, _bias)
    yield Rule("replicated layers", "error", ("vllm",), "is not supported by vLLM", "leave it out", vllm,
               _adapter("layer_replication", "layer_replication"))  # fmt: skip
    yield Rule("variant", "error", ("vllm",), "is not supported by vLLM", loading, vllm, _variant)
    yield Rule("modules_to_save", "error", ("vllm",), "is refused by vLLM", loading, vllm, _saved)
    yield Rule("token indices", "error", ("vllm",), "passes vLLM's look at the configuration and fails when it loads",
               loading, vllm, _adapter("trainable_token_indices", "trainable_token_indices"))  # fmt: skip
    yield Rule("Conv1D", "error", CALIBRATED, "is saved and cannot be loaded again", "take int8 or nf4, or another "
               "base", gptqmodel, _conv1d)  # fmt: skip
    yield Rule("group size", "error", CALIBRATED, f"is no multiple of {GROUPS[-1]} in: quantised and saved without a "
               "word, it fails at the first input", "take int8 or nf4, or another base", gptqmodel,
               _shape(lambda inputs, _: group_size([inputs]) is not None))  # fmt: skip
    yield Rule("output width", "error", CALIBRATED, "is no multiple of 16 out: quantised and saved without a word, it "
               "fails when it is loaded", "take int8 or nf4, or another base", gptqmodel,
               _shape(lambda _, outputs: outputs % 16 == 0))  # fmt: skip
    yield Rule("kernels", "warning", CALIBRATED, "does not fit vLLM's fast kernels (128 in, 64 out, on each GPU of "
               "several)", "expect the slow ones", vllm, _shape(_kernel))  # fmt: skip


RULES = tuple(_rules())
