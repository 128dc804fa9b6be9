"""`python -m gpuparse` is the `gpuparse` command."""

from gpuparse.cli import main

if __name__ == "__main__":
    main()
