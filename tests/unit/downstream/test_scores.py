"""Scores are what their names say, where a clip has one class and where it has any number of labels."""

import json
import math

import numpy as np
import pytest

from megascale.downstream.scores import average_windows, pool, score, score_labels


def test_windows_are_averaged_by_recording_wherever_they_stand():
    probabilities = np.array([[1.0, 0.0], [0.2, 0.8], [0.0, 1.0], [0.4, 0.6], [0.5, 0.5]])
    averaged, targets, names = average_windows(probabilities, np.array([0, 1, 0, 1, 0]), ["b", "a", "b", "a", "c"])
    assert names == ["b", "a", "c"]
    assert np.allclose(averaged, [[0.5, 0.5], [0.3, 0.7], [0.5, 0.5]], atol=1e-12)  # sums of two doubles
    assert targets.tolist() == [0, 1, 0]


def test_average_can_overrule_most_windows():
    averaged, _, _ = average_windows(np.array([[0.6, 0.4], [0.6, 0.4], [0.0, 1.0]]), np.array([1, 1, 1]), ["a"] * 3)
    assert averaged.argmax(axis=1).tolist() == [1]


def test_scores_are_those_computed_by_hand():
    #           truth:  a a a a b b c, predicted: a a b c b a c
    found = score(np.array([0, 0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 2, 1, 0, 2]), ["a", "b", "c"])
    assert found["accuracy"] == pytest.approx(4 / 7)
    assert found["count"] == 7
    assert found["chance"] == pytest.approx(4 / 7)
    # F1 = 2 TP / (2 TP + FP + FN)
    f1 = {"a": 4 / (4 + 1 + 2), "b": 2 / (2 + 1 + 1), "c": 2 / (2 + 1 + 0)}
    assert {name: row["f1"] for name, row in found["per_class"].items()} == pytest.approx(f1)
    assert found["macro_f1"] == pytest.approx(sum(f1.values()) / 3)
    assert found["per_class"]["a"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 4, "f1": f1["a"], "count": 4})


def test_confusion_rows_are_truth_and_columns_are_predictions():
    found = score(np.array([0, 0, 0, 1]), np.array([2, 2, 0, 1]), ["a", "b", "c"])
    assert found["confusion"] == [[1, 0, 2], [0, 1, 0], [0, 0, 0]]
    assert found["classes"] == ["a", "b", "c"]


def test_class_absent_from_the_test_set_is_not_in_the_macro_mean():
    targets, predicted = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2])
    found = score(targets, predicted, ["a", "b", "absent"])
    assert found["macro_f1"] == pytest.approx((1.0 + 2 / 3) / 2)  # b: precision 1, recall 1/2
    assert found["per_class"]["absent"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "count": 0}
    assert score(targets, np.array([0, 0, 1, 1]), ["a", "b", "absent"])["macro_f1"] == 1.0


def test_class_that_is_never_predicted_counts_as_zero():
    assert score(np.array([0, 0, 1]), np.array([0, 0, 0]), ["a", "b"])["macro_f1"] == pytest.approx(0.8 / 2)


# ----------------------------------------------------------------------------------------------------- several labels

#                   a                      b           absent      everywhere
TARGETS = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 1]], dtype=np.float32)
PROBABILITIES = np.array([[0.9, 0.1, 0.2, 0.5], [0.8, 0.7, 0.9, 0.5], [0.3, 0.8, 0.1, 0.1], [0.1, 0.2, 0.1, 0.2]])


