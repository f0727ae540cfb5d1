"""What the options of the strong recipe promise: rates, margins, restarts, averages, augmentation, centred scores."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command_line, portable_system, wave, weights
from scipy.stats import chisquare

import trainECAPAModel
from dataLoader import train_loader
from ECAPAModel import ECAPAModel
from exps import average
from tools import read_scores

pytestmark = pytest.mark.usefixtures('short_crops')
ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.name for path in (ROOT / 'exps/recipes').glob('*.txt'))
PUBLISHED = dict(lr=0.001, lr_decay=0.97, C=8, n_class=4, m=0.2, s=30, test_step=1, device='cpu')


def recipe_system(recipe):
    """A small system with the options of a recipe."""
    args = trainECAPAModel.make_parser().parse_args([f'@{ROOT}/exps/recipes/{recipe}'])
    return ECAPAModel(**{**vars(args), 'C': 8, 'n_class': 4, 'device': 'cpu'})


@pytest.mark.parametrize(
    'recipe, points',
    [
        # (epochs done, learning rate, margin), by hand from the recipe's comment.
        ('strong.txt', [(0, 0, 0), (3, 0.1, 0), (6, 0.2, 0), (10, None, 0), (17.5, None, 0.1), (25, None, 0.2)]),
        ('strong.txt', [(63, 0.1 + 5e-7, 0.2), (120, 1e-6, 0.2)]),
        ('strong_lm.txt', [(0, 0, 0.2), (0.4, 2e-4, 0.32), (0.8, 4e-4, 0.44), (1, None, 0.5), (8, 1e-6, 0.5)]),
        ('voxceleb2.txt', [(0, 0.001, 0.2), (0.9, 0.001, 0.2), (1, 0.00097, 0.2), (79, 0.001 * 0.97**79, 0.2)]),
    ],
)
def test_rates_and_margins(recipe, points):
    system = recipe_system(recipe)
    for done, rate, margin in points:
        epoch, share = int(done) + 1, done - int(done)
        found = system.set_learning_rate(epoch, share)
        assert found == system.optim.param_groups[0]['lr']
        assert rate is None or found == pytest.approx(rate, rel=1e-3, abs=1e-12)
        assert system.speaker_loss.m == pytest.approx(margin)


def test_a_cosine_falls_as_one():
    system = ECAPAModel(**PUBLISHED, schedule='cosine', min_lr=1e-5, warmup=2, max_epoch=12)
    for done in np.linspace(2, 12, 21):
        expected = 1e-5 + 0.5 * (0.001 - 1e-5) * (1 + math.cos(math.pi * (done - 2) / 10))
        assert system.set_learning_rate(int(done) + 1, done % 1) == pytest.approx(expected)


@pytest.mark.parametrize('optimizer', ['adam', 'sgd'])
def test_an_optimiser_step_with_clipping(optimizer):
    """Beside PyTorch's own optimiser on gradients that are scaled by hand."""
    system = portable_system(8, optimizer=optimizer, clip=0.5, weight_decay=0.01, lr=0.001).train()
    plain = portable_system(8).train()
    if optimizer == 'sgd':
        expected = torch.optim.SGD(plain.parameters(), lr=0.001, momentum=0.9, nesterov=True, weight_decay=0.01)
    else:
        expected = torch.optim.Adam(plain.parameters(), lr=0.001, weight_decay=0.01)
    audio = torch.from_numpy(np.stack([wave(i, 8240) for i in range(4)]))
    for _ in range(2):
        *_, norm = system.train_step(audio, torch.arange(4))
        expected.zero_grad()
        plain(audio, torch.arange(4))[0].backward()
        total = math.sqrt(sum(p.grad.double().square().sum().item() for p in plain.parameters()))
        assert norm.item() == pytest.approx(total, rel=1e-3) and total > 0.5
        for parameter in plain.parameters():
            parameter.grad *= 0.5 / total
        expected.step()
    moved, differ = 0, 0
    for found, wanted, start in zip(system.parameters(), plain.parameters(), portable_system(8).parameters()):
        moved += (wanted - start).detach().square().sum().item()
        differ += (wanted - found).detach().square().sum().item()
    # A step of Adam hardly depends on the size of a gradient, so a tiny one of another sign shows.
    assert moved > 0 and differ < 0.01 * moved


