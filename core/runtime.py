"""Device, precision, processes, signals, logging and memory of the running process."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib.util
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from core.errors import as_config_error
from core.screen import SafeFormatter, clear_open_line, new_screen_handler

logger = logging.getLogger("recipes")

# Warnings about intended behaviour: PEFT's about gradient checkpointing, and PyTorch's about the
# synchronization checks around CUDA graphs.
warnings.filterwarnings("ignore", ".*is_gradient_checkpointing|Synchronization debug mode")
# Loggers that warn all the time, of kernels that are not needed, and of disabled timeouts, which
# `Subprocess` enforces itself.
NOISY_LOGGERS = ("bitsandbytes.autograd", "bitsandbytes.backends.cpu.ops", "math_verify")
for logger_name in NOISY_LOGGERS:
    logging.getLogger(logger_name).setLevel(logging.ERROR)

EXIT_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Whether a `deferred_signals` is active; an inner one leaves signals to it.
is_deferring = False


# ---- memory --------------------------------------------------------------------------------------


def configure_allocator() -> None:
    """On Linux, put large tensors on huge pages, and return them to the system when freed.

    By default glibc raises its mmap threshold whenever a large block is freed, and keeps the holes.
    The heap grows in steps of 128 MB, so that it gets huge pages too. THP_MEM_ALLOC_ENABLE=0 in the
    environment leaves the allocator unchanged.
    """
    # mallopt's option numbers, from malloc.h.
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    setting = os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if setting != "1" or not huge_pages.exists() or "[never]" in huge_pages.read_text():
        return
    with contextlib.suppress(AttributeError):  # musl has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 2**24)
        mallopt(top_pad, 2**27)
        mallopt(trim_threshold, 2**27)


def peak_memory() -> dict[str, float]:
    """{"peak_gb": peak memory of this process}, of its GPU if it has one; {} on Windows."""
    if torch.cuda.is_available():
        return {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}
    if importlib.util.find_spec("resource") is None:
        return {}
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes on Linux
    return {"peak_gb": round(peak * unit / 1e9, 2)}


@contextlib.contextmanager
def memory_limit(gigabytes: float) -> Iterator[None]:
    """Raise MemoryError in the block if the process takes this much more memory. Only on Linux; the
    limit applies to all threads."""
    if sys.platform != "linux":
        yield
        return
    import resource

    with open("/proc/self/statm") as file:
        num_pages = int(file.read().split()[0])
    limit = num_pages * resource.getpagesize() + int(gigabytes * 1e9)
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
    if soft_limit != resource.RLIM_INFINITY:
        limit = min(limit, soft_limit)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard_limit))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft_limit, hard_limit))


# ---- device and precision ------------------------------------------------------------------------


def default_device() -> torch.device:
    """This process's GPU, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of a Precision. "auto" is the GPU's fast 16-bit type; float32 on CPU and MPS."""
    if precision != "auto":
        return getattr(torch, precision)
    if not torch.cuda.is_available():
        return torch.float32
    # Older GPUs emulate bfloat16, slowly.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def suggest_bfloat16(precision: str) -> None:
    """Log a hint if the CPU is faster in bfloat16 than in float32, the choice of "auto"."""
    if default_device().type != "cpu" or precision != "auto":
        return
    if torch.cpu.get_capabilities().get("amx_bf16"):
        logger.info("this CPU has AMX, so --torch_dtype=bfloat16 is faster")


# ---- processes -----------------------------------------------------------------------------------


def is_main_process() -> bool:
    """True in the process that writes and logs; under `accelerate launch` this is rank 0."""
    return int(os.environ.get("RANK", 0)) == 0


def wait_for_everyone() -> None:
    """Return once every process of the run has called this."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    from accelerate import PartialState

    on_cpu = default_device().type == "cpu"
    PartialState(cpu=on_cpu).wait_for_everyone()


def is_sharded() -> bool:
    """Whether each process has only a part of the model, launched with FSDP or DeepSpeed."""
    variables = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return any(os.environ.get(variable, "").lower() == "true" for variable in variables)


