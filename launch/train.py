"""Train: python launch/train.py --config=configs/sudoku_dispo.py [--workdir=DIR] [--config.KEY=V]

The same command again resumes. See README.md and docs/.
"""

import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# This folder's evaluate.py must not shadow the library of that name; the clone itself may run.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT / "launch"]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from configs import command_line  # noqa: E402

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, e.g. configs/sudoku_dispo.py")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; default runs/RECIPE-PRESET")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    """Builds the recipe, then calls the trainer."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: options start with --config.")
    import jax

    from dmrl import console, heap, parallel, processes, recipe, trainer
    from dmrl.checkpoint import CheckpointError

    logging.getLogger("jax").setLevel(logging.WARNING)
    config = CONFIG.value.to_dict()
    heap.keep_pages()
    try:
        processes.join()
        made = recipe.build(config)
        if config["dry_run"]:
            from dmrl import cost

            print(CONFIG.value)
            print(cost.dry_run(made))
            print(f"mesh here         {dict(parallel.make_mesh(**made.mesh).shape)}")
            return
        workdir = local_folder(WORKDIR.value) if WORKDIR.value else default_workdir()
        if processes.is_writer():
            print(f"workdir {workdir}", flush=True)
        trainer.train(made, workdir, config)
    except (ValueError, OSError, trainer.NotFiniteError, CheckpointError) as error:
        processes.stop(f"error: {error}")
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason, _, _ = str(error).partition("\n")
        processes.stop(f"error: {reason}")
    if not processes.is_writer():
        return
    rows = [r for r in trainer.before_after(workdir) if r[0].endswith(("/solved", "/cells"))]
    console.Console().table("Held-out, before and after stage 2", rows)
    print(f"report {workdir / 'report.html'}")


def local_folder(name: str) -> Path:
    """A workdir that was asked for.

    Raises ValueError for the address of an object store: files there cannot be appended to.
    """
    if "://" in name:
        raise ValueError(
            f"--workdir={name}: give a folder that all processes see (NFS, Filestore, or a bucket "
            "mounted with gcsfuse; docs/pods.md)"
        )
    return Path(name)


def default_workdir() -> Path:
    """runs/RECIPE or runs/RECIPE-PRESET, beside the clone's files."""
    path, _, preset = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return Path("runs") / "-".join(filter(None, [Path(path).stem, preset]))


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse)
