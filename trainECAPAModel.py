"""The command: trains ECAPA-TDNN on VoxCeleb2 and scores VoxCeleb1, or scores a checkpoint (--eval)."""

import argparse
import contextlib
import datetime
import functools
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata

import numpy as np
import torch
import torch.distributed as dist
from scipy.special import expit, logit

import dataLoader
import tools
from ECAPAModel import Diverged, ECAPAModel, checkpoint_sizes, load_model, prune, read_checkpoint, saved_models
from tools import BadInput, process_count, process_rank, say


def make_parser():
    """The options; their names and defaults are those of the published code, its author's paths excepted."""
    parser = argparse.ArgumentParser(
        description='Train and score ECAPA-TDNN speaker verification.',
        epilog='@FILE reads options from a recipe; what follows it on the command line takes precedence. '
        'Running the same command again continues an interrupted run.',
        fromfile_prefix_chars='@',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)

    add = parser.add_argument_group('training').add_argument
    add('--num_frames', type=number(int, 1), default=200, help='length of a training crop, in frames of 10 ms')
    add('--max_epoch', type=number(int, 1), default=80, help='last epoch')
    add('--batch_size', type=number(int, 2), default=400, help='utterances in a step')
    add('--n_cpu', type=number(int, 0), default=default_n_cpu(), help='processes that load data, for each GPU')
    add('--test_step', type=number(int, 1), default=1, help='save, test and lower the rate every so many epochs')
    add('--accumulate', type=number(int, 1), default=1, help='parts of a batch, one after another, to save memory')
    add('--freeze_epochs', type=number(int, 0), default=0, help='first epochs that train the classifier alone')
    add('--optimizer', choices=('adam', 'sgd'), default='adam', help='sgd: with Nesterov momentum 0.9')
    add('--weight_decay', type=number(float, 0), default=2e-5, help='L2 penalty on all weights')
    add('--clip', type=number(float, 0), default=0.0, help='largest norm of the gradient (0: no limit)')
    add('--lr', type=number(float, 0), default=0.001, help='learning rate')
    add('--schedule', choices=('step', 'cosine'), default='step', help='cosine: from --lr to --min_lr at --max_epoch')
    add('--lr_decay', type=number(float, 0), default=0.97, help='step: factor on the rate every test_step epochs')
    add('--min_lr', type=number(float, 0), default=0.0, help='cosine: learning rate at the end')
    add('--warmup', type=number(float, 0), default=0.0, help='first epochs, in which the rate grows from 0')
    add('--seed', type=number(int, 0), default=10, help='seed of everything drawn at random')
    add('--device', default='auto', help='auto (cuda if there is one, else cpu), cpu, cuda, cuda:1, ...')
    precisions = ('auto', 'bf16', 'fp32', 'exact')
    add('--precision', choices=precisions, default='auto', help='auto: bf16 if a GPU has it, else fp32; exact: no TF32')
    add('--compile', action='store_true', help='compile the encoder for training: minutes at the start, then faster')

    add = parser.add_argument_group('data').add_argument
    add('--train_list', default='data/VoxCeleb2/train_list.txt', help='lines `speaker path`')
    add('--train_path', default='data/VoxCeleb2/train/wav', help='folder of the paths in --train_list')
    lists, folders = ['data/VoxCeleb1/veri_test2.txt'], ['data/VoxCeleb1/test/wav']
    add('--eval_list', nargs='+', default=lists, help='trial lists, lines `label enrolment test` or the label last')
    add('--eval_path', nargs='+', default=folders, help='folder of the paths in --eval_list: one, or one for each')
    add('--enrol_list', default='', help='lines `model utterance...`: --eval_list enrols these models')
    add('--musan_path', default='data/musan_split', help='MUSAN: noise/, speech/ and music/')
    add('--rir_path', default='data/RIRS_NOISES/simulated_rirs', help='room impulse responses')
    add('--save_path', default='exps/exp1', help='folder of the results: score.txt and model/')
    add('--keep', type=number(int, 0), default=0, help='newest checkpoints to keep (0: all of them)')
    add('--max_bad', type=number(float, 0, 100), default=1.0, help='percent of training files that may be unusable')
    add('--force', action='store_true', help='continue a run although options that change its numbers differ')
    speeds = {'nargs': '?', 'const': True, 'default': False, 'choices': ('drawn',)}
    add('--speed_perturb', **speeds, help='0.9 and 1.1 speed as new speakers; drawn: one speed for each crop')
    add('--augment', type=number(float, 0, 1), default=5 / 6, help='share of the crops that is augmented')
    add('--no_specaug', action='store_true', help='no SpecAugment')
    add('--initial_model', default='', help='checkpoint to start from, or to score with --eval')
    add('--keep_classifier', action='store_true', help="train on the speakers of --initial_model's classifier, or stop")

    add = parser.add_argument_group('model and loss').add_argument
    add('--C', type=number(int, 8), help='channels; without it those of --initial_model, else 1024')
    add('--m', type=number(float, 0, math.pi), default=0.2, help='margin of AAM-softmax, in radians')
    add('--margin_from', type=number(float, 0, math.pi), help='margin at the beginning; without it --m throughout')
    ramp = {'type': number(float, 0), 'nargs': 2, 'default': [0.0, 1.0], 'metavar': ('FROM', 'TO')}
    add('--margin_epochs', **ramp, help='finished epochs between which the margin grows to --m')
    add('--s', type=number(float, 0), default=30, help='scale of AAM-softmax')
    add('--n_class', type=number(int, 1), help='speakers; without it those in --train_list')

    add = parser.add_argument_group('scores (with --eval and --verify)').add_argument
    add('--score_norm', choices=('none', 'asnorm'), default='none', help='asnorm: also scores normalised by a cohort')
    add('--cohort_utterances', type=number(int, 1), default=20, help='of each speaker in --train_list, for the cohort')
    add('--top_n', type=number(int, 2), default=400, help='closest cohort speakers that normalise a score')
    add('--subtract_mean', action='store_true', help="also scores minus the training speakers' mean")
    add('--p_target', type=number(float, 1e-6, 1 - 1e-6), default=0.5, help='--verify: prior of the same speaker')
    add('--c_miss', type=number(float, 1e-6), default=1.0, help='--verify: cost of rejecting the same speaker')
    add('--c_fa', type=number(float, 1e-6), default=1.0, help='--verify: cost of accepting another speaker')

    add = parser.add_argument_group('command (without one of these: train)').add_argument
    add('--check', action='store_true', help='check everything that training needs, every file included, and stop')
    add('--eval', action='store_true', help='score --initial_model on --eval_list; needs no training data')
    add('--embed', metavar='FILES', help='write embeddings.npz of all files of a folder, or of a list of paths')
    add('--verify', nargs=2, metavar=('A.wav', 'B.wav'), help='score two recordings')
    return parser


