"""These tests have a command and environments of their own, bash tests/fake_cuda/run.sh; elsewhere they are skipped.

FAKE_CUDA says which kind of GPU torch is to see in this process; from then on it sees nothing else.
"""

from __future__ import annotations

import os

import pytest

GPU = os.environ.get("FAKE_CUDA")
if GPU is not None:
    from tests.fake_cuda import kernels, patches

    patches.install(patches.KINDS[GPU])
    kernels.install()


class Elsewhere(pytest.Module):
    """A file of tests where torch is not faked."""

    def collect(self):
        pytest.skip("needs an environment of its own: bash tests/fake_cuda/run.sh", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    return None if GPU is not None else Elsewhere.from_parent(parent, path=module_path)


@pytest.fixture
def run_of(tiny_model, tmp_path_factory):
    """run_of(case, family="llama", **sizes): the context of a run of a small model (`runs.opened`)."""
    from tests.fake_cuda.runs import SIZES, opened

    def run(case, family: str = "llama", **changes):
        rope = {"rope": None} if family == "llama" else {}
        return opened(case, tiny_model(family, **SIZES | rope | changes), tmp_path_factory.mktemp("run"))

    return run
