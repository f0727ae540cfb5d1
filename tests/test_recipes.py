"""What the options of the strong recipe promise: rates, margins, restarts, averages, crops."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import evaluate, refusal, train
from conftest import make_system, portable_system, wave, weights, write_wav
from scipy.stats import chisquare

import trainECAPAModel
from dataLoader import train_loader
from ECAPAModel import ECAPAModel, describe
from exps import average
from loss import LOSSES
from model import ECAPA_TDNN, ENCODERS
from tools import options_for, read_scores

pytestmark = pytest.mark.usefixtures('quick')
ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.name for path in (ROOT / 'exps/recipes').glob('*.txt'))


class Longer(ECAPA_TDNN):
    """The network with one more tensor."""

    def __init__(self, C):
        super().__init__(C)
        self.extra = torch.nn.Parameter(torch.ones(1))


class Alike(ECAPA_TDNN):
    """The network with another function, but the same tensors."""


class Spread(torch.nn.Module):
    """A loss without weights: embeddings of different speakers move apart."""

    def __init__(self, n_class, m, s, size):
        super().__init__()

    def set_margin(self, margin):
        pass

    def forward(self, x, label):
        cosines = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(x).T
        return (cosines * (label != label.view(-1, 1))).mean(), torch.zeros(1)

    @staticmethod
    def classes_of(state):
        return None if state else 0


def test_an_encoder_made_from_another_one_is_told_apart(monkeypatch):
    monkeypatch.setitem(ENCODERS, 'longer', Longer)
    for encoder in ('ecapa', 'longer'):
        state = make_system(encoder=encoder).state_dict()
        assert describe(state)['encoder'] == encoder
        # Of a damaged checkpoint too, so that the message is about the tensor that is missing.
        del state['speaker_encoder.fc6.bias']
        assert describe(state)['encoder'] == encoder


def test_an_encoder_that_no_checkpoint_could_tell_is_refused_before_training(
    tree, monkeypatch, capsys
):
    monkeypatch.setitem(ENCODERS, 'alike', Alike)
    assert '--encoder alike' in refusal(capsys, train, tree, encoder='alike')
    assert not Path(tree['save_path']).exists()


def test_a_loss_without_weights_is_trained_continued_and_scored(tree, monkeypatch, capsys):
    monkeypatch.setitem(LOSSES, 'spread', Spread)
    for max_epoch in (1, 2):
        train(tree, loss='spread', max_epoch=max_epoch)
    model = f'{tree["save_path"]}/model/model_0002.model'
    assert not [name for name in weights(model) if name.startswith('speaker_loss')]
    evaluate(tree, model)
    assert '--loss aam (was spread)' in refusal(capsys, train, tree, max_epoch=3)


def recipe_system(recipe):
    """A small system with the options of a recipe."""
    args = trainECAPAModel.make_parser().parse_args([f'@{ROOT}/exps/recipes/{recipe}'])
    return ECAPAModel(**{**options_for(ECAPAModel, args), 'C': 8, 'n_class': 4, 'device': 'cpu'})


@pytest.mark.parametrize(
    'recipe, points',
    [
        # (epochs done, learning rate, margin), by hand from the recipe's comment.
        (
            'strong.txt',
            [
                (0, 0, 0),
                (3, 0.1, 0),
                (6, 0.2, 0),
                (10, None, 0),
                (17.5, None, 0.1),
                (25, None, 0.2),
                (63, 0.1 + 5e-7, 0.2),
                (120, 1e-6, 0.2),
            ],
        ),
        (
            'strong_lm.txt',
            [
                (0, 0, 0.2),
                (0.4, 2e-4, 0.32),
                (0.8, 4e-4, 0.44),
                (1, None, 0.5),
                (8, 1e-6, 0.5),
            ],
        ),
        (
            'voxceleb2.txt',
            [
                (0, 0.001, 0.2),
                (0.9, 0.001, 0.2),
                (1, 0.00097, 0.2),
                (79, 0.001 * 0.97**79, 0.2),
            ],
        ),
    ],
)
def test_rates_and_margins(recipe, points):
    system = recipe_system(recipe)
    for done, rate, margin in points:
        returned = system.set_rate_and_margin(done)
        assert returned == system.optim.param_groups[0]['lr']
        assert rate is None or returned == pytest.approx(rate, rel=1e-3, abs=1e-12)
        assert system.speaker_loss.m == pytest.approx(margin)


def test_a_cosine_falls_as_one():
    system = make_system(schedule='cosine', min_lr=1e-5, warmup=2, max_epoch=12)
    for done in np.linspace(2, 12, 21):
        height = (1 + math.cos(math.pi * (done - 2) / 10)) / 2
        rate = system.set_rate_and_margin(done)
        assert rate == pytest.approx(1e-5 + (0.001 - 1e-5) * height)


@pytest.mark.parametrize('optimizer', ['adam', 'sgd'])
def test_an_optimiser_step_with_clipping(optimizer):
    """Beside PyTorch's own optimiser on gradients that are scaled by hand."""
    settings = {'lr': 0.001, 'weight_decay': 0.01}
    system = portable_system(8, optimizer=optimizer, clip=0.5, **settings).train()
    plain = portable_system(8).train()
    if optimizer == 'sgd':
        expected = torch.optim.SGD(plain.parameters(), momentum=0.9, nesterov=True, **settings)
    else:
        expected = torch.optim.Adam(plain.parameters(), **settings)
    audio = torch.from_numpy(np.stack([wave(i, 8240) for i in range(4)]))
    for _ in range(2):
        *_, norm = system.train_step(audio, torch.arange(4))
        expected.zero_grad()
        plain(audio, torch.arange(4))[0].backward()
        squares = [p.grad.double().square().sum().item() for p in plain.parameters()]
        total = math.sqrt(sum(squares))
        assert norm.item() == pytest.approx(total, rel=1e-3)
        assert total > 0.5
        for parameter in plain.parameters():
            parameter.grad *= 0.5 / total
        expected.step()

    moved = 0
    difference = 0
    start = portable_system(8)
    for ours, theirs, begin in zip(system.parameters(), plain.parameters(), start.parameters()):
        moved += (theirs - begin).detach().square().sum().item()
        difference += (theirs - ours).detach().square().sum().item()
    # A step of Adam hardly depends on the size of a gradient, so a tiny one of another sign shows.
    assert moved > 0
    assert difference < 0.01 * moved


