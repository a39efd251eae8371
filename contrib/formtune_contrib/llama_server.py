"""llama.cpp's server as a program: FILE CONTEXT PORT NAME True|False (whether thinking is on)."""

import sys
import threading
from pathlib import Path

from formtune.export.llama_cpp import LlamaServer

if __name__ == "__main__":  # formtune serve starts it
    file, context, port, name, thinking = sys.argv[1:]
    server = LlamaServer(Path(file), int(context), int(port), name, thinking == "True")
    threading.Event().wait()
