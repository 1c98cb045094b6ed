"""core/runtime.py: memory and the warnings of libraries."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import core.verifiers


def test_libraries_do_not_warn_of_what_is_meant(caplog):
    import bitsandbytes

    bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu").eval()(
        torch.randn(4, 64)
    )  # not in float16
    assert core.verifiers.numeric([""], ["It is 7.0"], ["3 + 4 #### 7"]) == [
        1.0
    ]  # without a timeout of its own
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []


HOLES = """
import re, common, torch
held = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
# Freed at once: from then on glibc takes blocks of this size from its heap, and keeps them.
torch.ones(7_000_000)
start, blocks = held(), [torch.ones(5_000_000) for _ in range(30)]
del blocks[::2]
print(held() - start)
"""


@pytest.mark.skipif(
    sys.platform != "linux"
    or "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(),
    reason="only where Linux has huge pages",
)
def test_freed_tensors_leave_no_holes():
    held = [
        int(
            subprocess.run(
                [sys.executable, "-c", HOLES],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
                env=os.environ | {"THP_MEM_ALLOC_ENABLE": flag},
            ).stdout
        )
        for flag in ("0", "1")
    ]
    assert held[1] < 0.7 * held[0]