def test_scores_of_labels_are_those_computed_by_hand():
    found = score_labels(TARGETS, PROBABILITIES, ["a", "b", "absent", "everywhere"])
    # a: right at ranks 1 and 3: (1/1 + 2/3) / 2; of its 4 pairs of a positive and a negative, 3 stand in order
    # b: right at rank 2: 1/2; of its 3 pairs, 2 stand in order. everywhere: all are right, and there is no pair
    rows = found["per_class"]
    assert [rows[name]["ap"] for name in ("a", "b", "everywhere")] == pytest.approx([5 / 6, 1 / 2, 1])
    assert [rows[name]["auc"] for name in ("a", "b")] == pytest.approx([3 / 4, 2 / 3])
    assert [row["count"] for row in rows.values()] == [2, 1, 0, 4]
    assert found["map"] == pytest.approx((5 / 6 + 1 / 2 + 1) / 3)
    assert found["auc"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert found["count"] == 4


def test_class_that_does_not_occur_is_in_no_mean():
    found = score_labels(TARGETS, PROBABILITIES, ["a", "b", "absent", "everywhere"])
    assert found["per_class"]["absent"] == {"ap": None, "auc": None, "count": 0}
    kept = score_labels(TARGETS[:, [0, 1, 3]], PROBABILITIES[:, [0, 1, 3]], ["a", "b", "everywhere"])
    assert (kept["map"], kept["auc"], kept["d_prime"]) == (found["map"], found["auc"], found["d_prime"])


def test_d_prime_is_audiosets():
    """As published together for AudioSet: AUC 0.959 and d' 2.452, AUC 0.973 and d' 2.732. (arXiv:1912.10211)"""
    for auc, d_prime in ((0.959, 2.452), (0.973, 2.732)):
        negatives = 1000
        right = round(auc * negatives)  # one positive clip, above so many of the others
        probabilities = np.concatenate([[right - 0.5], np.arange(negatives)])[:, None]
        found = score_labels(np.eye(negatives + 1, 1), probabilities, ["a"])
        assert found["auc"] == pytest.approx(auc, abs=1e-12)
        assert found["d_prime"] == pytest.approx(d_prime, abs=0.01)  # the published AUC has three digits


def test_d_prime_is_of_the_mean_auc():
    targets_RC = np.repeat(np.eye(5, 1), 3, axis=1)
    below = [
        1,
        3,
        4,
    ]  # of four negatives; AUCs of 1/4, 3/4 and 1: neither the mean of d's (1 has none) nor the median's
    probabilities_RC = np.array([[count - 0.5 for count in below], *([i] * 3 for i in range(4))])
    found = score_labels(targets_RC, probabilities_RC, ["a", "b", "c"])
    assert [row["auc"] for row in found["per_class"].values()] == [0.25, 0.75, 1.0]
    assert found["auc"] == pytest.approx(2 / 3)
    assert found["d_prime"] == pytest.approx(math.sqrt(2) * 0.430727, abs=1e-6)  # tables: Phi(0.430727) = 2/3


def test_d_prime_without_a_bound_is_none_and_the_scores_are_json():
    perfect = score_labels(TARGETS, TARGETS, ["a", "b", "absent", "everywhere"])
    assert (perfect["map"], perfect["auc"], perfect["d_prime"]) == (1.0, 1.0, None)
    nothing = score_labels(np.zeros((2, 2)), np.full((2, 2), 0.5), ["a", "b"])
    assert (nothing["map"], nothing["auc"], nothing["d_prime"]) == (None, None, None)
    chance = score_labels(np.array([[1.0], [0.0]]), np.full((2, 1), 0.5), ["a"])
    assert (chance["auc"], chance["d_prime"]) == (0.5, 0.0)
    for found in (perfect, nothing, chance):
        json.dumps(found, allow_nan=False)
        assert all(value is None or math.isfinite(value) for value in (found["map"], found["auc"], found["d_prime"]))


def test_windows_of_several_labels_are_averaged_too():
    probabilities = np.array([[0.2, 0.4], [0.6, 0.0], [0.5, 0.5]])
    averaged, targets, names = average_windows(probabilities, np.array([[1, 0], [1, 0], [1, 1]]), ["b", "b", "a"])
    assert names == ["b", "a"]
    assert np.allclose(averaged, [[0.4, 0.2], [0.5, 0.5]], atol=1e-12)  # sums of two doubles
    assert targets.tolist() == [[1, 0], [1, 1]]


def test_pooled_results_score_as_all_their_predictions_together():
    rng, classes = np.random.default_rng(0), ["a", "b", "c", "absent"]
    truth, predicted = rng.integers(0, 3, 60), rng.integers(0, 4, 60)
    parts = [score(truth[i : i + 20], predicted[i : i + 20], classes) for i in (0, 20, 40)]
    assert pool(parts) == score(truth, predicted, classes)
    assert pool(parts)["macro_f1"] != pytest.approx(np.mean([part["macro_f1"] for part in parts]))
