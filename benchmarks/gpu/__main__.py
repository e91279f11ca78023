"""``python -m benchmarks.gpu``."""

from benchmarks.gpu.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
