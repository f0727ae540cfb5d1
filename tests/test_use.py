"""What users do with a model: several lists, AS-norm, results, embeddings, lists of their own."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from cli import command_line
from conftest import make_system, wave, weights, write_wav

import tools
import trainECAPAModel
from dataLoader import train_loader
from ECAPAModel import ECAPAModel, load_model
from exps import compare, embed, lists, verify
from exps.scoring import as_norm, choose_cohort, embed_speakers
from tools import BadInput, operating_points, score_pairs

pytestmark = pytest.mark.usefixtures('short_crops')
ROOT = Path(__file__).parents[1]


@pytest.fixture
def model(tmp_path):
    """A checkpoint of random weights."""
    torch.manual_seed(1)
    path = tmp_path / 'exp/model/model_0001.model'
    path.parent.mkdir(parents=True)
    make_system().save_parameters(path)
    return str(path)


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


def run(*flags, **options):
    trainECAPAModel.main(command_line(*flags, device='cpu', n_cpu=0, **options))


def eval_options(tree, model):
    names = ('eval_list', 'eval_path', 'save_path')
    return {'initial_model': model, **{name: tree[name] for name in names}}


def results_of(folder):
    """The lists in the results.json of a folder."""
    record = json.loads(Path(folder, 'results.json').read_text())
    assert list(record) == ['lists']
    return record['lists']


def last_table(capsys):
    """Rows of cells of the table that a command printed last, its header first."""
    lines = capsys.readouterr().out.splitlines()
    header = max(n for n, line in enumerate(lines) if line.split()[:2] == ['list', 'kind'])
    return [re.split('  +', line) for line in lines[header:]]


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


def test_operating_points_separate_as_they_say():
    random = np.random.default_rng(3)
    labels = random.integers(2, size=2000)
    scores = random.standard_normal(2000) + 2 * labels
    points = operating_points(scores, labels)
    eer, threshold = points['EER'].values()
    assert np.mean(scores[labels == 1] <= threshold) == pytest.approx(eer / 100, abs=0.002)
    assert np.mean(scores[labels == 0] > threshold) == pytest.approx(eer / 100, abs=0.002)
    for prior in (0.01, 0.05):
        cost, threshold = points[f'minDCF({prior})'].values()
        missed = np.mean(scores[labels == 1] <= threshold)
        accepted = np.mean(scores[labels == 0] > threshold)
        assert (prior * missed + (1 - prior) * accepted) / prior == pytest.approx(cost)


def test_several_lists_in_one_command(tree, model, tmp_path, capsys, embedded):
    lines = Path(tree['eval_list']).read_text().splitlines(keepends=True)
    second = str(tmp_path / 'second.txt')
    Path(second).write_text(''.join(lines[::2]))
    elsewhere = str(shutil.copytree(tree['eval_path'], tmp_path / 'elsewhere'))
    save_path = tree['save_path']
    options = command_line(
        '--eval', device='cpu', n_cpu=0, initial_model=model, save_path=save_path
    )
    options += ['--eval_list', tree['eval_list'], second]

    trainECAPAModel.main([*options, '--eval_path', tree['eval_path']])
    assert [len(paths) for paths in embedded] == [12], 'a file of two lists is embedded once'
    header, *together = last_table(capsys)
    assert header == ['list', 'kind', 'trials', 'speakers', 'EER', 'minDCF(0.01)', 'minDCF(0.05)']
    counts = [[tree['eval_list'], 'raw', '66', '-'], [second, 'raw', '33', '-']]
    assert [row[:4] for row in together] == counts, 'four speakers are too few to tell'

    trainECAPAModel.main([*options, '--eval_path', tree['eval_path'], elsewhere])
    assert last_table(capsys)[1:] == together
    for name, row in zip((tree['eval_list'], second), together):
        trainECAPAModel.main([*options, '--eval_list', name, '--eval_path', tree['eval_path']])
        assert last_table(capsys)[1:] == [row]


def test_several_lists_in_training(tree, tmp_path, capsys):
    lines = Path(tree['eval_list']).read_text().splitlines(keepends=True)
    second = tmp_path / 'second.txt'
    second.write_text(''.join(lines[:40]))
    options = {**tree, 'C': 8, 'num_frames': 20, 'batch_size': 4, 'max_epoch': 1}
    first = options.pop('eval_list')
    arguments = command_line(device='cpu', n_cpu=0, **options)
    trainECAPAModel.main([*arguments, '--eval_list', first, str(second)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line for line in lines if line}
    assert (rows[first][2], rows[str(second)][2]) == ('66', '40')
    (score,) = tools.read_scores(tree['save_path'] + '/score.txt')
    assert f'{score[4]:.2f}%' == rows[first][4]


def test_as_norm_by_command(tree, model, capsys, embedded):
    options = eval_options(tree, model)
    options |= {'train_list': tree['train_list'], 'train_path': tree['train_path']}
    for settings in ({}, {}, {'cohort_utterances': 2}, {'seed': 3}):
        run('--eval', score_norm='asnorm', **options, **settings)
    made = [len(paths) for paths in embedded if paths[0].startswith(tree['train_path'])]
    assert made == [12, 8, 12], 'a cohort is made again when a setting changes, and only then'
    rows = last_table(capsys)[1:]
    assert [row[1] for row in rows] == ['raw', 'asnorm']
    Path(f'{model}.cohort.npz').write_bytes(b'')
    run('--eval', score_norm='asnorm', **options, seed=3)
    assert last_table(capsys)[1:] == rows, 'a damaged cohort is made again'

    entry = results_of(tree['save_path'])[tree['eval_list']]
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


def test_results_say_what_they_are(tree, model):
    run('--eval', **eval_options(tree, model))
    entry = results_of(tree['save_path'])[tree['eval_list']]
    assert list(entry) == [
        'figures', 'scores', 'trials', 'targets', 'speakers', 'sha256', 'checkpoint', 'command',
        'commit', 'versions', 'options',
    ]  # fmt: skip
    assert set(entry['figures']['raw']) == {'EER', 'minDCF(0.01)', 'minDCF(0.05)'}
    assert (entry['trials'], entry['targets']) == (66, 12)
    assert entry['sha256'] == tools.sha256(Path(tree['eval_list']).read_bytes())
    sha256 = tools.sha256(Path(model).read_bytes())
    assert entry['checkpoint'] == {'path': model, 'sha256': sha256}
    assert entry['versions']['torch'].startswith(torch.__version__.split('+')[0])
    assert entry['options']['seed'] == 10
    assert entry['options']['eval_list'] == [tree['eval_list']]


def test_every_list_keeps_its_results(tree, model, tmp_path, capsys):
    """Two lists of one name in one command; a third of that name, of another model, in a later."""
    lines = Path(tree['eval_list']).read_text().splitlines(keepends=True)
    names = [str(tmp_path / str(number) / 'trials.txt') for number in range(3)]
    for number, name in enumerate(names):
        Path(name).parent.mkdir()
        Path(name).write_text(''.join(lines[number:60:2]))
    options = eval_options(tree, model)
    del options['eval_list']

    run('--eval', '--eval_list', *names[:2], **options)
    first = results_of(tree['save_path'])
    contents = {name: Path(first[name]['scores']).read_text() for name in names[:2]}
    other = str(tmp_path / 'other.model')
    torch.manual_seed(2)
    make_system().save_parameters(other)
    run('--eval', '--eval_list', names[2], **{**options, 'initial_model': other})
    entries = results_of(tree['save_path'])
    assert list(entries) == names
    assert {name: entries[name] for name in names[:2]} == first
    assert [entries[name]['checkpoint']['path'] for name in names] == [model, model, other]
    for name in names:
        text = Path(entries[name]['scores']).read_text()
        rows = [line.split() for line in text.splitlines()]
        trials = [line.split() for line in Path(name).read_text().splitlines()]
        assert [[row[0], *row[2:]] for row in rows] == trials
        assert contents.get(name, text) == text

    run('--eval', '--eval_list', names[1], **options)
    again = results_of(tree['save_path'])
    assert again[names[1]]['scores'] == entries[names[1]]['scores'], 'it takes its own place'
    with pytest.raises(SystemExit):
        run('--eval', '--eval_list', names[1], names[1], **options)
    assert '--eval_list' in capsys.readouterr().err


@pytest.mark.parametrize('content', ['{}', '[]', '{"lists": {"a": {"raw": 1}}}', '{"lists": 3}'])
def test_a_results_file_of_something_else_is_refused(tree, model, capsys, content):
    run('--eval', **eval_options(tree, model))
    path = Path(tree['save_path'], 'results.json')
    path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        run('--eval', **eval_options(tree, model))
    assert stop.value.code == 2
    assert str(path) in capsys.readouterr().err
    assert path.read_text() == content
    pair = [f'{tree["eval_path"]}/id{n}/session/00000.wav' for n in (0, 1)]
    verify.main([*pair, *command_line(initial_model=model, device='cpu')])
    output = capsys.readouterr().out
    assert output.startswith('score ')
    assert str(path) in output


def test_embeddings_of_any_format(tree, model, capsys):
    folder = Path(tree['save_path']).parent / 'recordings'
    audio = wave(1, 32000)
    write_wav(folder / 'a.wav', audio)
    write_wav(folder / 'stereo/b.flac', np.stack([audio, audio], axis=1), subtype='PCM_16')
    slow = np.interp(np.arange(24000 * 2) / 24000, np.arange(32000) / 16000, audio)
    write_wav(folder / 'rate.ogg', slow, rate=24000, subtype='VORBIS')
    options = command_line(initial_model=model, device='cpu', n_cpu=0)
    out = str(folder / 'first.npz')
    embed.main([str(folder), '--out', out, *options])
    notes = capsys.readouterr().err
    assert '2 channels averaged' in notes and 'resampled from 24000 Hz' in notes

    with np.load(out) as written:
        names = written['names'].tolist()
        embeddings = written['embeddings']
    assert names == [str(folder / name) for name in ('a.wav', 'rate.ogg', 'stereo/b.flac')]
    assert embeddings.shape == (3, 192)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert embeddings[0] @ embeddings[2] > 0.999
    alone = load_model(model, device='cpu').embed(names[:1])
    np.testing.assert_allclose(alone[0], embeddings[0], atol=1e-5)

    (folder / 'list.txt').write_bytes(f'{names[2]}\r\n\n{names[0]}\r\n'.encode())
    embed.main([str(folder / 'list.txt'), '--out', str(folder / 'second.npz'), *options])
    with np.load(folder / 'second.npz') as again:
        np.testing.assert_allclose(again['embeddings'], embeddings[[2, 0]], atol=1e-5)
    for arguments, words in (
        ([str(folder), '--out', out, *options], 'is there already'),
        ([str(folder), '--out', out + '2', '--device', 'cpu'], '--initial_model is needed'),
        ([str(folder / 'none'), '--out', out + '2', *options], 'none: no such file'),
    ):
        with pytest.raises(SystemExit) as stop:
            embed.main(arguments)
        assert stop.value.code == 2
        assert words in capsys.readouterr().err


def test_verify_two_files(tree, model, capsys):
    pair = [f'{tree["eval_path"]}/id{n}/session/00000.wav' for n in (0, 1)]
    options = command_line(initial_model=model, device='cpu')
    verify.main([*pair, *options])
    output = capsys.readouterr().out
    assert 'no threshold is known' in output
    run('--eval', **eval_options(tree, model))
    text = Path(tree['save_path'], 'scores/trials.txt').read_text()
    names = [path.removeprefix(tree['eval_path'] + '/') for path in pair]
    (score,) = [line.split()[1] for line in text.splitlines() if line.split()[2:] == names]
    assert float(re.search(r'score (\S+)', output)[1]) == pytest.approx(float(score), abs=1e-4)

    capsys.readouterr()
    verify.main([*pair, *options])
    output = capsys.readouterr().out
    figures = results_of(tree['save_path'])[tree['eval_list']]['figures']
    same = float(score) > figures['raw']['EER']['threshold']
    assert ('the same speaker' if same else 'different speakers') in output
    assert 'other recordings' in output


@pytest.fixture
def recordings(tmp_path):
    """Someone's own recordings: six speakers, one of them with one file, and files with faults."""
    folder = tmp_path / 'own'
    for speaker in range(6):
        for number in range(4 if speaker else 1):
            audio = 0.5 * wave(speaker, 20000 + 1000 * number)
            write_wav(folder / f'sp{speaker}/{number}.wav', audio, subtype='PCM_16')
    write_wav(folder / 'sp1/silent.wav', np.zeros(16000), subtype='PCM_16')
    write_wav(folder / 'sp1/phone.wav', wave(1, 8000), rate=8000, subtype='PCM_16')
    write_wav(folder / 'sp2/two words.wav', wave(2, 16000), subtype='PCM_16')
    write_wav(folder / 'sp2/loud.wav', (20 * wave(2, 16000)).clip(-1, 1), subtype='PCM_16')
    (folder / 'sp3/broken.wav').write_text('nothing')
    write_wav(folder / 'stray.wav', wave(2, 16000), subtype='PCM_16')
    return folder


