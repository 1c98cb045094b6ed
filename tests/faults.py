"""Runs a chain many times, with a fault in each run, then the same command again without one.

    python tests/faults.py chain.yaml FOLDER 200

The moments at which a fault can come are counted in an undisturbed run: in the output folder every
file that is opened for writing, renamed, linked, deleted or flushed, and every folder made there;
every file of tensors; every file of a model that is read; every pass through a model, so that
training, evaluation and sampling are covered; every optimizer step. The faults are spread evenly
over them, and are in turn

    kill     kill -9
    full     no space left on the disk from here on
    term     SIGTERM
    int      SIGINT

One line of JSON is printed for the undisturbed run and for each trial.
"""

import errno
import json
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

import bitsandbytes  # noqa: E402, F401 (the children fork from a process that has imported all)
import datasets  # noqa: E402, F401
import dpo  # noqa: E402, F401
import peft  # noqa: E402, F401
import reward  # noqa: E402, F401
import rl  # noqa: E402, F401
import safetensors.torch  # noqa: E402
import sft  # noqa: E402, F401
import tensorboard  # noqa: E402, F401
import torch  # noqa: E402
import transformers  # noqa: E402
from torch.nn.modules.module import register_module_forward_pre_hook  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_pre_hook  # noqa: E402

import chain  # noqa: E402

KINDS = ("kill", "full", "term", "int")
# A disk that is full from the start is refused like an invalid option.
EXPECTED_STATUS = {"kill": (-signal.SIGKILL,), "full": (1, 2), "term": (143,), "int": (130,)}
# Python's own events (sys.addaudithook), by whether they need space on the disk.
NEEDS_SPACE = {
    "open": True,
    "os.mkdir": True,
    "os.link": True,
    "os.rename": False,
    "os.remove": False,
    "os.rmdir": False,
}
MINE = ("notes.txt", ".venv.3.11/pyvenv.cfg", "01_sft/.zshrc.2024-01-01", "final/thesis.txt")


class Faults:
    """Counts the moments of this process, and lets a fault happen at one of them."""

    def __init__(self, folder: Path, number: int, kind: str):
        self.folder = str(folder)
        self.number = number  # of the moment; 0: none
        self.kind = kind
        self.count = 0
        self.disk_is_full = False

    def install(self) -> None:
        sys.addaudithook(self.on_event)
        save, fsync = safetensors.torch.save_file, os.fsync

        def save_file(tensors, filename, *args, **kwargs):
            self.moment(needs_space=True)
            return save(tensors, filename, *args, **kwargs)

        def flush(descriptor):
            self.moment(needs_space=True)
            return fsync(descriptor)

        safetensors.torch.save_file = save_file
        transformers.modeling_utils.safe_save_file = save_file
        os.fsync = flush
        register_optimizer_step_pre_hook(lambda *arguments: self.moment(needs_space=False))
        register_module_forward_pre_hook(self.before_pass)

    def before_pass(self, module, arguments) -> None:
        if isinstance(module, transformers.PreTrainedModel):
            self.moment(needs_space=False)

    def on_event(self, event: str, arguments: tuple) -> None:
        if event not in NEEDS_SPACE:
            return
        path = str(arguments[0])
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            if path.endswith(("/config.json", "/tokenizer.json")):
                self.moment(needs_space=False)
        elif path.startswith(self.folder):
            self.moment(NEEDS_SPACE[event])

    def moment(self, needs_space: bool) -> None:
        self.count += 1
        if self.disk_is_full and needs_space:
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.count != self.number:
            return
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.kind == "int":
            os.kill(os.getpid(), signal.SIGINT)
        else:
            self.disk_is_full = True
            raise OSError(errno.ENOSPC, "No space left on device")


def run(yaml: str, folder: Path, number: int = 0, kind: str = "") -> tuple[int, int, str]:
    """(exit status, moments, what was printed) of the chain in a child process."""
    log_path = folder.with_suffix(".log")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faults = Faults(folder, number, kind)
        faults.install()
        status = 99
        try:
            chain.main([yaml, f"--output_dir={folder}"])
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            os.write(writer, str(faults.count).encode())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    moments = os.read(reader, 100)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), int(moments or 0), log_path.read_text()


def place_files(folder: Path) -> None:
    for name in MINE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")


def lost_files(folder: Path) -> list[str]:
    return [name for name in MINE if not (folder / name).is_file()]


def weights(folder: Path) -> str:
    path = folder / "final/model.safetensors"
    return chain.hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def main() -> None:
    yaml, out, trials = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    run(yaml, out / "first")  # fills the caches of the machine
    status, moments, printed = run(yaml, out / "undisturbed")
    expected = weights(out / "undisturbed")
    print(json.dumps({"status": status, "moments": moments, "printed": printed}), flush=True)
    for trial in range(trials):
        folder = out / str(trial)
        place_files(folder)
        number = 1 + trial * moments // trials
        kind = KINDS[trial % len(KINDS)]
        status, _, printed = run(yaml, folder, number, kind)
        status_again, _, printed_again = run(yaml, folder)
        line = {
            "trial": trial,
            "moment": number,
            "kind": kind,
            "status": status,
            "status_again": status_again,
            "is_equal": weights(folder) == expected,
            "lost": lost_files(folder),
            "printed": printed[-1500:],
            "printed_again": printed_again[-1500:],
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
