"""What happens if a number is not finite: a loss, a gradient, a weight or an embedding?"""

import re

import numpy as np
import pytest
import torch
from cli import evaluate, refusal, train

import dataLoader
from ECAPAModel import load_model, saved_models
from tools import read_scores

pytestmark = pytest.mark.usefixtures('quick', 'few_trials')


def test_a_loss_that_is_not_finite_stops_the_run(tree, capsys, monkeypatch):
    train(tree)
    augment = dataLoader.train_loader.augment
    calls = []

    def poison(dataset, audio, rng):
        """The sixth crop is not finite."""
        calls.append(audio)
        crop = augment(dataset, audio, rng)
        if len(calls) == 6:
            crop = crop * np.float32(np.nan)
        return crop

    monkeypatch.setattr(dataLoader.train_loader, 'augment', poison)
    message = refusal(capsys, train, tree, max_epoch=2)
    assert 'epoch 2, step 2:' in message
    batch = torch.load(tree['save_path'] + '/bad_batch.pt', weights_only=True)
    assert (batch['epoch'], batch['step'], len(batch['files'])) == (2, 2, 4)
    assert all(path in message for path in batch['files'])
    assert batch['audio'].isnan().all(dim=1).tolist() == [False, True, False, False]
    speakers = [path.split('/')[-3] for path in batch['files']]
    assert speakers == [f'id{label}' for label in batch['labels'].tolist()]
    assert list(saved_models(tree['save_path'] + '/model').values()) == [1]
    system = load_model(tree['save_path'] + '/model/model_0001.model', device='cpu').train()
    replayed = system.train_step(batch['audio'], batch['labels'])
    assert not replayed.isfinite().all()
    monkeypatch.undo()
    train(tree, max_epoch=2)
    assert [score[0] for score in read_scores(tree['save_path'] + '/score.txt')] == [1, 2]


def test_an_exploding_gradient_stops_the_run(tree, capsys):
    assert re.search('epoch 1, step [1-4]:', refusal(capsys, train, tree, lr=1e30))
    assert not saved_models(tree['save_path'] + '/model')


def test_weights_that_are_not_finite_are_not_saved(tree, capsys):
    """A step with a huge rate has a finite loss and gradient, and no weights."""
    message = refusal(capsys, train, tree, batch_size=12, lr=1e300)
    assert 'epoch 1: speaker_encoder.' in message
    assert not saved_models(tree['save_path'] + '/model')


def test_an_embedding_that_is_not_finite_is_an_error(tree, capsys):
    train(tree)
    path = tree['save_path'] + '/model/model_0001.model'
    state = torch.load(path)
    state['speaker_encoder.bn6.weight'].fill_(3e38)
    torch.save(state, path)
    assert '4 of 4 files' in refusal(capsys, evaluate, tree, path)
    state['speaker_encoder.bn6.weight'].fill_(float('nan'))
    torch.save(state, path)
    assert 'speaker_encoder.bn6.weight' in refusal(capsys, evaluate, tree, path)
