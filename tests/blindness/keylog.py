"""A role that gives its TLS session keys away, for a reviewer who wants to read all that the role can read.

`python -m tests.blindness.keylog FILE --role relay …` runs the role as always and appends the keys of its connections
to FILE, in the format that other programs take as SSLKEYLOGFILE. arcbridge itself has no such setting.
"""

from __future__ import annotations

import ssl
import sys

from arcbridge import __main__ as executable
from arcbridge.net import tls


def give_away(file: str) -> None:
    """Let each context that this process makes from now on write its keys to `file`."""
    harden = tls._harden

    def harden_and_tell(context: ssl.SSLContext, alpn: str) -> None:
        harden(context, alpn)
        context.keylog_filename = file

    tls._harden = harden_and_tell
    # aiofastnet makes TLS objects of its own, for which Python's callback does not work. The loop's TLS serves instead.
    sys.modules["aiofastnet"] = None


if __name__ == "__main__":
    give_away(sys.argv[1])
    sys.exit(executable.main(sys.argv[2:]))
