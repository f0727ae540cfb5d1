"""Trains again and again, and is killed at every kind of place, for test_resume.py."""

import io
import os
import random
import signal
import sys

import torch
from cli import start, train

import dataLoader

# Where a run is killed, and at which call of that function at the latest.
PLACES = {
    'loading': ('dataLoader.train_loader.__getitem__', 40),
    'stepping': ('ECAPAModel.ECAPAModel.train_step', 8),
    'saving': ('torch.save', 4),
    'flushing': ('os.fsync', 9),
    'renaming': ('os.replace', 6),
    'renamed': ('os.close', 6),
    'evaluating': ('ECAPAModel.ECAPAModel.embed_window', 4),
    'any time': None,
}
torch_save = torch.save


def die():
    """Ends this process as a power cut does."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_written(item, file):
    """Writes half of a checkpoint to the disk first."""
    whole = io.BytesIO()
    torch_save(item, whole)
    content = whole.getvalue()
    file.write(content[: len(content) // 2])
    file.flush()
    die()


def arm(place, last_call):
    """Replaces the function of a place by one that dies at its call number `last_call`."""
    owner, _, name = place.rpartition('.')
    module, *parts = owner.split('.')
    holder = sys.modules[module]
    for part in parts:
        holder = getattr(holder, part)
    original = getattr(holder, name)
    calls = []

    def armed(*args, **kwargs):
        calls.append(name)
        if len(calls) == last_call and place == 'torch.save':
            die_half_written(*args)
        if len(calls) == last_call:
            die()
        return original(*args, **kwargs)

    setattr(holder, name, armed)


def train_until_killed(options, place, call):
    """Trains three epochs; dies at a call of a place, if one is given."""
    dataLoader.EVAL_CROP = 4800
    if PLACES.get(place):
        arm(PLACES[place][0], call)
    train(options, max_epoch=3, n_cpu=int(place == 'any time'))


def train_once(options, place, rng, folder):
    """Trains in another process, which is killed at a place, if any.

    Returns whether the kill came before the end of the training.
    """
    _, calls = PLACES.get(place) or (None, 1)
    call = rng.randint(1, calls)
    delay = rng.uniform(0.05, 2)
    process = start(train_until_killed, options, place, call, folder=folder)
    if place == 'any time':
        process.join(delay)
        process.kill()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL), (folder / 'stderr').read_text()
    return process.exitcode != 0


def train_with_kills(tree, folder, kills):
    """Trains into folder/1, folder/2 and so on until there were `kills` kills, and a last run ends.

    Returns the places of the kills, and the number of runs.
    """
    folder.mkdir()
    rng = random.Random(0)
    places = []
    number = 1
    ended = False
    while not ended:
        place = None
        if len(places) < kills:
            place = list(PLACES)[len(places) % len(PLACES)]
        options = {**tree, 'save_path': str(folder / str(number))}
        if train_once(options, place, rng, folder):
            places.append(place)
        elif place:
            number += 1
        else:
            ended = True
    return places, number