def test_lists_of_own_speakers(recordings, tmp_path, capsys):
    out = tmp_path / 'lists'
    lists.main([str(recordings), '--out', str(out), '--test_speakers', '2', '--seed', '4'])
    report = capsys.readouterr().out
    train = [line.split() for line in (out / 'train_list.txt').read_text().splitlines()]
    trials = [line.split() for line in (out / 'trials.txt').read_text().splitlines()]
    for speaker, name in train:
        assert speaker == name.split('/')[0]
        assert (recordings / name).exists()
    tested = {name for trial in trials for name in trial[1:]}
    held_out = {name.split('/')[0] for name in tested}
    assert len(held_out) == 2
    assert held_out.isdisjoint(speaker for speaker, _ in train)
    for label, a, b in trials:
        assert (label == '1') == (a.split('/')[0] == b.split('/')[0])
    assert len({tuple(sorted(trial[1:])) for trial in trials}) == len(trials)
    labels = [trial[0] for trial in trials]
    assert labels.count('1') == labels.count('0') > 0
    used = tested | {name for _, name in train}
    assert len(used) == 22 and 'sp2/loud.wav' in used

    left_out = (out / 'left_out.txt').read_text()
    faults = {
        'silent.wav': 'silent',
        'phone.wav': '8000 Hz',
        'two words.wav': 'white space',
        'broken.wav': 'cannot be read',
        'stray.wav': '',
    }
    for name, fault in faults.items():
        assert re.search(f'{name}: .*{fault}', left_out)
    for words in ('22 utterances of 6 speakers', 'clipped      1 files', '8000 Hz: 1 files'):
        assert words in report
    again = tmp_path / 'again'
    lists.main([str(recordings), '--out', str(again), '--test_speakers', '2', '--seed', '4'])
    assert (again / 'trials.txt').read_bytes() == (out / 'trials.txt').read_bytes()


