"""What servers read is the policy, bit for bit: from every layout, whole or as changed bytes."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from megatron_powerflow.serving.on_server.powerflow_weight_files import apply_changes, checksum, entries, read
from tests.distributed.test_export import tensors_of


def write_versions(model: str, out: str, *, as_changes: bool, num_steps: int, **parallel) -> dict:
    """Write the untrained model and `num_steps` others, each of which moves some numbers of every parameter, and
    export the last one. Returns the manifest of each."""
    from megatron_powerflow.config import ModelSection, ParallelSection, PrecisionSection
    from megatron_powerflow.hf.config import read_architecture
    from megatron_powerflow.hf.families import FAMILIES as families
    from megatron_powerflow.hf.live_weights import export_to_hf
    from megatron_powerflow.parallel.initialize import initialized
    from megatron_powerflow.parallel.launch import read_launch
    from megatron_powerflow.parallel.layout import inference_layout
    from megatron_powerflow.serving.manifest import Probe
    from megatron_powerflow.serving.weight_writer import WeightWriter
    from megatron_powerflow.training.policy import build_policy

    launch, folder = read_launch(), Path(out)
    architecture, family = read_architecture(model, families)
    layout = inference_layout(ParallelSection(**parallel), architecture, launch.world_size)
    with initialized(layout, launch, seed=0) as groups:
        precision = PrecisionSection(dtype="fp32")
        chunks = build_policy(architecture, family, layout, ModelSection(hf_path=model), precision, groups)
        writer = WeightWriter(folder / "weights", chunks, architecture, family, groups, as_changes=as_changes)
        manifests = []
        for step in range(num_steps + 1):
            for chunk in chunks if step else ():
                for name, parameter in chunk.named_parameters():
                    if parameter.ndim == 2 and "embedding" not in name and "output_layer" not in name:
                        parameter.data[:, :: 7 + step] *= 1.0 + 2.0**-12
            manifests.append(asdict(writer.write(f"run/{step}", step, Probe((), (), 1.0))))
            writer.forget_older()
        source = Path(model)
        export_to_hf(chunks, architecture, family, groups, companions=source, out=folder / "hf", source=source)
    return {"manifests": manifests}


LAYOUTS = [{}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_whole_weights_are_those_of_an_export(gloo, tiny_model, tmp_path, parallel):
    size = parallel.get("tp", 1) * parallel.get("pp", 1)
    found = gloo.run(
        size, write_versions, str(tiny_model("qwen2")), str(tmp_path), as_changes=False, num_steps=1, **parallel
    )[0]
    last = found["manifests"][-1]
    assert Path(last["folder"]).name == "step_000001"
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["step_000001"], "older ones are gone"
    assert_same_tensors(Path(last["folder"]), tmp_path / "hf", last["checksums"])
    assert last["num_bytes"] == last["whole_bytes"] == sum(v.nbytes for v in tensors_of(tmp_path / "hf").values())


@pytest.mark.parametrize("parallel", [{"tp": 2, "pp": 2}, {"ep": 2, "pp": 2}], ids=str)
def test_changes_lead_from_the_first_weights_to_the_last(gloo, tiny_model, tmp_path, parallel):
    model = tiny_model("qwen3_moe" if "ep" in parallel else "llama")
    found = gloo.run(4, write_versions, str(model), str(tmp_path), as_changes=True, num_steps=2, **parallel)[0]
    first, _, last = found["manifests"]
    assert [Path(one["folder"]).name for one in last["changes"]] == ["step_000001.changes", "step_000002.changes"]
    assert last["folder"] == first["folder"]
    assert [(one["base"], one["version"]) for one in last["changes"]] == [("run/0", "run/1"), ("run/1", "run/2")]
    assert last["num_bytes"] < 0.35 * last["whole_bytes"]
    copy = tmp_path / "copy"
    shutil.copytree(last["folder"], copy)
    for one in last["changes"]:
        apply_changes(copy, Path(one["folder"]))
    assert_same_tensors(copy, tmp_path / "hf", last["checksums"])


def assert_same_tensors(folder: Path, exported: Path, checksums: dict[str, str]) -> None:
    wanted = tensors_of(exported)
    found = {name: read(entry) for name, entry in entries(folder).items()}
    assert found.keys() == wanted.keys() == checksums.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {name: checksum(value) for name, value in wanted.items()} == checksums