def number(kind, low, high=math.inf):
    """argparse type: an int or float (kind) in [low, high]."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'{text} is not between {low} and {high}')
        return value

    convert.__name__ = kind.__name__
    return convert


def default_n_cpu():
    """Loading processes for each training process: its share of the processors, 16 at most."""
    return max(1, min(16, tools.available_cpus() // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))


def main(argv=None):
    """Runs the command; exit status 2, with a sentence on standard error, for input that cannot be used."""
    command = ['python', *(sys.argv if argv is None else [os.path.basename(__file__), *argv])]
    args = make_parser().parse_args(argv, argparse.Namespace(command=shlex.join(command)))
    with sentences_for_people(args):
        uses = {'eval': evaluate, 'embed': embed, 'verify': verify}
        use = next((name for name in uses if getattr(args, name)), None)
        if use and not args.initial_model:
            raise BadInput(f'--{use} needs --initial_model, a checkpoint')
        join_processes(args)
        if use in (None, 'eval'):
            found = provenance(args.command)
            versions = ', '.join(map(' '.join, found['versions'].items()))
            say(f'command       {found["command"]}\ncommit        {found["commit"]}\nversions      {versions}')
        uses.get(use, train)(args)
        if dist.is_initialized():
            dist.destroy_process_group()


def train(args):
    """Trains from where --save_path stands to --max_epoch, saving and testing every test_step epochs."""
    with first_process_first():
        dataset = dataLoader.train_loader(**vars(args))
        dataset.bad_audio = os.path.join(args.save_path, 'bad_audio.txt')
        eval_files, trial_lists = dataLoader.read_trial_lists(args.eval_list, args.eval_path, args.enrol_list)
        system, initial_weights = build(args, dataset.n_class)
        loader = dataLoader.make_batches(dataset, args.batch_size, args.n_cpu, pin_memory=system.on_gpu)
        if process_rank() == 0:
            dataLoader.check_data(dataset, eval_files, args.eval_path, args.check, args.n_cpu, args.max_bad)
    plan(system, loader, eval_files, trial_lists, args)
    if args.check:
        say('all is well: nothing was found that would stop this run')
        return

    tools.init_args(args)
    lock = tools.lock_folder(args.save_path) if process_rank() == 0 else None
    identity = what_changes_numbers(system, dataset, trial_lists, args)
    done, scores = start(system, initial_weights, identity, args)
    if process_rank() == 0:
        # Not before: a run whose options are refused must not remove anything.
        prune(args.model_save_path, args.keep, done['epoch'])
        dataset.sort_bad_audio()
        write_options(args)
    if 'loss' in done and done['epoch'] not in [score[0] for score in scores]:
        # The run ended between saving this epoch and testing it.
        test(system, eval_files, trial_lists, scores, args, **done)
    for epoch in range(done['epoch'] + 1, args.max_epoch + 1):
        # Seeding each epoch by its number makes a resumed epoch draw what an uninterrupted run would have.
        torch.manual_seed(int(np.random.SeedSequence([args.seed, epoch, process_rank()]).generate_state(1)[0]))
        loader.batch_sampler.epoch = epoch
        try:
            loss, lr, accuracy = system.train_network(epoch, loader)
        except Diverged as error:
            raise explain(error, loader, args) from error
        with first_process_first():
            replaced = dataset.sort_bad_audio() if process_rank() == 0 else 0
        bad = f', {replaced} utterances replaced ({dataset.bad_audio})' if replaced else ''
        say(f'{time.strftime("%F %T")} epoch {epoch}, LR {lr:f}, LOSS {loss:f}, ACC {accuracy:2.2f}%{bad}')
        if epoch % args.test_step == 0:
            figures = {'loss': loss, 'lr': lr, 'accuracy': accuracy}
            if process_rank() == 0:
                system.save_training(args.model_save_path, epoch, args.keep, **figures, identity=identity)
            test(system, eval_files, trial_lists, scores, args, epoch, **figures)
    if lock:
        lock.close()
    say(f'{args.max_epoch} epochs are done; results: {args.score_save_path} and {args.model_save_path}')


def test(system, eval_files, trial_lists, scores, args, epoch, loss, lr, accuracy):
    """Scores --eval_list after an epoch, prints the figures, and adds a line to `scores` and score.txt."""
    results = system.score_lists(eval_files, trial_lists)
    eer = results[0]['raw'][1]['EER']['value']
    best = min([eer, *(score[4] for score in scores)])
    scores.append((epoch, lr, loss, accuracy, eer, best))
    if process_rank() == 0:
        tools.write_text(args.score_save_path, ''.join(tools.SCORE_LINE % score for score in scores))
    say(f'{time.strftime("%F %T")} epoch {epoch}, EER {eer:2.2f}%, best EER {best:2.2f}%')
    say(tools.figures_table(results, trial_lists))


def evaluate(args):
    """Scores --initial_model on --eval_list, prints the figures and writes them and all scores below --save_path."""
    read_results(args.save_path)
    system = load_model(args.initial_model, **vars(args))
    with first_process_first():
        eval_files, trial_lists = dataLoader.read_trial_lists(args.eval_list, args.eval_path, args.enrol_list)
        if process_rank() == 0:
            dataLoader.check_audio(eval_files, '--eval_list')
        normalisation = dataLoader.choose_normalisation(**vars(args))
    os.makedirs(os.path.join(args.save_path, 'scores'), exist_ok=True)
    results = system.score_lists(eval_files, trial_lists, *normalisation)
    say(f'{args.initial_model}\n{tools.figures_table(results, trial_lists)}')
    if process_rank() == 0:
        write_results(results, trial_lists, system.checkpoint, args)


# Machinery of training: the plan, the results folder, where a run stands, what ends it.


def build(args, speakers):
    """(ECAPAModel of the options for a training list of `speakers` speakers, weights of --initial_model or None).

    The channels are --C, else those of --initial_model, else 1024; --keep_classifier keeps all speakers of the latter.
    """
    C, n_class, weights = args.C, args.n_class or speakers, None
    if n_class < speakers:
        raise BadInput(f'--n_class {n_class} is too small: {args.train_list} has {speakers} speakers; leave it out')
    if args.keep_classifier and not args.initial_model:
        raise BadInput('--keep_classifier needs --initial_model, the checkpoint whose classifier goes on')
    if args.batch_size < 2 * args.accumulate * process_count():
        raise BadInput(f'--accumulate {args.accumulate}: every part of a batch must have 2 utterances, for batch norm')
    if args.warmup >= args.max_epoch or args.min_lr > args.lr or args.margin_epochs[0] > args.margin_epochs[1]:
        raise BadInput('--warmup must be below --max_epoch, --min_lr at most --lr, --margin_epochs in their order')
    if args.initial_model:
        weights, _ = read_checkpoint(args.initial_model)
        found, trained = checkpoint_sizes(weights)
        if C not in (None, found):
            raise BadInput(f'--C {C} contradicts {args.initial_model}, which has {found} channels; leave --C out')
        C = found
        # After --speed_perturb the first third are the speakers at their own speed, in the same order.
        if args.keep_classifier and trained not in (speakers, 3 * speakers):
            counts = f'{args.initial_model} was trained on {trained} speakers, {args.train_list} has {speakers}'
            raise BadInput(f'--keep_classifier: {counts}; they must be as many, or a third after --speed_perturb')
        n_class = trained if args.keep_classifier else n_class
    C = C or 1024
    if C % 8:
        raise BadInput(f'--C {C}: the channels are cut into 8 groups, so it must be a multiple of 8')
    torch.manual_seed(args.seed)
    return ECAPAModel(**{**vars(args), 'C': C, 'n_class': n_class}), weights


def plan(system, loader, eval_files, trial_lists, args):
    """Prints what the run will do; BadInput where there is no room for its results."""
    dataset, encoder = loader.dataset, sum(parameter.numel() for parameter in system.speaker_encoder.parameters())
    speakers, classifier = len(system.speaker_loss.weight), system.speaker_loss.weight.numel()
    clips = ', '.join(f'{len(files.paths)} {category}' for category, files in dataset.noises.items())
    processes = f'{process_count()} processes on ' if process_count() > 1 else ''
    trials = sum(len(trials.labels) for trials in trial_lists)
    say(
        f'device        {processes}{system.device}, {system.precision}, {args.n_cpu} loading processes\n'
        f'training      {len(dataset.speakers):,} speakers, {len(dataset):,} utterances ({args.train_list})\n'
        f'augmentation  {clips} files, {len(dataset.rirs):,} RIRs\n'
        f'evaluation    {trials:,} trials over {len(eval_files):,} files ({", ".join(args.eval_list)})\n'
        f'an epoch      {len(loader):,} steps of {args.batch_size} utterances\n'
        f'parameters    {encoder:,} in the encoder, {classifier:,} in the classifier of {speakers:,} speakers'
    )
    if args.max_epoch % args.test_step:
        say('note          the last epochs are neither tested nor saved: --max_epoch is no multiple of --test_step')
    with first_process_first():
        check_room(args, 4 * (encoder + classifier))


def check_room(args, size):
    """BadInput where --save_path cannot be written or has no room for a checkpoint of `size` bytes."""
    folder = os.path.abspath(args.save_path)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput(f'--save_path {args.save_path}: {folder} cannot be written')
    free = shutil.disk_usage(folder).free
    models = args.keep or max(0, args.max_epoch // args.test_step - len(saved_models(f'{args.save_path}/model')))
    # The .state files are twice as large; two are kept, and a third is there while it is written.
    needed = [size * (count + 6) for count in (2, models)]
    room = f'{free / 1e9:.2f} GB are free in --save_path {args.save_path}'
    if free < needed[0]:
        raise BadInput(f'{room}, and a checkpoint and its state need {needed[0] / 1e9:.2f} GB')
    if free < needed[1]:
        say(f'WARNING       {room}, and the run needs {needed[1] / 1e9:.2f} GB: --keep limits the checkpoints')


def what_changes_numbers(system, dataset, trial_lists, args):
    """{option: value} of what changes a run's numbers; lists count by their content, MUSAN and RIRs by their counts."""
    names = ['num_frames', 'batch_size', 'test_step', 'accumulate', 'freeze_epochs', 'speed_perturb', 'lr', 'lr_decay']
    names += ['m', 's', 'seed', 'initial_model', 'optimizer', 'weight_decay', 'clip', 'schedule', 'min_lr', 'warmup']
    names += ['augment', 'no_specaug', 'margin_from', 'margin_epochs', *['max_epoch'] * (args.schedule == 'cosine')]
    noises = ' '.join(f'{len(files.paths)}/{files.pieces[-1]}' for files in dataset.noises.values())
    return {
        **{name: getattr(args, name) for name in names},
        'C': system.speaker_encoder.conv1.out_channels,
        'n_class': len(system.speaker_loss.weight),
        'precision': system.precision,
        'train_list': f'SHA-256 {dataset.list_digest[:16]}',
        'eval_list': ' '.join(f'SHA-256 {trials.digest[:16]}' for trials in trial_lists),
        'musan_path': f'files/pieces {noises}',
        'rir_path': f'{len(dataset.rirs)} files',
    }


