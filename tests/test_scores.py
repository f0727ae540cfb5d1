"""Which scores does --eval write: of several lists, normalised, centred, of enrolled models?"""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import evaluate, train
from conftest import make_system

from ECAPAModel import ECAPAModel, load_model
from exps.scoring import as_norm, choose_cohort, embed_speakers, read_results
from tools import BadInput, operating_points, read_scores, score_pairs

NAME = 'id{}/session/{:05d}.wav'.format
pytestmark = pytest.mark.usefixtures('quick')


@pytest.fixture
def embedded(monkeypatch):
    """The paths of each call of ECAPAModel.embed_files."""
    calls = []
    embed_files = ECAPAModel.embed_files

    def watched(system, paths, *args, **kwargs):
        calls.append(paths)
        return embed_files(system, paths, *args, **kwargs)

    monkeypatch.setattr(ECAPAModel, 'embed_files', watched)
    return calls


def last_table(capsys):
    """Rows of cells of the table that a command printed last, its header first."""
    lines = capsys.readouterr().out.splitlines()
    header = max(n for n, line in enumerate(lines) if line.split()[:2] == ['list', 'kind'])
    return [re.split('  +', line) for line in lines[header:]]


# Several lists.


def test_several_lists_in_one_command(tree, model, tmp_path, capsys, embedded):
    lines = Path(tree['eval_list']).read_text().splitlines(keepends=True)
    second = str(tmp_path / 'second.txt')
    Path(second).write_text(''.join(lines[::2]))
    elsewhere = str(shutil.copytree(tree['eval_path'], tmp_path / 'elsewhere'))
    both = [tree['eval_list'], second]

    evaluate(tree, model, eval_list=both)
    assert [len(paths) for paths in embedded] == [12], 'a file of two lists is embedded once'
    header, *together = last_table(capsys)
    assert header == ['list', 'kind', 'trials', 'speakers', 'EER', 'minDCF(0.01)', 'minDCF(0.05)']
    counts = [[tree['eval_list'], 'raw', '66', '-'], [second, 'raw', '33', '-']]
    assert [row[:4] for row in together] == counts, 'four speakers are too few to tell'

    evaluate(tree, model, eval_list=both, eval_path=[tree['eval_path'], elsewhere])
    assert last_table(capsys)[1:] == together
    for name, row in zip(both, together):
        evaluate(tree, model, eval_list=name)
        assert last_table(capsys)[1:] == [row]


def test_several_lists_in_training(tree, tmp_path, capsys):
    lines = Path(tree['eval_list']).read_text().splitlines(keepends=True)
    second = tmp_path / 'second.txt'
    second.write_text(''.join(lines[:40]))
    first = tree['eval_list']
    train(tree, eval_list=[first, second])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line for line in lines if line}
    assert (rows[first][2], rows[str(second)][2]) == ('66', '40')
    (score,) = read_scores(tree['save_path'] + '/score.txt')
    assert f'{score[4]:.2f}%' == rows[first][4]


# AS-norm.


def slow_as_norm(score, enrolment, test, cohort, top_n):
    """Adaptive s-norm of one trial, as in Matejka et al., eq. 3 and 4, with vectors (2, 192)."""
    sides = []
    for vector in (enrolment, test):
        scores = [0.5 * np.sum(vector * speaker) for speaker in cohort]
        closest = sorted(scores, reverse=True)[:top_n]
        sides.append((score - np.mean(closest)) / np.std(closest))
    return 0.5 * sum(sides)


@pytest.mark.parametrize('top_n', [5, 400])
def test_as_norm_equals_a_loop(top_n):
    random = np.random.default_rng(2)
    embeddings = random.standard_normal((30, 2, 192)) / 14
    cohort = random.standard_normal((40, 2, 192)) / 14
    pairs = random.integers(30, size=(200, 2))
    scores = score_pairs(embeddings, pairs)
    expected = []
    for score, (a, b) in zip(scores, pairs):
        expected.append(slow_as_norm(score, embeddings[a], embeddings[b], cohort, top_n))
    normalised = as_norm(
        scores, embeddings.astype(np.float32), pairs, cohort.astype(np.float32), top_n
    )
    np.testing.assert_allclose(normalised, expected, rtol=1e-4, atol=1e-4)