def test_two_stages_with_the_average_between(tree, tmp_path, capsys):
    """strong.txt, the mean of its checkpoints, strong_lm.txt on the classifier of all speeds."""
    first = {'max_epoch': 3, 'warmup': 1, 'margin_epochs': [1, 2], 'save_path': tmp_path / 'one'}
    train(tree, f'@{ROOT}/exps/recipes/strong.txt', **first)
    models = [tmp_path / f'one/model/model_{epoch:04d}.model' for epoch in (1, 2, 3)]
    out = str(tmp_path / 'average.model')
    average.main([str(tmp_path / 'one/model'), '--last', '2', '--out', out])
    second, third = (weights(path) for path in models[1:])
    mean = weights(out)
    assert list(mean) == list(third)
    for name, tensor in mean.items():
        expected = third[name]
        if tensor.is_floating_point():
            expected = (second[name] + third[name]) / 2
        assert tensor.dtype == third[name].dtype
        np.testing.assert_allclose(tensor, expected, rtol=1e-6, atol=1e-7, err_msg=name)

    last = {'save_path': tmp_path / 'two', 'initial_model': out}
    train(tree, f'@{ROOT}/exps/recipes/strong_lm.txt', **last)
    assert 'left out' not in capsys.readouterr().out
    classifier = weights(tmp_path / 'two/model/model_0001.model')['speaker_loss.weight']
    assert classifier.shape == (12, 192)
    score = str(tmp_path / 'one/score.txt')
    for arguments, words in (
        ([str(models[0]), score, '--out', out + '2'], 'score.txt'),
        ([str(tmp_path / 'one/model'), '--last', '9', '--out', out + '2'], ' 3 checkpoints'),
        ([str(models[0]), '--out', out], out),
    ):
        assert words in refusal(capsys, average.main, arguments)
        assert not Path(out + '2').exists()