def start(system, initial_weights, identity, args):
    """Resumes the run in --save_path, or starts one: (the epoch done last with its figures, the scores up to it)."""
    done = system.resume(args.model_save_path, identity, args.force)
    if done:
        notes = [f'after epoch {done["epoch"]}, from {args.model_save_path}']
        notes += [f'--force: {change}' for change in done.pop('changed')]
    elif initial_weights:
        unfit = system.load_parameters(args.initial_model, initial_weights)
        notes = [f'from {args.initial_model}', *(f'left out: {name}' for name in unfit)]
    else:
        notes = ['from random weights']
    say('start         ' + '\n  '.join(notes))
    if process_count() > 1:
        # One seed need not give the same numbers on machines with other processors.
        for tensor in system.state_dict().values():
            dist.broadcast(tensor, 0)
    done = done or {'epoch': 0}
    scores = [score for score in tools.read_scores(args.score_save_path) if score[0] <= done['epoch']]
    found = sorted(set(tools.gather([(done['epoch'], 'loss' in done, len(scores))])))
    if len(found) > 1:
        where = f'--save_path {args.save_path}: the processes see different checkpoints'
        raise BadInput(f'{where}, after epochs {[f[0] for f in found]}; it must be one folder that all machines share')
    return done, scores


def write_options(args):
    """Writes SAVE_PATH/options.txt: the options, to be read back with @, and where they were used."""
    path, found = os.path.join(args.save_path, 'options.txt'), provenance(args.command)
    lines = [f'# {name} {value}' for name, value in {**found, **found['versions']}.items() if name != 'versions']
    for name, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        if value is True:
            lines.append(f'--{name}')
        elif value is not None and value is not False and name not in ('score_save_path', 'model_save_path', 'command'):
            lines.append(f'--{name} {shlex.join(map(str, values))}')
    tools.write_text(path, '\n'.join(lines) + '\n')


