"""A bar with rate and time left, or a line every ten seconds if stderr is not a terminal."""

from __future__ import annotations

import sys

from tqdm import tqdm


class Bar:
    """Counts `unit`s; if their total is unknown, the time left is estimated from the share of the bytes read."""

    def __init__(self, name: str, total: int | None, unit: str) -> None:
        live = sys.stderr.isatty()
        self.bar = tqdm(
            total=total, desc=name, unit=unit, unit_scale=total is None or total > 10_000, dynamic_ncols=live,
            mininterval=0.2 if live else 10.0, smoothing=0.05,
        )  # fmt: skip

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_) -> None:
        if self.bar.total is not None:
            self.bar.total = max(self.bar.n, 0)
        self.bar.close()

    def add(self, count: int) -> None:
        """Advance by `count`."""
        self.bar.update(count)

    def skip(self, count: int) -> None:
        """Count units that an earlier run finished."""
        self.bar.initial += count
        self.bar.n += count

    def reading(self, count: int, source: tuple[int, int], share: float | None) -> None:
        """Advance by `count` units of source number `source[0]` of `source[1]`, of which `share` has been read."""
        if share is not None:
            done = (source[0] + share) / source[1]
            self.bar.total = max(self.bar.n + count, round((self.bar.n + count) / max(done, 1e-6)))
        self.bar.update(count)

    def log(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.write(text, file=sys.stderr)