def test_a_restart_in_the_middle_of_the_ramp_changes_nothing(tree, tmp_path):
    """Margin and rate move with every step; the run that stops in between ends with the same bits."""
    small = {**tree, 'C': 8, 'num_frames': 20, 'batch_size': 4, 'n_cpu': 0, 'device': 'cpu', 'max_epoch': 4}
    recipe = [f'@{ROOT}/exps/recipes/strong.txt', '--margin_epochs', '1', '3', '--warmup', '0.5', '--test_step', '1']
    folders = [str(tmp_path / name) for name in ('straight', 'stopped')]
    trainECAPAModel.main([*recipe, *command_line(**{**small, 'save_path': folders[0]})])
    stop = RuntimeError('stopped')

    class Stopped(ECAPAModel):
        def train_network(self, epoch, loader):
            if epoch == 3:
                raise stop
            return super().train_network(epoch, loader)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainECAPAModel, 'ECAPAModel', Stopped)
        with pytest.raises(RuntimeError, match='stopped'):
            trainECAPAModel.main([*recipe, *command_line(**{**small, 'save_path': folders[1]})])
    assert [score[0] for score in read_scores(folders[1] + '/score.txt')] == [1, 2]
    trainECAPAModel.main([*recipe, *command_line(**{**small, 'save_path': folders[1]})])
    contents = [Path(folder, 'score.txt').read_text() for folder in folders]
    assert contents[0] == contents[1] and contents[0].count('\n') == 4
    states = [torch.load(f'{folder}/model/model_0004.state', weights_only=True)['optim'] for folder in folders]
    models = [weights(f'{folder}/model/model_0004.model') for folder in folders]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    momenta = [[entry['momentum_buffer'] for entry in state['state'].values()] for state in states]
    assert all(torch.equal(a, b) for a, b in zip(*momenta)) and len(momenta[0]) > 50


def test_frozen_epochs_with_sgd_and_forced_changes(tree, capsys):
    """The encoder's momentum begins later than the classifier's; --force applies what it says."""
    small = {**tree, 'C': 8, 'num_frames': 20, 'batch_size': 4, 'n_cpu': 0, 'device': 'cpu', 'freeze_epochs': 1}
    trainECAPAModel.main(command_line(optimizer='sgd', max_epoch=2, **small))
    trainECAPAModel.main(command_line('--force', optimizer='sgd', max_epoch=3, weight_decay=0.5, **small))
    state = torch.load(f'{tree["save_path"]}/model/model_0003.state', weights_only=True)['optim']
    assert state['param_groups'][0]['weight_decay'] == 0.5
    with pytest.raises(SystemExit) as stop:
        trainECAPAModel.main(command_line('--force', optimizer='adam', max_epoch=4, **small))
    assert stop.value.code == 2 and 'give the --optimizer it began with' in capsys.readouterr().err


def test_a_cosine_is_not_continued_to_another_end(tree, capsys):
    small = {**tree, 'C': 8, 'num_frames': 20, 'batch_size': 4, 'n_cpu': 0, 'device': 'cpu'}
    trainECAPAModel.main(command_line(schedule='cosine', max_epoch=1, **small))
    with pytest.raises(SystemExit) as stop:
        trainECAPAModel.main(command_line(schedule='cosine', max_epoch=2, **small))
    assert stop.value.code == 2 and '--max_epoch 2 (was 1)' in capsys.readouterr().err


