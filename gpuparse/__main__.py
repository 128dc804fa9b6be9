"""`python -m gpuparse` is the `gpuparse` command."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Runs the command line. An interrupt is quiet from the first import on, which takes longest."""
    try:
        from gpuparse.cli import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
