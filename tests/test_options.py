"""Which options does a command take, which does it refuse, and what does a run keep of them?"""

import argparse
import inspect
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from cli import SMALL, command_line, evaluate, refusal, train
from conftest import make_system

import trainECAPAModel
from dataLoader import train_loader
from ECAPAModel import ECAPAModel
from exps import verify
from tools import PUBLISHED_OPTIONS, in_range

pytestmark = pytest.mark.usefixtures('quick')
ROOT = Path(__file__).parents[1]


# What the command takes.


def test_defaults_of_the_published_command():
    args = trainECAPAModel.make_parser().parse_args([])
    expected = {
        'num_frames': 200,
        'max_epoch': 80,
        'batch_size': 400,
        'test_step': 1,
        'lr': 0.001,
        'lr_decay': 0.97,
        'm': 0.2,
        's': 30,
        'save_path': 'exps/exp1',
        'initial_model': '',
        'eval': False,
        'seed': 10,
        'device': 'auto',
        'eval_list': ['data/VoxCeleb1/veri_test2.txt'],
        'rir_path': 'data/RIRS_NOISES/simulated_rirs',
    }
    assert {name: getattr(args, name) for name in expected} == expected


def test_the_defaults_of_the_class_are_those_of_the_command():
    """Except n_cpu: a script that embeds two files need not start processes."""
    parser = trainECAPAModel.make_parser()
    for name, parameter in inspect.signature(ECAPAModel).parameters.items():
        if parameter.default is not inspect.Parameter.empty and name != 'n_cpu':
            default = parser.get_default(name)
            if isinstance(default, list):
                default = tuple(default)
            assert parameter.default == default, name


def test_a_misspelt_option_is_an_error(tree):
    with pytest.raises(TypeError, match='wieght_decay'):
        make_system(wieght_decay=0)
    with pytest.raises(TypeError, match='keep'):
        make_system(keep=3)
    with pytest.raises(TypeError, match='speed_pertrub'):
        train_loader(**tree, num_frames=20, speed_pertrub=True)


def test_scripts_may_pass_all_published_options_to_every_part(tree):
    options = {**dict.fromkeys(PUBLISHED_OPTIONS), **tree, 'num_frames': 20}
    assert len(train_loader(**options)) == 12
    options |= {'lr': 0.001, 'lr_decay': 0.97, 'm': 0.2, 's': 30, 'test_step': 1}
    options |= {'C': 8, 'n_class': 4, 'n_cpu': 0, 'max_epoch': 80}
    assert ECAPAModel(**options).n_class == 4


def test_torchrun_hands_on_each_option_or_its_longer_name():
    """torchrun's parser refuses a text with which several of its options begin."""
    launcher = pytest.importorskip('torch.distributed.run').get_args_parser()
    theirs = [name for action in launcher._actions for name in action.option_strings]
    for action in trainECAPAModel.make_parser()._actions:
        if action.dest == 'help':
            continue
        safe = []
        for name in action.option_strings:
            if not any(their_name.startswith(name) for their_name in theirs):
                safe.append(name)
        assert safe, action.option_strings
    args = trainECAPAModel.make_parser().parse_args(['--margin', '0.3', '--scale', '32'])
    assert (args.m, args.s) == (0.3, 32)


# Recipes.


def test_a_recipe_is_read_where_it_stands(tmp_path):
    recipe = tmp_path / 'recipe.txt'
    recipe.write_text("# a recipe\n--C 64 --lr 0.01\n\n--save_path 'exps/with space'\n")
    parser = trainECAPAModel.make_parser()
    args = parser.parse_args(['--lr', '0.1', f'@{recipe}', '--C', '128'])
    assert args.C == 128
    assert args.lr == 0.01
    assert args.save_path == 'exps/with space'


RECIPES = {
    'unclosed quote': ("--lr 0.1\n--train_list 'abc\n", "'abc"),
    'backslash at the end': ('--train_list abc\\\n', 'abc'),
    'unknown option': ('--lr 0.1 --lrr 0.2\n', '--lrr'),
}


@pytest.mark.parametrize('fault', RECIPES)
def test_a_recipe_is_refused(tmp_path, monkeypatch, capsys, fault):
    content, words = RECIPES[fault]
    (tmp_path / 'recipe.txt').write_text(content)
    monkeypatch.chdir(tmp_path)
    assert words in refusal(capsys, trainECAPAModel.main, ['@recipe.txt'])
    assert os.listdir(tmp_path) == ['recipe.txt']


# What the command refuses.