@functools.cache  # so that what is written at the end is what ran
def provenance(command):
    """What the numbers come from: {'command', 'commit', 'versions': of Python and of the packages}."""
    house = os.path.dirname(os.path.abspath(__file__))
    git, commit = 'git --git-dir=.git --work-tree=. describe --always --dirty --abbrev=40 --exclude=*', 'unknown'
    with contextlib.suppress(OSError):
        commit = subprocess.run(git.split(), cwd=house, capture_output=True, text=True).stdout.strip() or commit
    packages = ('torch', 'torchaudio', 'numpy', 'scipy', 'scikit-learn', 'soundfile')
    versions = {'python': platform.python_version(), **{name: metadata.version(name) for name in packages}}
    return {'command': command, 'commit': commit, 'versions': versions}


def explain(error, loader, args):
    """BadInput for a loss that diverged (Diverged); leaves the batch in SAVE_PATH/bad_batch.pt."""
    rank = f'_{process_rank()}' if process_rank() else ''
    path = os.path.join(args.save_path, f'bad_batch{rank}.pt')
    indices = next(itertools.islice(loader.batch_sampler, error.step - 1, None))
    files = [loader.dataset.path(index) for _, index in indices]
    batch = dict(zip(('audio', 'labels'), error.batch), epoch=error.epoch, step=error.step, files=files)
    tools.write_whole(path, lambda file: torch.save(batch, file))
    shown = '\n'.join(files[:20] + [f'and {len(files) - 20} more'] * (len(files) > 20))
    remedy = 'Look at these, or lower --lr, and run the same command again.'
    return BadInput(
        f'{error}. What was saved before is untouched. The batch is in {path}; its files:\n{shown}\n{remedy}'
    )


