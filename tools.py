"""Measures and small helpers: error rates, EER, minDCF, accuracy, score.txt, and the error that bad input raises."""

import os
import re

import numpy as np
import torch.distributed as dist
from sklearn.metrics import roc_curve

SCORE_LINE = '%d epoch, LR %f, LOSS %f, ACC %2.2f%%, EER %2.2f%%, bestEER %2.2f%%\n'
SCORE_PATTERN = re.compile(r'(\d+) epoch, LR (\S+), LOSS (\S+), ACC (\S+)%, EER (\S+)%, bestEER (\S+)%\n', re.ASCII)


class BadInput(Exception):
    """What the user gave cannot be used: the message says what is wrong, where, and what to do about it."""


def process_rank():
    """Number of this process among those that train together, 0 where it is alone or the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(tensor):
    """The tensor summed over the processes that train together."""
    if process_count() > 1:
        dist.all_reduce(tensor)
    return tensor


def copy_from_first(tensor):
    """Overwrites the tensor with that of the first of the processes that train together."""
    if process_count() > 1:
        dist.broadcast(tensor, 0)


def available_cpus():
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def init_args(args):
    """Sets args.score_save_path and args.model_save_path below args.save_path, and makes the folders."""
    args.score_save_path = os.path.join(args.save_path, 'score.txt')
    args.model_save_path = os.path.join(args.save_path, 'model')
    try:
        os.makedirs(args.model_save_path, exist_ok=True)
    except OSError as error:
        raise BadInput(f'--save_path {args.save_path}: cannot make the folder ({error.strerror})') from error
    return args


def write_whole(path, write):
    """Calls write(temporary path) and renames the result to `path`, which is thus never seen half written."""
    temporary = f'{path}.part'
    write(temporary)
    os.replace(temporary, path)


def read_scores(path):
    """The lines of a score.txt as tuples (epoch, lr, loss, accuracy %, EER %, best EER %), oldest first.

    A missing file has no lines. Raises BadInput, with the line number, on a line of another format.
    """
    scores = []
    if not os.path.exists(path):
        return scores
    with open(path, encoding='utf-8', errors='replace') as lines:
        for number, line in enumerate(lines, 1):
            match = SCORE_PATTERN.fullmatch(line)
            if not match:
                raise BadInput(f'{path}, line {number}: not a line of a score.txt: {line.strip()!r}')
            scores.append((int(match[1]), *map(float, match.groups()[1:])))
    return scores


def score_pairs(embeddings, pairs):
    """Scores (N,) of pairs (N, 2) of rows of embeddings (files, 2, 192), as ECAPAModel.embed_files makes them.

    A score is half the cosine of the whole utterances plus half the mean cosine of the 25 pairs of their crops.
    """
    vectors = embeddings.reshape(len(embeddings), -1)
    scores = np.empty(len(pairs), vectors.dtype)
    for start in range(0, len(pairs), 4096):
        first, second = pairs[start : start + 4096].T
        scores[start : start + 4096] = 0.5 * np.einsum('nd,nd->n', vectors[first], vectors[second])
    return scores


def tuneThresholdfromScore(scores, labels, target_fa, target_fr=None):
    """Operating points on the ROC of verification scores.

    scores, labels: (N,) scores and 1 (same speaker) or 0; target_fa, target_fr: wanted rates, 0 to 1.
    Returns (thresholds, EER in percent, fpr, fnr): a [threshold, fpr, fnr] for each wanted rate (misses first), and
    the two rates along the ROC. The EER is the larger of the two rates where they are closest.
    """
    fpr, tpr, thresholds = roc_curve(labels, scores, pos_label=1)
    fnr = 1 - tpr
    tuned = []
    for rates, targets in ((fnr, target_fr or []), (fpr, target_fa)):
        for target in targets:
            nearest = np.nanargmin(np.abs(target - rates))
            tuned.append([thresholds[nearest], fpr[nearest], fnr[nearest]])
    nearest = np.nanargmin(np.abs(fnr - fpr))
    return tuned, max(fpr[nearest], fnr[nearest]) * 100, fpr, fnr


def ComputeErrorRates(scores, labels):
    """Miss and false-alarm rates, (N,) each, with every score in ascending order as the threshold.

    Returns (fnrs, fprs, thresholds); a trial is accepted above the threshold. Equal scores are passed one at a time in
    their given order, as the published code does.
    """
    order = np.argsort(scores, kind='stable')
    labels = np.asarray(labels)[order].astype(np.int64)
    targets = labels.sum()
    fnrs = np.cumsum(labels) / targets
    fprs = 1 - np.cumsum(1 - labels) / (len(labels) - targets)
    return fnrs, fprs, np.asarray(scores)[order]


def ComputeMinDcf(fnrs, fprs, thresholds, p_target, c_miss, c_fa):
    """Minimum of the normalised detection cost (NIST SRE 2008) over the thresholds, and the threshold it is at."""
    costs = c_miss * np.asarray(fnrs) * p_target + c_fa * np.asarray(fprs) * (1 - p_target)
    best = np.argmin(costs)
    return costs[best] / min(c_miss * p_target, c_fa * (1 - p_target)), thresholds[best]


def verification_figures(scores, labels):
    """(EER in percent, minDCF at p_target 0.05, minDCF at p_target 0.01) of (N,) scores; both costs are 1."""
    eer = tuneThresholdfromScore(scores, labels, [1, 0.1])[1]
    rates = ComputeErrorRates(scores, labels)
    return eer, *(ComputeMinDcf(*rates, p_target, 1, 1)[0] for p_target in (0.05, 0.01))


def accuracy(output, target, topk=(1,)):
    """Percentages of rows of output (B, classes) whose target (B,) is among the k largest: a (1,) tensor for each k."""
    _, predictions = output.topk(max(topk), dim=1)
    correct = predictions == target.view(-1, 1)
    return [correct[:, :k].any(dim=1).float().mean().mul(100).view(1) for k in topk]
