"""Writes the mean of checkpoints, which is scored like any other and often better than each.

    python -m exps.average exps/exp1/model --last 10 --out exps/exp1/average.model
    python -m exps.average exps/exp1/model/model_0070.model exps/exp1/model/model_0080.model \
        --out two.model

The mean of the weights that one training run passed through at its end (stochastic weight
averaging, Izmailov et al., UAI 2018); batch norms' means and variances are averaged too, their
counts are those of the last.
"""

import argparse
import os

import torch

from dataLoader import require
from ECAPAModel import read_checkpoint, saved_models
from tools import BadInput, exit_on_bad_input, write_whole


def main(argv=None):
    """Writes the mean; exit status 2, with a sentence, for checkpoints that cannot be averaged."""
    parser = argparse.ArgumentParser(
        prog='python -m exps.average', description='Average checkpoints of one run.'
    )
    add = parser.add_argument
    add('models', nargs='+', help='checkpoints, or the folder model/ of a run')
    add('--last', type=int, default=10, help='of a folder: how many of its newest (default: 10)')
    add('--out', required=True, help='checkpoint to write')
    args = parser.parse_args(argv)
    with exit_on_bad_input():
        average(args.models, args.last, args.out)


def average(models, last, out):
    """Writes to `out` the mean of checkpoints, or of the `last` newest of a folder.

    Raises BadInput where they differ, or `out` is there.
    """
    if os.path.exists(out):
        raise BadInput(f'--out {out} is there already; remove it or choose another name')
    paths = newest(models[0], last) if os.path.isdir(models[0]) else models
    if len(models) > 1 and paths is not models:
        raise BadInput(f'{models[0]}: is a folder; give one folder, or checkpoints')
    for path in paths:
        require(os.path.isfile, path, 'MODELS')
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise BadInput('MODELS: names a checkpoint twice, which would count twice')

    total = {}
    expected = kinds(read_checkpoint(paths[0])[0])
    for path in paths:
        weights, _ = read_checkpoint(path)
        if kinds(weights) != expected:
            raise BadInput(
                f'{path}: has other tensors than {paths[0]}; only checkpoints of one run can be '
                'averaged'
            )
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                total[name] = total.get(name, 0) + tensor.double() / len(paths)
            else:
                total[name] = tensor
    mean = {name: tensor.to(weights[name].dtype) for name, tensor in total.items()}
    write_whole(out, lambda file: torch.save(mean, file))
    print(f'{out}: the mean of {len(paths)} checkpoints, {paths[0]} to {paths[-1]}')


def newest(folder, count):
    """Paths of the `count` newest checkpoints of a folder, the oldest first."""
    paths = list(saved_models(folder))
    if not 0 < count <= len(paths):
        raise BadInput(f'{folder}: holds {len(paths)} checkpoints, --last is {count}; choose fewer')
    return paths[:count][::-1]


def kinds(weights):
    """{name: (shape, type)} of a state dict."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}


if __name__ == '__main__':
    main()
