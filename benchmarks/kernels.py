"""The head of a language model: what our log-probabilities cost beside everybody else's, in one run.

    python benchmarks/kernels.py                # on a GPU: the table of spec/kernels.md, against ceilings and peers
    python benchmarks/kernels.py --device cpu   # the chunked torch definition against eager log_softmax

Prints one table of ratios, writes benchmarks/results/kernels-<device>.json and draws kernels-<device>.png.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
SEED = 0
PACKAGES = ("triton", "numpy", "liger-kernel", "cut-cross-entropy", "trl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7, help="times that each is measured, in turns")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs; writes nothing")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    if arguments.device == "cpu":
        import kernels_cpu as mode
    else:
        import kernels_cuda as mode  # type: ignore[no-redef]
    from stamp import stamp

    # transformers does `import kernels` and means another package: peers must not find this file.
    sys.path = [path for path in sys.path if Path(path or ".").resolve() != HERE]
    result = mode.measure(rounds=arguments.rounds, quick=arguments.quick)
    print(table(result["rows"], mode.COLUMNS))
    if not arguments.quick:
        about = {"benchmark": "kernels", **stamp(*PACKAGES, device=arguments.device), "seed": SEED}
        name = f"kernels-{about['device']}"
        file = HERE / "results" / f"{name}.json"
        file.write_text(json.dumps(about | result, indent=1) + "\n")
        mode.draw(result, file.with_suffix(".png"))
        print(f"wrote {file.relative_to(HERE.parent)} and {name}.png")


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """The rows as aligned text; a missing number is left blank."""
    lines = [columns] + [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


if __name__ == "__main__":
    main()
