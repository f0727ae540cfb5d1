"""What users do with a model: several lists, AS-norm, results, embeddings, pairs of files, lists of their own."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import command_line, wave, weights, write_wav

import tools
import trainECAPAModel
from dataLoader import choose_cohort, train_loader
from ECAPAModel import ECAPAModel, load_model
from exps import compare, lists
from tools import BadInput, as_norm, operating_points, score_pairs

pytestmark = pytest.mark.usefixtures('short_crops')
ROOT = Path(__file__).parents[1]


@pytest.fixture
def model(tmp_path):
    """A checkpoint of random weights."""
    torch.manual_seed(1)
    system = ECAPAModel(lr=0.001, lr_decay=0.97, C=8, n_class=4, m=0.2, s=30, test_step=1, device='cpu')
    (tmp_path / 'exp/model').mkdir(parents=True)
    system.save_parameters(tmp_path / 'exp/model/model_0001.model')
    return str(tmp_path / 'exp/model/model_0001.model')


def run(*flags, **options):
    trainECAPAModel.main(command_line(*flags, device='cpu', n_cpu=0, **options))


def eval_options(tree, model):
    return {'initial_model': model, **{name: tree[name] for name in ('eval_list', 'eval_path', 'save_path')}}


def slow_as_norm(score, enrolment, test, cohort, top_n):
    """Adaptive s-norm of one trial, as in Matejka et al., eq. 3 and 4, with vectors (2, 192)."""
    sides = []
    for vector in (enrolment, test):
        closest = sorted((0.5 * np.sum(vector * speaker) for speaker in cohort), reverse=True)[:top_n]
        sides.append((score - np.mean(closest)) / np.std(closest))
    return 0.5 * sum(sides)


@pytest.mark.parametrize('top_n', [5, 400])
def test_as_norm_equals_a_loop(top_n):
    random = np.random.default_rng(2)
    embeddings, cohort = random.standard_normal((30, 2, 192)) / 14, random.standard_normal((40, 2, 192)) / 14
    pairs = random.integers(30, size=(200, 2))
    scores = score_pairs(embeddings, pairs)
    expected = [slow_as_norm(s, embeddings[a], embeddings[b], cohort, top_n) for s, (a, b) in zip(scores, pairs)]
    found = as_norm(scores, embeddings.astype(np.float32), pairs, cohort.astype(np.float32), top_n)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_cohort_of_one_is_refused():
    with pytest.raises(BadInput, match='cohort'):
        as_norm(np.zeros(1), np.ones((2, 2, 192), np.float32), np.array([[0, 1]]), np.ones((1, 2, 192), np.float32), 9)


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
        missed, accepted = np.mean(scores[labels == 1] <= threshold), np.mean(scores[labels == 0] > threshold)
        assert (prior * missed + (1 - prior) * accepted) / prior == pytest.approx(cost)


def test_several_lists_in_one_command(tree, model, tmp_path, capsys, monkeypatch):
    lines = Path(tree['eval_list']).read_text().splitlines(keepends=True)
    second = tmp_path / 'second.txt'
    second.write_text(''.join(lines[::2]))
    shutil.copytree(tree['eval_path'], tmp_path / 'elsewhere')
    embedded, embed = [], ECAPAModel.embed_with_quality
    monkeypatch.setattr(
        ECAPAModel, 'embed_with_quality', lambda self, paths, *a: embedded.append(paths) or embed(self, paths, *a)
    )
    options = command_line('--eval', device='cpu', n_cpu=0, initial_model=model, save_path=tree['save_path'])
    lists = ['--eval_list', tree['eval_list'], str(second)]
    trainECAPAModel.main([*options, *lists, '--eval_path', tree['eval_path']])
    assert [len(paths) for paths in embedded] == [12], 'a file that two lists name is embedded once'
    together = capsys.readouterr().out.splitlines()[-3:]
    assert together[0].split()[:5] == ['list', 'trials', 'EER', 'minDCF(0.01)', 'minDCF(0.05)']
    for name, row in zip((tree['eval_list'], str(second)), together[1:]):
        trainECAPAModel.main([*options, '--eval_list', name, '--eval_path', tree['eval_path']])
        assert capsys.readouterr().out.splitlines()[-1].split() == row.split()
    trainECAPAModel.main([*options, *lists, '--eval_path', tree['eval_path'], str(tmp_path / 'elsewhere')])
    assert [row.split() for row in capsys.readouterr().out.splitlines()[-2:]] == [row.split() for row in together[1:]]


def test_several_lists_in_training(tree, tmp_path, capsys):
    lines = Path(tree['eval_list']).read_text().splitlines(keepends=True)
    second = tmp_path / 'second.txt'
    second.write_text(''.join(lines[:40]))
    options = {**tree, 'C': 8, 'num_frames': 20, 'batch_size': 4, 'max_epoch': 1}
    first = options.pop('eval_list')
    trainECAPAModel.main([*command_line(device='cpu', n_cpu=0, **options), '--eval_list', first, str(second)])
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert (rows[first][1], rows[str(second)][1]) == ('66', '40')
    (score,) = tools.read_scores(tree['save_path'] + '/score.txt')
    assert f'{score[4]:.2f}%' == rows[first][2]


def test_as_norm_by_command(tree, model, capsys, monkeypatch):
    options = {**eval_options(tree, model), 'train_list': tree['train_list'], 'train_path': tree['train_path']}
    embedded, embed = [], ECAPAModel.embed_with_quality
    monkeypatch.setattr(
        ECAPAModel, 'embed_with_quality', lambda self, paths, *a: embedded.append(paths) or embed(self, paths, *a)
    )
    for settings in ({}, {}, {'cohort_utterances': 2}, {'seed': 3}):
        run('--eval', score_norm='asnorm', **options, **settings)
    made = [paths for paths in embedded if paths[0].startswith(tree['train_path'])]
    assert [len(paths) for paths in made] == [12, 8, 12], (
        'the cohort is made again when a setting changes, and only then'
    )
    header, row = capsys.readouterr().out.splitlines()[-2:]
    assert 'asnorm EER' in header and len(row.split()) == 8
    Path(f'{model}.cohort.npz').write_bytes(b'')
    run('--eval', score_norm='asnorm', **options, seed=3)
    assert capsys.readouterr().out.splitlines()[-1] == row, 'a damaged cohort is made again'
    record = json.loads((Path(tree['save_path']) / 'results.json').read_text())
    figures = record['lists'][tree['eval_list']]
    lines = [line.split() for line in Path(tree['save_path'], 'scores/trials.txt').read_text().splitlines()]
    trials = [line.split() for line in Path(tree['eval_list']).read_text().splitlines()]
    assert [[line[0], *line[3:]] for line in lines] == trials
    labels, raw, normalised = np.array([line[:3] for line in lines], float).T
    for scores, kind in ((raw, 'raw'), (normalised, 'asnorm')):
        assert operating_points(scores, labels)['EER']['value'] == pytest.approx(
            figures[kind]['EER']['value'], abs=1e-6
        )


def test_a_cohort_is_the_mean_over_utterances(tree, model):
    system = load_model(model, device='cpu')
    cohort = system.cohort(choose_cohort(tree['train_list'], tree['train_path'], per_speaker=2, seed=1))
    for speaker in range(4):
        paths = [f'{tree["train_path"]}/id{speaker}/session/{n:05d}.wav' for n in range(3)]
        each = system.embed_files(paths)
        means = [each[list(pair)].mean(axis=0) for pair in ((0, 1), (0, 2), (1, 2))]
        assert any(np.allclose(cohort[speaker], mean, atol=1e-5) for mean in means)


def test_results_say_what_they_are(tree, model):
    run('--eval', **eval_options(tree, model))
    record = json.loads((Path(tree['save_path']) / 'results.json').read_text())
    assert record['checkpoint'] == {'path': model, 'sha256': tools.digest(Path(model).read_bytes())}
    figures = record['lists'][tree['eval_list']]
    assert (figures['trials'], figures['targets']) == (66, 12)
    assert figures['sha256'] == tools.digest(Path(tree['eval_list']).read_bytes())
    assert set(figures['raw']) == {'EER', 'minDCF(0.01)', 'minDCF(0.05)'}
    assert record['versions']['torch'].startswith(torch.__version__.split('+')[0])
    assert record['seed'] == 10 and record['options']['eval_list'] == [tree['eval_list']]


def test_every_list_keeps_its_results(tree, model, tmp_path, capsys):
    """Two lists of one name in one command, and a third of that name, of another model, in a later one."""
    lines, names = Path(tree['eval_list']).read_text().splitlines(keepends=True), []
    for number in range(3):
        names.append(str(tmp_path / str(number) / 'trials.txt'))
        Path(names[-1]).parent.mkdir()
        Path(names[-1]).write_text(''.join(lines[number:60:2]))
    options = eval_options(tree, model)
    del options['eval_list']
    run('--eval', '--eval_list', *names[:2], **options)
    first = json.loads(Path(tree['save_path'], 'results.json').read_text())['lists']
    contents = {name: Path(first[name]['scores']).read_text() for name in names[:2]}
    other = str(tmp_path / 'other.model')
    torch.manual_seed(2)
    ECAPAModel(0.001, 0.97, 8, 4, 0.2, 30, test_step=1, device='cpu').save_parameters(other)
    run('--eval', '--eval_list', names[2], **{**options, 'initial_model': other})
    found = json.loads(Path(tree['save_path'], 'results.json').read_text())['lists']
    assert list(found) == names and {name: found[name] for name in names[:2]} == first
    assert [found[name]['checkpoint']['path'] for name in names] == [model, model, other]
    for name in names:
        rows = [line.split() for line in Path(found[name]['scores']).read_text().splitlines()]
        assert [[row[0], *row[2:]] for row in rows] == [line.split() for line in Path(name).read_text().splitlines()]
        assert name == names[2] or Path(found[name]['scores']).read_text() == contents[name]
    run('--eval', '--eval_list', names[1], **options)
    again = json.loads(Path(tree['save_path'], 'results.json').read_text())['lists']
    assert again[names[1]]['scores'] == found[names[1]]['scores'], 'a list that is scored again takes its own place'
    with pytest.raises(SystemExit):
        run('--eval', '--eval_list', names[1], names[1], **options)
    assert 'names a list twice' in capsys.readouterr().err
    Path(tree['save_path'], 'results.json').write_text('{}')
    with pytest.raises(SystemExit):
        run('--eval', '--eval_list', names[1], **options)
    assert 'not what --eval writes' in capsys.readouterr().err
    pair = [f'{tree["eval_path"]}/id{n}/session/00000.wav' for n in (0, 1)]
    run('--verify', *pair, initial_model=model, save_path=tree['save_path'])
    assert re.search('score .*\nnote: .*not what --eval writes', capsys.readouterr().out)


def test_options_are_kept_and_read_back(tree):
    options = {**tree, 'C': 8, 'num_frames': 20, 'batch_size': 4, 'max_epoch': 1, 'lr': 0.002}
    run(**options)
    path = Path(tree['save_path']) / 'options.txt'
    assert '# torch ' in path.read_text()
    kept = trainECAPAModel.make_parser().parse_args([f'@{path}'])
    expected = trainECAPAModel.make_parser().parse_args(command_line(device='cpu', n_cpu=0, **options))
    assert kept == expected


def test_embeddings_of_any_format(tree, model, capsys):
    folder = Path(tree['save_path']).parent / 'recordings'
    audio = wave(1, 32000)
    write_wav(folder / 'a.wav', audio)
    write_wav(folder / 'stereo/b.flac', np.stack([audio, audio], axis=1), subtype='PCM_16')
    slow = np.interp(np.arange(24000 * 2) / 24000, np.arange(32000) / 16000, audio)
    write_wav(folder / 'rate.ogg', slow, rate=24000, subtype='VORBIS')
    run('--embed', str(folder), initial_model=model, save_path=tree['save_path'])
    notes = capsys.readouterr().err
    assert '2 channels averaged' in notes and 'resampled from 24000 Hz' in notes
    with np.load(Path(tree['save_path']) / 'embeddings.npz') as found:
        names, embeddings = found['names'].tolist(), found['embeddings']
    assert names == [str(folder / name) for name in ('a.wav', 'rate.ogg', 'stereo/b.flac')]
    assert embeddings.shape == (3, 192)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert embeddings[0] @ embeddings[2] > 0.999
    np.testing.assert_allclose(load_model(model, device='cpu').embed(names[:1])[0], embeddings[0], atol=1e-5)
    (folder / 'list.txt').write_text(f'{names[2]}\n{names[0]}\n')
    run('--embed', str(folder / 'list.txt'), initial_model=model, save_path=tree['save_path'])
    with np.load(Path(tree['save_path']) / 'embeddings.npz') as again:
        np.testing.assert_allclose(again['embeddings'], embeddings[[2, 0]], atol=1e-5)


def test_verify_two_files(tree, model, capsys):
    pair = [f'{tree["eval_path"]}/id{n}/session/00000.wav' for n in (0, 1)]
    run('--verify', *pair, initial_model=model, save_path=tree['save_path'])
    output = capsys.readouterr().out
    assert 'no threshold is known' in output
    run('--eval', **eval_options(tree, model))
    line = next(
        line.split() for line in Path(tree['save_path'], 'scores/trials.txt').read_text().splitlines()
        if line.split()[2:] == [path.removeprefix(tree['eval_path'] + '/') for path in pair]
    )  # fmt: skip
    assert float(re.search(r'score (\S+)', output)[1]) == pytest.approx(float(line[1]), abs=1e-4)
    capsys.readouterr()
    run('--verify', *pair, initial_model=model, save_path=tree['save_path'])
    output = capsys.readouterr().out
    threshold = json.loads(Path(tree['save_path'], 'results.json').read_text())['lists'][tree['eval_list']]['raw'][
        'EER'
    ]
    same = float(line[1]) > threshold['threshold']
    assert ('the same speaker' if same else 'different speakers') in output and 'other recordings' in output


@pytest.fixture
def recordings(tmp_path):
    """Someone's own recordings: six speakers, one of them with one file, and files with faults."""
    folder = tmp_path / 'own'
    for speaker in range(6):
        for number in range(4 if speaker else 1):
            write_wav(
                folder / f'sp{speaker}/{number}.wav', 0.5 * wave(speaker, 20000 + 1000 * number), subtype='PCM_16'
            )
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
    assert all(speaker == name.split('/')[0] and (recordings / name).exists() for speaker, name in train)
    held_out = {name.split('/')[0] for trial in trials for name in trial[1:]}
    assert len(held_out) == 2 and held_out.isdisjoint(speaker for speaker, _ in train)
    assert all((label == '1') == (a.split('/')[0] == b.split('/')[0]) for label, a, b in trials)
    assert len({tuple(sorted(trial[1:])) for trial in trials}) == len(trials)
    labels = [trial[0] for trial in trials]
    assert labels.count('1') == labels.count('0') > 0
    used = {name for _, name in train} | {name for trial in trials for name in trial[1:]}
    assert len(used) == 22 and 'sp2/loud.wav' in used
    left_out = (out / 'left_out.txt').read_text()
    faults = {
        'silent.wav': 'silent',
        'phone.wav': '8000 Hz',
        'two words.wav': 'white space',
        'broken.wav': 'unreadable',
    }
    assert all(re.search(f'{name}: .*{fault}', left_out) for name, fault in faults.items()) and 'stray.wav' in left_out
    assert '22 utterances of 6 speakers' in report and 'clipped      1 files' in report and '8000 Hz: 1 files' in report
    again = tmp_path / 'again'
    lists.main([str(recordings), '--out', str(again), '--test_speakers', '2', '--seed', '4'])
    assert (again / 'trials.txt').read_bytes() == (out / 'trials.txt').read_bytes()


