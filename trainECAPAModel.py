"""The command: trains ECAPA-TDNN on VoxCeleb2 and scores VoxCeleb1, or scores a checkpoint (--eval)."""

import argparse
import contextlib
import datetime
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import time
import zipfile
from importlib import metadata

import numpy as np
import torch
import torch.distributed as dist

from dataLoader import (
    check_audio,
    check_share,
    check_sound,
    collect_bad_audio,
    find_audio,
    make_batches,
    read_audio,
    read_trial_lists,
    read_whole,
    require,
    train_loader,
)
from ECAPAModel import (
    Diverged,
    ECAPAModel,
    checkpoint_sizes,
    choose_device,
    load_model,
    prune,
    read_checkpoint,
    saved_models,
    summary,
)
from tools import (
    FIGURES,
    SCORE_LINE,
    BadInput,
    as_norm,
    available_cpus,
    digest,
    exit_on_bad_input,
    gather,
    init_args,
    make_folder,
    only_run_in,
    operating_points,
    plot_det,
    process_count,
    process_rank,
    read_scores,
    score_pairs,
    table,
    write_arrays,
    write_text,
    write_whole,
)

SUPPRESS = argparse.SUPPRESS


class RecipeParser(argparse.ArgumentParser):
    """Parser whose @FILE arguments hold options as a shell line would, with # comments."""

    def convert_arg_line_to_args(self, arg_line):
        """Options on one line of a recipe."""
        return shlex.split(arg_line, comments=True)