def close_process_group() -> None:
    """End the threads of torch.distributed, which could otherwise outlive the interpreter."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# ---- signals -------------------------------------------------------------------------------------


def exit_on_signals() -> None:
    """Make SIGINT and SIGTERM exit with status 130 and 143 (see also `deferred_signals`)."""

    def exit_now(number, frame):
        name = signal.Signals(number).name
        clear_open_line()
        print(f"stopped by {name}; run the same command again to resume", file=sys.stderr)
        sys.exit(128 + number)

    for number in EXIT_SIGNALS:
        signal.signal(number, exit_now)
    atexit.register(close_process_group)


@contextlib.contextmanager
def deferred_signals(
    action: str = "saving a checkpoint after this step, then exiting",
) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the yielded list, so that a loop can save first.

    If there was a signal, the program exits after the block with status 130 or 143. A second signal
    ends it at once. `action`, for the log, is what the loop does after a signal. Inside another
    such block the list stays empty: the outer loop decides when to stop.
    """
    global is_deferring
    received: list[int] = []
    if is_deferring:
        yield received
        return

    def defer(number, frame):
        if received:
            sys.exit(128 + number)
        received.append(number)
        logger.warning(
            "%s: %s; run the same command again to resume", signal.Signals(number).name, action
        )

    previous_handlers = {}
    # Python allows signal handlers only in the main thread.
    if threading.current_thread() is threading.main_thread():
        for number in EXIT_SIGNALS:
            previous_handlers[number] = signal.signal(number, defer)
        is_deferring = True
    try:
        yield received
    finally:
        if previous_handlers:
            is_deferring = False
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
    if received:
        sys.exit(128 + received[0])


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block, which must be Python code, after this much processor time.

    There is no limit outside the main thread and on Windows, where Python has no such signals.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number, frame):
        raise TimeoutError(f"not done after {seconds:g} s")

    previous_handler = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous_handler)


def any_process_stopped(accelerator: Any, signals: list[int]) -> bool:
    """Whether any process received a signal, so that all of them save and exit together.

    `signals` is the list from `deferred_signals`; afterwards it has a signal in every process.
    """
    # A launcher may signal only one process; the others would wait for it in the next collective.
    count = torch.tensor(len(signals), device=accelerator.device)
    if not accelerator.reduce(count, "sum"):
        return False
    if not signals:
        signals.append(signal.SIGTERM)
    return True


# ---- logging -------------------------------------------------------------------------------------


warn_once = functools.cache(logger.warning)


def warn_together(what: str, notes: Sequence[str]) -> None:
    """Log all `notes` in one warning; nothing without notes."""
    if len(notes) == 1:
        logger.warning("%s: %s", what, notes[0])
    elif notes:
        logger.warning("%s:\n  %s", what, "\n  ".join(notes))


def level_of_dry_run(level: str) -> str:
    """The plan is the answer of a dry run, so it is shown at every log level."""
    return level if level.upper() == "DEBUG" else "INFO"


def start_logging(level: str, path: Path | None = None) -> contextlib.ExitStack:
    """Log to the screen, and to the file at `path`, until the returned stack is closed.

    The screen gets this project's messages from `level` up, as plain text. The file gets all
    levels, and also log messages and warnings of libraries. Only the main process logs. Raises
    ConfigError if the file cannot be written.
    """
    import transformers

    stack = contextlib.ExitStack()
    # Without any handler on the root logger, Python would print the libraries' warnings.
    file_handler: logging.Handler = logging.NullHandler()
    if is_main_process() and path:
        with as_config_error(f"output_dir={path.parent} cannot be written to"):
            path.parent.mkdir(parents=True, exist_ok=True)
            file_handler = logging.FileHandler(path, encoding="utf-8")
        layout = "%(asctime)s %(levelname)s %(name)s: %(message)s"
        file_handler.setFormatter(SafeFormatter(layout))
    add_handler(stack, logging.getLogger(), file_handler)
    # In a chain, the screen handler has been set up already.
    if is_main_process() and not logger.handlers:
        screen_handler = new_screen_handler()
        screen_handler.setLevel(level.upper())
        add_handler(stack, logger, screen_handler)

    logger.setLevel(logging.DEBUG)
    logging.raiseExceptions = False  # the code that fails reports a full disk, once
    logging.captureWarnings(True)
    stack.callback(logging.captureWarnings, False)
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.disable_progress_bar()
    return stack


def add_handler(
    stack: contextlib.ExitStack, target: logging.Logger, handler: logging.Handler
) -> None:
    """Add `handler` to `target`, to be removed and closed with the stack."""
    target.addHandler(handler)
    stack.callback(handler.close)
    stack.callback(target.removeHandler, handler)


configure_allocator()
