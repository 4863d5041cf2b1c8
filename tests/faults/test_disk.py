"""Disks that are full or read only: a clear error, nothing of other runs lost, and the run goes on with more room.

A small tmpfs in a mount namespace of its own (as root, or where users may make such namespaces).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import SHORT

UNSHARE = ["unshare", "--map-root-user", "--mount"]
SCENARIO = """
import contextlib, io, json, pathlib, subprocess, sys
import torch
from prunella import cli
torch.set_num_threads(1)
disk, tries, command = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]

def run(*more):
    sys.argv = ["prunella", *command, *more]
    said = io.StringIO()
    cli.err.file = said
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code or 0, said.getvalue()

def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)

def used():
    stat = __import__("os").statvfs(disk)
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize  # what a run leaves; it may need more on its way

def weights():
    return {p.name: p.read_bytes() for p in disk.glob("out/*") if p.suffix in (".safetensors", ".masks")}

mount("size=64m")
assert run()[0] == 0
need, whole = used(), weights()
subprocess.run(["umount", disk], check=True)
rows = []
for share in tries:
    mount(f"size={max(1, int(share * need / 4096)) * 4096}")
    code, said = run()
    left = sorted(p.name for p in disk.iterdir())
    row = {"share": share, "code": code, "said": said, "left": left}
    if code:
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        again = ["--resume"] if (disk / "out.partial" / "run.json").exists() else []
        row["again"], row["said again"] = run(*again)
    row["same"] = weights() == whole
    rows.append(row)
    subprocess.run(["umount", disk], check=True)
mount("ro,size=1m")
code, said = run()
print(json.dumps({"tries": rows, "read only": [code, said]}))
"""


def scenario(tmp_path: Path, tries: list[float], *command: object) -> dict[str, Any]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    arguments = [str(disk), json.dumps(tries), *(str(disk / "out") if item == "OUT" else str(item) for item in command)]
    ran = subprocess.run([*UNSHARE, sys.executable, "-c", SCENARIO, *arguments], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


COMMANDS: dict[str, tuple[object, ...]] = {
    "prune": ("prune", "MODEL", "-o", "OUT", *SHORT),
    "prune packed": ("prune", "MODEL", "-o", "OUT", *SHORT, "--format", "packed", "--bits", 8),
    "heal": (
        "heal",
        "PRUNED",
        "-o",
        "OUT",
        "--tokens",
        256,
        "--length",
        32,
        "--windows",
        1,
        "--set",
        "heal.held_out=4",
    ),
    "pack": ("pack", "PRUNED", "-o", "OUT"),
}
TRIES = [0.01, 0.1, 0.3, 0.5, 0.7, 0.85, 0.95, 0.99, 1.2, 8]  # of what is needed


@pytest.mark.parametrize(
    ("what", "tries"),
    [("prune", [0.5, 8]), *(pytest.param(what, TRIES, marks=pytest.mark.slow) for what in COMMANDS)],
    ids=lambda value: value if isinstance(value, str) else str(len(value)),
)
def test_a_full_disk_loses_nothing(what: str, tries: list[float], llama: Path, pruned: Path, tmp_path: Path) -> None:
    names = {"MODEL": llama, "PRUNED": pruned}
    found = scenario(tmp_path, tries, *(names.get(str(item), item) for item in COMMANDS[what]))
    for row in found["tries"]:
        if row["code"]:
            assert row["code"] == 2, row["said"]
            assert "no space left on the disk of" in row["said"], row
            assert "Traceback" not in row["said"], row
            assert "out" not in row["left"], row
            assert row["again"] == 0, row["said again"]
        assert row["same"], row["share"]
    assert found["tries"][0]["code"]
    assert found["tries"][-1]["code"] == 0
    code, said = found["read only"]
    assert code == 2, said
    assert "cannot be" in said
    assert "Traceback" not in said