@pytest.mark.parametrize(
    'option, value, words',
    [
        ('batch_size', 13, ['--batch_size 13', ' 12 ']),
        ('n_class', 3, ['--n_class 3', ' 4 ']),
        ('C', 12, ['--C 12']),
        ('warmup', 1, ['--warmup']),
        ('min_lr', 1, ['--min_lr']),
        ('lr', 'fast', ['--lr', 'fast']),
        ('lr', 'nan', ['--lr', 'nan']),
        ('max_epoch', 0, ['--max_epoch', '0']),
        ('device', 'toaster', ['--device', 'toaster']),
        ('device', 'cuda:99', ['--device', 'cuda:99']),
        ('initial_model', 'nowhere.model', ['--initial_model', 'nowhere.model']),
        ('save_path', __file__, ['--save_path', os.path.basename(__file__)]),
    ],
)
def test_an_option_is_refused(tree, capsys, option, value, words):
    message = refusal(capsys, train, tree, **{option: value})
    assert all(word in message for word in words), message
    assert not os.path.exists(tree['save_path'])


def test_eval_without_a_checkpoint_is_refused(tree, capsys):
    arguments = command_line('--eval', **tree)
    assert '--initial_model' in refusal(capsys, trainECAPAModel.main, arguments)


@pytest.mark.parametrize(
    'flags', [['--eval', '--initial_model', 'exps/pretrain.model'], ['--no_such_option']]
)
def test_nothing_is_made_where_the_command_is_refused(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    assert flags[-1] in refusal(capsys, trainECAPAModel.main, flags)
    assert list(tmp_path.iterdir()) == []


def test_two_commands_are_refused(tree, model, capsys):
    tree['save_path'] += '2'
    message = refusal(capsys, evaluate, tree, model, '--check')
    assert '--eval' in message and '--check' in message
    assert not Path(tree['save_path']).exists()


def test_a_seed_that_is_too_large_is_refused(tree, capsys):
    assert '--seed' in refusal(capsys, train, tree, seed=2**64)
    train(tree, seed=2**64 - 1)


def test_a_crop_that_memory_cannot_hold_is_refused(tree, capsys):
    assert '--batch_size' in refusal(capsys, train, tree, num_frames=10**12)


@pytest.mark.parametrize('kind, text', [(int, '9' * 20), (int, '9' * 5000), (float, 'inf')])
def test_options_have_finite_bounds(kind, text):
    """Also if an option has no upper bound: 20 nines overflowed the clock."""
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        in_range(kind, 0)(text)


@pytest.mark.parametrize('option', ['--c_miss', '--c_fa'])
@pytest.mark.parametrize('value', ['inf', 'nan', '1e999', '-1'])
def test_costs_are_finite(capsys, option, value):
    message = refusal(capsys, verify.main, ['a.wav', 'b.wav', option, value])
    assert option in message


# What a run keeps.


def test_options_are_kept_and_read_back(tree):
    train(tree, lr=0.002)
    path = Path(tree['save_path'], 'options.txt')
    assert '# torch ' in path.read_text()
    kept = trainECAPAModel.make_parser().parse_args([f'@{path}'])
    arguments = command_line(**{**SMALL, **tree, 'lr': 0.002})
    assert kept == trainECAPAModel.make_parser().parse_args(arguments)


@pytest.mark.parametrize('value', ['-x', '--lr', '@list', "two 'words' # in one", ''])
def test_options_of_any_name_are_read_back(tmp_path, value):
    flags = [f'--train_list={value}', f'--eval_list={value}', '--save_path', str(tmp_path)]
    args = trainECAPAModel.make_parser().parse_args(flags)
    args.command = ''
    trainECAPAModel.write_options(args)
    kept = trainECAPAModel.make_parser().parse_args([f'@{tmp_path}/options.txt'])
    assert (kept.train_list, kept.eval_list) == (value, [value])


def test_a_run_says_what_it_was(tree, capsys):
    git = ['git', 'rev-parse', 'HEAD']
    described = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    commit = described.stdout.strip() or 'unknown'
    train(tree)
    log = capsys.readouterr().out.splitlines()[:3]
    assert re.fullmatch(r'command +python trainECAPAModel.py .*--batch_size 4.*', log[0])
    assert re.fullmatch(rf'commit +{commit}(-dirty)?', log[1])
    assert re.fullmatch(r'versions +python 3\S+, torch 2\S+, torchaudio .*', log[2])
    options = Path(tree['save_path'], 'options.txt').read_text()
    assert '# command python trainECAPAModel.py' in options
    assert f'# commit {commit}' in options
    model = f'{tree["save_path"]}/model/model_0001.model'
    evaluate(tree, model)
    record = json.loads(Path(tree['save_path'], 'results.json').read_text())
    entry = record['lists'][tree['eval_list']]
    assert entry['commit'].startswith(commit)
    assert '--eval' in entry['command']
    assert entry['versions']['python']
