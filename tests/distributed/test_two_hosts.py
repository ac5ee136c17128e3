"""Two machines, played by two network namespaces with a cable between them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from equality import check_equal, line
from equality import reference as reference  # the run on one process, and its fixture
from launching import environment, finish, kill_group, start

RECORDING = Path(__file__).parents[1] / "helpers" / "recording.py"
ADDRESSES = ("10.231.77.1", "10.231.77.2")


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def hosts():
    """Names of two namespaces that see each other and nothing else."""
    tag = os.getpid() % 100000
    names = [f"fs{tag}a", f"fs{tag}b"]
    made = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            cables = [f"c{tag}a", f"c{tag}b"]
            ip("link", "add", cables[0], "netns", names[0], "type", "veth",
               "peer", "name", cables[1], "netns", names[1])  # fmt: skip
            for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
                ip("-n", name, "link", "set", cable, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except OSError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield list(zip(names, cables, strict=True))
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)


def begin(hosts, tmp_path, *rest: object):
    """The two commands of the README, one on each machine."""
    started = []
    for rank, (name, cable) in enumerate(hosts):
        output = tmp_path / f"machine-{rank}.txt"
        words = [
            *("ip", "netns", "exec", name),
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
            *("--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)),
            *("--main_process_ip", ADDRESSES[0], "--main_process_port", "29511"),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),
            *map(str, rest),
        ]
        env = environment(GLOO_SOCKET_IFNAME=cable, TP_SOCKET_IFNAME=cable)
        started.append((start(words, output, env=env), output))
    return started


@pytest.mark.slow
def test_a_training_on_two_machines_equals_one_process(hosts, reference, tmp_path):
    name = "two-hosts"
    rest = (RECORDING, reference / f"record-{name}", reference / "one", *line(reference, name, 3))
    machines = begin(hosts, tmp_path, *rest)
    try:
        texts = [finish(process, output, 180) for process, output in machines]
    finally:
        for process, _ in machines:
            kill_group(process)
    assert [process.returncode for process, _ in machines] == [0, 0], texts
    assert "2 processes on cpu" in texts[0]
    assert "processes on cpu" not in texts[1]  # only the first one prints
    check_equal(reference, name, 2)


@pytest.mark.slow
def test_the_loss_of_a_machine_is_told_on_the_other_one(hosts, reference, tmp_path):
    """Its network goes away, without a word: as when the power fails."""
    fields = line(reference, "lost", 3, **{"train.max_steps": 100000, "train.process_timeout": 5})
    train = Path(__file__).parents[2] / "scripts" / "train.py"
    machines = begin(hosts, tmp_path, train, *fields)
    try:
        from launching import wait_until

        log = reference / "lost" / "log.jsonl"
        wait_until(lambda: log.exists() and len(log.read_text().splitlines()) > 5)
        ip("-n", hosts[1][0], "link", "set", hosts[1][1], "down")
        first, output = machines[0]
        text = finish(first, output, 60)  # 5 s of silence, and at most 20 s after that
        assert first.returncode != 0
        assert "error: process 1 (pid " in text
        assert "died or cannot be reached" in text
    finally:
        for process, _ in machines:
            kill_group(process)
