"""The command: trains ECAPA-TDNN on VoxCeleb2 and scores VoxCeleb1; --eval scores a checkpoint."""

import argparse
import contextlib
import datetime
import glob
import itertools
import math
import os
import platform
import shlex
import shutil
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import dataLoader
import tools
from ECAPAModel import (
    Diverged,
    ECAPAModel,
    Progress,
    describe,
    load_weights,
    prune,
    read_checkpoint,
    resume,
    save_training,
    saved_models,
)
from exps.scoring import add_scoring_options, evaluate, say_figures
from loss import LOSSES
from model import ENCODERS, foreign_batch_norms
from tools import BadInput, first_process_first, in_range, process_count, process_rank, say


def make_parser():
    """Makes the parser. The published options keep their names and, but for a few, their defaults.

    The exceptions are paths, --n_cpu and --n_class.
    """
    parser = argparse.ArgumentParser(
        description='Train and score ECAPA-TDNN speaker verification.',
        epilog='@FILE reads options from a recipe; options after it on the command line take '
        'precedence. Run the same command again to continue an interrupted run.',
        formatter_class=tools.HelpFormatter,
        fromfile_prefix_chars='@',
    )
    parser.convert_arg_line_to_args = split_recipe_line

    # fmt: off
    group = parser.add_argument_group('command (without one of these: train)')
    add = group.add_mutually_exclusive_group().add_argument
    add('--check', action='store_true', help='check every file that training needs, and stop')
    add('--eval', action='store_true', help='score --initial_model on --eval_list')

    add = parser.add_argument_group('training').add_argument
    add('--max_epoch', type=in_range(int, 1), default=80, help='number of epochs')
    add('--batch_size', type=in_range(int, 2), default=400, help='utterances in a step')
    add('--test_step', type=in_range(int, 1), default=1,
        help='save and test every N epochs, and after the last one; --schedule step also reduces '
        'the learning rate every N epochs')
    add('--optimizer', choices=('adam', 'sgd'), default='adam', help='sgd: Nesterov momentum 0.9')
    add('--weight_decay', type=in_range(float, 0), default=2e-5, help='L2 penalty on all weights')
    add('--clip', type=in_range(float, 0), default=0.0,
        help='clip gradients to this norm (0: do not clip)')
    add('--accumulate', type=in_range(int, 1), default=1,
        help='split each batch into N parts, one after another, to save memory')
    add('--freeze_epochs', type=in_range(int, 0), default=0,
        help='train only the classifier in the first N epochs')
    add('--compile', action='store_true',
        help='compile the encoder for training: takes minutes at the start, then is faster')

    add = parser.add_argument_group('learning rate').add_argument
    add('--lr', type=in_range(float, 0), default=0.001,
        help='learning rate at the start, after the warm-up')
    add('--schedule', choices=('step', 'cosine'), default='step',
        help='cosine: falls from --lr to --min_lr at --max_epoch')
    add('--lr_decay', type=in_range(float, 0), default=0.97,
        help='step: multiply the learning rate by this every --test_step epochs')
    add('--min_lr', type=in_range(float, 0), default=0.0, help='cosine: learning rate at the end')
    add('--warmup', type=in_range(float, 0), default=0.0,
        help='increase the learning rate from 0 over the first N epochs')

    add = parser.add_argument_group('crops and augmentation').add_argument
    add('--num_frames', type=in_range(int, 1), default=200,
        help='length of a crop, in frames of 10 ms')
    add('--musan_path', default='data/musan_split', help='MUSAN: noise/, speech/ and music/')
    add('--rir_path', default='data/RIRS_NOISES/simulated_rirs', help='room impulse responses')
    add('--augment', type=in_range(float, 0, 1), default=5 / 6,
        help='share of the crops that are augmented (default: %(default).3g); 0 needs neither '
        'MUSAN nor RIRs')
    add('--codec', type=in_range(float, 0, 1), default=0.0,
        help='share of the crops that go through a telephone or internet codec')
    add('--speed_perturb', action='store_true',
        help='play each crop at speed 0.9, 1 or 1.1; changed speeds count as new speakers')
    add('--no_specaug', action='store_true', help='no SpecAugment')
    add('--max_bad', type=in_range(float, 0, 100), default=1.0,
        help='percentage of the training files that may be unusable')

    add = parser.add_argument_group('model and loss').add_argument
    add('--encoder', choices=ENCODERS, default='ecapa', help='network in model.py')
    add('--loss', choices=LOSSES, default='aam', help='classifier and loss in loss.py')
    add('--C', type=in_range(int, 1), help='channels; without it those of --initial_model, or 1024')
    add('--m', '--margin', type=in_range(float, 0, math.pi), default=0.2,
        help='margin of AAM-softmax, in radians')
    add('--margin_from', type=in_range(float, 0, math.pi),
        help='margin at the start; without it the margin is always --m')
    add('--margin_epochs', type=in_range(float, 0), nargs=2, default=[0.0, 1.0],
        metavar=('FROM', 'TO'), help='epochs between which the margin grows to --m')
    add('--s', '--scale', type=in_range(float, 0), default=30, help='scale of AAM-softmax')
    add('--n_class', type=in_range(int, 1),
        help='number of classes (default: one for each speaker of --train_list, or three with '
        '--speed_perturb)')
    add('--keep_classifier', action='store_true',
        help='keep the classifier of --initial_model; stop if it does not fit --train_list')

    add = parser.add_argument_group('results').add_argument
    add('--save_path', default='exps/exp1', help='folder of the results: score.txt and model/')
    add('--keep', type=in_range(int, 0), default=0,
        help='how many of the newest checkpoints to keep (0: all)')
    add('--force', action='store_true',
        help='continue a run even if you changed options that change its numbers')
    # fmt: on

    add_scoring_options(parser)
    return parser


