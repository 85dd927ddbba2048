"""GPU tests under NVIDIA's compute-sanitizer, which finds reads and writes out of bounds.

python -m benchmarks.gpu.sanitizer FILE [PYTEST ARGUMENTS]
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Replaces this process by the sanitizer; exit code 3 and a sentence where it is not installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("sanitizer: compute-sanitizer is not installed (it is part of the CUDA toolkit)")
        return 3
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *argv]
    os.execv(tool, [tool, "--error-exitcode", "9", *tests])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
