"""How long one waits before anything happens: the imports, and the commands that load no model.

    python benchmarks/startup.py --output benchmarks/results

Every command runs in a fresh process, all in turn. One round goes before the measured ones, so that the files are in
the disk's cache and compiled. The public names load on first use; what that takes is a row of its own.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from peers import write

TORCH, BOTH, HELP = "import torch", "import torch, llama_multimodal", "llama-mm --help"
IMPORTS = ("pass", TORCH, BOTH, "import llama_multimodal", "import torch; from llama_multimodal import load")
COMMANDS = (HELP, "llama-mm describe --help", "llama-mm zoo", "llama-mm doctor")
BEYOND_TORCH = "import llama_multimodal, beyond torch"
LIMITS = {BEYOND_TORCH: 0.3, HELP: 0.5}
"""Seconds that the medians have to stay below."""


def argument_lists() -> dict[str, list[str]]:
    program = shutil.which("llama-mm", path=str(Path(sys.executable).parent))
    if program is None:
        raise SystemExit("llama-mm is not installed beside this Python: make install")
    imports = {code: [sys.executable, "-c", code] for code in IMPORTS}
    return imports | {command: [program, *command.split()[1:]] for command in COMMANDS}


def one_round(commands: dict[str, list[str]]) -> dict[str, float]:
    """Each command once; its seconds."""
    seconds = {}
    for name, command in commands.items():
        started = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        seconds[name] = time.perf_counter() - started
    # Neighbours in time: what else the machine does slows both, and drops out of the difference.
    return seconds | {BEYOND_TORCH: seconds[BOTH] - seconds[TORCH]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="folder for the JSON result")
    args = parser.parse_args()
    commands = argument_lists()
    one_round(commands)
    rounds = [one_round(commands) for _ in range(args.repeats)]
    results = {}
    for name in rounds[0]:
        times = [seconds[name] for seconds in rounds]
        results[name] = {"seconds": statistics.median(times), "fastest": min(times), "slowest": max(times)}
        line = f"{name:46s} {results[name]['seconds']:7.3f} s  ({min(times):.3f} to {max(times):.3f})"
        if name in LIMITS:
            results[name]["limit"] = LIMITS[name]
            kept = results[name]["seconds"] < LIMITS[name]
            line += f"   limit {LIMITS[name]} s, {'kept' if kept else 'missed'}"
        print(line)
    write("startup", results, args.output)


if __name__ == "__main__":
    main()
