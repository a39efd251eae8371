"""A server of chat completions on this machine, for tests of what asks one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer:
    """Speaks as much of the chat completions API as a client needs.

    Args:
        say: Makes the answer to a user's message: a text, or a whole message.
        tokenizer: With a chat template; counts the prompt's tokens.
    """

    def __init__(self, say: Callable[[str], Any], tokenizer: Any = None) -> None:
        self.say, self.tokenizer = say, tokenizer
        self.requests: list[dict[str, Any]] = []  # the bodies of those for completions
        self.most = self.now = 0  # requests at the same time
        self.failures = 0  # of the next requests, answered with 503
        self.system, self.extra, self.tokenize, self.finish = None, 0, False, "stop"
        self.usage = tokenizer is not None
        self.status, self.html = 200, False
        self.logprob: float | None = None  # of each word of the answers; None: `logprobs` is ignored
        self.refuses_logprobs = False  # by status 400
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.now += 1
                outer.most = max(outer.most, outer.now)
                status, reply = outer.reply(self.path, body)
                outer.now -= 1
                data = b"<html></html>" if outer.html else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if outer.html else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        if self.system:
            messages = [{"role": "system", "content": self.system}, *messages[1:]]
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return [0] * self.extra + ids

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/tokenize" and self.tokenize:
            return 200, {"count": 0, "tokens": self.prompt(body["messages"])}
        if path != "/v1/chat/completions":
            return 404, {"detail": "Not Found"}
        if self.failures:
            self.failures -= 1
            return 503, {"error": {"message": "overloaded"}}
        self.requests.append(body)
        if self.refuses_logprobs and "logprobs" in body:
            return 400, {"error": {"message": "logprobs: unknown key"}}
        if self.status != 200:
            return self.status, {"error": {"message": "so it is"}}
        answer = self.say(body["messages"][-1]["content"])
        time.sleep(0.01)
        message = answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}
        reply = {
            "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": self.finish, "message": message}],
        }  # fmt: skip
        if self.logprob is not None and body.get("logprobs"):
            words = [answer[:6], answer[6:], "</s>"]
            content = [{"token": word, "logprob": self.logprob, "bytes": None, "top_logprobs": []} for word in words]
            reply["choices"][0]["logprobs"] = {"content": content, "refusal": None}
        if self.usage:
            count = len(self.prompt(body["messages"]))
            reply["usage"] = {"prompt_tokens": count, "completion_tokens": 7, "total_tokens": count + 7}
        return 200, reply
