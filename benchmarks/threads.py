"""What waiting threads cost beside another busy process: seconds of a forward and backward pass over 512 tokens.

    python benchmarks/threads.py .cache/models/smollm2-135m-instruct

Each figure is a process of its own: one thread, two threads as OpenMP waits by default, and as formtune sets it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

SETTINGS = {"default": {}, "formtune": {"GOMP_SPINCOUNT": "2000"}, "passive": {"OMP_WAIT_POLICY": "passive"}}
STEPS = 3


def measure(base: str, threads: int) -> float:
    """Seconds of a step, the first one left out."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "q_proj" in name
    ids = torch.randint(0, model.config.vocab_size, (1, 512))
    for step in range(STEPS + 1):
        if step == 1:
            started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
    return (time.perf_counter() - started) / STEPS


def main(base: str) -> None:
    for busy in (0, 1):
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        for name, variables in SETTINGS.items():
            for threads in (1, 2):
                program = [sys.executable, __file__, base, str(threads)]
                done = subprocess.run(program, env=os.environ | variables, capture_output=True, text=True, check=True)
                print(f"busy processes: {busy}, {name}, {threads} threads: {float(done.stdout):.2f} s", flush=True)
        for process in others:
            process.kill()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(measure(sys.argv[1], int(sys.argv[2])))
    elif len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        sys.exit(__doc__)
