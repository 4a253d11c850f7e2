"""MKL's vector math is called on one thread before anything of ours computes."""

from __future__ import annotations

import subprocess
import sys

# The race itself shows once in a thousand processes: too rare to wait for in a test.
NOTE_FIRST_CALL = """
import torch
first = []
original = torch.cos
torch.cos = lambda x: first.append(x.numel()) or original(x)
import compressor.models.architecture
print(first)
"""


def test_first_call_is_of_one_element() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOTE_FIRST_CALL], check=True, text=True, stdout=subprocess.PIPE
    )
    assert done.stdout.strip() == "[1]"
