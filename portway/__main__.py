"""`python3 -m portway`, and `python3 -I -S portway` on the folder itself, in a clone.

This file is for any Python 3, so that a too old one gets a sentence instead of a traceback.
"""

import os
import sys


def run() -> int:
    """Run the command line under a Python that is new enough. Returns the exit code."""
    if sys.version_info < (3, 11):  # noqa: UP036 - said to the Python that runs this, whatever was installed
        found = ".".join(map(str, sys.version_info[:3]))
        sys.stderr.write("portway: needs Python 3.11 or newer; %s is %s\n" % (sys.executable, found))  # noqa: UP031
        return 1
    from portway.cli import main

    return main()


if __name__ == "__main__":
    if not __package__:  # run as a folder: Python put the folder itself where its parent has to stand
        sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.exit(run())