def test_two_stages_with_the_average_between(tree, tmp_path, capsys):
    """strong.txt, the mean of its checkpoints, strong_lm.txt on the classifier of three times the speakers."""
    small = {**tree, 'C': 8, 'num_frames': 20, 'batch_size': 4, 'n_cpu': 0, 'device': 'cpu'}
    first = command_line(**{**small, 'max_epoch': 3, 'warmup': 1, 'save_path': tmp_path / 'one'})
    trainECAPAModel.main([f'@{ROOT}/exps/recipes/strong.txt', *first, '--margin_epochs', '1', '2'])
    models = [tmp_path / f'one/model/model_{epoch:04d}.model' for epoch in (1, 2, 3)]
    out = str(tmp_path / 'average.model')
    average.main([str(tmp_path / 'one/model'), '--last', '2', '--out', out])
    found, (_, second, third) = weights(out), [weights(path) for path in models]
    assert list(found) == list(third)
    for name, tensor in found.items():
        expected = (second[name] + third[name]) / 2 if tensor.is_floating_point() else third[name]
        assert tensor.dtype == third[name].dtype
        np.testing.assert_allclose(tensor, expected, rtol=1e-6, atol=1e-7, err_msg=name)
    del small['C']
    last = command_line(**{**small, 'max_epoch': 1, 'save_path': tmp_path / 'two', 'initial_model': out})
    trainECAPAModel.main([f'@{ROOT}/exps/recipes/strong_lm.txt', *last])
    assert 'left out' not in capsys.readouterr().out
    assert weights(tmp_path / 'two/model/model_0001.model')['speaker_loss.weight'].shape == (12, 192)
    for arguments, words in (
        ([str(models[0]), str(tmp_path / 'one/score.txt'), '--out', out + '2'], 'score.txt: cannot be read'),
        ([str(tmp_path / 'one/model'), '--last', '9', '--out', out + '2'], 'holds 3 checkpoints'),
        ([str(models[0]), '--out', out], 'is there already'),
    ):
        with pytest.raises(SystemExit) as stop:
            average.main(arguments)
        assert stop.value.code == 2 and words in capsys.readouterr().err
        assert not Path(out + '2').exists()


