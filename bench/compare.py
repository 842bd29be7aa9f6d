"""`python -m bench.compare A B`: the benchmarks that became slower from A to B, by more than the spread of either.

The spread is the distance between the quartiles of a benchmark's rounds. `pytest bench --benchmark-json` writes both files. The exit
status is 1 if something became slower.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Statistics = dict[str, Any]


def load(path: str | Path) -> dict[str, Statistics]:
    """The statistics of each benchmark by name."""
    return {benchmark["name"]: benchmark["stats"] for benchmark in json.loads(Path(path).read_text())["benchmarks"]}


def slower(before: dict[str, Statistics], after: dict[str, Statistics]) -> list[str]:
    """A line for each benchmark in both files whose median grew by more than the larger of its two spreads. The worst comes first."""
    found = []
    for name in before.keys() & after.keys():
        was, now = before[name], after[name]
        spread = max(was["iqr"], now["iqr"])
        if now["median"] - was["median"] > spread:
            line = f"{name}: {was['median'] * 1e3:.3f} ms -> {now['median'] * 1e3:.3f} ms, spread {spread * 1e3:.3f} ms"
            found.append((now["median"] / was["median"], line))
    return [f"{ratio:.2f}x slower  {line}" for ratio, line in sorted(found, reverse=True)]


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print(__doc__)
        return 2
    before, after = map(load, arguments)
    for names, where in ((before.keys() - after.keys(), arguments[0]), (after.keys() - before.keys(), arguments[1])):
        for name in sorted(names):
            print(f"only in {where}: {name}")
    lines = slower(before, after)
    print("\n".join(lines) or f"nothing of {len(before.keys() & after.keys())} got slower by more than the spread")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
