"""Device, precision, processes, signals, logging and memory of the running program."""

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
from pathlib import Path

import torch

from core.errors import as_config_error

logger = logging.getLogger("recipes")
warnings.filterwarnings(
    "ignore", ".*is_gradient_checkpointing|Synchronization debug mode"
)  # of peft; of `cuda_graph_steps`
for noisy in (
    "bitsandbytes.autograd",
    "bitsandbytes.backends.cpu.ops",
    "math_verify",
):  # they warn at every layer of
    logging.getLogger(noisy).setLevel(
        logging.ERROR
    )  # every step, of a kernel not needed, of timeouts `Subprocess` has


def lean_memory() -> None:
    """On Linux, lay large tensors on huge pages, give them back when freed (glibc would keep the holes), and let the
    heap grow by 128 MB, so that it has such pages too. THP_MEM_ALLOC_ENABLE=0 in the environment: all as it was."""
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    wanted = os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1") == "1"
    if wanted and pages.exists() and "[never]" not in pages.read_text():
        with contextlib.suppress(AttributeError):  # musl has no mallopt
            for option, size in (
                (-3, 2**24),
                (-2, 2**27),
                (-1, 2**27),
            ):  # mmap threshold, top pad, trim threshold
                ctypes.CDLL(None).mallopt(option, size)


def wait_for_everyone() -> None:
    """Until all processes are here."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from accelerate import PartialState

        PartialState(cpu=default_device().type == "cpu").wait_for_everyone()


def is_sharded() -> bool:
    """Whether the processes hold the model in parts while they train: launched with FSDP or DeepSpeed."""
    return any(
        os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true"
        for kind in ("FSDP", "DEEPSPEED")
    )


def exit_on_signals() -> None:
    """SIGINT and SIGTERM end the program with status 130 and 143 (see `deferred_signals`), gloo's threads before it."""

    def leave(number, _):
        print(
            f"stopped by {signal.Signals(number).name}; the same command goes on", file=sys.stderr
        )
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    atexit.register(
        lambda: torch.distributed.is_initialized() and torch.distributed.destroy_process_group()
    )


@contextlib.contextmanager
def deferred_signals():
    """Within it SIGINT and SIGTERM only come into the list that it yields, so that a loop can save first; after it the
    program ends with status 130 or 143. A second signal does not wait."""
    came: list[int] = []

    def wait(number, _):
        if came:
            sys.exit(128 + number)
        came.append(number)
        logger.warning(
            "%s: a checkpoint is saved after this step, then the run ends; the same command goes on",
            signal.Signals(number).name,
        )

    mine = threading.current_thread() is threading.main_thread()  # signals come to no other
    old = {
        number: signal.signal(number, wait) for number in (signal.SIGINT, signal.SIGTERM) if mine
    }
    try:
        yield came
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    if came:
        sys.exit(128 + came[0])


def is_main_process() -> bool:
    """True in the one process that writes and logs, also under `accelerate launch`."""
    return int(os.environ.get("RANK", 0)) == 0


def start_logging(level: str, path: Path | None = None) -> contextlib.ExitStack:
    """Until closed: our own tidy lines on the screen, and those and all that libraries say in the file at `path`."""
    import transformers

    stack, main, root = contextlib.ExitStack(), is_main_process(), logging.getLogger()
    handler: logging.Handler = (
        logging.NullHandler()
    )  # without any, Python prints what libraries warn of
    if main and path:
        with as_config_error(f"output_dir={path.parent} cannot be written to"):
            path.parent.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers = [(root, handler)]
    if main and not logger.handlers:  # within a chain the screen is set up already
        handlers.append((logger, logging.StreamHandler(sys.stdout)))
        handlers[-1][1].setLevel(level.upper())
    for target, handler in handlers:
        target.addHandler(handler)
        stack.callback(handler.close)
        stack.callback(target.removeHandler, handler)
    logger.setLevel(logging.DEBUG)
    logging.raiseExceptions = False  # a full disk is said once, by what fails
    logging.captureWarnings(True)
    stack.callback(logging.captureWarnings, False)
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.disable_progress_bar()
    return stack


warn_once = functools.cache(logger.warning)


def default_device() -> torch.device:
    """This process's GPU, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def peak_memory() -> dict[str, float]:
    """{"peak_gb": the most that this process has held}, of a GPU if there is one; {} on Windows, which does not say."""
    if torch.cuda.is_available():
        return {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}
    if importlib.util.find_spec("resource") is None:
        return {}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)}


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of a Precision here: by default the fast one of the GPU, and float32 on CPU and MPS."""
    if precision == "auto" and torch.cuda.is_available():
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    return torch.float32 if precision == "auto" else getattr(torch, precision)


lean_memory()