# Machinery of evaluation, and the other uses of a model.


def read_results(folder):
    """What a folder's results.json holds, {'lists': {}} where there is none; BadInput where it is something else."""
    path = os.path.join(folder, 'results.json')
    if not os.path.exists(path):
        return {'lists': {}}
    try:
        with open(path, encoding='utf-8') as file:
            record = json.load(file)
        for entry in record['lists'].values():
            entry.setdefault('checkpoint', record['checkpoint'])
            if not isinstance(entry['scores'] + entry['checkpoint']['sha256'], str):
                raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f'{path}: not what --eval writes; move it away') from error
    return record


def write_results(results, trial_lists, checkpoint, args):
    """Writes SAVE_PATH/results.json, where other lists stay, and for each list scores/LIST.txt (`label scores...
    enrolment test`). Of two lists of one name, the second's file gets a number.
    """
    lists = read_results(args.save_path)['lists']
    for trials, kinds in zip(trial_lists, results):
        taken = {path: os.path.basename(entry['scores']) for path, entry in lists.items()}
        stem = os.path.splitext(os.path.basename(trials.path))[0]
        names = [f'{stem}.txt', *(f'{stem}_{number}.txt' for number in range(2, len(lists) + 3))]
        name = taken.get(trials.path) or next(name for name in names if name not in taken.values())
        path = os.path.join(args.save_path, 'scores', name)
        columns = zip(*[[f'{score:.6f}' for score in scores] for scores, _ in kinds.values()])
        rows = (
            ' '.join([str(label), *column, trials.names[a], trials.names[b]]) + '\n'
            for label, column, (a, b) in zip(trials.labels, columns, trials.pairs.tolist())
        )
        tools.write_text(path, ''.join(rows))
        lists[trials.path] = {
            **{'trials': len(trials.labels), 'targets': int(trials.labels.sum())},
            **{kind: figures for kind, (_, figures) in kinds.items()},
            **{'sha256': trials.digest, 'scores': path, 'checkpoint': checkpoint, **provenance(args.command)},
        }
    about = {'seed': args.seed, 'options': vars(args), **provenance(args.command)}
    record = {'checkpoint': checkpoint, 'lists': lists, **about}
    tools.write_text(os.path.join(args.save_path, 'results.json'), json.dumps(record, indent=2) + '\n')