def test_every_speed_is_as_likely(tree):
    dataset = train_loader(**tree, num_frames=20, speed_perturb=True)
    assert (len(dataset), dataset.n_class) == (12, 12)
    dataset.augment = lambda audio, rng: audio
    versions = []
    for epoch in range(1, 101):
        for index in range(12):
            _, label = dataset[epoch, index]
            assert label % 4 == dataset.labels[index]
            versions.append(label // 4)
    assert chisquare(np.bincount(versions, minlength=3)).pvalue > 0.001


@pytest.mark.parametrize('share', [0, 0.5, 1])
def test_share_of_augmented_crops(share):
    class Recorder(train_loader):
        def __init__(self):
            self.calls = []
            self.augment_share = share

        def add_rev(self, audio, rng):
            self.calls.append('reverberation')

        def add_noise(self, audio, noisecat, rng):
            self.calls.append(noisecat)

    rng = random.Random(1)
    kinds = []
    for _ in range(4000):
        recorder = Recorder()
        recorder.augment(np.zeros(10), rng)
        kinds.append(tuple(recorder.calls))
    ways = [('reverberation',), ('speech',), ('music',), ('noise',), ('speech', 'music')]
    counts = [kinds.count(kind) for kind in [(), *ways]]
    expected = [4000 * (1 - share), *5 * [4000 * share / 5]]
    assert sum(counts) == 4000
    seen = [(count, mean) for count, mean in zip(counts, expected) if mean]
    if len(seen) == 1:
        assert seen[0][0] == 4000
    else:
        assert chisquare(*zip(*seen)).pvalue > 0.001


def test_specaug_can_be_left_out():
    audio = torch.from_numpy(np.stack([wave(i, 16240) for i in range(4)]))
    for no_specaug in (False, True):
        system = make_system(no_specaug=no_specaug)
        features = [system.speaker_encoder.features(audio, aug=aug) for aug in (False, True)]
        assert torch.equal(*features) == no_specaug
        assert list(system.state_dict()) == list(make_system().state_dict())


@pytest.mark.parametrize('recipe', RECIPES)
def test_recipes_run(tree, model, tmp_path, recipe):
    path = ROOT / 'exps/recipes' / recipe
    assert path.read_text().startswith('# ')
    options = {'save_path': tmp_path / 'run', 'batch_size': 12, 'test_step': 1, 'warmup': 0}
    if recipe in ('finetune.txt', 'strong_lm.txt'):
        options['initial_model'] = model
    if recipe == 'small_gpu.txt':
        options['accumulate'] = 4
    train(tree, f'@{path}', **options)
    assert len(read_scores(tmp_path / 'run/score.txt')) == 1


# Fine-tuning, accumulation, speeds.


def test_a_large_margin_goes_on_with_the_classifier(tree, tmp_path, capsys):
    """After --speed_perturb with all 3 S classes; not at all from other speakers' model."""
    train(tree, '--speed_perturb', batch_size=12)
    model = tree['save_path'] + '/model/model_0001.model'
    second = {'save_path': str(tmp_path / 'second'), 'initial_model': model, 'batch_size': 12}
    second |= {'lr': 0, 'min_lr': 0}
    recipe = f'@{ROOT}/exps/recipes/strong_lm.txt'
    train(tree, recipe, **second)
    before = weights(model)['speaker_loss.weight']
    after = weights(tmp_path / 'second/model/model_0001.model')['speaker_loss.weight']
    assert len(before) == 12
    assert torch.equal(before, after)
    assert 'left out' not in capsys.readouterr().out

    lines = Path(tree['train_list']).read_text().splitlines(keepends=True)
    two = [line for line in lines if line[:3] in ('id0', 'id1')]
    Path(tmp_path / 'two.txt').write_text(''.join(two))
    for change, words in (
        ({'train_list': str(tmp_path / 'two.txt')}, '12 classes'),
        ({'initial_model': ''}, '--initial_model'),
    ):
        options = {**second, 'save_path': str(tmp_path / 'none'), 'batch_size': 4, **change}
        assert words in refusal(capsys, train, tree, recipe, **options)
        assert not Path(options['save_path']).exists()


def test_frozen_epochs_train_the_classifier_only(tree, model):
    tree['save_path'] += 'frozen'
    train(tree, max_epoch=2, freeze_epochs=1, initial_model=model)
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
        # Each part has its own batch statistics, so they are left out here.
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
            write_wav(path, tone)
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
