"""llama.cpp's server, a check that it renders prompts as training does, and the measurements of a GGUF file."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formtune.base.renderer import Renderer
from formtune.base.row import Row, with_json_arguments
from formtune.errors import UserError
from formtune.evaluation.outcomes import Decoded
from formtune.export.gguf import ADAPTER, FILE
from formtune.export.measure import (
    COMPARED_ROWS,
    POSITIONS,
    TIMED,
    TRIES,
    Closeness,
    Reference,
    compare,
    last_logits,
    load,
)

HOST = "127.0.0.1"
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy for requests to this machine
TOP_TOKENS = 20  # tokens whose log-probabilities the server gives, at each position of an answer
CHATML = "<|im_start|>"  # in llama.cpp's template for a file without one


class LlamaServer:
    """The server of llama.cpp in this process; it listens until the process ends."""

    def __init__(self, file: Path, context: int, port: int = 0, name: str = "model", thinking: bool = False) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        if (adapter := file.with_name(ADAPTER)).is_file():
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter))]
        params.hostnames, params.port, params.n_ctx = [HOST], port, context
        params.cpuparams.n_threads = torch.get_num_threads()  # more threads than free cores wait at every layer
        params.enable_reasoning, params.default_template_kwargs = -thinking, {"enable_thinking": str(thinking).lower()}
        params.verbosity, params.sampling.temp = 0, 0  # the temperature of requests that name none
        params.model_alias = {name}
        self._server = xllamacpp.Server(params)  # returns when the model is loaded
        self.url = self._server.listening_address

    def post(self, path: str, body: dict[str, Any]) -> Any:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with LOCAL.open(urllib.request.Request(self.url + path, data, headers)) as reply:
            return json.load(reply)

    def answer(self, prompt: Sequence[int], tokens: int, **options: Any) -> Any:
        """The greedy answer to a prompt in token ids."""
        body: dict[str, Any] = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "return_tokens": True}
        return self.post("/completion", body | options)


def llama_cpp_tokens(post: Callable[[str, dict[str, Any]], Any], text: str) -> list[int]:
    """Token ids of a rendered prompt, with the BOS that the server adds."""
    return post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]


def chat_prompt(row: Row) -> dict[str, Any]:
    """Messages and tools of a chat completion request for a row's prompt."""
    messages = with_json_arguments(row.messages if row.target is None else row.messages[:-1])
    # "none": the server does not parse the answer.
    return {"messages": messages} | ({"tools": json.loads(row.tools), "tool_choice": "none"} if row.tools else {})


def prompt_fault(row: Row, ids: list[int], renderer: Renderer) -> str | None:
    """How, and from which token on, a server's prompt differs from that of training; None if they are equal."""
    expected, decode, bos = row.prompt_ids, renderer.tokenizer.decode, [renderer.tokenizer.bos_token_id]
    if ids == expected:
        return None
    text, trained = decode(ids), decode(expected)
    turns = [(turn["role"], turn["content"]) for turn in chat_prompt(row)["messages"] if turn["content"] in trained]
    role, lost = next((turn for turn in turns if turn[1] not in text), ("", ""))
    faults = {  # the first that applies
        "it has a second BOS": ids == bos + expected,
        "its BOS is missing": bos + ids == expected,
        "the same text is tokenized differently": text == trained,
        "it is rendered by a default chat template (ChatML)": CHATML in text and CHATML not in trained,
        f"the {role} turn is trimmed": lost and lost.strip() in text,
        f"the {role} turn is missing or altered": lost,
        "the switch that turns thinking on or off is lost": text.count("think") != trained.count("think"),
        "it is rendered by another chat template": True,
    }  # fmt: skip
    fault = next(name for name, applies in faults.items() if applies)
    first = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, expected, strict=False)))
    theirs, ours = ([decode([token]) for token in part[first : first + 8]] for part in (ids, expected))
    sizes = f"the server's prompt has {len(ids):,} tokens and formtune's {len(expected):,}"
    return f"{sizes}: {fault}; from token {first} on they are {theirs}, and formtune's {ours}"


