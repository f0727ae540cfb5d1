"""How a command ends: signals, helpers that die, streams and places that go away, options."""

import argparse

import pytest

import trainECAPAModel
from tools import number


@pytest.mark.parametrize('kind, text', [(int, '9' * 20), (int, '9' * 5000), (float, 'inf')])
def test_options_have_finite_bounds(kind, text):
    """Also where no upper bound is given: 20 nines overflowed the clock."""
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        number(kind, 0)(text)


def test_torchrun_hands_on_each_option_or_its_longer_name():
    """Its parser refuses what may be the beginning of several of its own options."""
    launcher = pytest.importorskip('torch.distributed.run').get_args_parser()
    theirs = [name for action in launcher._actions for name in action.option_strings]
    for action in trainECAPAModel.make_parser()._actions:
        if action.dest == 'help':
            continue
        safe = [
            name
            for name in action.option_strings
            if not any(their_name.startswith(name) for their_name in theirs)
        ]
        assert safe, action.option_strings
    args = trainECAPAModel.make_parser().parse_args(['--margin', '0.3', '--scale', '32'])
    assert (args.m, args.s) == (0.3, 32)