def test_exhaustive_trials_and_no_trials(recordings, tmp_path, capsys):
    arguments = [str(recordings), '--test_speakers', '3', '--exhaustive']
    lists.main([*arguments, '--out', str(tmp_path / 'a')])
    trials = (tmp_path / 'a/trials.txt').read_text().splitlines()
    files = {name for trial in trials for name in trial.split()[1:]}
    assert len(trials) == len(files) * (len(files) - 1) // 2
    lists.main([str(recordings), '--out', str(tmp_path / 'b'), '--test_speakers', '0'])
    assert not (tmp_path / 'b/trials.txt').exists()
    assert 'not written  trials.txt' in capsys.readouterr().out
    for count in ('5', '1'):
        with pytest.raises(SystemExit) as stop:
            lists.main([str(recordings), '--out', str(tmp_path / 'c'), '--test_speakers', count])
        assert stop.value.code == 2
        assert '--test_speakers' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        lists.main([str(recordings), '--out', str(tmp_path / 'a')])
    assert 'is there already' in capsys.readouterr().err


def test_a_large_margin_goes_on_with_the_classifier(tree, tmp_path, capsys):
    """After --speed_perturb with all 3 S classes; not at all from other speakers' model."""
    small = {**tree, 'C': 8, 'num_frames': 20, 'batch_size': 12, 'max_epoch': 1}
    run('--speed_perturb', **small)
    model = tree['save_path'] + '/model/model_0001.model'
    second = {**small, 'save_path': str(tmp_path / 'second'), 'initial_model': model}
    second |= {'lr': 0, 'min_lr': 0}
    del second['C']
    recipe = f'@{ROOT}/exps/recipes/strong_lm.txt'
    run(recipe, **second)
    before = weights(model)['speaker_loss.weight']
    after = weights(tmp_path / 'second/model/model_0001.model')['speaker_loss.weight']
    assert len(before) == 12
    assert torch.equal(before, after)
    assert 'left out' not in capsys.readouterr().out

    lines = Path(tree['train_list']).read_text().splitlines(keepends=True)
    two = [line for line in lines if line[:3] in ('id0', 'id1')]
    Path(tmp_path / 'two.txt').write_text(''.join(two))
    for change, words in (
        ({'train_list': str(tmp_path / 'two.txt')}, 'was trained on 12 speakers'),
        ({'initial_model': ''}, 'needs --initial_model'),
    ):
        options = {**second, 'save_path': str(tmp_path / 'none'), 'batch_size': 4, **change}
        with pytest.raises(SystemExit) as stop:
            run(recipe, **options)
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
        assert not Path(options['save_path']).exists()


