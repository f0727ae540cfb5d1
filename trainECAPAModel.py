"""The command: trains ECAPA-TDNN on VoxCeleb2 and scores VoxCeleb1; --eval scores a checkpoint."""

import argparse
import datetime
import itertools
import math
import os
import shlex
import shutil
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

import dataLoader
import tools
from ECAPAModel import (
    Diverged,
    Done,
    ECAPAModel,
    describe,
    load_cohort,
    load_model_of,
    load_weights,
    own_options,
    prune,
    read_checkpoint,
    resume,
    save_training,
    saved_models,
)
from loss import LOSSES
from model import ENCODERS
from tools import BadInput, first_process_first, number, process_count, process_rank, say


def make_parser():
    """The options; names and defaults are those of the published code, but for its paths."""
    parser = Parser(
        description='Train and score ECAPA-TDNN speaker verification.',
        epilog='@FILE reads options from a recipe; what follows it on the command line takes '
        'precedence. Running the same command again continues an interrupted run.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    # fmt: off
    group = parser.add_argument_group('command (without one of these: train)')
    add = group.add_mutually_exclusive_group().add_argument
    add('--check', action='store_true', help='look at every file that training needs, and stop')
    add('--eval', action='store_true', help='score --initial_model on --eval_list')

    add = parser.add_argument_group('training').add_argument
    add('--max_epoch', type=number(int, 1), default=80, help='last epoch')
    add('--batch_size', type=number(int, 2), default=400, help='utterances in a step')
    add('--test_step', type=number(int, 1), default=1,
        help='save, test and lower the rate every so many epochs')
    add('--optimizer', choices=('adam', 'sgd'), default='adam', help='sgd: Nesterov, momentum 0.9')
    add('--weight_decay', type=number(float, 0), default=2e-5, help='L2 penalty on all weights')
    add('--clip', type=number(float, 0), default=0.0, help='largest norm of the gradient (0: none)')
    add('--accumulate', type=number(int, 1), default=1,
        help='parts of a batch, one after another, to save memory')
    add('--freeze_epochs', type=number(int, 0), default=0,
        help='first epochs, which train the classifier alone')
    add('--compile', action='store_true',
        help='compile the encoder for training: minutes at the start, then faster')

    add = parser.add_argument_group('learning rate').add_argument
    add('--lr', type=number(float, 0), default=0.001, help='learning rate')
    add('--schedule', choices=('step', 'cosine'), default='step',
        help='cosine: from --lr to --min_lr at --max_epoch')
    add('--lr_decay', type=number(float, 0), default=0.97,
        help='step: factor on the rate every test_step epochs')
    add('--min_lr', type=number(float, 0), default=0.0, help='cosine: learning rate at the end')
    add('--warmup', type=number(float, 0), default=0.0,
        help='first epochs, in which the rate grows from 0')

    add = parser.add_argument_group('crops and augmentation').add_argument
    add('--num_frames', type=number(int, 1), default=200,
        help='length of a crop, in frames of 10 ms')
    add('--musan_path', default='data/musan_split', help='MUSAN: noise/, speech/ and music/')
    add('--rir_path', default='data/RIRS_NOISES/simulated_rirs', help='room impulse responses')
    add('--augment', type=number(float, 0, 1), default=5 / 6,
        help='share of the crops that is augmented (default: %(default).3g)')
    add('--codec', type=number(float, 0, 1), default=0.0,
        help='share of the crops that goes through a codec of telephones or the internet')
    add('--speed_perturb', action='store_true',
        help='a speed of 0.9, 1 or 1.1 for each crop, the changed ones as other speakers')
    add('--no_specaug', action='store_true', help='no SpecAugment')
    add('--max_bad', type=number(float, 0, 100), default=1.0,
        help='percent of the training files that may be unusable')

    add = parser.add_argument_group('model and loss').add_argument
    add('--encoder', choices=ENCODERS, default='ecapa', help='network in model.py')
    add('--loss', choices=LOSSES, default='aam', help='classifier and loss in loss.py')
    add('--C', type=number(int, 1), help='channels; without it those of --initial_model, else 1024')
    add('--m', '--margin', type=number(float, 0, math.pi), default=0.2,
        help='margin of AAM-softmax, in radians')
    add('--margin_from', type=number(float, 0, math.pi),
        help='margin at the beginning; without it --m throughout')
    add('--margin_epochs', type=number(float, 0), nargs=2, default=[0.0, 1.0],
        metavar=('FROM', 'TO'), help='finished epochs between which the margin grows to --m')
    add('--s', '--scale', type=number(float, 0), default=30, help='scale of AAM-softmax')
    add('--n_class', type=number(int, 1), help='speakers; without it those in --train_list')
    add('--keep_classifier', action='store_true',
        help="train on the speakers of --initial_model's classifier, or stop")

    add = parser.add_argument_group('results').add_argument
    add('--save_path', default='exps/exp1', help='folder of the results: score.txt and model/')
    add('--keep', type=number(int, 0), default=0, help='newest checkpoints to keep (0: all)')
    add('--force', action='store_true',
        help='continue a run although options that change its numbers differ')
    # fmt: on

    tools.add_scoring_options(parser)
    return parser


def main(argv=None):
    """Runs the command; exit status 2, with a sentence, for input that cannot be used."""
    args = make_parser().parse_args(argv)
    args.command = tools.command_of('trainECAPAModel.py', argv)
    with tools.exit_on_bad_input(after_interrupt=lambda: where_it_goes_on(args)):
        join_processes(args)
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


def train(args):
    """Trains from where --save_path stands to --max_epoch, testing every test_step epochs."""
    with first_process_first():
        dataset = dataLoader.train_loader(**vars(args))
        trials = dataLoader.read_trial_lists(
            args.eval_list, args.eval_path, args.enrol_list, args.speaker
        )
        system, initial_weights = build_system(args, dataset.n_class)
        loader = dataLoader.make_batches(
            dataset, args.batch_size, args.n_cpu, pin_memory=system.on_gpu
        )
        if process_rank() == 0:
            dataLoader.check_data(
                dataset, trials[0], args.eval_path, args.check, args.n_cpu, args.max_bad
            )
    print_plan(system, loader, trials, args)

    lock = None
    if not args.check:
        tools.init_args(args)
        lock = tools.lock_folder(args.save_path) if process_rank() == 0 else None
    identity = run_identity(system, dataset, trials, args)
    done, scores = resume_or_begin(system, initial_weights, identity, args)
    if args.check:
        say('all is well: nothing was found that would stop this run')
        return

    dataset.bad_audio = dataLoader.BadAudio(f'{args.save_path}/bad_audio.txt', args.max_bad)
    if process_rank() == 0:
        # Not before: a run whose options are refused must not remove anything.
        prune(args.model_save_path, args.keep, done.epoch)
        dataset.bad_audio.sort(len(dataset))
        tools.write_options(args)
    if done.loss is not None and done.epoch not in [score[0] for score in scores]:
        # The run ended between saving this epoch and testing it.
        score_epoch(system, trials, scores, args, done)

    starts = []
    for epoch in range(done.epoch + 1, args.max_epoch + 1):
        starts.append(time.time())
        done = train_epoch(system, loader, epoch, args)
        with first_process_first():
            replaced = dataset.bad_audio.sort(len(dataset)) if process_rank() == 0 else 0
        say(epoch_line(done, starts, args.max_epoch, replaced))
        if epoch % args.test_step == 0:
            if process_rank() == 0:
                save_training(system, args.model_save_path, done, identity, args.keep)
            score_epoch(system, trials, scores, args, done)
    if lock:
        lock.close()
    say(
        f'{args.max_epoch} epochs are done; results: {args.score_save_path} and '
        f'{args.model_save_path}'
    )


def train_epoch(system, loader, epoch, args):
    """Trains an epoch; returns Done. Raises BadInput that names the batch if the loss diverges."""
    # Seeding each epoch by its number makes a resumed epoch draw what an uninterrupted run would
    # have drawn.
    seed = np.random.SeedSequence([args.seed, epoch, process_rank()]).generate_state(1)[0]
    torch.manual_seed(int(seed))
    loader.batch_sampler.epoch = epoch
    try:
        loss, lr, accuracy = system.train_network(epoch, loader)
    except Diverged as error:
        raise save_bad_batch(error, loader, args) from error
    return Done(epoch, loss, lr, accuracy)


def score_epoch(system, trials, scores, args, done):
    """Scores --eval_list after an epoch, and prints the figures.

    Puts a line into `scores` and into score.txt; the lines of later epochs, which a run has that
    lost its newest checkpoints, stay until their epochs are scored again.
    """
    paths, trial_lists = trials
    results = system.score_lists(paths, trial_lists)
    eer = results[0]['raw'].figures['EER']['value']
    earlier = [score for score in scores if score[0] < done.epoch]
    later = [score for score in scores if score[0] > done.epoch]
    best = min([eer, *(score[4] for score in earlier)])
    new = (done.epoch, done.lr, done.loss, done.accuracy, eer, best)
    scores[:] = [*earlier, new, *later]
    if process_rank() == 0:
        lines = [tools.SCORE_LINE % score for score in scores]
        tools.write_text(args.score_save_path, ''.join(lines))
    say(f'{now()} epoch {done.epoch}, EER {eer:2.2f}%, best EER {best:2.2f}%')
    say(tools.figures_table(results, trial_lists))


def evaluate(args):
    """Scores --initial_model on --eval_list; prints the figures, and writes them and all scores."""
    tools.read_results(args.save_path)
    tools.read_calibration(args.save_path)
    system, checkpoint = load_model_of(args)
    with first_process_first():
        paths, trial_lists = dataLoader.read_trial_lists(
            args.eval_list, args.eval_path, args.enrol_list, args.speaker
        )
        if process_rank() == 0:
            dataLoader.check_audio(paths, '--eval_list')
        cohort_files, top_n, subtract_mean = dataLoader.choose_normalisation(args)
    os.makedirs(os.path.join(args.save_path, 'scores'), exist_ok=True)
    cohort = load_cohort(system, checkpoint, cohort_files)
    results = system.score_lists(paths, trial_lists, cohort, top_n, subtract_mean)
    if process_rank() == 0:
        tools.add_intervals(results, trial_lists)
        tools.write_results(results, trial_lists, checkpoint, args)
        tools.add_calibrated(results, trial_lists, checkpoint, args)
    say(args.initial_model)
    say(tools.figures_table(results, trial_lists))


# Machinery: recipes; options and sizes; the plan; resuming; the log; what ends a run; processes.


class Parser(argparse.ArgumentParser):
    """ArgumentParser that reads @FILE as a shell would: arguments, quotes, comments."""

    def parse_known_args(self, args=None, namespace=None):
        """As ArgumentParser has it, with the options of the recipes in place of their names."""
        arguments = sys.argv[1:] if args is None else args
        return super().parse_known_args(self.expand(arguments), namespace)

    def expand(self, arguments, within=()):
        """The arguments, recipes expanded; within: the recipes that are being read."""
        expanded = []
        for argument in arguments:
            if argument.startswith('@'):
                expanded += self.read_recipe(argument[1:], within)
            elif len(f'{argument}.'.splitlines()) > 1:
                self.error(f'{argument!r}: a line break, which options.txt could not hold')
            else:
                expanded.append(argument)
        return expanded

    def read_recipe(self, path, within):
        """The arguments in a recipe, and in those that it names."""
        real_path = os.path.realpath(path)
        if real_path in within:
            self.error(f'{path}: this recipe includes itself')
        try:
            # Editors on Windows begin a file with a mark; names of files need not be UTF-8.
            with open(path, encoding='utf-8-sig', errors='surrogateescape') as file:
                lines = file.read().splitlines()
        except OSError as error:
            self.error(f'{path}: {error.strerror}')
        arguments = []
        for line_number, line in enumerate(lines, 1):
            try:
                arguments += shlex.split(line, comments=True)
            except ValueError as error:
                self.error(f'{path}, line {line_number}: {error}: {line!r}')
        return self.expand(arguments, (*within, real_path))


def build_system(args, speakers):
    """The system for a training list of `speakers` speakers.

    Returns (ECAPAModel, weights of --initial_model or None).
    """
    check_options(args, speakers)
    C = args.C
    n_class = args.n_class or speakers
    weights = None
    if args.initial_model:
        dataLoader.require(os.path.isfile, args.initial_model, '--initial_model')
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
            check_classifier(args, n_class, speakers)
    C = C or 1024

    if args.precision == 'exact':
        torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(args.seed)
    system = ECAPAModel(**{**own_options(args), 'C': C, 'n_class': n_class})
    check_description(system, args)
    return system, weights


def check_description(system, args):
    """Raises BadInput if a checkpoint of the system would be taken for one of another kind.

    Found out before the training, not when its first checkpoint is read again.
    """
    found = describe(system.state_dict())
    if (found['encoder'], found['C']) != (args.encoder, system.C):
        raise BadInput(
            f'--encoder {args.encoder}: its checkpoints would be read as {found["encoder"]} with '
            f'{found["C"]} channels; see channels_of in model.py, and give its tensors names of '
            'their own'
        )
    if found['n_class'] not in (0, system.n_class):
        raise BadInput(
            f'--loss {args.loss}: its checkpoints would be read as {found["loss"]} of '
            f'{found["n_class"]} speakers; see classes_of in loss.py'
        )


def check_options(args, speakers):
    """Raises BadInput for options that contradict each other, or a list of `speakers` speakers."""
    if args.n_class and args.n_class < speakers:
        raise BadInput(
            f'--n_class {args.n_class} is too small: {args.train_list} has {speakers} speakers; '
            'leave it out'
        )
    if args.keep_classifier and not args.initial_model:
        raise BadInput(
            '--keep_classifier needs --initial_model, the checkpoint whose classifier goes on'
        )
    if args.batch_size < 2 * args.accumulate * process_count():
        raise BadInput(
            f'--accumulate {args.accumulate}: every part of a batch must have 2 utterances, for '
            'batch norm'
        )
    if args.warmup >= args.max_epoch:
        raise BadInput(f'--warmup {args.warmup:g} must be below --max_epoch {args.max_epoch}')
    if args.min_lr > args.lr:
        raise BadInput(f'--min_lr {args.min_lr:g} must be at most --lr {args.lr:g}')
    begin, end = args.margin_epochs
    if begin > end:
        raise BadInput(f'--margin_epochs {begin:g} {end:g}: the first must be at most the second')


def check_classifier(args, trained, speakers):
    """Raises BadInput unless a classifier of `trained` classes can go on with `speakers`.

    With --speed_perturb the first third are the speakers at their own speed, in the same order.
    """
    if trained not in (speakers, 3 * speakers):
        raise BadInput(
            f'--keep_classifier: {args.initial_model} was trained on {trained} speakers, '
            f'{args.train_list} has {speakers}; they must be as many, or a third after '
            '--speed_perturb'
        )


def print_plan(system, loader, trials, args):
    """Prints what the run will do; raises BadInput where there is no room for its results."""
    dataset = loader.dataset
    encoder = sum(parameter.numel() for parameter in system.speaker_encoder.parameters())
    classifier = sum(parameter.numel() for parameter in system.speaker_loss.parameters())
    clips = ', '.join(f'{len(files.paths)} {kind}' for kind, files in dataset.noises.items())
    codecs = f'; codecs {", ".join(dataset.codecs)}' if dataset.codecs else ''
    processes = f'{process_count()} processes on ' if process_count() > 1 else ''
    paths, trial_lists = trials
    count = sum(len(one.labels) for one in trial_lists)
    say(
        f'device        {processes}{system.device}, {system.precision}, {args.n_cpu} loading '
        'processes\n'
        f'training      {len(dataset.speakers):,} speakers, {len(dataset):,} utterances '
        f'({args.train_list})\n'
        f'augmentation  {clips} files, {len(dataset.rirs):,} RIRs{codecs}\n'
        f'evaluation    {count:,} trials over {len(paths):,} files ({", ".join(args.eval_list)})\n'
        f'an epoch      {len(loader):,} steps of {args.batch_size} utterances\n'
        f'parameters    {encoder:,} in the encoder, {classifier:,} in the classifier of '
        f'{system.n_class:,} speakers'
    )
    if args.max_epoch % args.test_step:
        say(
            'note          the last epochs are neither tested nor saved: --max_epoch is no '
            'multiple of --test_step'
        )
    with first_process_first():
        check_room(args, 4 * (encoder + classifier))


def check_room(args, size):
    """Raises BadInput where --save_path has no room for a checkpoint of `size` bytes."""
    folder = os.path.abspath(args.save_path)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput(f'--save_path {args.save_path}: {folder} cannot be written')

    models = args.keep
    if not models:
        saved = saved_models(f'{args.save_path}/model')
        models = max(0, args.max_epoch // args.test_step - len(saved))
    # A .state is twice as large as a model; two are kept, and a third is there while it is written.
    least = size * (2 + 6)
    wanted = size * (models + 6)
    free = shutil.disk_usage(folder).free
    room = f'{free / 1e9:.2f} GB are free in --save_path {args.save_path}'
    if free < least:
        raise BadInput(f'{room}, and a checkpoint and its state need {least / 1e9:.2f} GB')
    if free < wanted:
        say(
            f'WARNING       {room}, and the run needs {wanted / 1e9:.2f} GB: --keep limits the '
            'checkpoints'
        )


def run_identity(system, dataset, trials, args):
    """{option: value} of what changes a run's numbers.

    Lists count by their content, MUSAN and RIRs by their counts.
    """
    names = [
        'num_frames', 'batch_size', 'test_step', 'accumulate', 'freeze_epochs', 'lr', 'lr_decay',
        'm', 's', 'seed', 'initial_model', 'optimizer', 'weight_decay', 'clip', 'schedule',
        'min_lr', 'warmup', 'augment', 'no_specaug', 'margin_from', 'margin_epochs', 'encoder',
        'loss',
    ]  # fmt: skip
    if args.schedule == 'cosine':
        names.append('max_epoch')
    identity = {name: getattr(args, name) for name in names}
    identity['speed_perturb'] = 'drawn' if args.speed_perturb else False
    identity['C'] = system.C
    identity['n_class'] = system.n_class
    identity['precision'] = system.precision
    identity['train_list'] = f'SHA-256 {dataset.list_sha256[:16]}'
    identity['eval_list'] = ' '.join(f'SHA-256 {one.sha256[:16]}' for one in trials[1])
    counts = [f'{len(files.paths)}/{files.pieces[-1]}' for files in dataset.noises.values()]
    identity['codec'] = 0.0
    if args.codec:
        identity['codec'] = f'{args.codec} of {" ".join(dataset.codecs)}'
    identity['musan_path'] = f'files/pieces {" ".join(counts)}'
    identity['rir_path'] = f'{len(dataset.rirs)} files'
    return identity


def resume_or_begin(system, initial_weights, identity, args):
    """Resumes the run in --save_path, or begins one.

    Returns (Done, the lines of score.txt). Raises BadInput for a score.txt without checkpoints.
    """
    folder = os.path.join(args.save_path, 'model')
    score_path = os.path.join(args.save_path, 'score.txt')
    scores = tools.read_scores(score_path)
    done, changes = resume(system, folder, identity, args.force)
    if scores and not done:
        raise BadInput(
            f'{score_path}: holds {len(scores)} scores of a run whose checkpoints are not in '
            f'{folder}. Put one of them back; or choose another --save_path, or move score.txt '
            'away, to begin again'
        )
    if done:
        notes = [f'after epoch {done.epoch}, from {folder}']
        notes += [f'--force: {change}' for change in changes]
    elif initial_weights:
        left_out = load_weights(system, initial_weights, args.initial_model)
        if left_out and args.keep_classifier:
            raise BadInput(
                f'--keep_classifier: {left_out[0]} of {args.initial_model} does not fit --loss '
                f'{args.loss}'
            )
        notes = [f'from {args.initial_model}', *(f'left out: {name}' for name in left_out)]
    else:
        notes = ['from random weights']
    say('start         ' + '\n  '.join(notes))

    if process_count() > 1:
        # One seed need not give the same numbers on machines with other processors.
        for tensor in system.state_dict().values():
            dist.broadcast(tensor, 0)
    done = done or Done()
    seen = set(tools.gather([(done.epoch, done.loss is not None, len(scores))]))
    if len(seen) > 1:
        epochs = sorted(facts[0] for facts in seen)
        raise BadInput(
            f'--save_path {args.save_path}: the processes see different checkpoints, after epochs '
            f'{epochs}; it must be one folder that all machines share'
        )
    return done, scores


def epoch_line(done, starts, max_epoch, replaced):
    """The line of the log on an epoch: figures, minutes and, from the second on, the expected end.

    starts: when each epoch of this process began; replaced: how many utterances were.
    """
    line = f'{now()} epoch {done.epoch}, LR {done.lr:f}, LOSS {done.loss:f}, '
    line += f'ACC {done.accuracy:2.2f}%, {(time.time() - starts[-1]) / 60:.1f} min'
    if len(starts) > 1 and done.epoch < max_epoch:
        # Of whole epochs, tests included.
        seconds = (starts[-1] - starts[0]) / (len(starts) - 1)
        end = starts[-1] + seconds * (max_epoch - done.epoch + 1)
        line += f', ends about {time.strftime("%F %H:%M", time.localtime(end))}'
    if replaced:
        line += f', {replaced} utterances replaced (bad_audio.txt)'
    return line


def now():
    """Date and time, for the log."""
    return time.strftime('%F %T')


def save_bad_batch(error, loader, args):
    """Writes the batch whose loss diverged to SAVE_PATH/bad_batch.pt; returns BadInput on it."""
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
        f'{error}. What was saved before is untouched. The batch is in {path}; its files:',
        *files[:20],
    ]
    if len(files) > 20:
        lines.append(f'and {len(files) - 20} more')
    lines.append('Look at these, or lower --lr, and run the same command again.')
    return BadInput('\n'.join(lines))


def where_it_goes_on(args):
    """What to say of an interrupted command besides: from which epoch the same one continues."""
    if args.eval or args.check:
        return ''
    epochs = saved_models(os.path.join(args.save_path, 'model')).values()
    return f': the same command continues after epoch {max(epochs, default=0)}, the last saved'


def join_processes(args):
    """Joins the processes that torchrun started, each on a GPU of its own where there are GPUs.

    Raises BadInput for a device, or a number of processes, that does not go with that.
    """
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        return
    local_rank = int(os.environ['LOCAL_RANK'])
    on_gpu = args.device != 'cpu' and torch.cuda.is_available()
    refusal = refuse_gpus(args, on_gpu)
    if refusal:
        # The first process says it for all.
        raise SystemExit(2) if local_rank else BadInput(refusal)

    backend = 'gloo'
    gpu = None
    if on_gpu:
        backend = 'nccl'
        gpu = torch.device('cuda', local_rank)
        torch.cuda.set_device(gpu)
    # The others wait while the first goes through the files, an hour for all of VoxCeleb2.
    patience = datetime.timedelta(hours=3)
    store, rank, size = next(dist.rendezvous('env://', timeout=patience))
    # torchrun's own store stays after a restart: without a prefix, a process may find the address
    # of a killed one.
    if os.environ['TORCHELASTIC_USE_AGENT_STORE'] == 'True':
        store = dist.PrefixStore(f'restart {os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=patience, device_id=gpu
    )


def refuse_gpus(args, on_gpu):
    """Why torchrun's processes cannot share this machine's devices; None if they can."""
    if args.device.startswith('cuda:'):
        return (
            f'--device {args.device}: under torchrun every process takes a GPU of its own; leave '
            '--device out'
        )
    count = torch.cuda.device_count()
    if on_gpu and int(os.environ['LOCAL_WORLD_SIZE']) > count:
        return (
            f'torchrun: this machine has {count} GPUs, so --nproc_per_node must be at most {count}'
        )
    return None


if __name__ == '__main__':
    main()