def embed(args):
    """Writes SAVE_PATH/embeddings.npz: names (N,) and unit embeddings (N, 192) of the files of --embed."""
    system = load_model(args.initial_model, **vars(args))
    if os.path.isdir(args.embed):
        paths = dataLoader.find_audio(args.embed, '--embed', any_format=True)
    else:
        lines = dataLoader.read_list(args.embed, '--embed').splitlines()
        paths = [os.fsdecode(line.strip()) for line in lines if line.strip()]
    if not paths:
        raise BadInput(f'--embed: {args.embed}: names no file')
    path = os.path.join(args.save_path, 'embeddings.npz')
    os.makedirs(args.save_path, exist_ok=True)
    embeddings = system.embed(paths)
    if process_rank() == 0:
        tools.write_whole(path, lambda file: np.savez(file, names=np.array(paths), embeddings=embeddings))
    say(f'{path}: {len(paths):,} embeddings of 192 numbers')


def verify(args):
    """Prints the score of two recordings, and the decision by a calibration or else the threshold at the EER."""
    system = load_model(args.initial_model, **vars(args))
    cohort_files, *normalisation = dataLoader.choose_normalisation(**vars(args))
    calibration = system.calibration(cohort_files, *normalisation)
    embedded, pairs = system.embed_with_quality(args.verify, any_format=True), np.array([[0, 1]])
    cohort = cohort_files and system.cohort(cohort_files)
    scores, measures = system.score_pairs(*embedded, pairs, cohort, *normalisation)
    decision = {True: 'the same speaker', False: 'different speakers'}
    for kind, (score,) in scores.items():
        say(f'{kind} score {score:.4f}'.removeprefix('raw '))
    if calibration:
        ratio = tools.log_likelihood_ratios(calibration, scores, measures, pairs)[0]
        bayes, at_rate = math.log(args.c_fa / args.c_miss) - logit(args.p_target), calibration['threshold']
        where, after = calibration['list'], expit(ratio + logit(args.p_target))
        say(f'log-likelihood ratio {ratio:.2f} (natural), fitted on {where["trials"]:,} trials of {where["path"]}')
        say(f'probability of the same speaker {after:.4f}, {args.p_target} before')
        say(f'{decision[ratio > bayes]}, as a miss costs {args.c_miss:g} and a false acceptance {args.c_fa:g}')
        say(f'{decision[ratio > at_rate["ratio"]]}, if {at_rate["false_acceptances"]:g}% false acceptances are allowed')
        return
    score = scores['raw'][0]
    for folder in (args.save_path, os.path.dirname(os.path.dirname(os.path.abspath(args.initial_model)))):
        try:
            lists = read_results(folder)['lists']
        except BadInput as error:
            say(f'note: {error}')
            continue
        known = [path for path in lists if lists[path]['checkpoint']['sha256'] == system.checkpoint['sha256']]
        for path in known:
            at = lists[path]['raw']['EER']['threshold']
            say(f'{decision[score > at]}, at the EER threshold of {path}, {at:.4f}; other recordings have another one')
        if known:
            return
    say('no threshold is known: --eval on trials of recordings like these finds one')