def main(argv=None):
    """Runs the command. Exits with status 2 and a message if the input cannot be used."""
    args = None
    with lossy_log(), tools.exit_on_bad_input(lambda: resume_hint(args)):
        # Read the options, and join the other processes.
        args = make_parser().parse_args(argv)
        args.command = tools.command_of('trainECAPAModel.py', argv)
        join_processes(args)

        # Log what is run.
        facts = tools.provenance(args.command)
        versions = ', '.join(f'{name} {version}' for name, version in facts['versions'].items())
        say(f'command       {facts["command"]}')
        say(f'commit        {facts["commit"]}')
        say(f'versions      {versions}')

        if args.eval:
            evaluate(args)
        else:
            train(args)
        if dist.is_initialized():
            dist.destroy_process_group()


class Run(NamedTuple):
    """Everything that training needs, made before the first step."""

    dataset: dataLoader.train_loader
    loader: torch.utils.data.DataLoader
    trials: tuple  # (paths, trial lists) from read_trial_lists
    system: ECAPAModel
    initial_weights: dict | None
    identity: dict  # {option: value} of the options that change the numbers


def train(args):
    """Trains to --max_epoch from the last epoch in --save_path.

    Saves and tests every test_step epochs, and after the last one.
    """
    # Read, check and build everything. --check does only this.
    run = prepare(args)
    print_plan(run, args)
    if args.check:
        resume_or_begin(run, args)
        say('check passed')
        return

    tools.init_args(args)
    with locked(args.save_path):
        # Continue the run in this folder, or begin one.
        done, scores = resume_or_begin(run, args)
        open_records(run, done, args)
        if done.loss is not None and done.epoch not in [score[0] for score in scores]:
            # The run was stopped between saving this epoch and scoring it.
            score_epoch(run, done, scores, args)

        # Train an epoch, save it, score it.
        starts = []
        for epoch in range(done.epoch + 1, args.max_epoch + 1):
            starts.append(time.time())
            done = train_epoch(run, epoch, args)
            replaced = sort_bad_audio(run.dataset)
            say(epoch_line(done, starts, args.max_epoch, run.system.share_idle, replaced))
            if epoch % args.test_step == 0 or epoch == args.max_epoch:
                if process_rank() == 0:
                    save_training(run.system, args.model_save_path, done, run.identity, args.keep)
                score_epoch(run, done, scores, args)
    say(
        f'{args.max_epoch} epochs are done; results: {args.score_save_path} and '
        f'{args.model_save_path}'
    )


