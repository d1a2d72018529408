"""How fast a conversion is beside a plain copy of the same bytes, in one run.

    python tools/bench_convert.py FOLDER

FOLDER is a Hugging Face folder, best of some gigabytes. Each round copies its safetensors files until the
last byte is on the disk, then converts the folder there and back in processes of their own. Imports and
compiling cost seconds whatever the model's size: `--start FOLDER` names a tiny model to measure them with.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table


def main() -> None:
    """Prints the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a Hugging Face folder")
    parser.add_argument("--start", type=Path, help="a tiny model's folder")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    files = sorted(options.folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    seconds: dict[str, list[float]] = {}
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory(dir=options.folder.absolute().parent) as place:
            seconds.setdefault("plain copy", []).append(copy(files, Path(place)))
            for name, model in (("start", options.start), ("convert", options.folder)):
                if model is not None:
                    run, back = Path(place) / f"{name} run", Path(place) / f"{name} back"
                    seconds.setdefault(f"{name} from-hf", []).append(convert("from-hf", model, run))
                    seconds.setdefault(f"{name} to-hf", []).append(convert("to-hf", run, back))
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    table = Table("", "seconds, median", "of all rounds", "GB/s", title=f"{size / 1e9:.2f} GB")
    for name, values in seconds.items():
        median = statistics.median(values)
        rate = "" if name.startswith("start") else f"{size / 1e9 / median:.2f}"
        table.add_row(name, f"{median:.2f}", " ".join(f"{value:.2f}" for value in values), rate)
    Console().print(table)


def copy(files: list[Path], place: Path) -> float:
    """Seconds until copies of the files are on the disk."""
    begin = time.perf_counter()
    for file in files:
        shutil.copyfile(file, place / file.name)
        with (place / file.name).open("rb") as stream:
            os.fsync(stream.fileno())
    return time.perf_counter() - begin


def convert(direction: str, source: Path, target: Path) -> float:
    """Seconds of a conversion in its own process, as it tells them."""
    words = [sys.executable, "-m", "maxllm.cli", "convert", direction, str(source), str(target), "--json"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout)["seconds"])


if __name__ == "__main__":
    main()
