"""A process of a server whose model is cut over several, but the first.

python -m dsla_hf.serving.follower OPTIONS    `ServeOptions` as JSON
"""

from __future__ import annotations

import json
import logging
import os
import sys

from torch import distributed

from .command import EXIT_CODE, ServeOptions, follow
from .shared import join

logger = logging.getLogger(__name__)


def main() -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        follow(ServeOptions(**json.loads(sys.argv[1])), join())
    except Exception as error:  # the first is gone, or has the same error: all begin anew
        logger.critical("process %s ends: %s", os.environ["RANK"], (str(error).strip().splitlines() or [repr(error)])[0])
        os._exit(EXIT_CODE)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
