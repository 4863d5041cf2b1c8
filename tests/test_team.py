"""The processes of a run: one, and two that are started as torchrun starts them."""

from __future__ import annotations

from pathlib import Path

import torch
from processes import together

from prunella.team import Team, team


def test_one_process_is_a_team_that_does_nothing() -> None:
    alone = team()
    value = torch.ones(2)
    assert (alone.rank, alone.size, alone.main) == (0, 1, True)
    assert alone.reduce(value) is value
    assert alone.gather(3) == [3]
    assert alone.broadcast("x") == "x"
    assert alone.share([1, 2, 3]) == alone.share([1, 2, 3], [3, 2, 1]) == [1, 2, 3]
    alone.barrier()


def test_shares_are_all_of_it_and_near_each_other() -> None:
    items, costs = list(range(20)), [float(n * n % 17 + 1) for n in range(20)]
    for size in (2, 3):
        shares = [Team(rank, size).share(items, costs) for rank in range(size)]
        assert sorted(item for share in shares for item in share) == items
        loads = [sum(costs[item] for item in share) for share in shares]
        assert max(loads) - min(loads) <= max(costs)
        assert all(share == sorted(share) for share in shares)
        assert sorted(item for rank in range(size) for item in Team(rank, size).share(items)) == items


def meet(folder: str) -> None:
    crew = team(torch.device("cpu"))
    assert team() == crew == Team(crew.rank, 2)
    mine = torch.tensor([1.0, 10.0]) * (crew.rank + 1)
    assert crew.reduce(mine).tolist() == [3.0, 30.0]
    assert mine.tolist() == [1.0 * (crew.rank + 1), 10.0 * (crew.rank + 1)]
    assert crew.gather({"rank": crew.rank}) == [{"rank": 0}, {"rank": 1}]
    assert crew.broadcast(f"from {crew.rank}") == "from 0"
    assert crew.share([1, 2, 3]) == ([1, 3] if crew.main else [2])
    if crew.main:
        (Path(folder) / "there").touch()
    crew.barrier()
    assert (Path(folder) / "there").exists()


def test_two_processes_meet(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert together(log, meet, str(tmp_path)) == 0, log.read_text()
