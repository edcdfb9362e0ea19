"""Each entry of the CPU layer is needed: without it, the run it serves fails. One not needed any more fails here.

The layer patches a process for good, so each case is a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from megatron_powerflow.parallel.cpu_gloo import SHIMS, install
from tests.conftest import REPOSITORY
from tests.distributed.megatron_sessions import run_training

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU layer never acts beside CUDA")

MEGATRON_VERSION = tuple(int(part) for part in version("megatron-core").split(".")[:2])
SCRIPT = """
import sys
from pathlib import Path
from megatron_powerflow.parallel import cpu_gloo
if __name__ == "__main__":
    cpu_gloo.install(leave_out=frozenset(sys.argv[3:]))
    from tests.distributed.megatron_sessions import run_training
    run_training(Path(sys.argv[1]), "run.output_dir=" + sys.argv[2], "run.num_steps=2")
"""


# what only a mixture of experts spread over ranks, or latent attention, needs; ep=2 with tp=2 takes four ranks
WITH_EXPERTS = {
    "streams": 2,
    "all_to_all_splits": 2,
    "te_general_gemm": 2,
    "latent_attention_without_te": 2,
    "uneven_shards": 4,
}


@pytest.fixture(scope="module")
def started(gloo, tiny_model, tmp_path_factory) -> Path:
    """A run one step old: bf16, distributed optimizer, two pipeline stages, recomputation. Continuing it loads,
    samples, trains and saves."""
    folder = tmp_path_factory.mktemp("shims")
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt_token_ids": [5, 6, 7]}) + "\n")
    (folder / "script.py").write_text(SCRIPT)
    (folder / "config.yaml").write_text(
        f"""
model: {{hf_path: {tiny_model("llama")}, recompute: full}}
prompts: {{path: {folder / "prompts.jsonl"}}}
rollout: {{prompts_per_step: 1, responses_per_prompt: 2, max_prompt_tokens: 8, max_response_tokens: 4}}
parallel: {{micro_batch_size: 1, pp: 2}}
optimizer: {{lr: 1e-3, distributed: true}}
metrics: {{wandb: "off", curves: false}}
evaluation: {{samples: 0}}
run: {{num_steps: 1, export: false, output_dir: {folder / "run"}}}
"""
    )
    gloo.run(2, run_training, folder / "config.yaml")
    return folder


@pytest.fixture(scope="module")
def with_experts(tiny_model, started, tmp_path_factory) -> dict[int, Path]:
    """Number of processes -> a run of a mixture with latent attention that has not begun."""
    folders = {}
    for num_processes in set(WITH_EXPERTS.values()):
        folder = folders[num_processes] = tmp_path_factory.mktemp("experts")
        shutil.copyfile(started / "script.py", folder / "script.py")
        text = (started / "config.yaml").read_text()
        text = text.replace(str(started / "run"), str(folder / "run")).replace("recompute: full", "recompute: none")
        text = re.sub("hf_path: [^,]*", f"hf_path: {tiny_model('deepseek_v3')}", text)
        split = "tp: 2, sequence_parallel: true, ep: 2" if num_processes == 4 else "ep: 2"
        text = text.replace("pp: 2", split).replace("prompts_per_step: 1", "prompts_per_step: 2")
        (folder / "config.yaml").write_text(text)
        (folder / "run").mkdir()
    return folders


def continue_without(
    started: Path, tmp_path: Path, *names: str, num_processes: int = 2, timeout: float = 90
) -> tuple[int | None, str]:
    """(exit code, stderr) of the continued run; None when it hangs."""
    shutil.copytree(started / "run", tmp_path / "run")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    process = subprocess.Popen(
        [*launcher, str(started / "script.py"), str(started / "config.yaml"), str(tmp_path / "run"), *names],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,
    )
    try:
        _, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its workers, which have sessions of their own
        _, stderr = process.communicate(timeout=60)
        return None, stderr
    return process.returncode, stderr


@pytest.mark.long  # every other test of gloo ranks sees it; this is what those below are compared with
def test_with_every_shim_the_run_works(started, tmp_path):
    code, stderr = continue_without(started, tmp_path, timeout=600)
    assert code == 0, stderr[-3000:]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step_000002"


@pytest.mark.long  # that mixtures work is seen in test_experts.py
def test_with_every_shim_a_mixture_works(with_experts, tmp_path):
    code, stderr = continue_without(with_experts[4], tmp_path, num_processes=4, timeout=600)
    assert code == 0, stderr[-3000:]


@pytest.mark.long  # changes with the version of Megatron-Core or torch, and with the layer itself
@pytest.mark.parametrize("shim", [shim for shim in SHIMS if shim.name != "compiler"], ids=lambda shim: shim.name)
def test_without_a_shim_the_run_fails(started, with_experts, tmp_path, shim):
    if shim.needed_below is not None and shim.needed_below <= MEGATRON_VERSION:
        pytest.skip(f"Megatron-Core {shim.needed_below} and later do without it")
    num_processes = WITH_EXPERTS.get(shim.name, 2)
    run = with_experts[num_processes] if shim.name in WITH_EXPERTS else started
    code, _ = continue_without(run, tmp_path, shim.name, num_processes=num_processes)
    assert code != 0, f"{shim.name} is not needed any more: remove it"


@pytest.mark.long
def test_without_the_compiler_entry_every_process_loads_a_compiler():
    script = """
import sys
from megatron_powerflow.parallel import cpu_gloo
cpu_gloo.install(leave_out=frozenset(sys.argv[1:]))
import megatron_powerflow.train
print(any(name.startswith(("torch._inductor", "torch._dynamo.")) for name in sys.modules))
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    loaded = [
        subprocess.run(
            [sys.executable, "-c", script, *names], capture_output=True, text=True, check=True, env=environment
        ).stdout.split()[-1]
        for names in ((), ("compiler",))
    ]
    assert loaded == ["False", "True"]


def test_every_entry_says_what_it_owes():
    for shim in SHIMS:
        assert shim.upstream
        assert shim.symptom
        assert shim.removal


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="no such shim"):
        install(leave_out=frozenset({"nothing"}))


def hf_logits(model: str) -> list:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(model).eval()(torch.tensor([[5, 6, 7, 8]])).logits.tolist()


@pytest.mark.slow
def test_transformers_loads_models_as_without_the_layer(gloo, tiny_model):
    """The layer wraps torch's factories, which transformers calls under `torch.device("meta")`."""
    model = str(tiny_model("llama"))
    plain = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import hf_logits; print(hf_logits({model!r}))"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=True,
    )
    (patched,) = gloo.run(1, hf_logits, model)
    torch.testing.assert_close(torch.tensor(patched), torch.tensor(json.loads(plain.stdout)))
