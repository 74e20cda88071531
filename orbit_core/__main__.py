"""`python -m orbit_core`: see command.py.

A container's first process loses a SIGTERM that it has no handler for, and its pod then waits out the whole grace
period. So the handler comes before the imports; nothing has begun by then, and ending at once loses nothing.
"""

import os
import signal
import sys

from orbit_core.errors import ExitCode

if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(ExitCode.RESUMABLE))
    from orbit_core.command import main

    sys.exit(main())