def test_a_cohort_of_one_is_refused():
    embeddings = np.ones((2, 2, 192), np.float32)
    cohort = np.ones((1, 2, 192), np.float32)
    with pytest.raises(BadInput, match='cohort'):
        as_norm(np.zeros(1), embeddings, np.array([[0, 1]]), cohort, 9)


def test_as_norm_by_command(tree, model, capsys, embedded):
    for settings in ({}, {}, {'cohort_utterances': 2}, {'seed': 3}):
        evaluate(tree, model, score_norm='asnorm', **settings)
    made = [len(paths) for paths in embedded if paths[0].startswith(tree['train_path'])]
    assert made == [12, 8, 12], 'a cohort is made again when a setting changes, and only then'
    rows = last_table(capsys)[1:]
    assert [row[1] for row in rows] == ['raw', 'asnorm']
    Path(f'{model}.cohort.npz').write_bytes(b'')
    evaluate(tree, model, score_norm='asnorm', seed=3)
    assert last_table(capsys)[1:] == rows, 'a damaged cohort is made again'

    entry = read_results(tree['save_path'])[tree['eval_list']]
    text = Path(tree['save_path'], 'scores/trials.txt').read_text()
    lines = [line.split() for line in text.splitlines()]
    trials = [line.split() for line in Path(tree['eval_list']).read_text().splitlines()]
    assert [[line[0], *line[3:]] for line in lines] == trials
    labels, raw, normalised = np.array([line[:3] for line in lines], float).T
    for scores, kind in ((raw, 'raw'), (normalised, 'asnorm')):
        eer = operating_points(scores, labels)['EER']['value']
        assert eer == pytest.approx(entry['figures'][kind]['EER']['value'], abs=1e-6)


def test_a_cohort_is_the_mean_over_utterances(tree, model):
    system = load_model(model, device='cpu')
    files = choose_cohort(tree['train_list'], tree['train_path'], per_speaker=2, seed=1)
    cohort = embed_speakers(system, files)
    for speaker in range(4):
        paths = [f'{tree["train_path"]}/id{speaker}/session/{n:05d}.wav' for n in range(3)]
        each = system.embed_files(paths)
        means = [each[list(pair)].mean(axis=0) for pair in ((0, 1), (0, 2), (1, 2))]
        assert any(np.allclose(cohort[speaker], mean, atol=1e-5) for mean in means)


# Centred scores.


def test_centred_scores_equal_a_loop(tree, tmp_path):
    """The mean of the speakers is subtracted from each vector and from the cohort."""
    torch.manual_seed(3)
    system = make_system()
    system.save_parameters(tmp_path / 'a.model')
    options = {'score_norm': 'asnorm', 'top_n': 3, 'cohort_utterances': 3}
    evaluate(tree, tmp_path / 'a.model', '--subtract_mean', **options)
    figures = read_results(tree['save_path'])[tree['eval_list']]['figures']
    assert list(figures) == ['raw', 'asnorm', 'centred', 'centred asnorm']

    names = [f'id{speaker}/session/{n:05d}.wav' for speaker in range(4) for n in range(3)]
    cohort = system.embed_files([f'{tree["train_path"]}/{name}' for name in names])
    cohort = cohort.reshape(4, 3, 2, 192).mean(axis=1)
    files = dict(zip(names, system.embed_files([f'{tree["eval_path"]}/{n}' for n in names])))
    for line in Path(tree['save_path'], 'scores/trials.txt').read_text().splitlines():
        _, raw, _, minus_mean, normalised, a, b = line.split()
        expected = slow_scores(files[a], files[b], cohort)
        assert [float(raw), float(minus_mean)] == pytest.approx(expected[:2], abs=1e-5)
        assert float(normalised) == pytest.approx(expected[2], rel=1e-3, abs=1e-3)


