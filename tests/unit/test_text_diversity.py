"""distinct-n, self-BLEU and semantic distance: numbers by hand, and the order they promise."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_powerflow.metrics.diversity import distinct_n, embedding_distance, self_bleu


def test_distinct_n_by_hand():
    responses = ["a b a b", "a b c"]
    assert distinct_n(responses, 1) == 3 / 7
    assert distinct_n(responses, 2) == 3 / 5  # ab ba ab | ab bc
    assert distinct_n(responses, 4) == 1.0
    assert distinct_n(["a b", ""], 3) is None
    assert distinct_n(["A a"], 1) == 1.0


def test_self_bleu_is_one_for_equal_texts_and_falls_with_every_difference():
    same = "the cat sat on the mat all day long"
    other = "the cat sat under a table all night long"
    apart = "nobody expected seven purple submarines near Vienna yesterday"
    equal, near, far = (self_bleu(texts) for texts in ([same, same, same], [same, other], [same, apart]))
    assert equal == pytest.approx(1.0)
    assert far < near < 0.6
    assert self_bleu([same]) is None
    assert self_bleu(["", ""]) == 0.0


def test_self_bleu_is_sacrebleus_score_of_each_against_the_rest():
    import sacrebleu

    texts = ["one two three four five", "one two three four six", "one two nine four five"]
    expected = [
        sacrebleu.sentence_bleu(text, [t for t in texts if t is not text], use_effective_order=True).score
        for text in texts
    ]
    assert self_bleu(texts) == pytest.approx(sum(expected) / 300)


def test_embedding_distance_by_hand():
    vectors = np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 0.0]], dtype=np.float32)
    assert embedding_distance(vectors[:2]) == pytest.approx(1.0)
    assert embedding_distance(vectors[[0, 2]]) == pytest.approx(1.0)  # opposite counts as unrelated, not as 2
    assert embedding_distance(vectors[[0, 0]]) == pytest.approx(0.0)
    assert embedding_distance(vectors[[0, 0, 1]]) == pytest.approx(2 / 3)
    assert embedding_distance(vectors[[0, 3]]) == pytest.approx(1.0)
    assert embedding_distance(vectors[:1]) is None
