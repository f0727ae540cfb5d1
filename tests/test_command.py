"""The command, end to end on a small corpus of synthetic voices.

Training, score.txt, resume, fine-tuning, --eval.
"""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import command_line, finish, refusal, start
from conftest import assert_same_run, make_system, weights
from voices import make_corpus

import dataLoader
import trainECAPAModel
from tools import read_scores

pytestmark = pytest.mark.usefixtures('quick')
ROOT = Path(__file__).parents[1]
SMALL = {'C': 16, 'num_frames': 60, 'batch_size': 8, 'n_cpu': 1, 'device': 'cpu'}


@pytest.fixture(scope='session')
def voices(tmp_path_factory):
    """Options that name the parts of a small corpus of synthetic voices."""
    folder = tmp_path_factory.mktemp('voices')
    make_corpus(folder, train_speakers=6, test_speakers=4, utterances=4, seed=1)
    return {
        'train_list': folder / 'VoxCeleb2/train_list.txt',
        'train_path': folder / 'VoxCeleb2/train/wav',
        'eval_list': folder / 'VoxCeleb1/veri_test2.txt',
        'eval_path': folder / 'VoxCeleb1/test/wav',
        'musan_path': folder / 'musan_split',
        'rir_path': folder / 'simulated_rirs',
    }


def run(voices, *flags, **options):
    """Runs the command with SMALL and `voices`, which `options` override."""
    trainECAPAModel.main(command_line(*flags, **{**SMALL, **voices, **options}))


@pytest.fixture(scope='module')
def trained(voices, quick, tmp_path_factory):
    """Folder of an uninterrupted run of four epochs, tested every second one."""
    folder = tmp_path_factory.mktemp('exps') / 'straight'
    run(voices, max_epoch=4, test_step=2, save_path=folder)
    return folder


def test_score_txt_and_checkpoints(trained):
    first, second = (trained / 'score.txt').read_text().splitlines()
    figures = r'LOSS \d+\.\d{6}, ACC \d+\.\d\d%, EER \d+\.\d\d%, bestEER \d+\.\d\d%'
    assert re.fullmatch(f'2 epoch, LR 0.001000, {figures}', first)
    assert re.fullmatch(f'4 epoch, LR 0.000970, {figures}', second)

    models = sorted(path.name for path in (trained / 'model').glob('*.model'))
    assert models == ['model_0002.model', 'model_0004.model']

    scores = read_scores(trained / 'score.txt')
    eers = [score[4] for score in scores]
    assert [score[5] for score in scores] == [eers[0], min(eers)]


def number_of_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_plan_comes_first_and_a_log_has_no_progress_bar(voices, tmp_path):
    arguments = command_line(**SMALL, **voices, max_epoch=1, save_path=tmp_path / 'exp')
    process = start(trainECAPAModel.main, arguments, folder=tmp_path)
    status, output, errors = finish([process], tmp_path)
    assert status == 0
    plan, _, rest = output.partition('start ')

    utterances = len(Path(voices['train_list']).read_text().splitlines())
    assert f'6 speakers, {utterances} utterances' in plan
    assert f'{utterances // 8} steps of 8 utterances' in plan

    system = make_system(16, 6)
    encoder = number_of_parameters(system.speaker_encoder)
    classifier = number_of_parameters(system.speaker_loss)
    sizes = f'{encoder:,} in the encoder, {classifier:,} in the classifier of 6 classes'
    assert sizes in plan

    rirs = len(list(Path(voices['rir_path']).rglob('*.wav')))
    noises = len(list(Path(voices['musan_path'], 'noise').rglob('*.wav')))
    assert f'{noises} noise' in plan
    assert f'{rirs} RIRs' in plan

    assert 'epoch 1, LR 0.001000' in rest
    assert errors == '', 'progress bars are for terminals'


def test_the_same_command_gives_the_same_run(voices, trained, tmp_path):
    run(voices, max_epoch=4, test_step=2, save_path=tmp_path / 'again', n_cpu=2)
    assert_same_run(trained, tmp_path / 'again')


def test_another_seed_gives_another_run(voices, trained, tmp_path):
    run(voices, max_epoch=2, test_step=2, save_path=tmp_path / 'other', seed=11)
    other = read_scores(tmp_path / 'other/score.txt')
    assert other[0] != read_scores(trained / 'score.txt')[0]


def test_a_continued_run_equals_an_uninterrupted_one(voices, trained, tmp_path, capsys):
    run(voices, max_epoch=2, test_step=2, save_path=tmp_path / 'exp')
    run(voices, max_epoch=4, test_step=2, save_path=tmp_path / 'exp')
    assert 'after epoch 2' in capsys.readouterr().out
    assert_same_run(trained, tmp_path / 'exp')


def test_the_last_epoch_is_saved_and_tested_too(voices, trained, tmp_path):
    """Also if --max_epoch is not a multiple of --test_step; the run then continues as any other."""
    folder = tmp_path / 'exp'
    for max_epoch, epochs in ((3, [2, 3]), (4, [2, 3, 4])):
        run(voices, max_epoch=max_epoch, test_step=2, save_path=folder)
        assert [score[0] for score in read_scores(folder / 'score.txt')] == epochs
        models = sorted(path.name for path in (folder / 'model').glob('*.model'))
        assert models == [f'model_{epoch:04d}.model' for epoch in epochs]
    straight = torch.load(trained / 'model/model_0004.model')
    for name, tensor in torch.load(folder / 'model/model_0004.model').items():
        assert torch.equal(tensor, straight[name]), name


