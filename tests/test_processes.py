"""Two processes train as one does: same epoch, gradients and evaluation, files written once."""

import os
from pathlib import Path

import cli
import numpy as np
import pytest
import torch
from cli import command_line, run_two, torchrun
from conftest import make_system, weights

import dataLoader
import trainECAPAModel
from dataLoader import make_batches, train_loader
from tools import process_count, process_rank, read_scores, sum_over_processes

pytestmark = pytest.mark.usefixtures('quick')
ROOT = Path(__file__).parents[1]
COMMAND = ROOT / 'trainECAPAModel.py'
SMALL = {**cli.SMALL, 'n_cpu': 1, 'max_epoch': 2}


def save_part_of_training(options):
    """Saves what this one of two processes computes, as RANK.pt."""
    torch.distributed.init_process_group('gloo')
    torch.save(part_of_training(options), f'{process_rank()}.pt')
    torch.distributed.destroy_process_group()


def mean_over_processes(tensor):
    """A copy of the tensor, averaged over the processes."""
    return sum_over_processes(tensor.clone()) / process_count()


def part_of_training(options):
    """What a process computes in training.

    indices: of an epoch; gradients: of its first batch, with stored batch norm statistics and with
    its own; statistics: these; weights: after two steps; embeddings: of five files.
    """
    dataset = train_loader(**options, num_frames=20, seed=1)
    loader = make_batches(dataset, batch_size=6, n_cpu=0)
    indices = [[index for _, index in batch] for batch in loader.batch_sampler]

    torch.manual_seed(1)
    system = make_system()
    system.speaker_encoder.specaug = torch.nn.Identity()
    audio, labels = next(iter(loader))
    gradients = {}
    for mode in ('stored', 'own'):
        system.train(mode == 'own').zero_grad()
        system(audio, labels)[0].backward()
        gradients[mode] = {
            name: mean_over_processes(p.grad) for name, p in system.named_parameters()
        }
    statistics = {name: buffer.clone() for name, buffer in system.named_buffers()}

    for audio, labels in loader:
        system.train_step(audio, labels)
    embeddings = system.embed_files([dataset.path(i) for i in range(5)])

    return {
        'indices': indices,
        'gradients': gradients,
        'statistics': statistics,
        'weights': system.state_dict(),
        'embeddings': torch.from_numpy(embeddings),
    }


def test_two_processes_share_an_epoch_and_agree(tree, tmp_path):
    status, _, errors = run_two(save_part_of_training, tree, folder=tmp_path)
    assert status == 0, errors
    first = torch.load(tmp_path / '0.pt')
    second = torch.load(tmp_path / '1.pt')
    alone = part_of_training(tree)

    assert len(alone['indices']) == 2
    joined = [a + b for a, b in zip(first['indices'], second['indices'])]
    assert joined == alone['indices']

    gradients = first['gradients']['stored']
    for name, expected in alone['gradients']['stored'].items():
        assert torch.equal(gradients[name], second['gradients']['stored'][name])
        bound = 1e-4 * expected.abs().max().item() + 1e-7
        np.testing.assert_allclose(gradients[name], expected, atol=bound, err_msg=name)

    together = torch.cat([p.flatten() for p in first['gradients']['own'].values()])
    expected = torch.cat([p.flatten() for p in alone['gradients']['own'].values()])
    assert (together - expected).norm() < 1e-4 * expected.norm()

    for name, expected in alone['statistics'].items():
        statistic = first['statistics'][name]
        assert torch.equal(statistic, second['statistics'][name]), name
        np.testing.assert_allclose(statistic, expected, rtol=1e-4, atol=1e-6, err_msg=name)
    for name, tensor in first['weights'].items():
        assert torch.equal(tensor, second['weights'][name])

    assert torch.equal(first['embeddings'], second['embeddings'])
    fresh = make_system()
    fresh.load_state_dict(first['weights'])
    names = [f'{tree["train_path"]}/id{n // 3}/session/{n % 3:05d}.wav' for n in range(5)]
    np.testing.assert_allclose(fresh.embed_files(names), first['embeddings'], atol=1e-5)


