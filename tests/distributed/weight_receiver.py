"""A process in the place of a server's worker: it takes a stream of weights, without vLLM and without our package.

    python weight_receiver.py FOLDER [die|hang]

FOLDER/place.json says where the group meets, once it is there; what came of it goes into FOLDER/result.json. die, hang:
in the middle of the second tensor's frame.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from powerflow_weight_files import checksum
from powerflow_weight_stream import Place, Stopped, join_as_worker, receive

FOLDER, MOOD = Path(sys.argv[1]), (sys.argv[2:] or [""])[0]
CPU = torch.device("cpu")


def say(name: str, value: dict) -> None:
    partial = FOLDER / f"{name}.partial"
    partial.write_text(json.dumps(value))
    partial.rename(FOLDER / f"{name}.json")


def next_place() -> tuple[Place, int]:
    path = FOLDER / "place.json"
    while not path.exists():
        time.sleep(0.02)
    values = json.loads(path.read_text())
    path.unlink()
    rank = values.pop("first_rank")
    return Place(**values), rank


def main() -> None:
    place, rank = next_place()
    try:
        group = join_as_worker(place, rank, CPU)
    except Stopped as stopped:
        say("result", {"stopped": str(stopped)})
        return
    except RuntimeError as error:
        say("result", {"never": str(error)})
        return
    found = {}
    try:
        for name, tensor in receive(group, CPU):
            found[name] = checksum(tensor)
            if len(found) == 2 and MOOD == "die":
                os._exit(9)
            if len(found) == 2 and MOOD == "hang":
                os.kill(os.getpid(), signal.SIGSTOP)
    except RuntimeError as error:
        say("result", {"broke": str(error)})
        return
    say("result", {"checksums": found})


if __name__ == "__main__":
    say("ready", {})
    while True:
        main()
