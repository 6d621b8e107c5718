"""The ranks of a job, from the side of a process alone."""

import signal

import numpy as np
import pytest
import torch

from fastmem.base import ranks
from fastmem.base.ranks import Stopped, joined
from fastmem.cli.main import main


def test_a_process_alone_is_a_job_of_one_rank() -> None:
    """Fails if a process without torchrun waits for others, or keeps its signals afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    with joined("cpu") as job:
        assert (job.rank, job.size, job.device) == (0, 1, torch.device("cpu"))
        assert job.sum(np.array([2.0])) == 2
        assert (job.all(True), job.all(False)) == (True, False)
        assert job.gathered("x") == ["x"]
        assert job.do_first(lambda: 3) == 3
        signal.raise_signal(signal.SIGTERM)  # stops between two steps, not here
        with pytest.raises(Stopped) as stop:
            job.clock()
        assert stop.value.args == (signal.SIGTERM,)
        assert job.clock() > 0  # the last checkpoint needs it
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stopped):  # the second Ctrl-C of a script that takes no steps
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(ValueError, match="do it inside `with fastmem"):
        ranks.current()
    with joined("cpu"):  # again
        pass


def test_a_rank_without_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if two ranks share a GPU, or the error does not say how many there are."""
    monkeypatch.setattr(ranks, "launched", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("RANK", "11")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"rank 11 needs GPU 3 of .*, which has 2: give"):
        ranks._own_device("cuda")
    with pytest.raises(ValueError, match="each rank takes its own GPU: give --device cuda, not"):
        ranks._own_device("cuda:1")


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf", "1e15"])
def test_a_wrong_limit(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a limit that is none is accepted."""
    monkeypatch.setattr(ranks, "COLLECTIVE_SECONDS", text)
    with pytest.raises(ValueError, match="FASTMEM_COLLECTIVE_SECONDS must be above 0, at most 1e9"):
        joined("cpu").__enter__()


def test_other_commands_refuse_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if each rank would run the same sweep, or a rank other than 0 prints."""
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "2"),
        ("MASTER_ADDR", "x"),
        ("MASTER_PORT", "1"),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        main(["capacity"])
    line = "fastmem: fastmem capacity is one process: leave torchrun out, and give --gpus-per-run\n"
    assert capsys.readouterr().err == line
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        main(["report", "x"])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("flags", [["--bogus", "1"], ["--steps", "1", "--epochs", "2"]])
def test_wrong_flags_of_one_node(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the first rank of a node says nothing of flags that no other node has."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
    for name, value in zip(names, ("8", "16", "x", "1", "0"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        main(["train", *flags])
    assert flags[-2] in capsys.readouterr().err


def test_a_device_that_is_none() -> None:
    """Fails if a typo of a device is PyTorch's error of many lines."""
    with pytest.raises(ValueError, match=r"device gpu is unavailable .*: try --device cpu"):
        joined("gpu").__enter__()
