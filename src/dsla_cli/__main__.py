"""`python -m dsla_cli` is `dsla`."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
