"""A process that has imported everything and forks a run of formtune for each request: a kill costs no new start.

Run as a script it reads one JSON object a line, {"args": [...], "every": seconds, "log": path}, answers with the process
id of the run, and with its exit code (negative: the signal) once it has ended.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

from lightning.pytorch.callbacks import Callback


class Progress(Callback):
    """Writes the number of steps done into a file, so that one can tell what a kill has cost."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        with open(self.path, "w") as file:  # noqa: PTH123 (the shortest way, at each step)
            file.write(str(trainer.global_step))


class Zygote:
    """Starts runs in a folder."""

    def __init__(self, folder: Path, every: float) -> None:
        self.every, self.log = every, folder / "output.log"
        paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=folder,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, args) -> int:
        """Start a run; its process id."""
        request = {"args": list(args), "every": self.every, "log": str(self.log)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """The exit code of the run that was started."""
        return int(self.process.stdout.readline())

    def run(self, args, signal_number=None, after=None) -> tuple[int, float]:
        """Start a run, send it a signal after so many seconds if it still lives: its exit code and its seconds."""
        began = time.monotonic()
        pid = self.start(args)
        timer = threading.Timer(after, self._send, (pid, signal_number)) if after is not None else None
        if timer:
            timer.start()
        code = self.wait()
        if timer:
            timer.cancel()
        return code, time.monotonic() - began

    @staticmethod
    def _send(pid: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def until_finished(
    zygote: Zygote, args, number: int, seconds: float, rng: random.Random, most: int = 1000
) -> list[int]:
    """Run and interrupt at random moments of `seconds`, and go on, until it has come to its end: the exit codes."""
    codes = []
    while not codes or codes[-1] != 0:
        after = rng.uniform(0, seconds) if len(codes) < most else None
        code, _ = zygote.run([*args, "--resume"], number, after)
        codes.append(code)
        assert code in (0, -number, 128 + number), zygote.log.read_text()[-3000:]
    return codes


def _serve() -> None:
    import peft  # noqa: F401

    from formtune.callbacks import checkpoints
    from formtune.cli import main
    from formtune.lightning_cli import run  # noqa: F401 (what takes seconds to import)

    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            checkpoints.EVERY = request["every"]
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            code = 70
            try:
                code = main(request["args"])
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