def slow_scores(a, b, cohort):
    """Raw, centred and centred asnorm score (the three closest speakers) of two files (2, 192)."""
    mean = cohort.mean(axis=0)
    raw = score(a, b)
    a = centre(a, mean)
    b = centre(b, mean)
    speakers = [centre(speaker, mean) for speaker in cohort]
    sides = []
    for side in (a, b):
        closest = sorted(score(side, speaker) for speaker in speakers)[-3:]
        sides.append((score(a, b) - np.mean(closest)) / np.std(closest))
    return raw, score(a, b), np.mean(sides)


def score(a, b):
    """Score of two files, each its whole embedding and that of its crops."""
    return 0.5 * (a[0] @ b[0] + a[1] @ b[1])


def centre(vectors, mean):
    """Subtracts a mean from both vectors of a file, and scales them to unit length."""
    return [unit(vectors[kind] - mean[kind]) for kind in (0, 1)]


def unit(vector):
    return vector / np.linalg.norm(vector)


# Enrolled models.


@pytest.mark.parametrize('line_end', ['\n', '\r\n'])
def test_models_are_enrolled_by_the_mean_of_their_utterances(tree, model, tmp_path, line_end):
    # Of a model's two lines both count; the second model is called as one of the files tested.
    models = [
        f'anna {NAME(0, 0)} {NAME(0, 1)}',
        f'{NAME(2, 0)} {NAME(1, 0)}',
        '',
        f'anna {NAME(0, 2)}',
    ]
    trials = [
        f'anna {NAME(1, 1)} nontarget',
        f'{NAME(2, 0)} {NAME(1, 2)} target',
        f'anna {NAME(2, 0)} nontarget',
    ]
    (tmp_path / 'models.txt').write_bytes(line_end.join(models).encode())
    (tmp_path / 'cn.txt').write_bytes(line_end.join(trials).encode())
    lists = {'eval_list': tmp_path / 'cn.txt', 'enrol_list': tmp_path / 'models.txt'}
    evaluate(tree, model, '--subtract_mean', **lists)
    text = Path(tree['save_path'], 'scores/cn.txt').read_text()
    rows = [line.split() for line in text.splitlines()]
    assert [row[3:] for row in rows] == [line.split()[:2] for line in trials]

    system = load_model(model, device='cpu')
    paths = [f'{tree["eval_path"]}/{NAME(s, n)}' for s in range(3) for n in range(3)]
    vectors = system.embed_files(paths)
    cohort = choose_cohort(tree['train_list'], tree['train_path'], 20, 10)
    centre = embed_speakers(system, cohort).mean(axis=0)
    for row, enrolled, test in ((0, [0, 1, 2], 4), (1, [3], 5), (2, [0, 1, 2], 6)):
        scores = [float(score) for score in rows[row][1:3]]
        expected = [
            raw_score(vectors[enrolled], vectors[test]),
            centred_score(vectors[enrolled].mean(axis=0) - centre, vectors[test] - centre),
        ]
        assert scores == pytest.approx(expected, abs=2e-5)


def raw_score(enrolled, test):
    """Score of a model's utterances (N, 2, 192) and a tested one (2, 192), by its definition."""
    mean = enrolled[:, 0].mean(axis=0)
    whole = mean @ test[0] / np.linalg.norm(mean)
    crops = np.mean(enrolled[:, 1] @ test[1])
    return 0.5 * whole + 0.5 * crops


def centred_score(a, b):
    """Mean cosine of two pairs of vectors (2, 192)."""
    a = a / np.linalg.norm(a, axis=1, keepdims=True)
    b = b / np.linalg.norm(b, axis=1, keepdims=True)
    return 0.5 * np.sum(a * b)
