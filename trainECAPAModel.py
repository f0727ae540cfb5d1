"""The command: trains ECAPA-TDNN on VoxCeleb2 and scores VoxCeleb1, or scores a checkpoint (--eval)."""

import argparse
import contextlib
import math
import os
import shlex
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

from dataLoader import check_audio, make_batches, read_trials, require, train_loader
from ECAPAModel import ECAPAModel, checkpoint_sizes, read_checkpoint
from tools import (
    SCORE_LINE,
    BadInput,
    available_cpus,
    init_args,
    process_count,
    process_rank,
    read_scores,
    verification_figures,
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

    group = parser.add_argument_group('training')
    add = group.add_argument
    add('--num_frames', type=number(int, 1), default=200, help='length of a training crop, in frames of 10 ms')
    add('--max_epoch', type=number(int, 1), default=80, help='last epoch')
    add('--batch_size', type=number(int, 2), default=400, help='utterances in a step')
    add('--n_cpu', type=number(int, 0), default=default_n_cpu(), help='processes that load data, for each GPU')
    add('--test_step', type=number(int, 1), default=1, help='save, test and lower the rate every so many epochs')
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

    group = parser.add_argument_group('data')
    add = group.add_argument
    add('--train_list', default='data/VoxCeleb2/train_list.txt', help='lines `speaker path`')
    add('--train_path', default='data/VoxCeleb2/train/wav', help='folder of the paths in --train_list')
    add('--eval_list', default='data/VoxCeleb1/veri_test2.txt', help='trials, lines `label enrolment test`')
    add('--eval_path', default='data/VoxCeleb1/test/wav', help='folder of the paths in --eval_list')
    add('--musan_path', default='data/musan_split', help='MUSAN: noise/, speech/ and music/')
    add('--rir_path', default='data/RIRS_NOISES/simulated_rirs', help='room impulse responses')
    add('--save_path', default='exps/exp1', help='folder of the results: score.txt and model/')
    add('--initial_model', default='', help='checkpoint to start from, or to score with --eval')

    group = parser.add_argument_group('model and loss')
    add = group.add_argument
    add('--C', type=number(int, 8), default=SUPPRESS, help='channels (default: those of --initial_model, else 1024)')
    add('--m', type=number(float, 0, math.pi), default=0.2, help='margin of AAM-softmax, in radians')
    add('--s', type=number(float, 0), default=30, help='scale of AAM-softmax')
    add('--n_class', type=number(int, 1), default=SUPPRESS, help='speakers (default: those in --train_list)')

    group = parser.add_argument_group('command')
    group.add_argument('--eval', action='store_true', help='score --initial_model; needs no training data')
    return parser


def default_n_cpu():
    """Loading processes for each training process: its share of the processors, 16 at most."""
    return max(1, min(16, available_cpus() // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))


def join_processes(args):
    """Joins the processes that torchrun started, each on a GPU of its own where there are GPUs."""
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        return
    if args.device in ('auto', 'cuda') and torch.cuda.is_available():
        args.device = f'cuda:{os.environ["LOCAL_RANK"]}'
        torch.cuda.set_device(args.device)
    dist.init_process_group('nccl' if args.device.startswith('cuda') else 'gloo')


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


def build_system(args, n_class):
    """ECAPAModel of the command's options; its channels are --C, else those of --initial_model, else 1024."""
    C = getattr(args, 'C', None)
    if args.initial_model:
        found, _ = checkpoint_sizes(read_checkpoint(args.initial_model))
        if C not in (None, found):
            raise BadInput(f'--C {C} contradicts {args.initial_model}, which has {found} channels; leave --C out')
        C = found
    C = C or 1024
    if C % 8:
        raise BadInput(f'--C {C}: the channels are cut into 8 groups, so it must be a multiple of 8')
    torch.manual_seed(args.seed)
    return ECAPAModel(**{**vars(args), 'C': C, 'n_class': n_class})


def check_trials(args):
    """Reads --eval_list and opens every file that it names; returns (number of trials, number of files)."""
    files, labels, _ = read_trials(args.eval_list)
    require(os.path.isdir, args.eval_path, '--eval_path')
    check_audio([os.path.join(args.eval_path, file) for file in files], '--eval_list')
    return len(labels), len(files)


def figures_line(eer, min_dcf_05, min_dcf_01):
    """The figures of a scored trial list in words."""
    return f'EER {eer:2.2f}%, minDCF(p_target 0.05) {min_dcf_05:.4f}, minDCF(p_target 0.01) {min_dcf_01:.4f}'


def evaluate(args):
    """Scores --initial_model on --eval_list and prints the figures. Returns them."""
    if not args.initial_model:
        raise BadInput('--eval needs --initial_model, the checkpoint to score')
    _, n_class = checkpoint_sizes(read_checkpoint(args.initial_model))
    if getattr(args, 'n_class', n_class) != n_class:
        raise BadInput(f'--n_class {args.n_class} contradicts {args.initial_model}, which has {n_class}; leave it out')
    with first_process_first():
        check_trials(args)
    system = build_system(args, n_class)
    system.load_parameters(args.initial_model)
    figures = verification_figures(*system.score_trials(args.eval_list, args.eval_path))
    say(f'{args.initial_model}: {figures_line(*figures)}')
    return figures


def prepare(args):
    """Checks everything that training needs and prints the plan. Returns (system, loader)."""
    with first_process_first():
        dataset, loader, n_class, trials = check(args)
    system = build_system(args, n_class)
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
        f'evaluation    {trials[0]:,} trials over {trials[1]:,} files ({args.eval_list})\n'
        f'an epoch      {len(loader):,} steps of {args.batch_size} utterances\n'
        f'parameters    {encoder:,} in the encoder, {classifier:,} in the classifier of {n_class:,} speakers'
    )
    if args.max_epoch % args.test_step:
        say('note          the last epochs are neither tested nor saved: --max_epoch is no multiple of --test_step')
    return system, loader


def check(args):
    """Reads the lists and opens a sample of the files. Returns (dataset, loader, n_class, (trials, files))."""
    dataset = train_loader(**vars(args))
    speakers = len(dataset.speakers)
    n_class = getattr(args, 'n_class', speakers)
    if n_class < speakers:
        raise BadInput(f'--n_class {n_class} is too small: {args.train_list} has {speakers} speakers; leave it out')
    loader = make_batches(dataset, args.batch_size, args.n_cpu)
    require(os.path.isdir, args.train_path, '--train_path')
    # All of VoxCeleb2 would take minutes to open; a wrong folder or rate shows in a sample.
    sample = np.unique(np.linspace(0, len(dataset) - 1, 200).astype(int))
    check_audio([dataset.path(i) for i in sample], '--train_list')
    noises = [('--musan_path', files.paths) for files in dataset.noises.values()]
    for role, paths in [('--rir_path', dataset.rirs), *noises]:
        check_audio([paths[i] for i in range(0, len(paths), len(paths) // 100 + 1)], role)
    return dataset, loader, n_class, check_trials(args)


def start(system, args):
    """Resumes the run in --save_path, or loads --initial_model, or starts afresh.

    Returns (the epoch done last with what is known of it, the scores up to it); score.txt is cut to these, so that an
    epoch that has to be trained again is not in it twice.
    """
    done = system.resume(args.model_save_path)
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
    figures = verification_figures(*system.score_trials(args.eval_list, args.eval_path))
    best = min([figures[0], *(score[4] for score in scores)])
    scores.append((epoch, lr, loss, accuracy, figures[0], best))
    if process_rank() == 0:
        write_scores(args.score_save_path, scores)
    say(f'{clock()} epoch {epoch}, {figures_line(*figures)}, best EER {best:2.2f}%')


def write_scores(path, scores):
    """Writes a score.txt from tuples as read_scores returns them."""

    def write(file):
        with open(file, 'w', encoding='utf-8') as lines:
            lines.writelines(SCORE_LINE % score for score in scores)

    write_whole(path, write)


def clock():
    """The time, for logs."""
    return time.strftime('%Y-%m-%d %H:%M:%S')


def train(args):
    """Trains from where --save_path stands to --max_epoch, saving and testing every test_step epochs."""
    system, loader = prepare(args)
    init_args(args)
    done, scores = start(system, args)
    if 'loss' in done and done['epoch'] not in [score[0] for score in scores]:
        # The run ended between saving this epoch and testing it.
        test(system, args, scores=scores, **done)
    for epoch in range(done['epoch'] + 1, args.max_epoch + 1):
        # Seeding each epoch by its number makes a resumed epoch draw what an uninterrupted run would have.
        torch.manual_seed(int(np.random.SeedSequence([args.seed, epoch, process_rank()]).generate_state(1)[0]))
        loader.batch_sampler.set_epoch(epoch)
        loss, lr, accuracy = system.train_network(epoch, loader)
        say(f'{clock()} epoch {epoch}, LR {lr:f}, LOSS {loss:f}, ACC {accuracy:2.2f}%')
        if epoch % args.test_step == 0:
            if process_rank() == 0:
                system.save_training(args.model_save_path, epoch, loss, lr, accuracy)
            test(system, args, epoch, loss, lr, accuracy, scores)
    say(f'{args.max_epoch} epochs are done; results: {args.score_save_path} and {args.model_save_path}')


def main(argv=None):
    """Runs the command; exit status 2, with a sentence on standard error, for input that cannot be used."""
    args = make_parser().parse_args(argv)
    try:
        join_processes(args)
        evaluate(args) if args.eval else train(args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except BadInput as error:
        # From a worker process the error comes wrapped in the worker's traceback.
        print('error: ' + str(error).rpartition('BadInput: ')[2].strip(), file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
