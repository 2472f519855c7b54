"""How a process ends."""

import subprocess
import sys

import pytest

EXCHANGING = """
import sys
import torch
from machine import process
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
held = torch.distributed.group.WORLD  # as DDP holds it
sys.setswitchinterval(1000)  # gloo's threads do not get their turn before the end
for _ in range(200):
    torch.distributed.all_reduce(torch.ones(1000), async_op=True)
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("code", [0, 75])
def test_a_process_leaves_with_its_code_whatever_the_exchange_still_holds(tmp_path, code):
    """It would abort in most cases: "terminate called without an active exception"."""
    command = [sys.executable, "-c", f"{EXCHANGING}\nprocess.leave({code})", tmp_path / "ranks"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (code, "")


def test_output_is_written_and_what_is_registered_for_the_end_is_done():
    program = (
        "import atexit; from machine import process; atexit.register(print, 'closed'); print('done'); process.leave(3)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "done\nclosed\n")


def test_nobody_has_to_read_the_output():
    program = "import sys; from machine import process; sys.stdout.write('x'); sys.stdout.close(); process.leave(3)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60).returncode == 3
