"""Task groups for lm-eval: definitions (YAML) in this folder, and the Python that they need.

`dsla eval` and `python -m dsla_hf.evaluation.lm_eval` know them; for lm-eval's own command they are `--include_path`.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
