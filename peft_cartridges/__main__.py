"""`python -m peft_cartridges` is the `cartridges` command, also for launchers that want a module."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
