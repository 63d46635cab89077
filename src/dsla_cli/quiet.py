"""Messages of other libraries that a user of the command cannot act on."""

from __future__ import annotations

import logging
import os
import sys
import warnings

# torchao names each of its compiled parts that this torch cannot load; none is used here.
SILENT_LOGGERS = ("torchao", "torch.utils._pytree")


def quiet_libraries() -> None:
    """To be called before they are imported. What a user has set in the environment stays."""
    if not sys.stderr.isatty():  # a bar that is drawn anew a thousand times fills a log
        for setting in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
            os.environ.setdefault(setting, "1")
    # peft 0.21 asks transformers 5.23 by an old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    for name in SILENT_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
