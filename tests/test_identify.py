"""Who of these people is it, how surely, and which people cannot be enrolled?"""

import csv
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from cli import command_line, refusal
from conftest import make_system, write_wav

from ECAPAModel import load_model
from exps import identify, scoring
from tools import sha256

pytestmark = pytest.mark.usefixtures('quick')


@pytest.fixture
def model(corpus):
    """A checkpoint of random weights in the folder of a run."""
    torch.manual_seed(1)
    path = corpus / 'exp/model/model_0001.model'
    path.parent.mkdir(parents=True)
    make_system().save_parameters(path)
    return str(path)


def people_of(corpus):
    """Folder of three people, three recordings each."""
    for speaker in range(3):
        for number in range(3):
            source = corpus / f'audio/id{speaker}/a/{number}.wav'
            write_wav(corpus / f'people/p{speaker}/{number}.wav', soundfile.read(source)[0])
    return str(corpus / 'people')


def run_identify(corpus, model, *flags):
    """Rows of the CSV for the recordings that nobody was enrolled by."""
    out = corpus / f'{random.random()}.csv'
    names = [f'{corpus}/audio/id{speaker}/a/3.wav' for speaker in range(5)]
    (corpus / 'files.txt').write_text('\n'.join(names))
    arguments = [str(corpus / 'files.txt'), '--people', people_of(corpus), '--out', str(out)]
    options = command_line(initial_model=model, device='cpu', n_cpu=0)
    identify.main([*arguments, *options, *flags])
    with open(out, newline='') as file:
        return list(csv.DictReader(file))


def slow_scores(corpus, model):
    """Score of each recording with each person, (5, 3), by loops."""
    system = load_model(model, device='cpu')
    scores = np.empty((5, 3))
    for speaker in range(5):
        ((whole, crops),) = system.embed_files([f'{corpus}/audio/id{speaker}/a/3.wav'])
        for person in range(3):
            paths = [f'{corpus}/people/p{person}/{number}.wav' for number in range(3)]
            enrolled = system.embed_files(paths, any_format=True).mean(axis=0)
            cosine = whole @ enrolled[0] / np.linalg.norm(enrolled[0])
            scores[speaker, person] = 0.5 * cosine + 0.5 * crops @ enrolled[1]
    return scores


def test_without_a_calibration_there_are_scores_and_a_note(corpus, model, capsys):
    rows = run_identify(corpus, model)
    assert 'raw scores' in capsys.readouterr().err
    scores = slow_scores(corpus, model)
    for row, expected in zip(rows, scores):
        assert row['name'] == f'p{expected.argmax()}'
        assert float(row['score']) == pytest.approx(expected.max(), abs=1e-4)
        assert row['probability'] == ''


@pytest.mark.parametrize('prior', [0.1, 0.5, 0.9])
def test_the_posterior_is_that_of_the_definition(corpus, model, prior):
    calibration = {
        'kind': 'raw',
        'weight': 60.0,
        'bias': -55.0,
        'threshold': {'false_acceptances': 1, 'ratio': 2.0},
        'list': {'path': 'dev.txt', 'sha256': 'x', 'trials': 100},
        'checkpoint': {'path': model, 'sha256': sha256(Path(model).read_bytes())},
        'options': {},
    }
    (corpus / 'exp/calibration.json').write_text(json.dumps(calibration))
    rows = run_identify(corpus, model, '--p_enrolled', str(prior))
    for row, scores in zip(rows, slow_scores(corpus, model)):
        weights = {f'p{k}': prior / 3 * np.exp(60 * score - 55) for k, score in enumerate(scores)}
        weights['nobody'] = 1 - prior
        total = sum(weights.values())
        best, second = sorted(weights, key=weights.get, reverse=True)[:2]
        assert (row['name'], row['second']) == (best, second)
        assert float(row['probability']) == pytest.approx(weights[best] / total, abs=0.01)


def test_people_that_cannot_be_enrolled_are_refused(corpus, model, capsys):
    people = people_of(corpus)
    arguments = [str(corpus / 'audio'), *command_line(initial_model=model, device='cpu', n_cpu=0)]

    def refused(people, *flags):
        return refusal(capsys, identify.main, [*arguments, '--people', str(people), *flags])

    assert '--out' in refused(people, '--out', str(corpus / 'audio'))
    os.makedirs(corpus / 'people/empty')
    assert 'no ' in refused(people) and 'empty' in refused(people)
    os.rmdir(corpus / 'people/empty')
    write_wav(corpus / 'people/silent/0.wav', np.zeros(16000))
    assert 'silent/0.wav' in refused(people)
    (corpus / 'people/silent/0.wav').unlink()
    (corpus / 'people/silent').rmdir()
    shared = corpus / 'people/p1/copy.wav'
    shared.write_bytes((corpus / 'people/p0/0.wav').read_bytes())
    assert 'p1 and p0' in refused(people)
    (corpus / 'list.txt').write_text(f'anna {corpus}/people/p0/0.wav\nberta\n')
    assert 'list.txt, line 2' in refused(corpus / 'list.txt')
    (corpus / 'list.txt').write_text('anna nowhere.wav\n')
    assert 'nowhere.wav' in refused(corpus / 'list.txt')
    shared.unlink()
    stray = corpus / 'people/bob.wav'
    stray.write_bytes((corpus / 'people/p0/0.wav').read_bytes())
    assert 'bob.wav' in refused(people)
    stray.unlink()
    os.makedirs(corpus / 'people/.Trash')
    assert list(identify.read_people(people)) == ['p0', 'p1', 'p2']


def test_scores_in_blocks_are_those_of_each_pair(monkeypatch):
    """Of seven people with two recordings each, and eleven recordings."""
    random = np.random.default_rng(0)
    vectors = random.standard_normal((25, 2, 192)).astype(np.float32)
    embeddings = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    cohort = random.standard_normal((40, 2, 192)).astype(np.float32)
    models = embeddings[:14].reshape(7, 2, 2, 192).mean(axis=1)
    monkeypatch.setattr(identify, 'PAIRS', 30)
    found = identify.score_people(models, embeddings[14:], cohort, 10, True)

    assert list(found) == ['raw', 'asnorm', 'centred', 'centred asnorm']
    for file in range(11):
        for model in range(7):
            pair = np.stack([models[model], embeddings[14 + file]])
            expected = scoring.score_kinds(pair, np.array([[0, 1]]), cohort, 10, True)
            for kind, scores in expected.items():
                assert found[kind][file, model] == pytest.approx(scores[0], abs=2e-5)