def test_exhaustive_trials_and_no_trials(recordings, tmp_path, capsys):
    lists.main([str(recordings), '--out', str(tmp_path / 'a'), '--test_speakers', '3', '--exhaustive'])
    trials = (tmp_path / 'a/trials.txt').read_text().splitlines()
    files = {name for trial in trials for name in trial.split()[1:]}
    assert len(trials) == len(files) * (len(files) - 1) // 2
    lists.main([str(recordings), '--out', str(tmp_path / 'b'), '--test_speakers', '0'])
    assert not (tmp_path / 'b/trials.txt').exists() and 'not written  trials.txt' in capsys.readouterr().out
    for options in (['--test_speakers', '5'], ['--test_speakers', '1']):
        with pytest.raises(SystemExit) as stop:
            lists.main([str(recordings), '--out', str(tmp_path / 'c'), *options])
        assert stop.value.code == 2 and '--test_speakers' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        lists.main([str(recordings), '--out', str(tmp_path / 'a')])
    assert 'is there already' in capsys.readouterr().err


def test_a_large_margin_goes_on_with_the_classifier(tree, tmp_path, capsys):
    """After --speed_perturb with all 3 S classes, trained on the S speakers; not at all from other speakers' model."""
    small = {**tree, 'C': 8, 'num_frames': 20, 'batch_size': 12, 'max_epoch': 1}
    run('--speed_perturb', **small)
    model = tree['save_path'] + '/model/model_0001.model'
    second = {**small, 'save_path': str(tmp_path / 'second'), 'initial_model': model, 'lr': 0, 'min_lr': 0}
    del second['C']
    recipe = f'@{ROOT}/exps/recipes/strong_lm.txt'
    run(recipe, **second)
    before, after = (weights(path) for path in (model, tmp_path / 'second/model/model_0001.model'))
    assert len(before['speaker_loss.weight']) == 12
    assert torch.equal(before['speaker_loss.weight'], after['speaker_loss.weight'])
    assert 'left out' not in capsys.readouterr().out
    lines = Path(tree['train_list']).read_text().splitlines(keepends=True)
    Path(tmp_path / 'two.txt').write_text(''.join(line for line in lines if line[:3] in ('id0', 'id1')))
    for change, words in (
        ({'train_list': str(tmp_path / 'two.txt')}, 'was trained on 12 speakers'),
        ({'initial_model': ''}, 'needs --initial_model'),
    ):
        options = {**second, 'save_path': str(tmp_path / 'none'), 'batch_size': 4, **change}
        with pytest.raises(SystemExit) as stop:
            run(recipe, **options)
        assert stop.value.code == 2 and words in capsys.readouterr().err
        assert not Path(options['save_path']).exists()


