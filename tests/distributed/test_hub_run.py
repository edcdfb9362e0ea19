"""A run whose model and prompts are names on the hub: pinned, continued, exported, pushed; and several processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_powerflow.commands.open_model import GENERATE_KEYS, open_named
from megatron_powerflow.parallel.launch import ALONE
from tests.conftest import REPOSITORY, run_cli
from tests.free_ports import free_port
from tests.hub_server import TOKEN

PROMPTS = b'{"prompt_token_ids": [5, 6, 7]}\n{"prompt_token_ids": [8, 9]}\n'
CONFIG = """
model: {{hf_path: owner/tiny}}
precision: {{dtype: fp32}}
prompts: {{path: owner/questions}}
rollout: {{prompts_per_step: 2, responses_per_prompt: 2, max_prompt_tokens: 8, max_response_tokens: 6}}
parallel: {{micro_batch_size: 2}}
metrics: {{wandb: "off", curves: false}}
evaluation: {{samples: 0}}
run: {{num_steps: 1, output_dir: {run}}}
"""


def environment(hub, cache: Path) -> dict[str, str]:
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "0", **settings}


@pytest.mark.slow
def test_a_run_goes_on_with_the_commit_that_it_began_with_and_its_export_is_pushed(hub, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    commits = {"owner/tiny": hub.add("owner/tiny", model)}
    commits["datasets/owner/questions"] = hub.add("datasets/owner/questions", {"train.jsonl": PROMPTS})
    run, config, said = tmp_path / "run", tmp_path / "config.yaml", environment(hub, tmp_path / "cache")
    config.write_text(CONFIG.format(run=run))
    done = run_cli("train", config, env=said)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "inputs.json").read_text())["revisions"] == commits

    shutil.copyfile(tiny_model("llama", seed=1) / "model.safetensors", model / "model.safetensors")
    moved = hub.add("owner/tiny", model)
    hub.add("datasets/owner/questions", {"train.jsonl": b'{"prompt_token_ids": [1]}\n'})
    done = run_cli("train", config, "run.num_steps=2", env=said)
    assert done.returncode == 0, done.stderr
    launches = [json.loads(line) for line in (run / "launches.jsonl").read_text().splitlines()]
    assert [launch["first_step"] for launch in launches] == [0, 1]
    assert all(launch["revisions"] == commits for launch in launches)
    card = (run / "hf_export" / "README.md").read_text()
    assert "base_model: owner/tiny\nlicense: mit\n" in card
    assert f"owner/tiny at commit {commits['owner/tiny']}" in card

    base = open_named(str(run), (), GENERATE_KEYS, ALONE, reference=True)
    assert base.hf_folder.name == commits["owner/tiny"]
    done = run_cli("train", config, "run.num_steps=3", f"model.hf_path=owner/tiny@{moved}", env=said)
    assert done.returncode == 2
    assert "these are not the weights that the run began with" in done.stderr

    done = run_cli("export", run, "--out", tmp_path / "out", "--push-to-hub", "me/sharp", "--private", env=said)
    assert done.returncode == 0, done.stderr
    pushed = hub.repositories["me/sharp"]
    assert pushed.private
    assert f"pushed {hub.url}/me/sharp/commit/{pushed.head}" in done.stdout
    assert pushed.files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()


PROCESS = """
import torch.distributed as dist
from megatron_powerflow.errors import UserError
from megatron_powerflow.hub.fetch import locate
from megatron_powerflow.hub.located import RequestedName
from megatron_powerflow.parallel.agreement import main_first
from megatron_powerflow.parallel.initialize import cpu_group
from megatron_powerflow.parallel.launch import read_launch

launch = read_launch()
found = locate([RequestedName("model", "owner/tiny", "--model")], launch).model("owner/tiny")

def fails():
    raise UserError("only the main process knows")

try:
    main_first(launch, "second", fails, print)
except UserError as error:
    assert str(error) == "only the main process knows"
else:
    raise AssertionError
with cpu_group(launch):
    everyone = [None, None]
    dist.all_gather_object(everyone, [found.revision, found.folder])
if launch.is_main:
    import json
    print("FOUND " + json.dumps(everyone))
"""


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_several_processes_take_the_commit_that_the_main_one_found(hub, tmp_path, launcher):
    """And what it finds wrong; process groups come up behind. srun: its variables alone, on one machine."""
    commit = hub.add("owner/tiny", {"config.json": b"{}", "model.safetensors": b"weights"})
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    said = environment(hub, tmp_path / "cache")
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        processes = [subprocess.Popen([*command, script], env=said, stdout=subprocess.PIPE, text=True)]
    else:
        slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2"}
        slurm |= {
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_ID": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        processes = [
            subprocess.Popen(
                [sys.executable, script],
                env=said | slurm | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    (line,) = (line for line in outputs[0].splitlines() if line.startswith("FOUND "))
    snapshot = f"{tmp_path}/cache/models--owner--tiny/snapshots/{commit}"
    assert json.loads(line.removeprefix("FOUND ")) == [[commit, snapshot]] * 2
    assert hub.asked.count("GET /api/models/owner/tiny") == 1  # which commit the name stands for