def prepare(args):
    """Reads the lists, builds the system and the loader, and checks the data; returns a Run."""
    with first_process_first():
        dataset = dataLoader.train_loader(**tools.options_for(dataLoader.train_loader, args))
        trials = dataLoader.read_trial_lists(
            args.eval_list, args.eval_path, args.enrol_list, args.speaker
        )
        system, initial_weights = build_system(args, dataset.n_class)
        loader = dataLoader.make_batches(
            dataset, args.batch_size, args.n_cpu, pin_memory=system.on_gpu
        )
        if process_rank() == 0:
            dataLoader.check_data(dataset, trials[0], args.check, args.n_cpu, args.max_bad)
            dataLoader.check_lists(dataset, trials[0], args.eval_path, args.speaker)
    identity = run_identity(system, dataset, trials, args)
    tools.compare_processes({**identity, 'max_epoch': args.max_epoch}, args)
    return Run(dataset, loader, trials, system, initial_weights, identity)


def train_epoch(run, epoch, args):
    """Trains an epoch; returns Progress. Raises BadInput naming the batch if the loss diverges."""
    # Each epoch has its own seed, so a resumed epoch draws the same as in an uninterrupted run.
    seed = np.random.SeedSequence([args.seed, epoch, process_rank()]).generate_state(1)[0]
    torch.manual_seed(int(seed))
    run.loader.batch_sampler.epoch = epoch
    try:
        loss, lr, accuracy = run.system.train_network(epoch, run.loader)
    except Diverged as error:
        raise save_bad_batch(error, run.loader, args) from error
    return Progress(epoch, loss, lr, accuracy)


def score_epoch(run, done, scores, args):
    """Scores --eval_list after an epoch, and prints the figures.

    Adds a line to `scores` and to score.txt. A run that lost its newest checkpoints has lines of
    later epochs; they stay until these epochs are scored again.
    """
    # Score.
    paths, trial_lists = run.trials
    results = run.system.score_lists(paths, trial_lists)
    eer = results[0]['raw'].figures['EER']['value']

    # Record the EER of the first list.
    earlier = [score for score in scores if score[0] < done.epoch]
    later = [score for score in scores if score[0] > done.epoch]
    best = min([eer, *(score[4] for score in earlier)])
    new = (done.epoch, done.lr, done.loss, done.accuracy, eer, best)
    scores[:] = [*earlier, new, *later]
    if process_rank() == 0:
        lines = [tools.SCORE_LINE % score for score in scores]
        tools.write_text(args.score_save_path, ''.join(lines))

    say(f'{now()} epoch {done.epoch}, EER {eer:2.2f}%, best EER {best:2.2f}%')
    say_figures(results, trial_lists)


# Machinery: options; the plan; resuming; the log; processes.


# Options.


def split_recipe_line(line):
    """Splits a line of a recipe as a shell does: arguments, quotes, comments."""
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise argparse.ArgumentError(None, f'{error} in a recipe: {line!r}') from error


def write_options(args):
    """Writes SAVE_PATH/options.txt: a recipe of the options; commit and versions are comments."""
    facts = tools.provenance(args.command)
    lines = [f'# command {facts["command"]}', f'# commit {facts["commit"]}']
    lines += [f'# {name} {version}' for name, version in facts['versions'].items()]
    for name, value in vars(args).items():
        if name in ('command', 'score_save_path', 'model_save_path'):
            continue
        if value is True:
            lines.append(f'--{name}')
        elif isinstance(value, list) and len(value) > 1:
            lines.append(f'--{name} {shlex.join(map(str, value))}')
        elif value is not None and value is not False:
            only = value[0] if isinstance(value, list) else value
            lines.append(f'--{name}={shlex.quote(str(only))}')
    tools.write_text(os.path.join(args.save_path, 'options.txt'), '\n'.join(lines) + '\n')


def build_system(args, classes):
    """Builds the system for a training list that needs `classes` classes.

    That is one class for each speaker, or three with --speed_perturb.

    Returns (ECAPAModel, weights of --initial_model or None). Raises BadInput for options that
    contradict each other, the list or --initial_model.
    """
    check_options(args, classes)

    # Take the sizes from --initial_model, from the options or from the list.
    C = args.C
    n_class = args.n_class or classes
    weights = None
    if args.initial_model:
        dataLoader.require_file(args.initial_model, '--initial_model')
        weights, _ = read_checkpoint(args.initial_model)
        found = describe(weights)
        if found['encoder'] != args.encoder:
            raise BadInput(
                f'--encoder {args.encoder} contradicts {args.initial_model}; give --encoder '
                f'{found["encoder"]}'
            )
        if C not in (None, found['C']):
            raise BadInput(
                f'--C {C} contradicts {args.initial_model}, which has {found["C"]} channels; leave '
                '--C out'
            )
        C = found['C']
        if args.keep_classifier:
            n_class = found['n_class']
            check_classifier(args, n_class, classes)
    C = C or 1024

    torch.manual_seed(args.seed)
    system = ECAPAModel(**{**tools.options_for(ECAPAModel, args), 'C': C, 'n_class': n_class})
    check_description(system, args)
    return system, weights


