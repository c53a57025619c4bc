"""The linear layer that fine-tuning can begin with, beside scikit-learn's logistic regression."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from megascale.tasks.regression_start import STRENGTHS, fit_linear


def test_single_precision_and_a_penalty_that_is_hardly_one_give_the_same_answers():
    """What runs have: more features than windows, the strength at the end of the grid, one that jitters by roundings."""
    rng = np.random.default_rng(1)
    classes_N = np.arange(90) % 3
    x_ND = (rng.normal(size=(90, 120)) + 2 * np.eye(3, 120)[classes_N]).astype(np.float32)
    x_ND[:, 119] = 5 + 5e-7 * rng.normal(size=90)  # the next number in fp32 is at 4.8e-7
    x_ND, held_out_ND = x_ND[:60], x_ND[60:]
    weight_CD, bias_C = fit_linear(torch.from_numpy(x_ND), torch.from_numpy(classes_N[:60]), 3, STRENGTHS[-1])
    assert weight_CD.dtype == torch.float32
    got_NC = torch.softmax(torch.from_numpy(held_out_ND) @ weight_CD.T + bias_C, dim=1).numpy()
    scaler = StandardScaler().fit(x_ND[:, :119].astype(np.float64))
    reference = LogisticRegression(C=STRENGTHS[-1], max_iter=10_000, tol=1e-8)
    reference.fit(scaler.transform(x_ND[:, :119]), classes_N[:60])
    expected_NC = reference.predict_proba(scaler.transform(held_out_ND[:, :119]))
    np.testing.assert_allclose(got_NC, expected_NC, atol=1e-2)


def draw(num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of very different sizes, one of which never changes, and classes that overlap."""
    rng = np.random.default_rng(0)
    classes_N = np.arange(120) % num_classes
    x_ND = (rng.normal(size=(120, 6)) + np.eye(num_classes, 6)[classes_N] * 1.5) * 10.0 ** np.arange(-3, 3) + 7
    return np.concatenate([x_ND, np.full((120, 1), 2.5)], axis=1), classes_N


@pytest.mark.parametrize("strength", [0.01, 1.0])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_one_class_a_clip_is_fitted_as_by_scikit_learn(num_classes, strength):
    x_ND, classes_N = draw(num_classes)
    weight_CD, bias_C = fit_linear(torch.from_numpy(x_ND), torch.from_numpy(classes_N), num_classes, strength)
    got_NC = torch.softmax(torch.from_numpy(x_ND) @ weight_CD.T + bias_C, dim=1).numpy()
    # of two classes scikit-learn fits one row of weights, the difference of ours: twice the penalty for the same answer
    theirs = 2 * strength if num_classes == 2 else strength
    scaler = StandardScaler().fit(x_ND)
    reference = LogisticRegression(C=theirs, max_iter=2000, tol=1e-8)
    reference.fit(scaler.transform(x_ND), classes_N)
    np.testing.assert_allclose(got_NC, reference.predict_proba(scaler.transform(x_ND)), atol=1e-3)


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_each_label_of_several_is_fitted_by_itself(strength):
    x_ND, classes_N = draw(4)
    labels_NC = np.stack([classes_N == 0, classes_N % 2 == 1, np.zeros(120, dtype=bool)], axis=1)
    weight_CD, bias_C = fit_linear(torch.from_numpy(x_ND), torch.from_numpy(labels_NC).double(), 3, strength)
    got_NC = torch.sigmoid(torch.from_numpy(x_ND) @ weight_CD.T + bias_C).numpy()
    scaler = StandardScaler().fit(x_ND)
    for c in range(2):
        reference = LogisticRegression(C=strength, max_iter=2000, tol=1e-8).fit(scaler.transform(x_ND), labels_NC[:, c])
        expected_N = reference.predict_proba(scaler.transform(x_ND))[:, 1]
        np.testing.assert_allclose(got_NC[:, c], expected_N, atol=1e-3)
    assert got_NC[:, 2].max() < 0.01, "a label that no clip has"