def test_frozen_epochs_train_the_classifier_alone(tree, model):
    options = {'num_frames': 20, 'batch_size': 4, 'max_epoch': 2, 'freeze_epochs': 1, 'initial_model': model}
    tree['save_path'] += 'frozen'
    run(**tree, **options)
    states = [weights(model)]
    states += [weights(f'{tree["save_path"]}/model/model_000{n}.model') for n in (1, 2)]
    changed = [{name for name in a if not torch.equal(a[name], b[name])} for a, b in zip(states, states[1:])]
    assert changed[0] == {'speaker_loss.weight'}
    assert 'speaker_encoder.conv1.weight' in changed[1] and 'speaker_encoder.bn1.running_mean' in changed[1]


def test_accumulated_gradients_are_those_of_the_batch():
    waves = torch.from_numpy(np.stack([wave(i, 8240) for i in range(6)]))
    labels = torch.arange(6)
    gradients = []
    for accumulate in (1, 4):
        torch.manual_seed(5)
        system = ECAPAModel(0.001, 0.97, 8, 6, 0.2, 30, 1, device='cpu', accumulate=accumulate)
        system.speaker_encoder.specaug = torch.nn.Identity()
        # Without batch statistics, which each part has its own of; but with the encoder's gradients.
        system.train()
        for module in system.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.eval()
        totals = system.train_step(waves, labels)
        gradients.append({**{name: p.grad for name, p in system.named_parameters()}, 'totals': totals})
    for name, gradient in gradients[0].items():
        scale = gradient.abs().max().item()
        np.testing.assert_allclose(gradients[1][name], gradient, atol=1e-4 * scale + 1e-7, err_msg=name)


