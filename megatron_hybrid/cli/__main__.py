"""Run the command line as `python -m megatron_hybrid.cli COMMAND ...`."""

import sys

from megatron_hybrid.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