def test_a_run_that_ended_before_its_test_is_tested_first(voices, trained, tmp_path):
    run(voices, max_epoch=2, test_step=2, save_path=tmp_path / 'exp')
    (tmp_path / 'exp/score.txt').unlink()
    run(voices, max_epoch=4, test_step=2, save_path=tmp_path / 'exp')
    assert_same_run(trained, tmp_path / 'exp')


def test_a_checkpoint_of_the_published_code_is_continued(voices, trained, tmp_path, capsys):
    """It has no state beside it.

    Weights and best EER carry over, the optimiser starts from the beginning.
    """
    folder = tmp_path / 'exp'
    (folder / 'model').mkdir(parents=True)
    shutil.copy(trained / 'model/model_0004.model', folder / 'model')
    line = '4 epoch, LR 0.000970, LOSS 9.0, ACC 1.00%, EER 0.01%, bestEER 0.01%\n'
    (folder / 'score.txt').write_text(line)

    run(voices, max_epoch=6, test_step=2, save_path=folder)
    assert 'model_0004' in capsys.readouterr().err
    scores = read_scores(folder / 'score.txt')
    assert [score[0] for score in scores] == [4, 6]
    assert scores[1][5] == 0.01


def test_eval_gives_the_figures_of_training(voices, trained, capsys):
    model = trained / 'model/model_0004.model'
    arguments = command_line(
        '--eval',
        initial_model=model,
        save_path=trained.parent / 'evaluated',
        device='cpu',
        eval_list=voices['eval_list'],
        eval_path=voices['eval_path'],
    )
    trainECAPAModel.main(arguments)

    header, row = capsys.readouterr().out.splitlines()[-2:]
    figures = dict(zip(header.split(), row.split()))
    last = read_scores(trained / 'score.txt')[-1]
    assert float(figures['EER'].rstrip('%')) == last[4]
    assert float(figures['minDCF(0.01)']) >= float(figures['minDCF(0.05)'])

    system = make_system(16, 6)
    system.load_parameters(model)
    eer, min_dcf = system.eval_network(
        eval_list=str(voices['eval_list']), eval_path=str(voices['eval_path'])
    )
    assert f'{eer:.2f}%' == figures['EER']
    assert f'{min_dcf:.4f}' == figures['minDCF(0.05)']


def test_eval_refuses_another_size(voices, trained, capsys):
    model = trained / 'model/model_0004.model'
    arguments = command_line('--eval', initial_model=model, C=64, **voices)
    assert '--C 64' in refusal(capsys, trainECAPAModel.main, arguments)


def test_fine_tuning_on_other_speakers(voices, trained, tmp_path, capsys):
    lines = Path(voices['train_list']).read_text().splitlines(keepends=True)
    speakers = sorted({line.split()[0] for line in lines})[:3]
    lines = [line for line in lines if line.split()[0] in speakers]
    (tmp_path / 'three.txt').write_text(''.join(lines))
    recipe = tmp_path / 'start.txt'
    recipe.write_text('# fine-tuning\n--lr 0 --max_epoch 1  # only the statistics move\n')

    model = trained / 'model/model_0004.model'
    options = {**SMALL, **voices}
    options['train_list'] = tmp_path / 'three.txt'
    options['initial_model'] = model
    options['save_path'] = tmp_path / 'exp'
    del options['C']
    trainECAPAModel.main([f'@{recipe}', *command_line(**options)])
    assert 'left out: speaker_loss.weight' in capsys.readouterr().out

    before = weights(model)
    after = weights(tmp_path / 'exp/model/model_0001.model')
    assert after['speaker_loss.weight'].shape == (3, 192)
    for name in before:
        statistic = 'running' in name or 'tracked' in name
        if name.startswith('speaker_encoder') and not statistic:
            assert torch.equal(before[name], after[name])


def test_memory_is_pinned_for_a_gpu_alone(voices, tmp_path, monkeypatch):
    """Pinning opens a context on a GPU, which a run on the CPU does not need."""
    pinned = []
    make_batches = dataLoader.make_batches

    def watched(*args, pin_memory, **others):
        pinned.append(pin_memory)
        return make_batches(*args)

    monkeypatch.setattr(dataLoader, 'make_batches', watched)
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    run(voices, '--check', save_path=tmp_path / 'exp')
    assert pinned == [False]


def test_published_curve_is_in_the_format_of_score_txt(golden):
    curve = np.loadtxt(golden / 'published_curve.csv', delimiter=',', skiprows=1)
    scores = np.array(read_scores(ROOT / 'exps/pretrain_score.txt'))
    assert np.array_equal(scores[:, [0, 2, 3, 4]], curve)
    np.testing.assert_allclose(scores[:, 1], 0.001 * 0.97 ** np.arange(80), atol=5e-7)
    assert np.array_equal(scores[:, 5], np.minimum.accumulate(curve[:, 3]))
