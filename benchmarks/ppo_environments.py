"""The interpreters of `ppo_step.py`'s contenders: virtual environments with TRL from PyPI."""

import subprocess
import venv
from pathlib import Path

import torch

__all__ = ["TRL", "interpreter"]

ROOT = Path(__file__).resolve().parents[1]
# The last two releases of TRL that have PPO: of the first design and of the second. What is not pinned here is what
# `constraints.txt` says, or what the pinned ones ask for.
TRL: dict[str, tuple[str, ...]] = {
    "trl-0.11.4": (
        "trl==0.11.4", "transformers==4.45.2", "accelerate==1.0.1", "datasets==3.6.0", "numpy==2.4.6",
        "rich==15.0.0",  # imported, and not among its requirements
    ),
    "trl-1.12.0": ("trl==1.12.0", "transformers==5.23.0", "-c", str(ROOT / "constraints.txt")),
}  # fmt: skip


def interpreter(name: str, folder: Path) -> str:
    """The Python of TRL `name` in an environment under the folder, which is made where it is not there yet."""
    # The same release of torch as ours, so that no difference is torch's.
    wanted = (f"torch=={torch.__version__.split('+')[0]}", *TRL[name])
    made, python = folder / name / "installed.txt", folder / name / "bin" / "python"
    if not made.is_file() or made.read_text() != "\n".join(wanted):
        print(f"installing {name} from PyPI into {folder / name} ...", flush=True)
        venv.create(folder / name, with_pip=True, clear=True)
        subprocess.run([str(python), "-m", "pip", "install", "-qq", *wanted], check=True)
        made.write_text("\n".join(wanted))
    return str(python)
