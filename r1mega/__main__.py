"""``python -m r1mega`` and ``torchrun -m r1mega``: the command line."""

import sys

from r1mega.stopping import watch

if __name__ == "__main__":
    watch()  # before the imports, which take a while
    from r1mega.cli import main

    sys.exit(main())
