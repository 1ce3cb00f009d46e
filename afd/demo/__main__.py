"""``python -m afd.demo``: takes Ctrl-C first, then imports what it needs."""

from __future__ import annotations

from afd import process


def _asked() -> process.Work:
    from afd.demo.digits import asked

    return asked()


if __name__ == "__main__":
    process.run(_asked, "afd.demo")
