"""What happens if a file that training reads is bad: utterance, noise or room."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import refusal, train
from conftest import assert_same_run, wave, write_wav

import dataLoader
from dataLoader import BadAudio, make_batches, read_room, reverberate, train_loader
from tools import BadInput

pytestmark = pytest.mark.usefixtures('quick', 'few_trials')
SOUND = 0.1 * np.random.default_rng(0).standard_normal(20000)
UTTERANCE = 'id1/session/00001.wav'
PARTS = {
    'musan_path': 'noise/source/recording/00000.wav',
    'rir_path': 'smallroom/Room001/Room001-00000.wav',
}


def make_dataset(tree, bad_audio=None, **options):
    dataset = train_loader(**tree, num_frames=20, **options)
    if bad_audio:
        dataset.bad_audio = BadAudio(str(bad_audio), 100, dataset.count_folders())
    return dataset


def test_without_augmentation_neither_noises_nor_rooms_are_needed(tree, capsys):
    train(tree, augment=0)
    plain = torch.load(f'{tree["save_path"]}/model/model_0001.model')
    assert re.search(r'augmentation +none', capsys.readouterr().out)
    nowhere = {'musan_path': 'nowhere', 'rir_path': 'nowhere'}
    train(tree, augment=0, save_path=f'{tree["save_path"]}2', **nowhere)
    for name, tensor in torch.load(f'{tree["save_path"]}2/model/model_0001.model').items():
        assert torch.equal(tensor, plain[name]), name
    train(tree, augment=0, max_epoch=2, **nowhere)
    assert '--musan_path' in refusal(capsys, train, tree, augment=0.1, **nowhere)


def write_cut(path):
    """Writes a wav that ends before the samples that its header announces."""
    content = Path(write_wav(path, SOUND)).read_bytes()
    Path(path).write_bytes(content[:9999])


BAD = {
    'empty': lambda path: write_wav(path, SOUND[:0], subtype='PCM_16'),
    '8 kHz': lambda path: write_wav(path, SOUND, rate=8000),
    'stereo, 48 kHz': lambda path: write_wav(path, np.stack([SOUND, SOUND], axis=1), rate=48000),
    'not finite': lambda path: write_wav(path, SOUND * np.nan),
    'cut short': write_cut,
    'text': lambda path: Path(path).write_text('<html>not found</html>'),
    'gone': lambda path: Path(path).unlink(),
}


@pytest.mark.parametrize('fault', BAD)
@pytest.mark.parametrize('option', PARTS)
def test_a_bad_noise_or_room_is_drawn_again_and_listed(tree, tmp_path, option, fault):
    bad = f'{tree[option]}/{PARTS[option]}'
    write_wav(bad, SOUND[:3000], subtype='PCM_16')
    dataset = make_dataset(tree, tmp_path / 'bad_audio.txt', augment=1.0)
    BAD[fault](bad)
    crops = [dataset[1, index][0] for index in range(12) for _ in range(5)]
    crops += [dataset[epoch, index][0] for epoch in (2, 3, 4) for index in range(12)]
    assert all(crop.isfinite().all() and crop.any() for crop in crops)
    lines = (tmp_path / 'bad_audio.txt').read_text().splitlines()
    assert lines and {line.split(': ')[0] for line in lines} == {bad}
    # The same draw gives the same crop, as a run that is continued needs it.
    assert all((dataset[3, index][0] == crops[72 + index]).all() for index in range(12))


def test_a_bad_noise_in_a_loading_process_is_listed_and_replaced_the_same(tree, tmp_path):
    bad = f'{tree["musan_path"]}/{PARTS["musan_path"]}'
    write_wav(bad, SOUND[:3000], subtype='PCM_16')
    batches = {}
    for n_cpu in (0, 1):
        listed = tmp_path / f'bad_audio{n_cpu}.txt'
        write_wav(bad, SOUND[:3000], subtype='PCM_16')
        dataset = make_dataset(tree, listed, augment=1.0)
        write_cut(bad)
        batches[n_cpu] = []
        for epoch in range(1, 4):
            loader = make_batches(dataset, 4, n_cpu)
            loader.batch_sampler.epoch = epoch
            batches[n_cpu] += [audio for audio, _ in loader]
        assert {line.split(': ')[0] for line in listed.read_text().splitlines()} == {bad}
    assert torch.equal(torch.stack(batches[0]), torch.stack(batches[1]))


@pytest.mark.parametrize('option', PARTS)
def test_bad_noises_and_rooms_count_to_max_bad_of_their_folder(tree, capsys, option, monkeypatch):
    folder = str(Path(tree[option], PARTS[option]).parent)
    for number in range(20):
        write_wav(f'{folder}/{number:05d}.wav', SOUND[:3000], subtype='PCM_16')
    files = len(list(Path(tree[option]).rglob('*.wav')))
    if option == 'musan_path':
        files = len(list(Path(tree[option], 'noise').rglob('*.wav')))
    monkeypatch.setattr(dataLoader, 'check_data', lambda *args: None)
    read_utterances = train_loader.read_or_replace
    spoilt = []

    def spoil(dataset, *args):
        """After the start, as a disk fails."""
        if not spoilt:
            spoilt.extend(sorted(Path(folder).glob('000*.wav'))[:15])
            for path in spoilt:
                path.write_bytes(b'')
        return read_utterances(dataset, *args)

    monkeypatch.setattr(train_loader, 'read_or_replace', spoil)
    options = {'max_epoch': 4, 'batch_size': 12, 'augment': 1, 'test_step': 4}
    train(tree, save_path=f'{tree["save_path"]}1', max_bad=90, **options)
    spoilt.clear()
    message = refusal(capsys, train, tree, max_bad=0.1, **options)
    assert '--max_bad 0.1%' in message
    assert re.search(rf'\d of {files} ', message)
    assert str(folder) in message


def one_utterance_of_zz(tree):
    """Adds a speaker with one utterance, which is missing, to the training list."""
    with open(tree['train_list'], 'a') as file:
        file.write('zz zz/session/00000.wav\n')


def test_a_speaker_without_a_good_file_is_replaced_by_others_with_their_labels(tree, tmp_path):
    for speaker in range(4):
        for number in range(3):
            path = f'{tree["train_path"]}/id{speaker}/session/{number:05d}.wav'
            write_wav(path, wave(speaker, 3440))
    one_utterance_of_zz(tree)
    dataset = make_dataset(tree, tmp_path / 'bad_audio.txt', augment=0)
    labels = set()
    for epoch in range(1, 30):
        audio, label = dataset[epoch, 12]
        np.testing.assert_allclose(audio, wave(label, 3440), atol=1e-6)
        labels.add(label)
    assert labels == {0, 1, 2, 3}
    (line,) = set((tmp_path / 'bad_audio.txt').read_text().splitlines())
    assert 'zz/session/00000.wav' in line


def room(delay, samples=8000):
    """A decaying response whose direct sound comes after `delay` seconds."""
    rng = np.random.default_rng(1)
    decay = np.exp(-np.arange(samples) / 1000)
    response = 0.3 * rng.standard_normal(samples) * decay
    response[0] = 2
    return np.concatenate([np.zeros(int(16000 * delay)), response])


@pytest.mark.parametrize(
    'delay, usable', [(0, True), (0.069, True), (0.19, True), (0.21, False), (2.5, False)]
)
def test_a_room_whose_direct_sound_is_late_is_refused(tmp_path, delay, usable):
    path = write_wav(tmp_path / 'room.wav', room(delay))
    if not usable:
        with pytest.raises(BadInput, match='room.wav'):
            read_room(path)
        return
    rir = read_room(path)
    np.testing.assert_allclose(rir, room(delay), atol=1e-6)
    # As published: the response with unit energy, from its first sample on.
    expected = np.convolve(SOUND, rir / np.linalg.norm(rir))[: len(SOUND)]
    np.testing.assert_allclose(reverberate(SOUND, rir), expected, atol=1e-5)


def test_a_late_room_is_found_by_check_and_never_used(tree, tmp_path, capsys):
    late = Path(tree['rir_path'], 'smallroom/Room001/late.wav')
    write_wav(late, room(2.5), subtype='PCM_16')
    assert 'late.wav' in refusal(capsys, train, tree, '--check')
    dataset = make_dataset(tree, tmp_path / 'bad_audio.txt')
    rng = random.Random(0)
    for _ in range(20):
        assert np.abs(dataset.add_rev(SOUND[:3440], rng)).max() > 0.01
    assert 'late.wav' in (tmp_path / 'bad_audio.txt').read_text()


def test_noises_given_as_rooms_are_refused(tree, capsys):
    for path in Path(tree['musan_path']).rglob('*.wav'):
        write_wav(path, np.concatenate([SOUND, 2 * SOUND]), subtype='PCM_16')
    assert '--rir_path' in refusal(capsys, train, tree, '--check', rir_path=tree['musan_path'])


@pytest.mark.parametrize('channels, rate', [(1, 48000), (2, 16000), (8, 48000)])
def test_rooms_of_another_format_get_the_line_that_converts_them(tree, capsys, channels, rate):
    for path in Path(tree['rir_path']).rglob('*.wav'):
        write_wav(path, np.tile(room(0)[:, None], channels), rate=rate)
    message = refusal(capsys, train, tree)
    assert f'{rate} Hz' in message
    assert 'ffmpeg -i' in message


# Utterances.


@pytest.mark.parametrize('fault', [*BAD, 'silent'])
def test_a_bad_utterance_is_replaced_and_listed(tree, tmp_path, capsys, fault):
    path = Path(tree['train_path'], UTTERANCE)
    if fault == 'silent':
        write_wav(path, 0 * SOUND, subtype='PCM_16')
    else:
        BAD[fault](path)
    message = refusal(capsys, train, tree)
    assert UTTERANCE in message and '1 of 12' in message, 'it is more than 1 %'

    workers = [0]
    if fault == 'gone':
        workers = [0, 2]
    for n_cpu in workers:
        folder = tmp_path / f'exp{n_cpu}'
        train(tree, save_path=folder, max_bad=10, max_epoch=2, n_cpu=n_cpu)
        log = capsys.readouterr().out
        assert '1 of 12' in log
        assert len(re.findall(r'epoch \d, LR.*, 1 utterances', log)) == 2
        (line,) = (folder / 'bad_audio.txt').read_text().splitlines()
        assert line.startswith(f'{path}: ')
        assert not (folder / 'bad_audio.new').exists()
    assert_same_run(tmp_path / 'exp0', tmp_path / f'exp{workers[-1]}')


def test_the_replacement_is_of_the_same_speaker(tree):
    for speaker in range(4):
        for number in range(3):
            path = f'{tree["train_path"]}/id{speaker}/session/{number:05d}.wav'
            write_wav(path, wave(speaker, 20000))
    Path(tree['train_path'], UTTERANCE).unlink()
    dataset = train_loader(**tree, num_frames=123)
    dataset.bad_audio = BadAudio(f'{tree["train_path"]}/bad.txt', 100)
    dataset.augment = lambda audio, rng: audio
    position = dataset.labels.tolist().index(1) + 1
    assert len(dataset[1, position][0]) == 19920
    whole = wave(1, 20000)
    for epoch in range(1, 5):
        audio, label = dataset[epoch, position]
        assert label == 1
        # The crop may begin at each of the 81 places that the file has for it.
        errors = [np.abs(audio.numpy() - whole[n : n + 19920]).max() for n in range(81)]
        assert min(errors) < 1e-3


def test_a_run_stops_when_too_much_is_bad(tree, capsys, monkeypatch):
    """Files that go bad after the run began."""
    train(tree, max_epoch=1)
    monkeypatch.setattr(dataLoader, 'check_data', lambda *args: None)
    for number in range(3):
        Path(tree['train_path'], f'id{number}/session/00000.wav').unlink()
    message = refusal(capsys, train, tree, max_bad=20, max_epoch=9)
    assert '--max_bad 20%' in message and '00000.wav' in message
    assert 0 < len(Path(tree['save_path'], 'bad_audio.txt').read_text().splitlines()) <= 3