def check_description(system, args):
    """Checks, before training, that checkpoints of the system will be readable.

    Raises BadInput if they would be read as checkpoints of another encoder, or of another number of
    channels or classes, or if several processes train and a batch norm sees only the batch of its
    own process.
    """
    foreign = foreign_batch_norms(system.speaker_encoder)
    if foreign and process_count() > 1:
        raise BadInput(
            f'--encoder {args.encoder}: {foreign[0]} sees only the batch of its process; use '
            'BatchNorm of model.py'
        )
    found = describe(system.state_dict())
    if (found['encoder'], found['C']) != (args.encoder, system.C):
        raise BadInput(
            f'--encoder {args.encoder}: its checkpoints would be read as {found["encoder"]} with '
            f'{found["C"]} channels; see channels_of in model.py, and give at least one tensor '
            'another name'
        )
    if found['n_class'] not in (0, system.n_class):
        raise BadInput(
            f'--loss {args.loss}: its checkpoints would be read as {found["loss"]} of '
            f'{found["n_class"]} classes; see classes_of in loss.py, and give its tensors other '
            'names'
        )


def check_options(args, classes):
    """Raises BadInput if options contradict each other or a list that needs `classes` classes."""
    if args.n_class and args.n_class < classes:
        raise BadInput(
            f'--n_class {args.n_class} is too small: {args.train_list} needs {classes} classes '
            '(one for each speaker, or three with --speed_perturb); leave it out'
        )
    if args.keep_classifier and not args.initial_model:
        raise BadInput(
            '--keep_classifier needs --initial_model, the checkpoint with the classifier'
        )
    if args.batch_size < 2 * args.accumulate * process_count():
        raise BadInput(
            f'--batch_size {args.batch_size}: every part of a batch must have at least 2 '
            f'utterances, for batch norm; a batch has {args.accumulate * process_count()} parts'
        )
    if args.warmup >= args.max_epoch:
        raise BadInput(f'--warmup {args.warmup:g} must be below --max_epoch {args.max_epoch}')
    if args.min_lr > args.lr:
        raise BadInput(f'--min_lr {args.min_lr:g} must be at most --lr {args.lr:g}')
    begin, end = args.margin_epochs
    if begin > end:
        raise BadInput(f'--margin_epochs {begin:g} {end:g}: the first must be at most the second')


def check_classifier(args, trained, classes):
    """Raises BadInput unless a classifier of `trained` classes can be used for `classes`.

    After --speed_perturb, the first third of its classes are the speakers at normal speed.
    """
    if trained not in (classes, 3 * classes):
        raise BadInput(
            f'--keep_classifier: {args.initial_model} has {trained} classes, {args.train_list} '
            f'needs {classes}; the numbers must be equal, or the first must be three times the '
            'second (if only the checkpoint was trained with --speed_perturb)'
        )


# The plan.


def print_plan(run, args):
    """Prints the plan of the run. Raises BadInput if the disk has no space for its results."""
    # Count.
    dataset = run.dataset
    system = run.system
    encoder = sum(parameter.numel() for parameter in system.speaker_encoder.parameters())
    classifier = sum(parameter.numel() for parameter in system.speaker_loss.parameters())
    clips = ', '.join(f'{len(files.paths)} {kind}' for kind, files in dataset.noises.items())
    added = f'{clips} files, {len(dataset.rirs):,} RIRs' if dataset.noises else 'none'
    codecs = f'; codecs {", ".join(dataset.codecs)}' if dataset.codecs else ''
    processes = f'{process_count()} processes on ' if process_count() > 1 else ''
    paths, trial_lists = run.trials
    count = sum(len(one.labels) for one in trial_lists)

    # Print.
    say(
        f'device        {processes}{system.device}, {system.precision}, {args.n_cpu} loading '
        'processes\n'
        f'training      {len(dataset.speakers):,} speakers, {len(dataset):,} utterances '
        f'({args.train_list})\n'
        f'augmentation  {added}{codecs}\n'
        f'evaluation    {count:,} trials over {len(paths):,} files ({", ".join(args.eval_list)})\n'
        f'an epoch      {len(run.loader):,} steps of {args.batch_size} utterances\n'
        f'parameters    {encoder:,} in the encoder, {classifier:,} in the classifier of '
        f'{system.n_class:,} classes'
    )
    unused = len(dataset) - len(run.loader) * args.batch_size
    if unused > len(dataset) / 10:
        say(
            f'note          an epoch leaves out {unused} of {len(dataset)} utterances, because all '
            'batches are whole; a smaller --batch_size leaves out fewer'
        )
    with first_process_first():
        check_disk_space(args, 4 * (encoder + classifier))