# Machinery of processes: joining them, taking turns, and how they end.


def join_processes(args):
    """Joins the processes that torchrun started, each on a GPU of its own where there are GPUs; else BadInput."""
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        return
    number, on_gpu, refusal = int(os.environ['LOCAL_RANK']), args.device != 'cpu' and torch.cuda.is_available(), ''
    if args.device.startswith('cuda:'):
        refusal = f'--device {args.device}: under torchrun every process takes a GPU of its own; leave --device out'
    elif on_gpu and int(os.environ['LOCAL_WORLD_SIZE']) > torch.cuda.device_count():
        count = torch.cuda.device_count()
        refusal = f'torchrun: this machine has {count} GPUs, so --nproc_per_node must be at most {count}'
    if refusal:
        raise SystemExit(2) if number else BadInput(refusal)
    backend, gpu = ('nccl', torch.device('cuda', number)) if on_gpu else ('gloo', None)
    if on_gpu:
        torch.cuda.set_device(gpu)
    # The others wait while the first goes through the files, which takes an hour for all of VoxCeleb2.
    patience = datetime.timedelta(hours=3)
    store, rank, size = next(dist.rendezvous('env://', timeout=patience))
    # torchrun's own store stays after a restart: without a prefix, a process may find the address of a killed one.
    if os.environ['TORCHELASTIC_USE_AGENT_STORE'] == 'True':
        store = dist.PrefixStore(f'restart {os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience, device_id=gpu)


@contextlib.contextmanager
def first_process_first():
    """The first process runs the block before the others do, so that what is wrong is said once."""
    if process_rank():
        dist.barrier()
    yield
    if process_count() > 1 and process_rank() == 0:
        dist.barrier()


@contextlib.contextmanager
def sentences_for_people(args):
    """Turns what may end a run, other than a mistake in this code, into a sentence and an exit status: 2 for bad input,
    a full disk or memory; 130 for Ctrl-C and 143 for SIGTERM, as shells have it.
    """

    def stop(number, frame):
        raise KeyboardInterrupt(signal.SIGTERM)

    # torchrun stops its processes itself, and a process that waits for another one could not answer.
    before = signal.getsignal(signal.SIGTERM)
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        signal.signal(signal.SIGTERM, stop)
    try:
        with tools.exit_on_bad_input():
            yield
    except KeyboardInterrupt as interrupt:
        terminated = interrupt.args == (signal.SIGTERM,)
        saved = next(iter(saved_models(os.path.join(args.save_path, 'model')).values()), 0)
        training = not (args.eval or args.embed or args.verify or args.check)
        how = f': the same command continues after epoch {saved}, the last saved' if training else ''
        print(f'\nstopped by {"SIGTERM" if terminated else "Ctrl-C"}{how}', file=sys.stderr)
        sys.exit(143 if terminated else 130)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == '__main__':
    main()
