"""No test reaches another machine: Python runs this at the start of every process that a test starts.

An audit hook sees every connection and every look-up of a name that Python makes, whichever library asks for it, and
no library can take it away again. Loopback and Unix sockets stay open: processes of one test talk through them.
Attempts are written to a file as well, because libraries swallow errors and ask again.
"""

import ipaddress
import os
import socket
import sys


def _is_here(host: object) -> bool:
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False


def _refuse(event: str, args: tuple) -> None:
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg") and isinstance(args[1], tuple):
        host = args[1][0]
    else:
        return
    if not _is_here(host):
        with open(os.environ["FORMTUNE_ATTEMPTS"], "a", encoding="utf-8") as file:  # noqa: PTH123
            file.write(f"{event} {host}\n")
        raise OSError(f"tests may not reach {host}")


if "FORMTUNE_ATTEMPTS" in os.environ:
    sys.addaudithook(_refuse)
