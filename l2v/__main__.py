"""`python -m l2v`: the command `l2v`."""

import sys

from l2v.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
