"""``python -m r1mega`` and ``torchrun -m r1mega``: the command line."""

import sys

from r1mega.cli import main

sys.exit(main())
