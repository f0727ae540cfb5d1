"""The classifier and loss of training: AAM-softmax (additive angular margin softmax)."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from tools import accuracy


class AAMsoftmax(nn.Module):
    """Additive angular margin softmax (Deng et al., ArcFace, CVPR 2019, eq. 3).

    n_class: number of speakers. m: margin in radians. s: scale of the cosines. size: size of
    an embedding. Every loss takes these four arguments, and has the methods of this class.
    """

    def __init__(self, n_class, m, s, size=192):
        super().__init__()
        self.m = m
        self.s = s
        self.weight = nn.Parameter(torch.empty(n_class, size))
        nn.init.xavier_normal_(self.weight, gain=1)

    def set_margin(self, margin):
        """Sets the margin, which may grow during training."""
        self.m = margin

    @staticmethod
    def classes_of(state):
        """Returns n_class of a state dict of this loss; None if it belongs to another loss.

        A loss without weights returns 0 for an empty state dict.
        """
        if state.keys() != {'weight'} or state['weight'].ndim != 2:
            return None
        return len(state['weight']) or None

    def forward(self, x, label):
        """Returns (loss, top-1 accuracy (1,) in percent) of embeddings x (B, size), labels (B,).

        The accuracy is that of the logits with the margin, so it is lower than the share of
        embeddings whose own speaker is the nearest.
        """
        cosine = F.linear(F.normalize(x), F.normalize(self.weight))  # (B, n_class)
        target = cosine.gather(1, label.view(-1, 1))  # (B, 1)

        # At |cos| = 1 the slope of the root is infinite, and the chain rule would make NaN of it.
        sine = (1 - target * target).clamp(min=torch.finfo(target.dtype).eps).sqrt()
        with_margin = target * math.cos(self.m) - sine * math.sin(self.m)

        # Beyond θ = π − m the cosine of θ + m would rise again; a straight line keeps falling.
        line = target - math.sin(math.pi - self.m) * self.m
        with_margin = torch.where(target > math.cos(math.pi - self.m), with_margin, line)

        logits = cosine.scatter(1, label.view(-1, 1), with_margin) * self.s
        return F.cross_entropy(logits, label), accuracy(logits.detach(), label)[0]


LOSSES = {'aam': AAMsoftmax}


def loss_of(state):
    """Finds the loss that a state dict belongs to.

    Returns (name in LOSSES, number of classes), or (None, None) if it belongs to none of them.
    Losses whose tensors have the same names are not told apart: the first one is returned.
    """
    for name, loss in LOSSES.items():
        n_class = loss.classes_of(state)
        if n_class is not None:
            return name, n_class
    return None, None
