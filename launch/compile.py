"""Compile a recipe's programs for a TPU slice that you do not have, and see whether they fit.

    python launch/compile.py --config=configs/sudoku_dispo.py:llada_8b --topology=v5p-8
    python launch/compile.py --config=configs/spg.py:sudoku --topology=v4-16,v5e-16 \\
        --config.rollout_chunks=2 --out=docs/slices.json

The rollout (sampler and probes) and the update are those that launch/train.py runs. Compiling is
not running: it shows that they build, what they hold and what they send, not how fast they are.
Needs no TPU, but its compiler: pip install '.[tpu]'. `--topology=cpu:8` simulates 8 devices, whose
attention holds less than an accelerator's and whose gradients transpose what they multiply
(dmrl/models/headwise.py, products.py).
"""

import logging
import os
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
TOPOLOGY = flags.DEFINE_list("topology", None, "Slices as Google names them, e.g. v4-16,v5p-8")
OUT = flags.DEFINE_string("out", None, "JSON of all results; a page of the same name beside it")
flags.mark_flags_as_required(["config", "topology"])


def main(argv: list[str]) -> None:
    """Compiles for one slice after the other; what is done is written at once."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: options start with --config.")
    os.environ["JAX_PLATFORMS"] = "cpu"  # a TPU's lock, if there is one, is not ours to take
    try:
        import jax

        from dmrl import ahead, fit, fit_page, parallel, recipe, slices, trainer

        logging.getLogger("jax").setLevel(logging.WARNING)
        if simulated := max(map(slices.simulated, TOPOLOGY.value)):
            jax.config.update("jax_num_cpu_devices", simulated)
        made = recipe.build(CONFIG.value.to_dict())
        refused = 0
        for name in TOPOLOGY.value:
            where = slices.find(name)
            mesh = parallel.mesh_over(where.devices, **made.mesh)
            done = []
            for program in ahead.programs(made, mesh):
                print(f"{name}: compiling the {program.name} ...", flush=True)
                done.append(fit.compiled(program, made, mesh, where))
                if OUT.value:
                    fit_page.save(Path(OUT.value), label(), trainer.git_hash(), done)
            fit_page.show(label(), done)
            refused += sum(f.fits is False for f in done)
    except (ValueError, ModuleNotFoundError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if refused else 0)


def label() -> str:
    """The recipe and its overrides, as they were given."""
    path, _, preset = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    given = [a.lstrip("-") for a in sys.argv[1:] if a.lstrip("-").startswith("config.")]
    name = Path(path).stem + (f":{preset}" if preset else "")
    return " ".join([name, *(g.removeprefix("config.") for g in given)])


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse)