def test_frozen_epochs_train_the_classifier_alone(tree, model):
    options = {'num_frames': 20, 'batch_size': 4, 'max_epoch': 2, 'freeze_epochs': 1}
    tree['save_path'] += 'frozen'
    run(**tree, **options, initial_model=model)
    paths = [f'{tree["save_path"]}/model/model_000{epoch}.model' for epoch in (1, 2)]
    states = [weights(path) for path in (model, *paths)]
    changed = []
    for before, after in zip(states, states[1:]):
        changed.append({name for name in before if not torch.equal(before[name], after[name])})
    assert changed[0] == {'speaker_loss.weight'}
    for name in ('speaker_encoder.conv1.weight', 'speaker_encoder.bn1.running_mean'):
        assert name in changed[1]


def test_accumulated_gradients_are_those_of_the_batch():
    waves = torch.from_numpy(np.stack([wave(i, 8240) for i in range(6)]))
    labels = torch.arange(6)
    gradients = []
    for accumulate in (1, 4):
        torch.manual_seed(5)
        system = make_system(n_class=6, accumulate=accumulate)
        system.speaker_encoder.specaug = torch.nn.Identity()
        # Without batch statistics, of which each part has its own, but with all gradients.
        system.train()
        for module in system.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.eval()
        totals = system.train_step(waves, labels)
        by_name = {name: parameter.grad for name, parameter in system.named_parameters()}
        gradients.append({**by_name, 'totals': totals})
    for name, gradient in gradients[0].items():
        scale = gradient.abs().max().item()
        np.testing.assert_allclose(
            gradients[1][name], gradient, atol=1e-4 * scale + 1e-7, err_msg=name
        )


