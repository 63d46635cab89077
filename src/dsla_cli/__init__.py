"""The command `dsla`. It reads its arguments, and looks at the folders they name, before it imports `dsla_hf` and with it torch: help,
`--version` and errors in the arguments come at once."""

from .main import main

__all__ = ["main"]
