"""What does --check find before a run begins?"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import refusal, train
from conftest import write_wav

UTTERANCE = 'id1/session/00001.wav'
SOUND = 0.1 * np.random.default_rng(0).standard_normal(20000)
pytestmark = pytest.mark.usefixtures('quick', 'few_trials')


def test_check_goes_through_every_file_and_stops(tree, capsys):
    train(tree, '--check')
    output = capsys.readouterr().out
    assert 'WARNING' in output and 'id1, id2' in output, 'the lists share speakers'
    assert not os.path.exists(tree['save_path'])
    for folder, name, level in (
        ('eval_path', UTTERANCE, 0),
        ('rir_path', 'smallroom/Room001/Room001-00001.wav', 0),
        ('musan_path', 'noise/source/recording/00001.wav', np.inf),
    ):
        path = Path(tree[folder], name)
        content = path.read_bytes()
        write_wav(path, SOUND * level)
        assert name in refusal(capsys, train, tree, '--check', n_cpu=2)
        path.write_bytes(content)


def test_training_does_not_begin_with_a_bad_trial_file(tree, capsys):
    """Its header is good; the first test would stop at it, perhaps after hours."""
    write_wav(Path(tree['eval_path'], UTTERANCE), 0 * SOUND)
    assert UTTERANCE in refusal(capsys, train, tree)
    assert not os.path.exists(tree['save_path'])


@pytest.mark.parametrize('fault', ['other options', 'score.txt', 'an encoder that lacks a tensor'])
def test_check_finds_what_would_stop_the_run(tree, model, capsys, fault):
    options = {'max_epoch': 2, 'save_path': f'{tree["save_path"]}2'}
    if fault == 'an encoder that lacks a tensor':
        state = torch.load(model)
        del state['speaker_encoder.layer2.bn3.weight']
        torch.save(state, model)
        options['initial_model'] = model
    else:
        train(tree, save_path=options['save_path'])
    if fault == 'other options':
        options['lr'] = 0.5
    if fault == 'score.txt':
        Path(options['save_path'], 'score.txt').write_text('nothing\n')

    before = sorted(Path(options['save_path']).rglob('*'))
    found = refusal(capsys, train, tree, '--check', **options)
    assert sorted(Path(options['save_path']).rglob('*')) == before
    assert found == refusal(capsys, train, tree, **options)


def test_check_and_training_agree_on_a_speaker_without_a_good_file(tree, capsys):
    with open(tree['train_list'], 'a') as file:
        file.write('zz zz/session/00000.wav\n')
    train(tree, '--check', max_bad=10)
    assert 'zz/session/00000.wav' in capsys.readouterr().out
    train(tree, max_bad=10, batch_size=13, max_epoch=1)
    assert re.search(r'epoch 1, .*\b1 ', capsys.readouterr().out)
    assert 'zz/session/00000.wav' in refusal(capsys, train, tree, '--check', max_bad=5)
    assert 'zz/session/00000.wav' in refusal(capsys, train, tree, max_bad=5, max_epoch=2)


@pytest.mark.parametrize(
    'option, folder',
    [('musan_path', 'noise/source/recording'), ('rir_path', 'smallroom/Room001')],
)
def test_check_reads_every_noise_and_room_by_the_rule_of_training(tree, capsys, option, folder):
    folder = Path(tree[option], folder)
    for number in range(300):
        write_wav(folder / f'{number:05d}.wav', SOUND[:2000], subtype='PCM_16')
    (folder / '00001.wav').write_bytes(b'')
    train(tree, '--check')
    assert '00001.wav' in capsys.readouterr().out
    message = refusal(capsys, train, tree, '--check', max_bad=0.1)
    assert option in message and '00001.wav' in message


def test_check_refuses_what_is_bad_as_a_whole(tree, capsys):
    for path in Path(tree['rir_path']).rglob('*.wav'):
        write_wav(path, 0 * SOUND)
    assert '--rir_path' in refusal(capsys, train, tree, '--check', max_bad=100)


def test_an_epoch_that_leaves_out_many_utterances_says_so(tree, capsys):
    train(tree, '--check', batch_size=7)
    assert re.search(r'5 of 12 utterances.*--batch_size', capsys.readouterr().out)
    train(tree, '--check', batch_size=4)
    assert 'leaves out' not in capsys.readouterr().out