def check_disk_space(args, size):
    """Raises BadInput if --save_path has no space for two checkpoints of `size` bytes and states.

    Prints a warning if it has space for these, but not for all checkpoints of the run.
    """
    folder = tools.check_writable(args.save_path, '--save_path')
    models = args.keep
    if not models:
        saved = saved_models(f'{args.save_path}/model')
        models = max(0, math.ceil(args.max_epoch / args.test_step) - len(saved))
    # A .state is at most twice as large as a model. Two states stay while a third one is written.
    least = size * (2 + 6)
    wanted = size * (models + 6)
    free = shutil.disk_usage(folder).free
    room = f'{free / 1e9:.2f} GB are free in --save_path {args.save_path}'
    if free < least:
        raise BadInput(f'{room}, and the newest checkpoints and states need {least / 1e9:.2f} GB')
    if free < wanted:
        say(
            f'WARNING       {room}, and the run needs {wanted / 1e9:.2f} GB; with --keep N '
            'only the newest N checkpoints stay'
        )


# Resuming.


def run_identity(system, dataset, trials, args):
    """Returns {option: value} of the options that change the numbers of a run.

    These are all that are not in tools.HARMLESS, without --max_epoch if the schedule is step. Lists
    are represented by their contents, MUSAN and RIRs by their numbers of files.
    """
    identity = {name: value for name, value in vars(args).items() if name not in tools.HARMLESS}
    if args.schedule == 'step':
        del identity['max_epoch']  # the rate does not depend on it, so it may be changed

    # Replace options by the values that are used.
    identity['C'] = system.C
    identity['n_class'] = system.n_class
    identity['precision'] = system.precision
    if args.codec:
        identity['codec'] = f'{args.codec} of {" ".join(dataset.codecs)}'
    if args.speed_perturb:
        identity['speed_perturb'] = 'drawn'

    # Replace paths by the contents of lists and folders.
    identity['train_list'] = f'SHA-256 {dataset.list_sha256[:16]}'
    identity['eval_list'] = digests(trials[1])
    counts = [f'{len(files.paths)}/{files.pieces[-1]}' for files in dataset.noises.values()]
    identity['musan_path'] = f'files/pieces {" ".join(counts)}'
    identity['rir_path'] = f'{len(dataset.rirs)} files'
    if not args.augment:
        del identity['musan_path'], identity['rir_path']
    return identity


def digests(trial_lists):
    """Returns a string that identifies trial lists by their contents."""
    return ' '.join(f'SHA-256 {trials.sha256[:16]}' for trials in trial_lists)


def resume_or_begin(run, args):
    """Resumes the run in --save_path, or begins one.

    Returns (Progress, the lines of score.txt). Raises BadInput for a score.txt without checkpoints.
    """
    # Resume, if there is a run.
    system = run.system
    folder = os.path.join(args.save_path, 'model')
    score_path = os.path.join(args.save_path, 'score.txt')
    scores = tools.read_scores(score_path)
    done, changes = resume(system, folder, run.identity, args.force)
    if scores and not done:
        raise BadInput(
            f'{score_path}: holds {len(scores)} scores of a run, but its checkpoints are not in '
            f'{folder}. Put one of them back; or, to begin again, choose another --save_path or '
            'move score.txt away'
        )

    # Log where the run begins.
    if done:
        notes = [f'after epoch {done.epoch}, from {folder}']
        notes += [f'--force: {change}' for change in changes]
    elif run.initial_weights:
        left_out = load_weights(system, run.initial_weights, args.initial_model)
        if left_out and args.keep_classifier:
            raise BadInput(
                f'--keep_classifier: {left_out[0]} of {args.initial_model} does not fit --loss '
                f'{args.loss}'
            )
        notes = [f'from {args.initial_model}']
        notes += [f'left out: {name}, which starts from random weights' for name in left_out]
        if args.freeze_epochs:
            notes.append(f'only the classifier trains in the first {args.freeze_epochs} epochs')
    else:
        notes = ['from random weights']
    say('start         ' + '\n  '.join(notes))

    if process_count() > 1:
        # With the same seed, machines with different processors may draw different numbers.
        for tensor in system.state_dict().values():
            dist.broadcast(tensor, 0)
    done = done or Progress()
    tools.compare_processes({'save_path': f'epoch {done.epoch}, {len(scores)} scores'}, args)
    return done, scores


