"""How different are the responses to one prompt? By their words and, given embeddings, by their meaning.

Each function takes one prompt's responses; the caller takes the mean over prompts. A quantity that does not exist, such
as a comparison of a single response, is None.

Left out: the sentence encoder (`evaluation/diversity.py`), judges (`evaluation/judge.py`). No torch; sacrebleu is
imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_powerflow.errors import UserError
from megatron_powerflow.metrics.repetition import ngrams


def distinct_n(responses: Sequence[str], n: int) -> float | None:
    """Returns distinct n-grams / all n-grams of words, over the responses together (Li et al., arXiv 1510.03055).

    Words are separated by white space and keep their case. None when no response has n words.
    """
    grams = [gram for response in responses for gram in ngrams(response.split(), n)]
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(responses: Sequence[str]) -> float | None:
    """Returns the mean over responses of BLEU-4 with all the others as references, in [0, 1].

    Zhu et al., arXiv 1802.01886, by sacrebleu's sentence BLEU: 13a tokens, exponential smoothing; orders for which the
    response is too short are left out. 1 where all are equal; lower is more diverse. None for fewer than two responses.
    Raises UserError where sacrebleu is not installed.
    """
    if len(responses) < 2:
        return None
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise UserError('self-BLEU needs sacrebleu; pip install "megatron_powerflow[eval]"') from None
    bleu = BLEU(effective_order=True)
    scores = [
        bleu.sentence_score(response, [*responses[:index], *responses[index + 1 :]]).score
        for index, response in enumerate(responses)
    ]
    return float(np.mean(scores)) / 100


def embedding_distance(embeddings: np.ndarray) -> float | None:
    """Returns the mean over pairs of 1 - clip(cos(e_i, e_j), 0, 1), in [0, 1].

    embeddings: [K, d] any float, read only. None for K < 2. An embedding of norm 0 has cosine 0 with everything.
    """
    if len(embeddings) < 2:
        return None
    vectors = embeddings.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    cosines = (vectors @ vectors.T)[np.triu_indices(len(vectors), k=1)]
    return float((1.0 - cosines.clip(0.0, 1.0)).mean())
