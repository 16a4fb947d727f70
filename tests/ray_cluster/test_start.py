"""What starting Ray does to the process that starts it."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


@pytest.mark.ray
def test_sigterm_puts_away_and_leaves_a_line() -> None:
    program = """
        import os, signal
        from raysl import ray_cluster
        from raysl.errors import answered

        with answered("experiment"):
            ray_cluster.start()
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.sigtimedwait([], 30)
            finally:
                print("put away")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "put away\n"
    assert done.stderr.split("\n") == [
        "",
        "experiment: interrupted. The same command goes on from what was finished.",
        "",
    ]
    assert done.returncode == 130
