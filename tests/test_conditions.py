"""Out in the world: codecs in training, conditions of a list, and who of these people it is."""

import csv
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from cli import command_line, refusal, train
from conftest import make_system, trial_lines, wave, write_wav
from scipy.stats import chisquare

import dataLoader
from dataLoader import INTERNET, TELEPHONE, Codec, through_codec, train_loader, usable_codecs
from ECAPAModel import load_model
from exps import conditions, identify, scoring
from tools import BadInput

ALL = {**TELEPHONE, **INTERNET}


def delay(a, b):
    """How many samples b comes later than a, by the largest correlation."""
    spectrum = np.fft.rfft(b, 2 * len(a)) * np.fft.rfft(a, 2 * len(a)).conj()
    lag = int(np.argmax(np.fft.irfft(spectrum)))
    return lag if lag < len(a) else lag - 2 * len(a)


@pytest.mark.parametrize('name', ALL)
def test_a_codec_keeps_length_level_and_place(name):
    codec = usable_codecs()[name]
    level = codec.levels and codec.levels[1]
    for samples in (1, 257, 8001, 32240):
        audio = 0.5 * wave(3, samples)
        coded = through_codec(audio, codec, level)
        assert coded.shape == audio.shape
        assert coded.dtype == np.float32
    # Of the longest.
    assert np.sqrt(np.mean(coded**2) / np.mean(audio**2)) == pytest.approx(1, abs=0.2)
    assert abs(delay(audio, coded)) <= 1
    assert np.corrcoef(audio, coded)[0, 1] > 0.8
    assert not np.array_equal(audio, coded)


def test_a_loud_crop_is_turned_down_and_not_clipped():
    audio = 3 * wave(3, 16000) / np.abs(wave(3, 16000)).max()
    coded = through_codec(audio, TELEPHONE['ulaw'])
    assert np.abs(coded).max() < 1.2
    quiet = through_codec(audio / 100, TELEPHONE['ulaw'])
    assert np.corrcoef(coded, quiet)[0, 1] > 0.99


def test_a_telephone_has_its_band():
    noise = 0.1 * np.random.default_rng(0).standard_normal(32000)
    spectrum = np.abs(np.fft.rfft(through_codec(noise, TELEPHONE['alaw'], telephone_band=True)))
    hertz = np.fft.rfftfreq(32000, 1 / 16000)
    inside = spectrum[(hertz > 500) & (hertz < 3000)].mean()
    assert spectrum[hertz < 100].mean() < 0.05 * inside
    assert spectrum[hertz > 4500].mean() < 0.05 * inside


def training_options(tree):
    names = ('train_list', 'train_path', 'musan_path', 'rir_path')
    return {name: tree[name] for name in names}


@pytest.mark.parametrize('share', [0, 0.3, 1])
def test_the_share_of_coded_crops(tree, monkeypatch, share):
    names = {codec: name for name, codec in ALL.items()}
    drawn = []

    def watched(audio, codec, compression, telephone_band):
        drawn.append((names[codec], telephone_band))
        return audio

    dataset = train_loader(**training_options(tree), num_frames=20, augment=0, codec=share)
    monkeypatch.setattr(dataLoader, 'through_codec', watched)
    for epoch in range(100):
        for index in range(12):
            dataset[epoch, index]
    if share in (0, 1):
        assert len(drawn) == 1200 * share
    else:
        assert chisquare([len(drawn), 1200 - len(drawn)], [360, 840]).pvalue > 0.001
    if share:
        telephone = [limited for name, limited in drawn if name in TELEPHONE]
        others = [limited for name, limited in drawn if name in INTERNET]
        expected = [len(drawn) * 2 / 3, len(drawn) / 3]
        assert chisquare([len(telephone), len(others)], expected).pvalue > 0.001
        limited = [sum(telephone), len(telephone) - sum(telephone)]
        assert chisquare(limited).pvalue > 0.001
        assert not any(others)
        assert {name for name, _ in drawn} == set(ALL)


