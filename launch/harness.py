"""Measure a checkpoint with EleutherAI's lm-eval harness (extra `eval`): its own command line.

    python launch/harness.py run --model dmrl --tasks gsm8k --apply_chat_template \\
        --model_args checkpoint=CKPT_DIR,tokenizer=HF_DIR,length=256,block=32 --batch_size 16

`--model dmrl` is `dmrl.harness.Checkpoint`, whose options are the model_args.
"""

import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# This folder's evaluate.py must not shadow the library of that name; the clone itself may run.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT / "launch"]
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Registers the model, then is the harness."""
    try:
        import lm_eval.__main__
    except ModuleNotFoundError as error:
        sys.exit(f"error: needs {error.name}: pip install 'dmrl[eval]'")
    from dmrl import harness

    logging.getLogger("jax").setLevel(logging.WARNING)
    del harness  # imported for what it registers
    lm_eval.__main__.cli_evaluate()


if __name__ == "__main__":
    main()