def test_the_speeds_are_other_speakers_and_move_the_pitch(tree):
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(60000) / 16000)
    for speaker in range(4):
        for number in range(3):
            path = f'{tree["train_path"]}/id{speaker}/session/{number:05d}.wav'
            soundfile.write(path, tone, 16000)
    dataset = train_loader(**tree, num_frames=200, speed_perturb=True)
    dataset.augment = lambda audio, rng: audio
    assert (len(dataset), dataset.n_class) == (12, 12)
    pitches = {0: 1000, 1: 900, 2: 1100}
    seen = set()
    for epoch in range(1, 5):
        for index in range(12):
            audio, label = dataset[epoch, index]
            assert label % 4 == index // 3, 'labels 3 S: a speed, S speakers each'
            assert audio.shape == (200 * 160 + 240,)
            spectrum = np.abs(np.fft.rfft(audio.numpy() * np.hanning(len(audio))))
            pitch = spectrum.argmax() * 16000 / len(audio)
            assert pitch == pytest.approx(pitches[label // 4], abs=1)
            seen.add(label // 4)
    assert seen == set(pitches)


@pytest.fixture
def experiment(tmp_path):
    """Folder of an experiment of five epochs, and scores of two kinds on one list."""
    folder = tmp_path / 'one'
    (folder / 'scores').mkdir(parents=True)
    line = '%d epoch, LR 0.001000, LOSS 1.000000, ACC 10.00%%, EER %.2f%%, bestEER 1.00%%\n'
    eers = [4, 3, 2, 1, 3]
    lines = [line % (epoch, eer) for epoch, eer in enumerate(eers, 1)]
    (folder / 'score.txt').write_text(''.join(lines))
    random = np.random.default_rng(4)
    labels = random.integers(2, size=200)
    scores = random.standard_normal((200, 2)) + labels[:, None]
    text = ''
    for label, (raw, normalised) in zip(labels, scores):
        text += f'{label} {raw:.6f} {normalised:.6f} x.wav y.wav\n'
    (folder / 'scores/hard.txt').write_text(text)
    eers = [operating_points(column, labels)['EER'] for column in scores.T]
    raw = {'EER': eers[0], 'minDCF(0.05)': {'value': 0.5}}
    entry = {
        'figures': {'raw': raw, 'asnorm': {'EER': eers[1]}},
        'scores': 'x/scores/hard.txt',
        'trials': 200,
        'sha256': '0',
        'checkpoint': {'path': 'x/model_0005.model', 'sha256': ''},
    }
    (folder / 'results.json').write_text(json.dumps({'lists': {'lists/hard.txt': entry}}))
    return folder


def test_comparing_experiments(experiment, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    compare.main([str(experiment / 'score.txt'), '--out', str(tmp_path)])
    training, scores = capsys.readouterr().out.split('\n\n')
    rows = [re.split(r'  +', line) for line in training.splitlines()]
    assert rows[1] == ['one', '5', '3.00%', '1.00%', '4', '2.60%']
    assert rows[2] == ['published', '80', '1.03%', '0.96%', '70', '1.05%']
    rows = [re.split(r'  +', line) for line in scores.splitlines()[:5]]
    record = json.loads((experiment / 'results.json').read_text())
    figures = record['lists']['lists/hard.txt']['figures']
    raw, normalised = (f'{figures[kind]["EER"]["value"]:.2f}%' for kind in ('raw', 'asnorm'))
    assert rows == [
        ['experiment', 'checkpoint', 'list', 'kind', 'trials', 'speakers', 'EER', 'minDCF(0.05)'],
        ['one', 'model_0005.model', 'hard', 'raw', '200', '-', raw, '0.5000'],
        ['one', 'model_0005.model', 'hard', 'asnorm', '200', '-', normalised, '-'],
        ['published', 'pretrain.model', 'Vox1_O', 'raw', '37,611', '40', '0.96%', '-'],
        ['published', 'pretrain.model', 'Vox1_O', 'asnorm', '37,611', '40', '0.86%', '-'],
    ]
    for name in ('curves.png', 'det_hard.png'):
        assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')

    compare.main([str(experiment / 'results.json'), '--out', str(tmp_path), '--markdown'])
    lines = capsys.readouterr().out.split('\n\n')[1].splitlines()[:6]
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    assert cells[:1] + cells[2:] == rows
    assert set(lines[1]) == set('|- '), 'the line that makes it a table in Markdown'


def test_comparing_other_files_is_refused(experiment, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main([str(tmp_path / 'none.txt')])
    assert stop.value.code == 2
    assert 'none.txt' in capsys.readouterr().err
    cases = {
        '1 high 0.2 x.wav y.wav\n': 'hard.txt: not a file of scores',
        '1 nan 0.2 x.wav y.wav\n': 'a score is not finite',
        '1 0.1 0.2 x.wav y.wav\n': 'results.json',
    }
    for text, words in cases.items():
        (experiment / 'scores/hard.txt').write_text(text)
        with pytest.raises(SystemExit) as stop:
            compare.main([str(experiment / 'score.txt'), '--out', str(tmp_path)])
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
