"""Does the gate tell a damaged model from one that nothing was done to?

    python benchmarks/gate.py RECIPE RUN --output FILE [--variant int4] [--block 7]

RUN is a run of RECIPE, which has `evaluate.gate`. Of the variant's artifact a copy is made in which
the scales of every linear of one decoder block are doubled; it is imported again as a variant,
beside the artifact as it is, rounding to 2 bits, and the baseline once more, and all are judged by
the recipe's own evaluation. Exit code 1 where a damaged one passes, or the baseline does not.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from records import write_record
from safetensors.torch import load_file, save_file

DAMAGED = ("doubled", "two-bit")  # must fail
SAME = "same"  # must pass


def double_scales(source: Path, target: Path, block: int) -> int:
    """Copy an artifact with one block's scales doubled; returns how many linears those are."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("SHA256SUMS"))
    changed = 0
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if re.search(rf"\.layers\.{block}\..*weight_scale$", name):
                tensors[name] = tensors[name] * 2
                changed += 1
        path.unlink()  # copies may be links
        save_file(tensors, path, {"format": "pt"})
    if not changed:
        raise SystemExit(f"no scales of block {block} in {source}")
    return changed


def figures(report: dict[str, Any], name: str) -> dict[str, Any]:
    """What the gate decided on, and the answers that changed."""
    variant = next(one for one in report["variants"] if one["name"] == name)
    return {
        "passed": variant["gate"]["passed"],
        "limits": variant["gate"]["limits"],
        "perplexity_change": {row["text"]: row["perplexity_change"] for row in variant["quality"]},
        "flips": {
            row["axis"]: row["flips"]["share"]["value"]
            for row in variant["retained"]
            if row["flips"]
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--variant", default="int4")
    parser.add_argument("--block", type=int, default=7)
    arguments = parser.parse_args()
    value = yaml.safe_load(arguments.recipe.read_text(encoding="utf-8"))
    base = arguments.recipe.resolve().parent
    store = (base / value.pop("store", ".compressor")).resolve()
    artifact = (arguments.run / "artifacts" / arguments.variant / "compressed-tensors").resolve()
    with tempfile.TemporaryDirectory() as scratch:
        damaged = Path(scratch) / "doubled"
        linears = double_scales(artifact, damaged, arguments.block)
        value["variants"] = {
            SAME: {"quantize": []},
            "intact": {"import": {"source": str(artifact)}},
            "doubled": {"import": {"source": str(damaged)}},
            "two-bit": {"quantize": [{"rtn": {"scheme": "W2A16", "group_size": 64}}]},
        }
        recipe = Path(scratch) / "gate.yaml"
        recipe.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
        command = [sys.executable, "-m", "compressor", "run", str(recipe)]
        command += ["--store", str(store), "--output", scratch + "/runs", "--no-verify"]
        done = subprocess.run(command, check=False)
        (found,) = Path(scratch).glob("runs/*/*/report/report.json")
        report = json.loads(found.read_text(encoding="utf-8"))
    made = {name: figures(report, name) for name in (SAME, "intact", *DAMAGED)}
    facts = {
        "exit_code": done.returncode,
        "block": arguments.block,
        "linears_doubled": linears,
        "variants": made,
    }
    print(write_record(arguments.output, report["environment"]["cpu"], facts), end="")
    told = not any(made[name]["passed"] for name in DAMAGED)
    return int(not (told and made[SAME]["passed"] and done.returncode == 3))


if __name__ == "__main__":
    sys.exit(main())