def test_speeds_are_drawn_and_an_epoch_is_no_longer(tree):
    options = {name: tree[name] for name in ('train_list', 'train_path', 'musan_path', 'rir_path')}
    dataset = train_loader(**options, num_frames=20, speed_perturb='drawn')
    assert (len(dataset), dataset.n_class) == (12, 12)
    dataset.augment = lambda audio, rng: audio
    labels = np.array([dataset[epoch, index][1] for epoch in range(1, 101) for index in range(12)])
    speakers = dataset.labels[np.tile(np.arange(12), 100)]
    assert np.array_equal(labels % 4, speakers), 'labels 3 S: a version, S speakers each'
    assert chisquare(np.bincount(labels // 4, minlength=3)).pvalue > 0.001


@pytest.mark.parametrize('share', [0, 0.5, 1])
def test_share_of_augmented_crops(share):
    class Recorder(train_loader):
        def __init__(self):
            self.calls, self.augmented = [], share

        def add_rev(self, audio, rng):
            self.calls.append('reverberation')

        def add_noise(self, audio, noisecat, rng):
            self.calls.append(noisecat)

    rng, kinds = random.Random(1), []
    for _ in range(4000):
        recorder = Recorder()
        recorder.augment(np.zeros(10), rng)
        kinds.append(tuple(recorder.calls))
    ways = [('reverberation',), ('speech',), ('music',), ('noise',), ('speech', 'music')]
    counts = [kinds.count(kind) for kind in [(), *ways]]
    expected = [4000 * (1 - share), *5 * [4000 * share / 5]]
    assert sum(counts) == 4000
    seen = [(count, mean) for count, mean in zip(counts, expected) if mean]
    assert chisquare(*zip(*seen)).pvalue > 0.001 if len(seen) > 1 else seen[0][0] == 4000


def test_specaug_can_be_left_out():
    audio = torch.from_numpy(np.stack([wave(i, 16240) for i in range(4)]))
    for options, same in (({}, False), ({'no_specaug': True}, True)):
        system = ECAPAModel(**PUBLISHED, **options)
        features = [system.speaker_encoder.features(audio, aug=aug) for aug in (False, True)]
        assert torch.equal(*features) == same
        assert list(system.state_dict()) == list(ECAPAModel(**PUBLISHED).state_dict())


def unit(vector):
    return vector / np.linalg.norm(vector)


def test_centred_scores_equal_a_loop(tree, tmp_path, capsys):
    """Either kind of vector, whole and crops, less the speakers' mean, to unit length; and so is the cohort."""
    torch.manual_seed(3)
    system, model = ECAPAModel(**PUBLISHED), str(tmp_path / 'a.model')
    system.save_parameters(model)
    options = {**tree, 'initial_model': model, 'device': 'cpu', 'n_cpu': 0, 'cohort_utterances': 3}
    trainECAPAModel.main(command_line('--eval', '--subtract_mean', score_norm='asnorm', top_n=3, **options))
    header = capsys.readouterr().out.splitlines()[-2]
    assert [header.count(name) for name in ('  EER', 'asnorm EER', 'centred EER', 'centred asnorm EER')] == [1, 2, 1, 1]
    names = [f'id{speaker}/session/{number:05d}.wav' for speaker in range(4) for number in range(3)]
    cohort = system.embed_files([f'{tree["train_path"]}/{name}' for name in names]).reshape(4, 3, 2, 192).mean(axis=1)
    files = dict(zip(names, system.embed_files([f'{tree["eval_path"]}/{name}' for name in names])))
    mean = cohort.mean(axis=0)
    speakers = [[unit(entry[kind] - mean[kind]) for kind in (0, 1)] for entry in cohort]
    centred = {name: [unit(vectors[kind] - mean[kind]) for kind in (0, 1)] for name, vectors in files.items()}

    def score(a, b):
        return 0.5 * (a[0] @ b[0] + a[1] @ b[1])

    lines = [line.split() for line in Path(tree['save_path'], 'scores/trials.txt').read_text().splitlines()]
    record = json.loads(Path(tree['save_path'], 'results.json').read_text())['lists'][tree['eval_list']]
    assert {'raw', 'asnorm', 'centred', 'centred asnorm'} < set(record)
    for _, raw, _, found, normalised, a, b in lines:
        assert float(raw) == pytest.approx(score(files[a], files[b]), abs=1e-5)
        assert float(found) == pytest.approx(score(centred[a], centred[b]), abs=1e-5)
        sides = []
        for side in (a, b):
            closest = sorted(score(centred[side], speaker) for speaker in speakers)[-3:]
            sides.append((score(centred[a], centred[b]) - np.mean(closest)) / np.std(closest))
        assert float(normalised) == pytest.approx(np.mean(sides), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize('recipe', RECIPES)
def test_recipes_run(tree, tmp_path, recipe):
    path = ROOT / 'exps/recipes' / recipe
    assert path.read_text().startswith('# ')
    torch.manual_seed(1)
    ECAPAModel(**PUBLISHED).save_parameters(tmp_path / 'a.model')
    arguments = command_line(**{**tree, 'save_path': tmp_path / 'exp'}, device='cpu', n_cpu=0)
    small = command_line(num_frames=20, batch_size=12, max_epoch=1, test_step=1, warmup=0)
    sizes = (
        ['--initial_model', str(tmp_path / 'a.model')] if recipe in ('finetune.txt', 'strong_lm.txt') else ['--C', '8']
    )
    sizes += ['--accumulate', '4'] * (recipe == 'small_gpu.txt')
    trainECAPAModel.main([f'@{path}', *arguments, *small, *sizes])
    assert len(read_scores(tmp_path / 'exp/score.txt')) == 1
