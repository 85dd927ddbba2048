"""`python -m l2v.cli`, where the command was before it moved to `l2v.commands`; for scripts that start it so."""

import sys

from l2v.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