def number(kind, low, high=math.inf):
    """argparse type: an int or float (kind) in [low, high]."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'{text} is not between {low} and {high}')
        return value

    convert.__name__ = kind.__name__
    return convert


def make_parser():
    """The options, in groups; their names and defaults are those of the published code, its author's paths excepted."""
    parser = RecipeParser(
        description='Train and score ECAPA-TDNN speaker verification.',
        epilog='@FILE reads options from a recipe; what follows it on the command line takes precedence. '
        'Running the same command again continues an interrupted run.',
        fromfile_prefix_chars='@',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_training_options(parser.add_argument_group('training').add_argument)
    add_data_options(parser.add_argument_group('data').add_argument)

    group = parser.add_argument_group('model and loss')
    add = group.add_argument
    add('--C', type=number(int, 8), default=SUPPRESS, help='channels (default: those of --initial_model, else 1024)')
    add('--m', type=number(float, 0, math.pi), default=0.2, help='margin of AAM-softmax, in radians')
    add('--s', type=number(float, 0), default=30, help='scale of AAM-softmax')
    add('--n_class', type=number(int, 1), default=SUPPRESS, help='speakers (default: those in --train_list)')

    group = parser.add_argument_group('score normalisation (with --eval)')
    add = group.add_argument
    add('--score_norm', choices=('none', 'asnorm'), default='none', help='asnorm: also scores normalised by a cohort')
    add('--cohort_utterances', type=number(int, 1), default=20, help='of each speaker in --train_list, for the cohort')
    add('--top_n', type=number(int, 2), default=400, help='closest cohort speakers that normalise a score')

    group = parser.add_argument_group('command (without one of these: train)')
    add = group.add_argument
    add('--check', action='store_true', help='check everything that training needs, every file included, and stop')
    add('--eval', action='store_true', help='score --initial_model on --eval_list; needs no training data')
    add(
        '--embed', metavar='FOLDER_OR_LIST', help='write embeddings.npz of all files of a folder, or of a list of paths'
    )
    add('--verify', nargs=2, metavar=('A.wav', 'B.wav'), help='score two recordings')
    return parser


def add_training_options(add):
    """The options of the training itself, by add(name, ...) of their group."""
    add('--num_frames', type=number(int, 1), default=200, help='length of a training crop, in frames of 10 ms')
    add('--max_epoch', type=number(int, 1), default=80, help='last epoch')
    add('--batch_size', type=number(int, 2), default=400, help='utterances in a step')
    add('--n_cpu', type=number(int, 0), default=default_n_cpu(), help='processes that load data, for each GPU')
    add('--test_step', type=number(int, 1), default=1, help='save, test and lower the rate every so many epochs')
    add('--accumulate', type=number(int, 1), default=1, help='parts of a batch, one after another, to save memory')
    add('--freeze_epochs', type=number(int, 0), default=0, help='first epochs that train the classifier alone')
    add('--speed_perturb', action='store_true', help='add all speakers at 0.9 and 1.1 of their speed, as new speakers')
    add('--lr', type=number(float, 0), default=0.001, help='learning rate of Adam')
    add('--lr_decay', type=number(float, 0), default=0.97, help='factor on the learning rate every test_step epochs')
    add('--seed', type=number(int, 0), default=10, help='seed of everything drawn at random')
    add('--device', default='auto', help='auto (cuda if there is one, else cpu), cpu, cuda, cuda:1, ...')
    add(
        '--precision',
        choices=('auto', 'fp32', 'bf16'),
        default='auto',
        help='auto: bf16 on a GPU that has it, else fp32',
    )
    add('--compile', action='store_true', help='compile the encoder for training: minutes at the start, then faster')


def add_data_options(add):
    """The options that name files and folders, by add(name, ...) of their group."""
    add('--train_list', default='data/VoxCeleb2/train_list.txt', help='lines `speaker path`')
    add('--train_path', default='data/VoxCeleb2/train/wav', help='folder of the paths in --train_list')
    lists, folders = ['data/VoxCeleb1/veri_test2.txt'], ['data/VoxCeleb1/test/wav']
    add('--eval_list', nargs='+', default=lists, help='trial lists, lines `label enrolment test`')
    add('--eval_path', nargs='+', default=folders, help='folder of the paths in --eval_list: one, or one for each')
    add('--musan_path', default='data/musan_split', help='MUSAN: noise/, speech/ and music/')
    add('--rir_path', default='data/RIRS_NOISES/simulated_rirs', help='room impulse responses')
    add('--save_path', default='exps/exp1', help='folder of the results: score.txt and model/')
    add('--keep', type=number(int, 0), default=0, help='newest checkpoints to keep (0: all of them)')
    add('--max_bad', type=number(float, 0, 100), default=1.0, help='percent of training files that may be unusable')
    add('--force', action='store_true', help='continue a run although options that change its numbers differ')
    add('--initial_model', default='', help='checkpoint to start from, or to score with --eval')
    add('--keep_classifier', action='store_true', help="train on the speakers of --initial_model's classifier, or stop")


def default_n_cpu():
    """Loading processes for each training process: its share of the processors, 16 at most."""
    return max(1, min(16, available_cpus() // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))


def join_processes(args):
    """Joins the processes that torchrun started, each on a GPU of its own where there are GPUs.

    Raises BadInput, in the first process of a machine, where that cannot be.
    """
    numbered = args.device.startswith('cuda:')
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        if numbered:
            # Otherwise PyTorch puts some of its own things on the first GPU.
            torch.cuda.set_device(choose_device(args.device))
        return
    gpu, refusal = None, ''
    if numbered:
        refusal = f'--device {args.device}: under torchrun every process takes a GPU of its own; leave --device out'
    elif args.device != 'cpu' and torch.cuda.is_available():
        gpu, count = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
        if int(os.environ['LOCAL_WORLD_SIZE']) > count:
            refusal = f'torchrun: this machine has {count} GPUs, so --nproc_per_node must be at most {count}'
    if refusal and os.environ['LOCAL_RANK'] == '0':
        raise BadInput(refusal)
    if refusal:
        sys.exit(2)
    if gpu is not None:
        torch.cuda.set_device(gpu)
    # The others wait while the first goes through the files, which takes an hour for all of VoxCeleb2.
    patience = datetime.timedelta(hours=3)
    store, rank, size = next(dist.rendezvous('env://', timeout=patience))
    # torchrun's own store outlives a restart: without a prefix, a process may find the address of one that was killed.
    if os.environ['TORCHELASTIC_USE_AGENT_STORE'] == 'True':
        store = dist.PrefixStore(f'restart {os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)
    where = {'backend': 'gloo'} if gpu is None else {'backend': 'nccl', 'device_id': torch.device('cuda', gpu)}
    dist.init_process_group(store=store, rank=rank, world_size=size, timeout=patience, **where)


@contextlib.contextmanager
def first_process_first():
    """The first process runs the block before the others do, so that what is wrong is said once."""
    if process_rank():
        dist.barrier()
    yield
    if process_count() > 1 and process_rank() == 0:
        dist.barrier()


def say(text):
    """Prints a line of the log, in the first process only."""
    if process_rank() == 0:
        print(text, flush=True)


def build_system(args, speakers):
    """ECAPAModel of the command's options, for a list of as many speakers.

    Its channels are --C, else those of --initial_model, else 1024; --keep_classifier keeps all speakers of the latter.
    """
    C, n_class = getattr(args, 'C', None), getattr(args, 'n_class', speakers)
    if args.keep_classifier and not args.initial_model:
        raise BadInput('--keep_classifier needs --initial_model, the checkpoint whose classifier goes on')
    if args.initial_model:
        found, trained = checkpoint_sizes(read_checkpoint(args.initial_model))
        if C not in (None, found):
            raise BadInput(f'--C {C} contradicts {args.initial_model}, which has {found} channels; leave --C out')
        C = found
        if args.keep_classifier:
            # After --speed_perturb the first third are the speakers at their own speed, in the same order.
            if trained not in (speakers, 3 * speakers):
                raise BadInput(
                    f'--keep_classifier: {args.initial_model} was trained on {trained} speakers, {args.train_list} has '
                    f'{speakers}: they must be as many, or a third after --speed_perturb; give the list that it was '
                    'trained on'
                )
            n_class = trained
    C = C or 1024
    if C % 8:
        raise BadInput(f'--C {C}: the channels are cut into 8 groups, so it must be a multiple of 8')
    torch.manual_seed(args.seed)
    return ECAPAModel(**{**vars(args), 'C': C, 'n_class': n_class})


def check_trials(args, **how):
    """Reads the trial lists and checks every file that they name, as check_audio does.

    Returns (number of trials, paths of the files).
    """
    paths, trials = read_trial_lists(args.eval_list, args.eval_path)
    check_audio(paths, '--eval_list', **how)
    return sum(len(labels) for labels, _ in trials), paths


def score_lists(system, args, cohort=None):
    """Scores --eval_list: [(list, labels (N,), {'raw': scores (N,), and with a cohort 'asnorm': scores (N,)})]."""
    paths, trials = read_trial_lists(args.eval_list, args.eval_path)
    embeddings = system.embed_files(paths)
    results = []
    for name, (labels, pairs) in zip(args.eval_list, trials):
        scores = {'raw': score_pairs(embeddings, pairs)}
        if cohort is not None:
            scores['asnorm'] = as_norm(scores['raw'], embeddings, pairs, cohort, args.top_n)
        results.append((name, labels, scores))
    return results


def figures_table(results):
    """The figures of score_lists as the text of a table, a row a list."""
    rows = [['list', 'trials', *FIGURES] + [f'asnorm {name}' for name in FIGURES] * ('asnorm' in results[0][2])]
    for name, labels, scores in results:
        points = [operating_points(kind, labels) for kind in scores.values()]
        figures = [text for p in points for text in (f'{p["EER"][0]:.2f}%', *(f'{p[d][0]:.4f}' for d in FIGURES[1:]))]
        rows.append([name, f'{len(labels):,}', *figures])
    return table(rows)


def load_cohort(system, args):
    """The cohort of --score_norm asnorm, kept beside the checkpoint until something that it depends on changes."""
    if args.score_norm == 'none':
        return None
    require(os.path.isfile, args.train_list, '--train_list (the cohort of --score_norm)')
    settings = [args.train_path, args.cohort_utterances, args.seed]
    key = ' '.join([digest(args.initial_model), digest(args.train_list), repr(settings)])
    path = f'{args.initial_model}.cohort.npz'
    try:
        with np.load(path) as cache:
            if str(cache['key']) == key:
                return cache['cohort']
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass
    cohort = system.cohort(args.train_list, args.train_path, args.cohort_utterances, args.seed)
    if process_rank() == 0:
        write_arrays(path, key=key, cohort=cohort)
    return cohort


def evaluate(args):
    """Scores --initial_model on --eval_list, prints the figures and writes them and all scores below --save_path."""
    with first_process_first():
        check_trials(args)
    system = load_for_use(args, '--eval')
    results = score_lists(system, args, load_cohort(system, args))
    say(f'{args.initial_model}\n{figures_table(results)}')
    if process_rank() == 0:
        write_results(args, results)


def write_results(args, results):
    """Writes SAVE_PATH/results.json, and for each list scores/LIST.txt (`label score [normalised] enrolment test`) and
    a DET curve. What an earlier --eval wrote for other lists stays; of two lists of one name, the second's files get a
    number.
    """
    make_folder(os.path.join(args.save_path, 'scores'), '--save_path')
    record = read_results(args.save_path)
    lists = record.get('lists', {})
    for earlier in lists.values():
        earlier.setdefault('checkpoint', record.get('checkpoint'))
    checkpoint = {'path': args.initial_model, 'sha256': digest(args.initial_model)}
    for name, labels, scores in results:
        path = scores_path(args.save_path, name, lists)
        columns = zip(*[[f'{score:.6f}' for score in kind] for kind in scores.values()])
        with open(name, encoding='utf-8', errors='surrogateescape') as lines:
            trials = [line.split() for line in lines if line.strip()]
        rows = (' '.join([trial[0], *column, *trial[1:]]) + '\n' for trial, column in zip(trials, columns))
        write_text(path, ''.join(rows))
        stem = os.path.splitext(os.path.basename(path))[0]
        plot_det(os.path.join(args.save_path, f'det_{stem}.png'), labels, scores)
        points = {
            kind: {figure: {'value': value, 'threshold': threshold} for figure, (value, threshold) in points.items()}
            for kind, points in ((kind, operating_points(values, labels)) for kind, values in scores.items())
        }
        counts = {'trials': len(labels), 'targets': int(labels.sum())}
        lists[name] = {**counts, **points, 'sha256': digest(name), 'scores': path, 'checkpoint': checkpoint}
    record = {
        'checkpoint': checkpoint,
        'lists': lists,
        'seed': args.seed,
        'options': vars(args),
        'versions': versions(),
    }
    write_text(os.path.join(args.save_path, 'results.json'), json.dumps(record, indent=2) + '\n')


def read_results(folder):
    """What a folder's results.json holds, {} where there is none; BadInput where it is something else."""
    path = os.path.join(folder, 'results.json')
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding='utf-8') as file:
            record = json.load(file)
        if all(isinstance(entry['scores'], str) for entry in record['lists'].values()):
            return record
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise BadInput(f'{path}: not what --eval writes; move it away')


def scores_path(folder, name, lists):
    """Where the scores of a trial list go: where they were, or scores/LIST.txt unless another list's are there."""
    taken = {other: os.path.basename(entry['scores']) for other, entry in lists.items()}
    stem = os.path.splitext(os.path.basename(name))[0]
    names = itertools.chain([f'{stem}.txt'], (f'{stem}_{number}.txt' for number in itertools.count(2)))
    chosen = taken.get(name) or next(file for file in names if file not in taken.values())
    return os.path.join(folder, 'scores', chosen)


def versions():
    """Versions of Python and of the packages that the numbers depend on."""
    packages = ('torch', 'torchaudio', 'numpy', 'scipy', 'scikit-learn', 'soundfile')
    return {'python': platform.python_version(), **{name: metadata.version(name) for name in packages}}


def load_for_use(args, option):
    """The model of --initial_model, which `option` needs; its sizes are its own."""
    if not args.initial_model:
        raise BadInput(f'{option} needs --initial_model, a checkpoint')
    C, n_class = checkpoint_sizes(read_checkpoint(args.initial_model))
    for name, found in (('C', C), ('n_class', n_class)):
        if getattr(args, name, found) != found:
            raise BadInput(
                f'--{name} {getattr(args, name)} contradicts {args.initial_model}, where it is {found}; leave it out'
            )
    return load_model(args.initial_model, **{**vars(args), 'C': C, 'n_class': n_class})


def embed(args):
    """Writes SAVE_PATH/embeddings.npz: names (N,) and unit embeddings (N, 192) of the files of --embed."""
    system = load_for_use(args, '--embed')
    if os.path.isdir(args.embed):
        paths = find_audio(args.embed, '--embed', any_format=True)
    else:
        require(os.path.isfile, args.embed, '--embed')
        with open(args.embed, encoding='utf-8', errors='surrogateescape') as lines:
            paths = [line.strip() for line in lines if line.strip()]
    path = os.path.join(args.save_path, 'embeddings.npz')
    embeddings = system.embed(paths)
    if process_rank() == 0:
        make_folder(args.save_path, '--save_path')
        write_arrays(path, names=np.array(paths), embeddings=embeddings)
    say(f'{path}: {len(paths):,} embeddings of 192 numbers')


def verify(args):
    """Prints the score of two recordings and, where the model's results.json is found, the decision."""
    system = load_for_use(args, '--verify')
    score = score_pairs(system.embed_files(args.verify, any_format=True), np.array([[0, 1]]))[0]
    say(f'score {score:.4f}')
    folders = [args.save_path, os.path.dirname(os.path.dirname(os.path.abspath(args.initial_model)))]
    for record in map(read_results, folders):
        thresholds = {
            name: entry['raw']['EER']['threshold']
            for name, entry in record.get('lists', {}).items()
            if entry.get('checkpoint', record.get('checkpoint'))['sha256'] == digest(args.initial_model)
        }
        for name, threshold in thresholds.items():
            decision = 'the same speaker' if score > threshold else 'different speakers'
            say(f'{decision}, at the EER threshold of {name}, {threshold:.4f}; other recordings have another one')
        if thresholds:
            return
    say('no threshold is known: --eval on trials of recordings like these finds one')


def prepare(args):
    """Checks everything that training needs and prints the plan. Returns (system, loader)."""
    with first_process_first():
        dataset, loader, (trials, files) = check(args)
    system = build_system(args, dataset.n_class)
    n_class = len(system.speaker_loss.weight)
    encoder, classifier = (
        sum(p.numel() for p in part.parameters()) for part in (system.speaker_encoder, system.speaker_loss)
    )
    clips = ', '.join(f'{len(files)} {category}' for category, files in dataset.noises.items())
    processes = f'{process_count()} processes on ' if process_count() > 1 else ''
    say(
        f'device        {processes}{system.device}, {system.precision}, PyTorch {torch.__version__}, '
        f'{args.n_cpu} loading processes\n'
        f'training      {len(dataset.speakers):,} speakers, {len(dataset):,} utterances ({args.train_list})\n'
        f'augmentation  {clips} files, {len(dataset.rirs):,} RIRs\n'
        f'evaluation    {trials:,} trials over {len(files):,} files ({", ".join(args.eval_list)})\n'
        f'an epoch      {len(loader):,} steps of {args.batch_size} utterances\n'
        f'parameters    {encoder:,} in the encoder, {classifier:,} in the classifier of {n_class:,} speakers'
    )
    if args.max_epoch % args.test_step:
        say('note          the last epochs are neither tested nor saved: --max_epoch is no multiple of --test_step')
    with first_process_first():
        check_room(args, 4 * (encoder + classifier))
    return system, loader


def check(args):
    """Reads the lists, checks the files (a sample of those to train on; all of them with --check) and their speakers.

    Returns (dataset, loader, (trials, paths of their files)).
    """
    dataset = train_loader(**vars(args), bad_audio=os.path.join(args.save_path, 'bad_audio.new'))
    speakers = dataset.n_class
    n_class = getattr(args, 'n_class', speakers)
    if n_class < speakers:
        raise BadInput(f'--n_class {n_class} is too small: {args.train_list} has {speakers} speakers; leave it out')
    loader = make_batches(dataset, args.batch_size, args.n_cpu)
    if args.batch_size < 2 * args.accumulate * process_count():
        raise BadInput(f'--accumulate {args.accumulate}: every part of a batch must have 2 utterances, for batch norm')
    require(os.path.isdir, args.train_path, '--train_path')
    everything = {'n_cpu': args.n_cpu} if args.check else {}
    # All of VoxCeleb2 would take an hour; a wrong folder or rate shows in a sample.
    chosen = np.random.default_rng(args.seed).permutation(len(dataset.labels))
    chosen = np.sort(chosen[: None if args.check else 200])
    faults = check_audio([dataset.path(i) for i in chosen], '--train_list', check_sound, args.n_cpu, args.max_bad)
    if faults:
        found = f'note          {len(faults)} of {len(chosen)} training files cannot be used and will be replaced:'
        say('\n'.join([found, *faults[:20]]))
    noises = [('--musan_path', files.paths, read_audio) for files in dataset.noises.values()]
    for role, paths, whole in [('--rir_path', dataset.rirs, check_sound), *noises]:
        step = 1 if args.check else len(paths) // 100 + 1
        check_audio([paths[i] for i in range(0, len(paths), step)], role, whole, **everything)
    trials, files = check_trials(args, check=read_whole, **everything) if args.check else check_trials(args)
    warn_of_overlap(dataset, files, args.eval_path)
    return dataset, loader, (trials, files)


def warn_of_overlap(dataset, files, folders):
    """Says which speakers of the trials, the first folders below --eval_path, are trained on."""
    names = {os.path.relpath(file, folder).split(os.sep)[0] for folder in folders for file in files}
    both = sorted(names.intersection(dataset.speakers))
    if both:
        say(
            f'WARNING       {len(both)} speakers are in --train_list and in --eval_list ({", ".join(both[:5])}, ...): '
            'the EER will be too good'
        )


def check_room(args, size):
    """Raises BadInput where --save_path cannot be written or has no room; size: of a checkpoint, in bytes."""
    folder = os.path.abspath(args.save_path)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput(f'--save_path {args.save_path}: {folder} cannot be written')
    free = shutil.disk_usage(folder).free
    models = args.keep or max(0, args.max_epoch // args.test_step - len(saved_models(f'{args.save_path}/model')))
    # The .state files are twice as large; two are kept, and a third is there while it is written.
    needed = [size * (count + 6) for count in (2, models)]
    say_free = f'{free / 1e9:.2f} GB are free in --save_path {args.save_path}, and'
    if free < needed[0]:
        raise BadInput(f'{say_free} a checkpoint and its state need {needed[0] / 1e9:.2f} GB')
    if free < needed[1]:
        say(f'WARNING       {say_free} the run needs {needed[1] / 1e9:.2f} GB: --keep limits the checkpoints')


# What changes the numbers of a run; a list or folder counts by what is in it, wherever it is.
IDENTITY = ('num_frames', 'batch_size', 'test_step', 'accumulate', 'freeze_epochs', 'speed_perturb', 'lr', 'lr_decay')
IDENTITY += ('m', 's', 'seed', 'initial_model')


def identity(system, dataset, args):
    """{option: its value} of everything that changes the numbers of a run, as plain types."""
    noises = ' '.join(f'{len(files)}/{files.pieces[-1]}' for files in dataset.noises.values())
    return {
        **{name: getattr(args, name) for name in IDENTITY},
        'C': system.speaker_encoder.conv1.out_channels,
        'n_class': len(system.speaker_loss.weight),
        'precision': system.precision,
        'train_list': f'SHA-256 {digest(args.train_list)[:16]}',
        'eval_list': ' '.join(f'SHA-256 {digest(path)[:16]}' for path in args.eval_list),
        'musan_path': f'files/pieces {noises}',
        'rir_path': f'{len(dataset.rirs)} files',
    }


def start(system, args, now):
    """Resumes the run in --save_path, or loads --initial_model, or starts afresh; now: identity() of this run.

    Returns (the epoch done last with what is known of it, the scores up to it); score.txt is cut to these, so that an
    epoch that has to be trained again is not in it twice. Raises BadInput for options that are not those that the run
    began with, unless --force is given.
    """

    def accept(state):
        then = state.pop('identity', now)
        changed = [f'--{name} {now[name]} (was {then[name]})' for name in now if then.get(name, now[name]) != now[name]]
        if changed and not args.force:
            raise BadInput(
                f'{args.save_path} holds a run with other options, which would change its numbers:\n'
                + '\n'.join(changed)
                + '\nGive those it began with (options.txt), choose another --save_path, or add --force.'
            )
        if changed:
            say('\n  '.join(['note          --force: this run goes on with other options', *changed]))

    done = system.resume(args.model_save_path, accept)
    if done:
        say(f'start         after epoch {done["epoch"]}, from {args.model_save_path}')
    elif args.initial_model:
        unfit = system.load_parameters(args.initial_model)
        say('\n  left out: '.join([f'start         from {args.initial_model}', *unfit]))
    else:
        say('start         afresh')
    done = done or {'epoch': 0}
    scores = [score for score in read_scores(args.score_save_path) if score[0] <= done['epoch']]
    return done, scores


def test(system, args, epoch, loss, lr, accuracy, scores):
    """Scores --eval_list after an epoch, prints the figures, and adds a line to `scores` and score.txt."""
    results = score_lists(system, args)
    eer = operating_points(results[0][2]['raw'], results[0][1])['EER'][0]
    best = min([eer, *(score[4] for score in scores)])
    scores.append((epoch, lr, loss, accuracy, eer, best))
    if process_rank() == 0:
        write_text(args.score_save_path, ''.join(SCORE_LINE % score for score in scores))
    say(f'{clock()} epoch {epoch}, EER {eer:2.2f}%, best EER {best:2.2f}%\n{figures_table(results)}')


def clock():
    """The time, for logs."""
    return time.strftime('%Y-%m-%d %H:%M:%S')


def write_options(args):
    """Writes SAVE_PATH/options.txt: the options, to be read back with @, and the versions."""
    path = os.path.join(args.save_path, 'options.txt')
    lines = [f'# {name} {version}' for name, version in versions().items()]
    for name, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        if value is True:
            lines.append(f'--{name}')
        elif value is not None and value is not False and name not in ('score_save_path', 'model_save_path'):
            lines.append(f'--{name} {shlex.join(map(str, values))}')
    write_text(path, '\n'.join(lines) + '\n')


def train(args):
    """Trains from where --save_path stands to --max_epoch, saving and testing every test_step epochs."""
    system, loader = prepare(args)
    if args.check:
        say('all is well: nothing was found that would stop this run')
        return
    with first_process_first():
        init_args(args)
    with only_run_in(args.save_path) if process_rank() == 0 else contextlib.nullcontext():
        run(system, loader, args)


def run(system, loader, args):
    """The epochs of train, in a folder that is this run's alone."""
    dataset = loader.dataset
    now = identity(system, dataset, args)
    done, scores = start(system, args, now)
    epochs = sorted(set(gather([done['epoch']])))
    with first_process_first():
        if len(epochs) > 1:
            raise BadInput(
                f'--save_path {args.save_path}: the processes see different checkpoints, after epochs {epochs}; it '
                'must be one folder that all machines share'
            )
    if process_rank() == 0:
        # Not before: a run whose options are refused must not remove anything.
        prune(args.model_save_path, args.keep)
        collect_bad_audio(dataset.bad_audio, bad_list(args))
        write_options(args)
    if 'loss' in done and done['epoch'] not in [score[0] for score in scores]:
        # The run ended between saving this epoch and testing it.
        test(system, args, scores=scores, **done)
    for epoch in range(done['epoch'] + 1, args.max_epoch + 1):
        # Seeding each epoch by its number makes a resumed epoch draw what an uninterrupted run would have.
        torch.manual_seed(int(np.random.SeedSequence([args.seed, epoch, process_rank()]).generate_state(1)[0]))
        loader.batch_sampler.set_epoch(epoch)
        loss, lr, accuracy = train_epoch(system, loader, args, epoch)
        if epoch % args.test_step == 0:
            if process_rank() == 0:
                figures = {'loss': loss, 'lr': lr, 'accuracy': accuracy}
                system.save_training(args.model_save_path, epoch, args.keep, **figures, identity=now)
            test(system, args, epoch, loss, lr, accuracy, scores)
    say(f'{args.max_epoch} epochs are done; results: {args.score_save_path} and {args.model_save_path}')


def train_epoch(system, loader, args, epoch):
    """An epoch of training and its line of the log. Returns (loss, learning rate, accuracy in percent).

    Leaves the batch of a loss or gradient that is not finite in SAVE_PATH/bad_batch.pt, and raises BadInput.
    """
    dataset = loader.dataset
    try:
        loss, lr, accuracy = system.train_network(epoch, loader)
    except Diverged as error:
        rank = f'_{process_rank()}' if process_rank() else ''
        path = os.path.join(args.save_path, f'bad_batch{rank}.pt')
        indices = [index for _, index in next(itertools.islice(loader.batch_sampler, error.step - 1, None))]
        files = [dataset.path(index) for index in indices]
        batch = dict(zip(('audio', 'labels'), error.batch), epoch=epoch, step=error.step, files=files)
        write_whole(path, lambda file: torch.save(batch, file))
        shown = '\n'.join(files[:20] + [f'and {len(files) - 20} more'] * (len(files) > 20))
        raise BadInput(
            f'{error}. What was saved before is untouched. The batch is in {path}; its files:\n{shown}\n'
            'Look at these, or lower --lr, and run the same command again.'
        ) from error
    finally:
        if process_rank() == 0:
            replaced, bad = collect_bad_audio(dataset.bad_audio, bad_list(args))
    note = ''
    if process_rank() == 0:
        if replaced[str(epoch)]:
            note = f', {replaced[str(epoch)]} utterances replaced ({bad_list(args)})'
        check_share(len(bad), len(dataset.labels), args.max_bad, f'they are in {bad_list(args)}')
    say(f'{clock()} epoch {epoch}, LR {lr:f}, LOSS {loss:f}, ACC {accuracy:2.2f}%{note}')
    return loss, lr, accuracy


def bad_list(args):
    """Path of the list of training files that cannot be used, each with the reason."""
    return os.path.join(args.save_path, 'bad_audio.txt')


@contextlib.contextmanager
def sentences_for_people(args):
    """Turns what may end a run, and is nobody's bug, into a sentence and an exit status: no traceback for it.

    2 for bad input, a full disk or memory; 130 for Ctrl-C and 143 for SIGTERM, as shells have it.
    """
    # torchrun stops its processes itself, and a process that waits for another one could not answer.
    before = signal.getsignal(signal.SIGTERM)
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        signal.signal(signal.SIGTERM, stop)
    try:
        with exit_on_bad_input():
            try:
                yield
            except RuntimeError as error:
                hint = next((hint for sign, hint in DEATHS.items() if sign in str(error)), None)
                if hint is None:
                    raise
                raise BadInput(f'{summary(error)}\n{hint}') from error
    except KeyboardInterrupt as interrupt:
        terminated = interrupt.args == (signal.SIGTERM,)
        saved = next(iter(saved_models(os.path.join(args.save_path, 'model')).values()), 0)
        training = not (args.eval or args.embed or args.verify or args.check)
        how = f': the same command continues after epoch {saved}, the last saved' if training else ''
        print(f'\nstopped by {"SIGTERM" if terminated else "Ctrl-C"}{how}', file=sys.stderr)
        sys.exit(143 if terminated else 130)
    finally:
        signal.signal(signal.SIGTERM, before)


# What PyTorch's errors say where memory is too small, and what to do.
DEATHS = {
    'out of memory': 'The GPU has too little memory: use a smaller --batch_size, or --accumulate.',
    'ALLOC_FAILED': 'The GPU has too little memory: use a smaller --batch_size, or --accumulate.',
    "can't allocate memory": 'This machine has too little memory: use a smaller --batch_size, or --accumulate.',
    'DataLoader worker': 'A loading process was killed, most likely for want of memory: use a smaller --n_cpu or, in a '
    'container, more shared memory (docker run --shm-size 8g).',
}


def stop(number, frame):
    """What SIGTERM does: the same as Ctrl-C."""
    raise KeyboardInterrupt(signal.SIGTERM)


def main(argv=None):
    """Runs the command; exit status 2, with a sentence on standard error, for input that cannot be used."""
    args = make_parser().parse_args(argv)
    with sentences_for_people(args):
        join_processes(args)
        command = embed if args.embed else verify if args.verify else evaluate if args.eval else train
        command(args)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    main()
