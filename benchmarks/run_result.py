"""A finished run as a committed result: its before/after table and metrics, with commit, versions, device and seed.

python benchmarks/run_result.py runs/reviews smollm2-reviews
"""

import json
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
# As in the other scripts: our own folder is not to be searched for transformers' `kernels`.
if Path(sys.path[0]).resolve() == ROOT / "benchmarks":
    sys.path[0] = str(ROOT)

from benchmarks.stamp import device_name, stamp  # noqa: E402
from hybrid.run import read_jsonl, summary  # noqa: E402

RESULTS = Path(__file__).parent / "results"


def main(run: str, name: str) -> None:
    folder = Path(run)
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    table = summary(folder)
    samples = [row for row in read_jsonl(folder / "samples.jsonl") if row["phase"] == "eval" and row["index"] < 8]
    result = {
        **stamp(),
        "seed": config["run"]["seed"],
        "table": {row.name: {"unit": row.unit, "values": row.values, "change": row.change} for row in table.rows},
        "config": config,
        "metrics": read_jsonl(folder / "metrics.jsonl"),
        "samples": samples,
    }
    path = RESULTS / f"{name}-{device_name()}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for row in table.rows:
        print(f"{row.name:24} {'  '.join(row.values):40} {row.change}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