def check_prompts(server: LlamaServer, rows: Sequence[Row], renderer: Renderer) -> None:
    """Raise a UserError if the server renders a row's prompt into other tokens than training did."""
    for original in rows:
        row = replace(original, messages=renderer.turns(original.messages))
        if renderer.templated:
            text = server.post("/apply-template", chat_prompt(row))["prompt"]
        else:
            bos = row.prompt_ids[:1] == [renderer.tokenizer.bos_token_id]
            text = renderer.tokenizer.decode(row.prompt_ids[bos:])
        if fault := prompt_fault(row, llama_cpp_tokens(server.post, text), renderer):
            raise UserError(f"{row.where}: {fault}")


def measure_gguf(tuned: Reference, kind: str, folder: Path) -> tuple[Closeness, list[Decoded], dict[str, float]]:
    """`measure` for a GGUF file in llama.cpp, which must render every prompt as training did.

    The server gives log-probabilities only for its own answers, so the adapter computes logits of these.
    """
    renderer, stop = Renderer.load(str(folder), tags=tuned.tags), tuned.stop
    pairs = list(zip(tuned.rows, tuned.limits, strict=True))
    context = max([len(row.prompt_ids) + limit for row, limit in pairs] + [len(tuned.timed) + TIMED])
    server = LlamaServer(folder / FILE, context + 8, thinking=renderer.thinking)
    check_prompts(server, [row for row in tuned.rows if row.messages], renderer)
    answers, sequences, likeliest = [], [], []
    every = max(1, len(pairs) // COMPARED_ROWS)
    for number, (row, limit) in enumerate(pairs):
        reply = server.answer(row.prompt_ids, limit, n_probs=TOP_TOKENS)
        ids, places = reply["tokens"], reply["completion_probabilities"]
        if any(token in stop for token in ids[:-1]):
            raise UserError(f"{row.where}: llama.cpp does not end its answer at {renderer.tokenizer.decode(stop[:1])}")
        if number % every == 0 and ids:
            sequences.append(row.prompt_ids + ids)
            likeliest.append([place["top_logprobs"] for place in places[: len(ids)]])
        ended = reply["stop_type"] == "eos" and ids[-1:] != [stop[0]]
        answers.append(Decoded([*ids, stop[0]] if ended else ids, [place["logprob"] for place in places]))
    expected = last_logits(load(tuned.adapter, tuned.base, torch.float32, tuned.quantize), sequences)
    logits = [_side_by_side(logits, places) for logits, places in zip(expected, likeliest, strict=True)]
    speeds = {"tokens_per_second": _speed(server, tuned.timed, ignore_eos=True)} if tuned.timed else {}
    if speeds and tuned.schema is not None:
        with suppress(urllib.error.HTTPError):  # llama.cpp does not support every schema
            speeds["constrained_tokens_per_second"] = _speed(server, tuned.timed, json_schema=tuned.schema)
    return compare(*zip(*logits, strict=True)), answers, speeds


def _side_by_side(logits: Tensor, places: list[list[dict[str, Any]]]) -> tuple[Tensor, Tensor]:
    """The reference's logits at each token of an answer, and a copy with llama.cpp's top tokens."""
    count = min(len(places), POSITIONS - 1)
    expected = logits[-1 - count : -1]
    ids = torch.tensor([[token["id"] for token in place] for place in places[-count:]])
    logprobs = torch.tensor([[token["logprob"] for token in place] for place in places[-count:]])
    return expected, expected.scatter(1, ids, logprobs + expected.logsumexp(-1, keepdim=True))


def _speed(server: LlamaServer, prompt: Sequence[int], **options: Any) -> float:
    """Tokens per second of a single answer, prompt included; the best of several tries."""
    times = [server.answer(prompt, TIMED, cache_prompt=False, **options)["timings"] for _ in range(TRIES)]
    # A constrained answer may end early: its time per token is extrapolated to all tokens.
    return TIMED / min(time["prompt_ms"] + TIMED * time["predicted_per_token_ms"] for time in times) * 1000
