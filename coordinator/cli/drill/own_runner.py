"""A runner of the drill's own: a child process on a state folder of its own, which it may kill at will."""

import os
import subprocess
import sys
import time
from pathlib import Path

END_S = 20.0
SWEEP_S = 40.0
LEAST_S = 2.0


class OwnRunner:
    """One runner through all its lives. Nobody else's process is ever signalled."""

    def __init__(
        self,
        name: str,
        state: Path,
        *,
        label: str,
        executor: str,
        slots: int,
        token_file: Path | None,
        env: dict[str, str],
    ) -> None:
        self.name = name
        self.state = state
        self._options = ["--name", name, "--state", str(state), "--labels", label, "--only-labelled"]
        self._options += ["--executor", executor, "--slots", str(slots)]
        if token_file is not None:
            self._options += ["--token-file", str(token_file)]
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("BUILDMILL_")}
        self._env = {**inherited, "BUILDMILL_DISK_RESERVE_MB": "0", **env}
        self._said = state.with_name(f"{state.name}.out")
        self._child: subprocess.Popen[bytes] | None = None
        self._address = ""
        self._is_messy = False

    @property
    def is_alive(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def said(self, most: int = 1500) -> str:
        """The end of what the process has printed."""
        return self._said.read_text(errors="replace")[-most:] if self._said.exists() else ""

    def start(self, address: str, *, once: bool = False) -> None:
        """A process on its state folder, which adopts whatever the last one left."""
        argv = [sys.executable, "-m", "coordinator", "runner", "--coordinator", address, *self._options]
        argv += ["--once"] if once else []
        self._address = address
        with self._said.open("ab") as said:
            # a session of its own: an interrupt of the terminal reaches it through the drill, in order
            self._child = subprocess.Popen(
                [*argv, "--with-parent"],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env=self._env,
                start_new_session=True,
                umask=0o022,
            )

    def kill(self) -> None:
        """As a loss of power does it: nothing is said, nothing is finished."""
        if self._child is not None:
            self._child.kill()
            self._child.wait(END_S)
            self._is_messy = True

    def end(self, address: str, *, within_s: float) -> bool:
        """Drain it; after a death let one more life clean up. False when it had to be killed."""
        deadline = time.monotonic() + within_s
        if self._child is None:
            return True
        if self.is_alive:
            if self._stop(deadline):
                self._is_messy = False  # it adopted whatever a former life left, and finished it
            else:
                self.kill()
        if self._is_messy or self._child.returncode != 0:
            self.start(address, once=True)
            try:
                self._is_messy = self._child.wait(_left(deadline, SWEEP_S)) != 0
            except subprocess.TimeoutExpired:
                if not self._stop(deadline):
                    self.kill()
        return not self._is_messy

    def _stop(self, deadline: float) -> bool:
        """TERM and wait for its steps, TERM again and do not."""
        if self._child is None:
            return True
        for _ in range(2):
            self._child.terminate()
            try:
                self._child.wait(_left(deadline, END_S))
            except subprocess.TimeoutExpired:
                continue
            return True
        return False


def _left(deadline: float, most_s: float) -> float:
    return min(most_s, max(LEAST_S, deadline - time.monotonic()))
