"""Averages checkpoints of one run; the mean is often better than any of them.

    python -m exps.average exps/exp1/model --last 10 --out exps/exp1/average.model
    python -m exps.average exps/exp1/model/model_0070.model exps/exp1/model/model_0080.model \
        --out two.model

This is stochastic weight averaging (Izmailov et al., UAI 2018). The running means and variances of
batch norms are averaged too; their counts are those of the last checkpoint. The result is scored
like any other checkpoint. --half writes 16-bit weights, also of a single checkpoint; the file is
half as large, and loads like any other.
"""

import argparse
import os

import torch

from dataLoader import require_file
from ECAPAModel import model_of, read_checkpoint, saved_models
from tools import BadInput, exit_on_bad_input, prepare_new_file, write_whole


def main(argv=None):
    """Runs the script. Exits with status 2 and a message if the input cannot be used."""
    parser = argparse.ArgumentParser(
        prog='python -m exps.average', description='Average checkpoints of one run.'
    )
    add = parser.add_argument
    add('models', nargs='+', help='checkpoints, or the folder of a run')
    add('--last', type=int, default=10, help='how many of the newest (default: 10)')
    add('--out', required=True, help='checkpoint to write')
    add('--half', action='store_true', help='write 16-bit weights, for a file of half the size')
    args = parser.parse_args(argv)
    with exit_on_bad_input():
        average(args.models, args.last, args.out, args.half)


def average(models, last, out, half=False):
    """Writes the mean of checkpoints, or of the `last` newest checkpoints of a folder, to `out`.

    half: write the weights of layers in float16; see half_precision. Raises BadInput if their
    tensors differ in shape, or if `out` exists.
    """
    prepare_new_file(out, '--out')
    paths = models
    if os.path.isdir(models[0]):
        below = os.path.join(models[0], 'model')
        paths = newest(below if os.path.isdir(below) else models[0], last)
    if len(models) > 1 and paths is not models:
        raise BadInput(f'{models[0]}: is a folder; give one folder, or checkpoints')
    for path in paths:
        require_file(path, 'MODELS')
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise BadInput('MODELS: a checkpoint is given twice; it would count twice')

    # Sum in double precision.
    total = {}
    expected = tensor_specs(read_checkpoint(paths[0])[0])
    for path in paths:
        weights, _ = read_checkpoint(path)
        if tensor_specs(weights) != expected:
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
    if half:
        mean = half_precision(mean, paths[0])
    write_whole(out, lambda file: torch.save(mean, file))
    print(f'{out}: the mean of {len(paths)} checkpoints, {paths[0]} to {paths[-1]}')


def newest(folder, count):
    """Returns the paths of the `count` newest checkpoints of a folder, the oldest first."""
    paths = list(saved_models(folder))
    if not 0 < count <= len(paths):
        raise BadInput(
            f'{folder}: holds {len(paths)} checkpoints, so --last {count} is not possible'
        )
    return paths[:count][::-1]


def half_precision(weights, path):
    """Returns a state dict, read from `path`, with the matrices of all layers in float16.

    Vectors stay in float32: they are small, and the variances of batch norms may be outside of
    float16's range. Filters, which are the same in every model, and counters, which nothing
    uses, are left out.
    """
    system = model_of(weights, path, device='cpu')
    parameters = dict(system.named_parameters())
    smaller = {}
    for name, tensor in weights.items():
        if name in parameters:
            smaller[name] = tensor.half() if tensor.ndim > 1 else tensor
        elif name.endswith(('running_mean', 'running_var')):
            smaller[name] = tensor
    return smaller


def tensor_specs(weights):
    """Returns {name: (shape, type)} of a state dict."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}


if __name__ == '__main__':
    main()