def test_speed_perturbation_triples_the_speakers_and_moves_the_pitch(tmp_path, tree):
    for speaker in range(4):
        for number in range(3):
            tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(60000) / 16000)
            soundfile.write(f'{tree["train_path"]}/id{speaker}/session/{number:05d}.wav', tone, 16000)
    dataset = train_loader(**{**tree, 'num_frames': 200, 'speed_perturb': True})
    dataset.augment = lambda audio, rng: audio
    assert (len(dataset), dataset.n_class) == (36, 12)
    assert [dataset[1, i][1] for i in range(0, 36, 3)] == list(range(12))
    for index, pitch in ((0, 1000), (12, 900), (24, 1100)):
        audio = dataset[1, index][0].numpy()
        assert audio.shape == (200 * 160 + 240,)
        spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio))))
        assert spectrum.argmax() * 16000 / len(audio) == pytest.approx(pitch, abs=1)


def test_comparing_experiments(tmp_path, capsys):
    pytest.importorskip('matplotlib')
    line = '%d epoch, LR 0.001000, LOSS 1.000000, ACC 10.00%%, EER %.2f%%, bestEER 1.00%%\n'
    (tmp_path / 'one').mkdir()
    (tmp_path / 'one/score.txt').write_text(''.join(line % (n, 5 - n) for n in range(1, 5)) + line % (5, 3))
    (tmp_path / 'one/scores').mkdir()
    kinds = {'raw': {'EER': {'value': 12.34}, 'minDCF(0.05)': {'value': 0.5}}, 'asnorm': {'EER': {'value': 10.5}}}
    entry = {**kinds, 'scores': 'x/scores/hard.txt', 'checkpoint': {'path': 'x/model_0005.model', 'sha256': ''}}
    record = {'checkpoint': entry['checkpoint'], 'lists': {'hard.txt': entry}}
    (tmp_path / 'one/results.json').write_text(json.dumps(record))
    random = np.random.default_rng(4)
    trials = [(label, *random.standard_normal(2) + label) for label in random.integers(2, size=200)]
    (tmp_path / 'one/scores/hard.txt').write_text(''.join(f'{a} {b:.6f} {c:.6f} x.wav y.wav\n' for a, b, c in trials))
    compare.main([str(tmp_path / 'one/score.txt'), '--out', str(tmp_path)])
    rows = [re.split(r'  +', line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0][6:] == ['checkpoint', 'list', 'EER', 'minDCF(0.05)', 'asnorm EER']
    one, published = '5 3.00% 1.00% 4 2.60% model_0005.model hard', '80 1.03% 0.96% 70 1.05% pretrain.model Vox1_O'
    assert rows[1] == ['one', *one.split(), '12.34%', '0.5000', '10.50%']
    assert rows[2] == ['published', *published.split(), '0.96%', '-', '0.86%']
    compare.main([str(tmp_path / 'one/results.json'), '--out', str(tmp_path), '--markdown'])
    lines = capsys.readouterr().out.splitlines()
    assert [[cell.strip() for cell in line.strip('|').split('|')] for line in lines[:1] + lines[2:4]] == rows[:3]
    assert set(lines[1]) == set('|- '), 'the line that makes it a table in Markdown'
    assert all((tmp_path / name).read_bytes().startswith(b'\x89PNG') for name in ('curves.png', 'det_hard.png'))
    with pytest.raises(SystemExit) as stop:
        compare.main([str(tmp_path / 'none.txt')])
    assert stop.value.code == 2 and 'none.txt' in capsys.readouterr().err
    (tmp_path / 'one/scores/hard.txt').write_text('1 high x.wav y.wav\n')
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / 'one/score.txt'), '--out', str(tmp_path)])
    assert 'hard.txt: not a file of scores' in capsys.readouterr().err
