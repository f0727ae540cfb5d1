"""Trains again and again, and is killed at every kind of place; test_resume.py runs this script.

`python tests/kills.py FOLDER KILLS --train_list ...` trains into FOLDER/1, FOLDER/2 and so on.
A process that has imported everything forks each run, so that a run takes no time to start.
"""

import io
import json
import os
import random
import signal
import sys
import time

import torch
from cli import train
from conftest import make_system

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


def train_in_a_child(options, place, rng):
    """Trains three epochs in another process, killed at a place, if any.

    Returns whether the kill came before the end of the training.
    """
    function, calls = PLACES.get(place) or (None, 1)
    call = rng.randint(1, calls)
    delay = rng.uniform(0.05, 2)
    child = os.fork()
    if child == 0:
        if function:
            arm(function, call)
        train(options, max_epoch=3, n_cpu=int(place == 'any time'))
        os._exit(0)

    if place == 'any time':
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def train_with_kills(options, folder, kills):
    """Trains until there were `kills` kills, and the last run has ended; prints a JSON object."""
    rng = random.Random(0)
    places = []
    number = 1
    ended = False
    while not ended:
        place = None
        if len(places) < kills:
            place = list(PLACES)[len(places) % len(PLACES)]
        options['save_path'] = f'{folder}/{number}'
        if train_in_a_child(options, place, rng):
            places.append(place)
        elif place:
            number += 1
        else:
            ended = True
    print(json.dumps({'places': places, 'runs': number}))


if __name__ == '__main__':
    torch.set_num_threads(1)
    dataLoader.EVAL_CROP = 4800
    # PyTorch imports much of itself for the first optimiser: here, for all that follow.
    make_system()
    folder, kills, *arguments = sys.argv[1:]
    names = [name.removeprefix('--') for name in arguments[::2]]
    train_with_kills(dict(zip(names, arguments[1::2])), folder, int(kills))
