"""Signs of life: which process of a job was lost, told by name and in a stated time.

When a process dies, its peers are left in a collective: with gloo they get an error that names a
socket, with NCCL they wait for ten minutes. So every process beats over the job's key-value store
and looks after others from a thread of its own. A peer on the same machine is missed when its
process is gone, within seconds; one on another machine when its beat stopped for `patience`
seconds. Machines stand in a ring, and each looks after the one before it, a process there for a
process here: every process is looked after by one elsewhere, and what one of them asks of the store
does not grow with the job. Whoever misses a peer raises an alarm that all hear. A second thread
looks after the first, which can get stuck where the store is cut off.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_LOOK_EVERY = 1.0
"""Seconds between two looks at processes on this machine."""
ROLL_CALL = 10.0
"""Seconds that survivors wait for each other to report."""
_EXIT_CODE = 2
_CUT_OFF = (
    "the job's first machine, which holds its key-value store, cannot be reached any more, so this "
    "process ended too"
)


@dataclass(frozen=True)
class Peer:
    """Who a process is.

    Attributes:
        rank: Its number.
        pid: Its process id.
        host: Its machine's name.
        place: Its machine: where its process id means something, and where no cable can break
            between it and others.
    """

    rank: int
    pid: int
    host: str
    place: str

    @classmethod
    def here(cls, rank: int) -> "Peer":
        """This process."""
        try:
            with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
                place = stream.read().strip()
            place += os.readlink("/proc/self/ns/pid") + os.readlink("/proc/self/ns/net")
        except OSError:  # no Linux: only its beat tells
            place = f"{socket.gethostname()}-{rank}"
        return cls(rank, os.getpid(), socket.gethostname(), place)

    def __str__(self) -> str:
        return f"process {self.rank} (pid {self.pid} on {self.host})"

    def is_gone(self) -> bool:
        """Whether the process has ended; only to be asked where its id means something."""
        try:
            with open(f"/proc/{self.pid}/stat", encoding="utf-8", errors="replace") as stream:
                return stream.read().rpartition(")")[2].split()[0] in {"Z", "X"}
        except (FileNotFoundError, ProcessLookupError):
            return True
        except OSError:
            return False


def looked_after_by(rank: int, peers: Sequence[Peer]) -> list[Peer]:
    """The processes on another machine that one process listens to.

    Args:
        rank: That process.
        peers: All processes, by rank.

    Returns:
        Its share of those on the machine before its own; every process of a job on several
        machines is in the share of exactly one.
    """
    places = list(dict.fromkeys(peer.place for peer in peers))
    if len(places) == 1:
        return []
    here = peers[rank].place
    before = places[places.index(here) - 1]
    mates = [peer.rank for peer in peers if peer.place == here]
    return [peer for peer in peers if peer.place == before][mates.index(rank) :: len(mates)]


class Watch:
    """Looks after peers of this process until it is closed.

    Args:
        store: The job's key-value store (`torch.distributed.Store`); used from several threads, so
            it must not be shared with anything that waits on it.
        peers: All processes, by rank.
        rank: This one.
        patience: Seconds without a beat after which a process on another machine counts as lost.
        leave: Ends this process at once when its main thread cannot be reached.
    """

    def __init__(
        self,
        store: Any,
        peers: Sequence[Peer],
        rank: int,
        patience: float,
        leave: Callable[[int], Any] = os._exit,
    ):
        self.peers, self.rank, self.patience = peers, rank, patience
        self._nearby = [p for p in peers if p.place == peers[rank].place and p.rank != rank]
        self._elsewhere = looked_after_by(rank, peers)
        self._store, self._leave = store, leave
        self._lock = threading.Lock()
        self._closed, self._ending = threading.Event(), threading.Event()
        self._beat_every = min(max(patience / 10, _LOOK_EVERY), 10.0)
        self._heard, self._lost = time.monotonic(), ""
        self._beat(0)
        self._threads = [
            threading.Thread(target=work, name=f"watch-{work.__name__}", daemon=True)
            for work in (self._look, self._guard)
        ]

    def start(self) -> None:
        """Begin to look; every process must have made its `Watch` before."""
        self._heard = time.monotonic()
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Say goodbye: this process ends, and is not to be missed."""
        self._closed.set()
        self._set("bye", "")

    def tell(self, reason: str) -> None:
        """Leave word of why this process ends, for those that will miss it."""
        self._ending.set()
        self._set("fault", reason)
        self._join("faults")

    def roll_call(self) -> tuple[str, int]:
        """After a collective failed: who is to blame, and who should say so.

        Returns:
            What happened, naming the process; and the rank that prints it: the first survivor, or 0
            where process 0 has said it itself. Takes at most `ROLL_CALL` seconds.
        """
        self._ending.set()
        others = [p for p in self.peers if p.rank != self.rank]
        deadline = time.monotonic() + ROLL_CALL
        reachable = self._join("survivors")
        while True:
            told = [self.peers[rank] for rank in self._joined("faults") if rank != self.rank]
            survivors = self._joined("survivors")
            silent = [p for p in others if p not in told and p.rank not in survivors]
            certain = all(p in self._nearby and p.is_gone() for p in silent)
            if told or certain or not reachable or time.monotonic() > deadline:
                break
            time.sleep(0.2)
            reachable = self._has("survivors")
        first = min([self.rank, *(p.rank for p in others if p not in silent and p not in told)])
        if told:
            first = 0 if told[0].rank == 0 else first
            reason = self._get(f"fault/{told[0].rank}") or "it did not say why"
            return f"{told[0]} ended: {reason}", first
        if not reachable:
            return _CUT_OFF, self.rank
        if silent:
            return _lost(silent), first
        return "the connection between the processes broke, but all of them are alive", first

    # -- the threads -------------------------------------------------------------------------

    def _look(self) -> None:
        """Beat, and look for peers that are gone or silent, until some are found."""
        beats: dict[int, tuple[bytes, float]] = {}
        count, next_beat = 0, 0.0
        while not self._closed.wait(_LOOK_EVERY):
            now = time.monotonic()
            lost = [p for p in self._nearby if p.is_gone() and not self._excused(p)]
            if now >= next_beat:
                count, next_beat = count + 1, now + self._beat_every
                if self._beat(count):
                    self._heard = now
                lost += [p for p in self._silent(beats, now) if not self._excused(p)]
            if lost:
                self._raise_alarm(" ".join(str(p.rank) for p in lost))
            elif (alarm := self._get("alarm")) is not None:
                lost = [self.peers[int(rank)] for rank in alarm.split()]
            if lost and not self._closed.is_set():
                survivors = [p.rank for p in self.peers if p not in lost]
                self._lost = _lost(lost) if self.rank == min(survivors, default=-1) else " "
                return

    def _guard(self) -> None:
        """Give the main thread time to end by itself; then end it, wherever it waits."""
        while not self._closed.wait(_LOOK_EVERY):
            silence = time.monotonic() - self._heard
            if self._ending.is_set():
                break
            if self._lost or silence > self.patience + self._beat_every:
                break
        else:
            return
        if not self._ending.wait(ROLL_CALL) and not self._closed.is_set():
            told = self._lost or _CUT_OFF
            if told.strip():
                print(f"error: {told}", file=sys.stderr, flush=True)
            self._leave(_EXIT_CODE)
            return
        if not self._closed.wait(2 * ROLL_CALL):
            self._leave(_EXIT_CODE)

    def _silent(self, beats: dict[int, tuple[bytes, float]], now: float) -> list[Peer]:
        """Peers elsewhere whose beat has not changed for too long; `beats` is brought up to date.

        A process here is never silent: it is gone or it is not, and one that computes for a minute
        without letting Python run must not be mistaken for a dead one.
        """
        found = []
        for peer in self._elsewhere:
            beat = self._get_raw(f"beat/{peer.rank}")
            known, since = beats.get(peer.rank, (None, now))
            if beat is not None and beat != known:
                beats[peer.rank] = (beat, now)
            elif known is None:
                beats[peer.rank] = (b"", now)
            elif now - since > self.patience:
                found.append(peer)
        return found

    def _excused(self, peer: Peer) -> bool:
        return self._has(f"bye/{peer.rank}")

    # -- the store; whatever it cannot do now counts as not said ------------------------------

    def _beat(self, count: int) -> bool:
        return self._set("beat", str(count))

    def _set(self, kind: str, value: str) -> bool:
        def work() -> bool:
            self._store.set(f"{kind}/{self.rank}", value)
            # Setting waits for no answer; this does.
            return bool(self._store.check([f"{kind}/{self.rank}"]))

        return bool(self._ask(work))

    def _raise_alarm(self, ranks: str) -> None:
        self._ask(lambda: self._store.set("alarm", ranks))

    def _join(self, list_: str) -> bool:
        """Put this process on a list that all can read in one request."""
        return bool(self._ask(lambda: self._store.append(list_, f"{self.rank} ") or True))

    def _joined(self, list_: str) -> list[int]:
        """The ranks on a list, in the order in which they came."""
        return [int(rank) for rank in dict.fromkeys((self._get(list_) or "").split())]

    def _has(self, key: str) -> bool:
        return bool(self._ask(lambda: self._store.check([key])))

    def _get_raw(self, key: str) -> bytes | None:
        if not self._has(key):  # asking for what is not there would wait for it
            return None
        value = self._ask(lambda: self._store.get(key))
        return None if value is None else bytes(value)

    def _get(self, key: str) -> str | None:
        value = self._get_raw(key)
        return None if value is None else value.decode(errors="replace")

    def _ask(self, work: Callable[[], Any]) -> Any:
        """`None` where the store does not answer, or another thread has waited for it too long."""
        if not self._lock.acquire(timeout=ROLL_CALL / 4):
            return None
        try:
            return work()
        except RuntimeError:
            return None
        finally:
            self._lock.release()


def _lost(peers: Sequence[Peer]) -> str:
    names = ", ".join(str(p) for p in peers)
    return f"{names} died or cannot be reached, so the others ended too"