def table_of_figures(output):
    """What a command printed, from the heading EER on."""
    return output[output.index('EER') :]


def assert_two_epochs(tree, output):
    """A training of two epochs by two processes is there, and each line was printed once."""
    for line in ('start         from random weights', 'epoch 2, LR', 'epochs are done'):
        assert output.count(line) == 1
    folder = Path(tree['save_path'])
    assert [score[0] for score in read_scores(folder / 'score.txt')] == [1, 2]
    assert sorted(os.listdir(folder / 'model')) == [
        'model_0001.model',
        'model_0001.state',
        'model_0002.model',
        'model_0002.state',
    ]
    weights(folder / 'model/model_0002.model')


def test_the_command_in_two_processes(tree, few_trials, tmp_path, monkeypatch, capsys):
    arguments = command_line(**SMALL, **tree)
    status, output, errors = run_two(trainECAPAModel.main, arguments, folder=tmp_path)
    assert status == 0, errors
    assert output.count('2 processes on cpu') == 1
    assert_two_epochs(tree, output)
    (tmp_path / 'stdout').unlink()

    folder = Path(tree['save_path'])
    arguments = command_line(
        '--eval',
        initial_model=folder / 'model/model_0002.model',
        device='cpu',
        eval_list=tree['eval_list'],
        eval_path=tree['eval_path'],
    )
    status, output, errors = run_two(trainECAPAModel.main, arguments, folder=tmp_path)
    assert status == 0, errors
    monkeypatch.chdir(tmp_path)
    trainECAPAModel.main(arguments)
    assert table_of_figures(output) == table_of_figures(capsys.readouterr().out)


@pytest.mark.slow
def test_a_job_of_torchrun_that_is_restarted_goes_on_after_the_last_checkpoint(
    tree, few_trials, tmp_path
):
    """One of the two processes is killed after the first epoch; torchrun starts both again."""
    script = tmp_path / 'killed.py'
    script.write_text(
        'import os, signal, trainECAPAModel\n'
        'from pathlib import Path\n'
        'score_epoch = trainECAPAModel.score_epoch\n'
        'def killed_once(*args):\n'
        '    score_epoch(*args)\n'
        '    if os.environ["RANK"] == "1" and not Path("killed").exists():\n'
        '        Path("killed").touch()\n'
        '        os.kill(os.getpid(), signal.SIGKILL)\n'
        'trainECAPAModel.score_epoch = killed_once\n'
        'trainECAPAModel.main()\n'
    )
    launcher = torchrun(script, *command_line(**SMALL, **tree), restarts=1, cwd=tmp_path)
    assert launcher.returncode == 0, launcher.stderr
    assert 'after epoch 1' in launcher.stdout
    assert_two_epochs(tree, launcher.stdout)


def check_and_note(arguments):
    """Runs the command, and notes in read.txt each file that is read."""
    read_audio = dataLoader.read_audio

    def watched(path, *args, **kwargs):
        with open('read.txt', 'a') as file:
            file.write(f'{path}\n')
        return read_audio(path, *args, **kwargs)

    dataLoader.read_audio = watched
    dataLoader.read_noise = lambda path: watched(path, silent_ok=True)
    dataLoader.read_for_trial = lambda path: watched(path, shortest=257)
    trainECAPAModel.main(arguments)


def test_a_check_goes_through_the_files_once(tree, tmp_path):
    """In the first of two processes: every file of the training list is read one time."""
    arguments = command_line('--check', **{**SMALL, **tree, 'n_cpu': 0})
    status, output, errors = run_two(check_and_note, arguments, folder=tmp_path)
    assert status == 0, errors
    assert output.count('check passed') == 1

    paths = (tmp_path / 'read.txt').read_text().splitlines()
    for folder in ('train_path', 'eval_path', 'musan_path', 'rir_path'):
        files = sorted(str(path) for path in Path(tree[folder]).rglob('*.wav'))
        assert sorted(path for path in paths if path.startswith(tree[folder])) == files
