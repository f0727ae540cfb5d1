"""Averages checkpoints of one run; the mean is often better than each of them.

    python -m exps.average exps/exp1/model --last 10 --out exps/exp1/average.model
    python -m exps.average exps/exp1/model/model_0070.model exps/exp1/model/model_0080.model \
        --out two.model

This is stochastic weight averaging (Izmailov et al., UAI 2018). The running means and variances of
batch norms are averaged too; their counts are those of the last checkpoint. The result is scored
like any other checkpoint.

Two options make the file smaller, also for a single checkpoint: --half writes 16-bit weights, and
--classes N keeps the first N classes of the classifier. After a training with --speed_perturb, the
first third of the classes are the speakers at their own speed.
"""

import argparse
import os

import torch

from dataLoader import require
from ECAPAModel import describe, read_checkpoint, saved_models
from tools import BadInput, exit_on_bad_input, in_range, write_whole


def main(argv=None):
    """Runs the script; exit status 2, with a message, for input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog='python -m exps.average', description='Average checkpoints of one run.'
    )
    add = parser.add_argument
    add('models', nargs='+', help='checkpoints, or the folder model/ of a run')
    add('--last', type=int, default=10, help='how many of the newest (default: 10)')
    add('--out', required=True, help='checkpoint to write')
    add('--half', action='store_true', help='write 16-bit weights, for a file of half the size')
    add('--classes', type=in_range(int, 1), help='keep only the first N classes of the classifier')
    args = parser.parse_args(argv)
    with exit_on_bad_input():
        average(args.models, args.last, args.out, args.half, args.classes)


def average(models, last, out, half=False, classes=None):
    """Writes the mean of checkpoints, or of the `last` newest checkpoints of a folder, to `out`.

    half: write matrices and filters in float16. Vectors stay in float32: they are small, and the
    variances of batch norms may be outside of float16's range. classes: how many to keep, None for
    all.

    Raises BadInput if their tensors differ in shape, or if `out` exists.
    """
    if os.path.exists(out):
        raise BadInput(f'--out {out} is there already; remove it or choose another name')
    paths = newest(models[0], last) if os.path.isdir(models[0]) else models
    if len(models) > 1 and paths is not models:
        raise BadInput(f'{models[0]}: is a folder; give one folder, or checkpoints')
    for path in paths:
        require(os.path.isfile, path, 'MODELS')
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
    mean = {}
    for name, tensor in total.items():
        is_weight = tensor.is_floating_point() and tensor.ndim > 1
        dtype = torch.float16 if half and is_weight else weights[name].dtype
        mean[name] = tensor.to(dtype)
    if classes:
        mean = first_classes(mean, classes)
    write_whole(out, lambda file: torch.save(mean, file))
    print(f'{out}: the mean of {len(paths)} checkpoints, {paths[0]} to {paths[-1]}')


def newest(folder, count):
    """Returns the paths of the `count` newest checkpoints of a folder, the oldest first."""
    paths = list(saved_models(folder))
    if not 0 < count <= len(paths):
        raise BadInput(f'{folder}: holds {len(paths)} checkpoints, --last is {count}; choose fewer')
    return paths[:count][::-1]


def first_classes(weights, count):
    """Keeps the first classes in a state dict: the first rows of tensors with a row for each class.

    Raises BadInput if there are fewer.
    """
    known = describe(weights)['n_class']
    if count > known:
        raise BadInput(f'--classes {count}: the classifier has {known}')
    kept = {}
    for name, tensor in weights.items():
        has_row_for_each = name.startswith('speaker_loss.') and tensor.shape[:1] == (known,)
        # A slice would be saved with the memory of all rows, so copy it.
        kept[name] = tensor[:count].clone() if has_row_for_each else tensor
    return kept


def tensor_specs(weights):
    """Returns {name: (shape, type)} of a state dict."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}


if __name__ == '__main__':
    main()