@contextlib.contextmanager
def locked(folder):
    """Keeps other runs out of a folder during the block; the first process locks it for all.

    Removes unfinished text files of a run that was killed. Raises BadInput that names the other
    process if another run holds run.lock.
    """
    if process_rank() > 0:
        yield
        return
    with open(os.path.join(folder, 'run.lock'), 'a+', encoding='utf-8') as file:
        lock(file, folder)
        for part in glob.glob(os.path.join(glob.escape(folder), '*.txt.*.part')):
            with contextlib.suppress(OSError):
                os.remove(part)
        file.truncate(0)
        file.write(f'process {os.getpid()} on host {platform.node()}\n')
        file.flush()
        yield


def lock(file, folder):
    """Locks an open file until it is closed. Raises BadInput if another process has locked it."""
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return  # Windows has no such locks
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        other = file.read().strip() or 'just started'
        raise BadInput(
            f'--save_path {folder}: another run is writing there, {other}; wait for it, stop it, '
            'or choose another folder'
        ) from error
    except OSError as error:
        why = f'this disk has no locks ({error.strerror})'
        print(f'{file.name}: {why}: do not start a second run', file=sys.stderr)


def open_records(run, done, args):
    """Prepares the files of --save_path: bad_audio.txt, options.txt and the checkpoints to keep."""
    # Before the first batch, because loading processes copy the dataset when they start.
    run.dataset.bad_audio = dataLoader.BadAudio(
        f'{args.save_path}/bad_audio.txt', args.max_bad, run.dataset.count_folders()
    )
    if process_rank() == 0:
        # After resuming, because a run with refused options must not remove anything.
        prune(args.model_save_path, args.keep, done.epoch)
        run.dataset.bad_audio.sort(len(run.dataset))
        write_options(args)


def sort_bad_audio(dataset):
    """Sorts bad_audio.txt after an epoch; returns how many utterances were replaced."""
    replaced = 0
    with first_process_first():
        if process_rank() == 0:
            replaced = dataset.bad_audio.sort(len(dataset))
    return replaced


# The log.