def test_a_coded_crop_depends_on_seed_epoch_and_index_alone(tree):
    options = training_options(tree)
    first = train_loader(**options, num_frames=20, codec=0.5, seed=1)
    again = train_loader(**options, num_frames=20, codec=0.5, seed=1)
    plain = train_loader(**options, num_frames=20, seed=1)
    same = []
    for index in range(12):
        assert torch.equal(first[2, index][0], again[2, index][0])
        same.append(torch.equal(first[2, index][0], plain[2, index][0]))
    assert 0 < sum(same) < 12, 'a crop that no codec took is as without the option'


def test_the_option_is_part_of_the_run(tree, capsys, short_crops):
    train(tree, codec=0.3)
    assert 'codecs gsm, ulaw' in capsys.readouterr().out
    assert '--codec 0.0 (was 0.3 of gsm' in refusal(capsys, train, tree, max_epoch=2)
    assert '--codec' in refusal(capsys, train, tree, max_epoch=2, codec=1.5)


def test_a_libsndfile_without_one_of_the_codecs_is_refused_at_the_start(monkeypatch):
    """Or the same command would give another model on another machine."""
    unknown = Codec(8000, 'WAV', 'NO_SUCH_CODING')
    monkeypatch.setitem(dataLoader.TELEPHONE, 'gsm', unknown)
    usable_codecs.cache_clear()
    with pytest.raises(BadInput, match='--codec.*gsm'):
        usable_codecs()
    usable_codecs.cache_clear()


