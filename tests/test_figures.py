"""What the figures of a list are: EER and minDCF if scores are equal, few or huge."""

import itertools
import json
import math

import numpy as np
import plain
import pytest

import tools
from tools import operating_points


def slow_points(scores, labels):
    """(EER in percent, minDCF at 0.01, minDCF at 0.05) by trying every threshold."""
    rates = []
    for threshold in [-math.inf, *sorted(set(scores))]:
        missed = [score <= threshold for score, label in zip(scores, labels) if label]
        accepted = [score > threshold for score, label in zip(scores, labels) if not label]
        rates.append((np.mean(missed), np.mean(accepted)))

    costs = []
    for prior in (0.01, 0.05):
        costs.append(min(miss * prior + false * (1 - prior) for miss, false in rates) / prior)

    for (miss, false), (next_miss, next_false) in zip(rates, rates[1:]):
        if next_miss >= next_false:
            part = (false - miss) / (false - miss + next_miss - next_false)
            return [100 * (miss + part * (next_miss - miss)), *costs]


def values_of(scores, labels):
    return [figure['value'] for figure in operating_points(scores, labels).values()]


@pytest.mark.parametrize('decimals', [0, 1, 8])
@pytest.mark.parametrize('scale', [1, -3000, 1e-6])
def test_figures_equal_a_loop_over_all_thresholds(decimals, scale):
    random = np.random.default_rng(decimals)
    for count in (2, 3, 5, 10, 60, 300):
        labels = random.permutation(np.arange(count) % 3 == 0).astype(int)
        scores = scale * (random.standard_normal(count) + labels).round(decimals)
        expected = slow_points(scores.tolist(), labels.tolist())
        assert values_of(scores, labels) == pytest.approx(expected, abs=1e-10)
        plain_values = plain.plain_figures(scores.tolist(), labels.tolist())
        assert plain_values == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(
    'by_falling_score, eer',
    [
        ([1, 1, 1, 0, 0, 0, 1, 1, 0, 0], 40),
        ([1, 0], 0),
        ([0, 1], 100),
        ([1, 1, 0, 0], 0),
        ([1, 0, 1, 0], 50),
        ([1, 0, 1], 50),
    ],
)
def test_the_eer_is_where_the_rates_cross(by_falling_score, eer):
    scores = -np.arange(len(by_falling_score), dtype=float)
    assert values_of(scores, by_falling_score)[0] == pytest.approx(eer, abs=1e-12)


@pytest.mark.parametrize('kind', [np.float32, np.float64, int, list])
def test_equal_scores_are_one_threshold(kind):
    """A model that gives every trial the same score knows nothing."""
    for labels in ([1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 0, 1, 0]):
        scores = [1] * 5 if kind is list else np.ones(5, kind)
        assert values_of(scores, labels) == [50, 1, 1]


def test_figures_do_not_depend_on_the_order_of_the_list():
    random = np.random.default_rng(1)
    labels = random.integers(2, size=200)
    scores = (random.standard_normal(200) + labels).round(1)
    first = operating_points(scores, labels)
    for _ in range(5):
        order = random.permutation(200)
        assert operating_points(scores[order], labels[order]) == first


def test_thresholds_have_the_rates_of_their_figures():
    random = np.random.default_rng(2)
    labels = random.integers(2, size=3000)
    scores = (random.standard_normal(3000) + 2 * labels).round(2)
    points = operating_points(scores, labels)
    for prior in (0.01, 0.05):
        cost, threshold = points[f'minDCF({prior})'].values()
        missed = np.mean(scores[labels == 1] <= threshold)
        accepted = np.mean(scores[labels == 0] > threshold)
        assert missed + accepted * (1 - prior) / prior == pytest.approx(cost)

    eer, threshold = points['EER'].values()
    gaps = []
    for other in (threshold, *scores):
        missed = np.mean(scores[labels == 1] <= other)
        accepted = np.mean(scores[labels == 0] > other)
        gaps.append(abs(missed - accepted))
    assert gaps[0] == pytest.approx(min(gaps), abs=1e-12)
    assert eer / 100 == pytest.approx(np.mean(scores[labels == 1] <= threshold), abs=gaps[0])


@pytest.mark.parametrize('decimals', [0, 2, 8])
def test_thresholds_are_finite_and_have_their_rates_on_float32_scores(decimals):
    """As read back from results.json, which is JSON without Infinity or NaN."""
    random = np.random.default_rng(decimals)
    for count, centre in itertools.product((2, 3, 8, 200), (-9, -1, 0, 1, 3, 9)):
        labels = random.permutation(np.arange(count) < max(1, count // 3)).astype(int)
        scores = random.standard_normal(count) + centre * labels
        scores = (scores.round(decimals) / 10).astype(np.float32)
        text = json.dumps(operating_points(scores, labels), allow_nan=False)
        for name, (value, threshold) in values_and_thresholds(json.loads(text)).items():
            missed = np.mean(scores[labels == 1] <= threshold)
            accepted = np.mean(scores[labels == 0] > threshold)
            if name == 'EER':
                assert min(missed, accepted) <= value / 100 + 1e-12
                assert value / 100 <= max(missed, accepted) + 1e-12
            else:
                prior = tools.PRIORS[name]
                assert missed + accepted * (1 - prior) / prior == pytest.approx(value, abs=1e-12)


def values_and_thresholds(points):
    return {name: (point['value'], point['threshold']) for name, point in points.items()}