class Log:
    """A stream whose text is dropped if it cannot be written (a closed pipe, a full disk)."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        """Writes text if possible."""
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self):
        """Flushes what was written if possible."""
        with contextlib.suppress(OSError):
            self.stream.flush()


@contextlib.contextmanager
def lossy_log():
    """Drops text that cannot be printed in the block; a log must not end a training run."""
    tools.prepare_streams()
    out = Log(sys.stdout)
    err = Log(sys.stderr)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    finally:
        tools.drop_unwritten()


def epoch_line(done, starts, max_epoch, share_idle, replaced):
    """Returns the log line of an epoch: figures, minutes and, after two epochs, the expected end.

    starts: when each epoch of this process began; share_idle: share of this epoch's
    training time in which the device waited for data; replaced: number of replaced utterances.
    """
    line = f'{now()} epoch {done.epoch}, LR {done.lr:f}, LOSS {done.loss:f}, '
    line += f'ACC {done.accuracy:2.2f}%, {(time.time() - starts[-1]) / 60:.1f} min, '
    line += f'{100 * share_idle:.0f}% waiting for data'
    if len(starts) > 1 and done.epoch < max_epoch:
        # From the times of whole epochs, including tests.
        seconds = (starts[-1] - starts[0]) / (len(starts) - 1)
        end = starts[-1] + seconds * (max_epoch - done.epoch + 1)
        line += f', ends about {time.strftime("%F %H:%M", time.localtime(end))}'
    if replaced:
        line += f', {replaced} utterances replaced (bad_audio.txt)'
    return line


def now():
    """Returns date and time for the log."""
    return time.strftime('%F %T')


def save_bad_batch(error, loader, args):
    """Writes the batch whose loss diverged to SAVE_PATH/bad_batch.pt; returns a BadInput."""
    rank = f'_{process_rank()}' if process_rank() else ''
    path = os.path.join(args.save_path, f'bad_batch{rank}.pt')
    indices = next(itertools.islice(loader.batch_sampler, error.step - 1, None))
    files = [loader.dataset.path(index) for _, index in indices]
    audio, labels = error.batch
    batch = {
        'audio': audio,
        'labels': labels,
        'epoch': error.epoch,
        'step': error.step,
        'files': files,
    }
    tools.write_whole(path, lambda file: torch.save(batch, file))

    lines = [
        f'{error}. Earlier checkpoints are unchanged. The batch is in {path}; its files:',
        *files[:20],
    ]
    if len(files) > 20:
        lines.append(f'and {len(files) - 20} more')
    lines.append(
        'Check these files and run the same command again; or reduce --lr and add --force, '
        'because the options of the run then change.'
    )
    return BadInput('\n'.join(lines))


def resume_hint(args):
    """Returns text that says after which epoch the same command continues, for end_on_signals.

    args: None before the options are read. Returns '' unless this is a training run.
    """
    if args is None or args.eval or args.check:
        return ''
    epochs = saved_models(os.path.join(args.save_path, 'model')).values()
    if not epochs:
        return ': no epoch was saved yet, so the same command begins again'
    return f': the same command continues after epoch {max(epochs)}, the last saved'


# Processes.


def join_processes(args):
    """Joins the processes that torchrun started, each on its own GPU if there are GPUs.

    Raises BadInput for a --device or a number of processes that does not fit the GPUs, and if
    a program other than torchrun started several processes: each would train by itself.
    """
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        refuse_other_launchers()
        return
    tools.common_store, rank, size = torchrun_store()
    on_gpu = args.device != 'cpu' and torch.cuda.is_available()
    refuse_gpus(args, on_gpu)

    backend = 'gloo'
    gpu = None
    if on_gpu:
        backend = 'nccl'
        gpu = torch.device('cuda', int(os.environ['LOCAL_RANK']))
        torch.cuda.set_device(gpu)
    dist.init_process_group(
        backend,
        store=tools.common_store,
        rank=rank,
        world_size=size,
        # After this time a process counts as hung. first_process_first waits for longer work.
        timeout=datetime.timedelta(seconds=tools.TIMEOUT),
        device_id=gpu,
    )


def torchrun_store():
    """Returns (store of keys that all processes of torchrun see, rank, number of processes)."""
    timeout = datetime.timedelta(seconds=tools.TIMEOUT)
    store, rank, size = next(dist.rendezvous('env://', timeout=timeout))
    # torchrun keeps its store after a restart. Without a prefix, a process could find the address
    # of one that was killed.
    if os.environ['TORCHELASTIC_USE_AGENT_STORE'] == 'True':
        store = dist.PrefixStore(f'restart {os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)
    return store, rank, size


# Variables that launchers set, and their largest value for a single process.
LAUNCHERS = {
    'RANK': 0,
    'WORLD_SIZE': 1,
    'SLURM_NTASKS': 1,
    'OMPI_COMM_WORLD_SIZE': 1,
    'PMI_SIZE': 1,
}


def refuse_other_launchers():
    """Raises BadInput if a program other than torchrun started several processes."""
    for name, largest in LAUNCHERS.items():
        value = os.environ.get(name, '')
        if value.isdecimal() and int(value) > largest:
            raise BadInput(
                f'{name}={value} in the environment: there are several processes, and each would '
                'train by itself. Start them with torchrun (README.md, "Training"; under srun, one '
                f'torchrun for each machine). If this is the only process: unset {name}'
            )


def refuse_gpus(args, on_gpu):
    """Raises BadInput if torchrun's processes cannot share this machine's devices."""
    if args.device.startswith('cuda:'):
        raise BadInput(
            f'--device {args.device}: under torchrun every process takes its own GPU; leave '
            '--device out'
        )
    count = torch.cuda.device_count()
    if on_gpu and int(os.environ['LOCAL_WORLD_SIZE']) > count:
        raise BadInput(
            f'torchrun: this machine has {count} GPUs, so --nproc_per_node must be at most {count}'
        )


if __name__ == '__main__':
    main()