@pytest.fixture
def corpus(tmp_path):
    """Folder of five speakers' recordings, four of each, and a list of all their trials."""
    names = [f'id{speaker}/a/{number}.wav' for speaker in range(5) for number in range(4)]
    for number, name in enumerate(names):
        audio = wave(number // 4, 40000 + 500 * number)[100 * number :]
        write_wav(tmp_path / 'corpus/audio' / name, audio, subtype='PCM_16')
    (tmp_path / 'corpus/trials.txt').write_text(trial_lines(names))
    return tmp_path / 'corpus'


def test_conditions_of_a_list(corpus, tree, capsys):
    arguments = [str(corpus / 'trials.txt'), '--audio', str(corpus / 'audio'), '--n_cpu', '0']
    places = ['--musan_path', tree['musan_path'], '--rir_path', tree['rir_path']]
    wanted = ['gsm', 'mp3', 'noise', 'room', 'short']
    for out in ('one', 'two'):
        options = ['--out', str(corpus / out), '--conditions', *wanted]
        conditions.main([*arguments, *places, *options])
    assert '120 files' in capsys.readouterr().out
    lists = sorted(path.name for path in (corpus / 'one').glob('*.txt'))
    assert lists == sorted(f'{name}.txt' for name in ['clean', *wanted, 'gsm_cross'])
    original = [line.split() for line in (corpus / 'trials.txt').read_text().splitlines()]
    cross = [line.split() for line in (corpus / 'one/gsm_cross.txt').read_text().splitlines()]
    assert cross[0][1:] == [original[0][1][:-3] + 'clean.wav', original[0][2][:-3] + 'gsm.wav']
    assert [line[0] for line in cross] == [line[0] for line in original]

    files = sorted((corpus / 'one/audio').rglob('*.wav'))
    assert len(files) == 20 * 6
    for path in files:
        same = corpus / 'two/audio' / path.relative_to(corpus / 'one/audio')
        assert path.read_bytes() == same.read_bytes(), 'drawn only by the name of the file'
    clean, _ = soundfile.read(corpus / 'one/audio/id0/a/0.clean.wav')
    noisy, _ = soundfile.read(corpus / 'one/audio/id0/a/0.noise.wav')
    noise = noisy - clean
    assert 10 * np.log10(np.sum(clean**2) / np.sum(noise**2)) == pytest.approx(10, abs=0.5)
    assert soundfile.info(corpus / 'one/audio/id0/a/0.short.wav').frames == 32000

    # What is there is kept.
    kept = corpus / 'one/audio/id0/a/0.gsm.wav'
    before = kept.stat().st_mtime_ns
    (corpus / 'one/audio/id0/a/1.gsm.wav').unlink()
    conditions.main([*arguments, *places, '--out', str(corpus / 'one'), '--conditions', *wanted])
    assert '1 files' in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == before
    arguments += ['--out', str(corpus / 'x'), '--conditions', 'fax']
    assert '--conditions fax' in refusal(capsys, conditions.main, arguments)
    assert not (corpus / 'x').exists()


def test_noise_is_of_the_speaker_and_recording_and_as_loud_as_asked_for(corpus):
    for category in ('noise', 'speech', 'music'):
        # Ten seconds, of which each recording takes 2.5 at another place.
        samples = 0.1 * np.random.default_rng(0).standard_normal(160000)
        write_wav(corpus / 'musan' / category / '1.wav', samples, subtype='PCM_16')
    names = [f'id{speaker}/{session}/1.wav' for speaker in range(2) for session in 'xy']
    for number, name in enumerate(names):
        loudness = (1.0, 0.01)[number % 2]
        audio = loudness * wave(number, 40000)
        write_wav(corpus / 'audio' / name, audio, subtype='PCM_16')
    (corpus / 'few.txt').write_text(trial_lines(names))
    arguments = [str(corpus / 'few.txt'), '--audio', str(corpus / 'audio'), '--n_cpu', '0']
    options = ['--musan_path', str(corpus / 'musan'), '--conditions', 'noise']
    conditions.main([*arguments, *options, '--out', str(corpus / 'out')])
    noises = []
    for name in names:
        stem = corpus / 'out/audio' / name[:-4]
        clean, _ = soundfile.read(f'{stem}.clean.wav')
        noisy, _ = soundfile.read(f'{stem}.noise.wav')
        original, _ = soundfile.read(corpus / 'audio' / name)
        np.testing.assert_array_equal(clean, original)
        noise = noisy * np.dot(clean, clean) / np.dot(noisy, clean) - clean
        # 0.5 dB for what of the noise is in phase with the speech, and for 16 bits.
        assert 10 * np.log10(np.sum(clean**2) / np.sum(noise**2)) == pytest.approx(10, abs=0.5)
        noises.append(noise)
    correlations = np.abs(np.corrcoef(noises) - np.eye(4))
    assert correlations.max() < 0.9, 'one noise under several recordings'


def test_every_file_gets_noise_if_some_of_it_is_silent(corpus):
    for number in range(6):
        sound = 0.1 * np.random.default_rng(number).standard_normal(80000) * (number == 0)
        write_wav(corpus / f'musan/noise/{number}.wav', sound, subtype='PCM_16')
    for category in ('speech', 'music'):
        write_wav(corpus / 'musan' / category / '0.wav', sound + 0.1, subtype='PCM_16')
    arguments = [str(corpus / 'trials.txt'), '--audio', str(corpus / 'audio'), '--n_cpu', '0']
    options = ['--musan_path', str(corpus / 'musan'), '--conditions', 'noise']
    conditions.main([*arguments, *options, '--out', str(corpus / 'out')])
    for path in (corpus / 'out/audio').rglob('*.noise.wav'):
        clean, _ = soundfile.read(str(path).replace('noise.wav', 'clean.wav'))
        noisy, _ = soundfile.read(path)
        assert np.abs(noisy - clean).max() > 0.01


def test_noise_that_is_silent_as_a_whole_is_refused(corpus, capsys):
    for category in ('noise', 'speech', 'music'):
        write_wav(corpus / 'musan' / category / '0.wav', np.zeros(80000), subtype='PCM_16')
    arguments = [str(corpus / 'trials.txt'), '--audio', str(corpus / 'audio'), '--n_cpu', '0']
    options = ['--musan_path', str(corpus / 'musan'), '--conditions', 'noise']
    arguments += [*options, '--out', str(corpus / 'out')]
    assert '--musan_path' in refusal(capsys, conditions.main, arguments)


def test_a_bad_file_is_named_once(corpus, capsys):
    (corpus / 'audio/id1/a/2.wav').write_bytes(b'not audio')
    arguments = [str(corpus / 'trials.txt'), '--audio', str(corpus / 'audio'), '--n_cpu', '0']
    arguments += ['--out', str(corpus / 'out'), '--conditions', 'gsm', 'short']
    assert refusal(capsys, conditions.main, arguments).count('id1/a/2.wav') == 1


def test_a_loud_file_is_turned_down_and_not_clipped_in_clean_too(corpus):
    path = corpus / 'audio/id0/a/0.wav'
    loud = 3 * wave(0, 40000) / np.abs(wave(0, 40000)).max()
    write_wav(path, loud, subtype='FLOAT')
    arguments = [str(corpus / 'trials.txt'), '--audio', str(corpus / 'audio'), '--n_cpu', '0']
    conditions.main([*arguments, '--out', str(corpus / 'out'), '--conditions', 'short'])
    clean, _ = soundfile.read(corpus / 'out/audio/id0/a/0.clean.wav')
    np.testing.assert_allclose(clean, loud / 3, atol=1e-4)


def test_conditions_that_would_mix_files_are_refused(corpus, tree, capsys):
    def refused(*arguments):
        arguments = [*arguments, '--n_cpu', '0', '--conditions', 'short']
        return refusal(capsys, conditions.main, arguments)

    audio = ['--audio', str(corpus / 'audio')]
    cases = {
        'would be written to the same file': 'id0/a/0.flac',
        'give paths below --audio': str(corpus / 'audio/id0/a/0.wav'),
        'without ..': '../audio/id0/a/0.wav',
    }
    for words, name in cases.items():
        (corpus / 'odd.txt').write_text(f'1 id0/a/0.wav {name}\n0 id0/a/0.wav id1/a/0.wav\n')
        assert words in refused(str(corpus / 'odd.txt'), *audio, '--out', str(corpus / 'odd'))
        assert not (corpus / 'odd').exists()

    written = [str(corpus / 'trials.txt'), *audio, '--out', str(corpus / 'out')]
    noise = ['--musan_path', tree['musan_path']]
    conditions.main([*written, '--n_cpu', '0', '--conditions', 'short'])
    conditions.main([*written, '--n_cpu', '0', '--conditions', 'noise', *noise])
    capsys.readouterr()
    assert 'snr' in refused(*written, *noise, '--snr', '5')
    text = (corpus / 'trials.txt').read_text()
    (corpus / 'trials.txt').write_text(''.join(text.splitlines(keepends=True)[1:]))
    assert str(corpus / 'out') in refused(*written)


def test_conditions_leave_out_codecs_that_libsndfile_lacks(corpus, monkeypatch, capsys):
    lacking = {**conditions.CODECS, 'opus': Codec(16000, 'OGG', 'NO_SUCH_CODING')}
    monkeypatch.setattr(conditions, 'CODECS', lacking)
    arguments = [str(corpus / 'trials.txt'), '--audio', str(corpus / 'audio'), '--n_cpu', '0']
    with pytest.raises(SystemExit) as stop:
        conditions.main([*arguments, '--out', str(corpus / 'out'), '--conditions', 'opus'])
    assert stop.value.code == 2
    streams = capsys.readouterr()
    assert 'opus' in streams.out and '--conditions opus' in streams.err


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
    sha256 = dataLoader.sha256(Path(model).read_bytes())
    calibration = {
        'kind': 'raw',
        'weight': 60.0,
        'bias': -55.0,
        'threshold': {'false_acceptances': 1, 'ratio': 2.0},
        'list': {'path': 'dev.txt', 'sha256': 'x', 'trials': 100},
        'checkpoint': {'path': model, 'sha256': sha256},
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

    assert '--out' in refused(people, '--out', str(corpus / 'none/who.csv'))
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
