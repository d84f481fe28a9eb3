"""A script in a process of its own with eight simulated devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import compiling

ROOT = Path(__file__).parent.parent


def run(script, *args):
    """What the last line that `script` prints holds as JSON."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {compiling.FLAGS}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *args],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
