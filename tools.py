"""The base of all modules: measures; files that a run writes; processes, log and errors."""

import argparse
import contextlib
import errno
import functools
import hashlib
import inspect
import io
import itertools
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from importlib import metadata

import numpy as np
import torch.distributed as dist
from sklearn.metrics import roc_curve

PRIORS = {'minDCF(0.01)': 0.01, 'minDCF(0.05)': 0.05}  # priors of a target; both costs are 1
FIGURES = ('EER', *PRIORS)


# 1. Measures: scores of trials; EER and minDCF; accuracy.
# In the shapes, D is the size of an embedding: 192 for ECAPA-TDNN.


def unit_length(vectors):
    """Scales vectors (..., D) to length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def unit_whole(embeddings):
    """Scales the first vector of each of embeddings (files, 2, D) to length 1.

    A mean over several utterances is shorter.
    """
    vectors = embeddings.copy()
    vectors[:, 0] = unit_length(vectors[:, 0])
    return vectors


def score_pairs(embeddings, pairs):
    """Computes scores (N,) of pairs (N, 2) of rows of embeddings (files, 2, D).

    A score is half the cosine of the whole utterances plus half the mean cosine of the 25 pairs of
    their crops.
    """
    vectors = embeddings.reshape(len(embeddings), -1)
    scores = np.empty(len(pairs), vectors.dtype)
    # In blocks: the vectors of all pairs of a long list would fill the memory.
    for start in range(0, len(pairs), 4096):
        block = slice(start, start + 4096)
        enrolment, test = pairs[block].T
        scores[block] = 0.5 * np.einsum('nd,nd->n', vectors[enrolment], vectors[test])
    return scores


def operating_points(scores, labels):
    """Computes FIGURES of scores (N,) with labels (N,), 1 (same speaker) or 0.

    Returns {figure: {'value', 'threshold'}}; a trial is accepted above the threshold. The EER is in
    percent.
    """
    misses, false_alarms, thresholds = error_curve(scores, labels)
    return {
        name: {'value': float(value), 'threshold': float(thresholds[index])}
        for name, (value, index) in find_figures(misses, false_alarms).items()
    }


def error_curve(scores, labels):
    """Computes the DET curve of scores (N,) with labels (N,).

    Returns (misses, false alarms, thresholds), at -inf and at each different score, ascending.
    """
    scores, is_target, ends, _ = sort_by_score(scores, labels)
    rates = error_rates(np.ones(len(scores), int), is_target, ends)
    return *rates, np.append(-np.inf, scores[ends])


def sort_by_score(scores, labels):
    """Sorts trials by their scores (N,), ascending.

    Returns (scores, whether each is a target trial, the last index of each group of equal scores,
    the order).
    """
    order = np.argsort(scores, kind='stable')
    scores = np.asarray(scores)[order]
    is_target = np.asarray(labels)[order] == 1
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    return scores, is_target, ends, order


def error_rates(weights, is_target, ends):
    """Computes the error rates of trials sorted by score, which count `weights` (N,) times each.

    is_target, ends: what sort_by_score returns. Returns (misses, false alarms), (K + 1,) each, at
    thresholds below all scores and at each of the K different ones. Equal scores are one threshold.
    NaN if there are no target or no non-target trials.
    """
    trials = np.cumsum(weights)[ends]
    missed = np.cumsum(weights * is_target)[ends]
    rejected = trials - missed
    with np.errstate(invalid='ignore'):
        misses = np.append(0, missed / missed[-1])
        false_alarms = 1 - np.append(0, rejected / rejected[-1])
    return misses, false_alarms


def find_figures(misses, false_alarms):
    """Finds FIGURES on a curve of error_rates: {figure: (value, index of its threshold)}."""
    indices = np.arange(len(misses))
    figures = {'EER': find_eer(misses, false_alarms)}
    for name, prior in PRIORS.items():
        figures[name] = ComputeMinDcf(misses, false_alarms, indices, prior, 1, 1)
    return figures


def find_eer(misses, false_alarms):
    """Returns (EER in percent, index of the nearest threshold) of a curve of error_rates.

    The EER is where the two rates cross, on the straight line between neighbouring thresholds.
    """
    difference = misses - false_alarms  # rises from -1 to 1
    after = np.argmax(difference >= 0)
    before = after - 1
    part = difference[before] / (difference[before] - difference[after])
    eer = misses[before] + part * (misses[after] - misses[before])
    nearest = after if difference[after] <= -difference[before] else before
    return 100 * eer, nearest


def tuneThresholdfromScore(scores, labels, target_fa, target_fr=None):
    """Finds operating points on the ROC, as the published code does.

    scores, labels: (N,), 1 for the same speaker or 0; target_fa, target_fr: wanted rates of false
    alarms and of misses. Returns (thresholds, EER in percent, fpr, fnr): a [threshold, fpr, fnr]
    for each wanted rate (misses first), and the two rates along the ROC. The EER is the larger of
    the two rates where they are closest, on a ROC without the points on its straight parts;
    operating_points has the exact one.
    """
    fpr, tpr, thresholds = roc_curve(labels, scores, pos_label=1)
    fnr = 1 - tpr

    tuned = []
    for rates, wanted in ((fnr, target_fr or []), (fpr, target_fa)):
        for rate in wanted:
            nearest = np.nanargmin(np.abs(rate - rates))
            tuned.append([thresholds[nearest], fpr[nearest], fnr[nearest]])

    nearest = np.nanargmin(np.abs(fnr - fpr))
    return tuned, max(fpr[nearest], fnr[nearest]) * 100, fpr, fnr


def ComputeErrorRates(scores, labels):
    """Returns (misses, false alarms, thresholds), (N,) each, as the published code computes them.

    Every score in ascending order is a threshold, above which a trial is accepted. Equal scores are
    not grouped: each is a separate threshold, in the order given.
    """
    order = np.argsort(scores, kind='stable')
    labels = np.asarray(labels)[order].astype(np.int64)
    targets = labels.sum()
    fnrs = np.cumsum(labels) / targets
    fprs = 1 - np.cumsum(1 - labels) / (len(labels) - targets)
    return fnrs, fprs, np.asarray(scores)[order]


def ComputeMinDcf(fnrs, fprs, thresholds, p_target, c_miss, c_fa):
    """Returns the minimum of the normalised detection cost (NIST SRE 2008), and its threshold."""
    costs = c_miss * np.asarray(fnrs) * p_target + c_fa * np.asarray(fprs) * (1 - p_target)
    best = np.argmin(costs)
    return costs[best] / min(c_miss * p_target, c_fa * (1 - p_target)), thresholds[best]


def accuracy(output, target, topk=(1,)):
    """Computes the accuracy in percent of output (B, classes) for target (B,).

    A row counts as right if its target is among the k largest. Returns a (1,) tensor for each k of
    topk.
    """
    _, predictions = output.topk(max(topk), dim=1)
    correct = predictions == target.view(-1, 1)
    return [correct[:, :k].any(dim=1).float().mean().mul(100).view(1) for k in topk]


# 2. What a run writes: score.txt, where its numbers come from, files that are whole.

SCORE_LINE = '%d epoch, LR %f, LOSS %f, ACC %2.2f%%, EER %2.2f%%, bestEER %2.2f%%\n'
NUMBER = r'(-?\d+\.\d+|-?inf|nan)'
SCORE_PATTERN = re.compile(
    rf'(\d+) epoch, LR {NUMBER}, LOSS {NUMBER}, ACC {NUMBER}%, EER {NUMBER}%, bestEER {NUMBER}%',
    re.ASCII,
)
PACKAGES = ('torch', 'torchaudio', 'numpy', 'scipy', 'scikit-learn', 'soundfile')


def init_args(args):
    """Sets args.score_save_path and model_save_path below args.save_path; makes the folders."""
    args.score_save_path = os.path.join(args.save_path, 'score.txt')
    args.model_save_path = os.path.join(args.save_path, 'model')
    os.makedirs(args.model_save_path, exist_ok=True)
    return args


def read_scores(path):
    """Reads a score.txt: a list of (epoch, lr, loss, accuracy %, EER %, best EER %).

    The list is empty if there is no such file. Raises BadInput with the line number for a line of
    another format.
    """
    scores = []
    text = read_bytes(path, missing=b'').decode('utf-8', errors='replace')
    for number, line in enumerate(text.splitlines(), 1):
        match = SCORE_PATTERN.fullmatch(line.rstrip())
        if not match:
            raise BadInput(f'{path}, line {number}: not a line of a score.txt: {line.strip()!r}')
        epoch, *figures = match.groups()
        scores.append((int(epoch), *map(float, figures)))
    return scores


@functools.cache  # the code that runs is that of the commit at the start
def provenance(command):
    """Finds out where numbers come from: {'command', 'commit', 'versions': {package: version}}."""
    repository = os.path.dirname(os.path.abspath(__file__))
    git = ['git', '--git-dir=.git', '--work-tree=.']
    git += ['describe', '--always', '--dirty', '--abbrev=40', '--exclude=*']
    commit = ''
    with contextlib.suppress(OSError):
        described = subprocess.run(git, cwd=repository, capture_output=True, text=True)
        commit = described.stdout.strip()
    versions = {'python': platform.python_version()}
    for name in PACKAGES:
        versions[name] = metadata.version(name)
    return {'command': command, 'commit': commit or 'unknown', 'versions': versions}


def read_bytes(path, missing=None):
    """Reads the bytes of a file.

    Returns `missing`, if that is given, for a file that does not exist. Raises BadInput that says
    why the file cannot be read.
    """
    try:
        with open(path, 'rb') as file:
            return file.read()
    except FileNotFoundError as error:
        if missing is not None:
            return missing
        raise BadInput(f'{path}: no such file') from error
    except OSError as error:
        raise BadInput(f'{path}: cannot be read ({error.strerror})') from error


unfinished_files = set()  # temporary files of write_whole


def write_whole(path, write):
    """Writes a file by calling write(binary file); an old file at `path` stays until that is done.

    Raises BadInput if the file cannot be written.
    """
    # Into memory first: torch.save turns an interrupt into another error.
    content = io.BytesIO()
    write(content)

    # A name for each process: two of them may write the same file, for example a cohort.
    temporary = f'{path}.{os.getpid()}.part'
    unfinished_files.add(temporary)
    try:
        with open(temporary, 'wb') as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name != 'nt':  # Windows has no such call
            # Without this, the renamed file might be gone after a power cut.
            folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        why = error.strerror or str(error)
        raise BadInput(
            f'{path}: cannot be written ({why}); an older file of this name is unchanged'
        ) from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        unfinished_files.discard(temporary)


def check_writable(folder, option):
    """Checks that files can be written in a folder, which need not exist yet.

    option: the option that names the folder. Returns the folder, or the nearest one above it that
    exists. Raises BadInput if that cannot be written.
    """
    existing = os.path.abspath(folder)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    try:
        with tempfile.TemporaryFile(dir=existing):
            return existing
    except OSError as error:
        why = f'{existing} cannot be written ({error.strerror})'
        raise BadInput(f'{option} {folder}: {why}; choose another place') from error


def prepare_new_file(path, option):
    """Checks that a script can write a new file, and makes its folder.

    Raises BadInput if the file exists, if the path is that of a folder, or if the folder cannot be
    written.
    """
    if os.path.exists(path):
        raise BadInput(f'{option} {path} already exists; remove it or choose another name')
    folder, name = os.path.split(path)
    if not name:
        raise BadInput(f'{option} {path}: is a folder; add the name of a file')
    check_writable(folder or '.', option)
    os.makedirs(folder or '.', exist_ok=True)


def write_text(path, text):
    """Writes a text file whole, as write_whole does."""
    write_whole(path, lambda file: file.write(text.encode('utf-8', 'surrogateescape')))


def sha256(content):
    """Computes the SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


# 3. Options; processes; the log; errors for people.

PATIENCE = 3 * 3600  # seconds: the first process may go through all files of VoxCeleb2
TIMEOUT = 600  # seconds after which a process that does not answer counts as hung

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT)

common_store = None  # torchrun's store of keys for the processes that train together
turns = itertools.count()  # names the blocks of first_process_first
helpers = []  # processes that load data for this one
held_signals = None  # while helpers start: a list of the signals that have arrived
socket_folder = None  # folder of the helpers' sockets

# The options of the published command. Its scripts pass all of them to each part: f(**vars(args)).
PUBLISHED_OPTIONS = {
    'num_frames', 'max_epoch', 'batch_size', 'n_cpu', 'test_step', 'lr', 'lr_decay', 'train_list',
    'train_path', 'eval_list', 'eval_path', 'musan_path', 'rir_path', 'save_path', 'initial_model',
    'C', 'm', 's', 'n_class', 'eval', 'score_save_path', 'model_save_path',
}  # fmt: skip

# Options that do not change the numbers of a training run. All others are compared when a run is
# continued, so a new option counts unless it is added here.
HARMLESS = {
    'check', 'eval', 'force', 'command', 'save_path', 'score_save_path', 'model_save_path', 'keep',
    'max_bad', 'device', 'n_cpu', 'compile',
    # The lists count by their contents, with --enrol_list as a part of --eval_list.
    'train_path', 'eval_path', 'enrol_list',
    # These change what is computed from scores, and only --eval has a cohort.
    'speaker', 'score_norm', 'top_n', 'cohort_utterances', 'subtract_mean',
}  # fmt: skip


def options_for(function, args):
    """Selects the options of a command that a function or class takes: {name: value}."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in vars(args).items() if name in names}


def refuse_unknown(function, names):
    """Raises TypeError for a name that is not an option of the published command."""
    for name in names:
        if name not in PUBLISHED_OPTIONS:
            raise TypeError(f'{function.__name__} has no option {name}')


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Formats --help with the defaults of the options that have one."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.default == '':
            return action.help
        return super()._get_help_string(action)


LARGEST = {int: 2**31 - 1, float: sys.float_info.max}


def in_range(kind, low, high=None):
    """Returns an argparse type: a finite int or float (kind) in [low, high]."""
    if high is None:
        high = LARGEST[kind]

    def convert(text):
        value = kind(text)
        # Written so that NaN is refused too.
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'{text} is not between {low} and {high}')
        return value

    convert.__name__ = kind.__name__
    return convert


def default_n_cpu():
    """Returns how many processes load data for a training process: its processors, at most 16."""
    return max(1, min(16, available_cpus() // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))


def available_cpus():
    """Returns how many processors this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def command_of(program, argv):
    """Returns the command line of `program` with arguments argv (None: those of this process)."""
    return shlex.join(['python', *program.split(), *(sys.argv[1:] if argv is None else argv)])


def process_rank():
    """Returns the number of this process; 0 is the one that writes, or the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count():
    """Returns how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def first_process_first():
    """Makes the other processes wait until the first one has run the block.

    They may wait for hours, so they ask torchrun's store: a collective would time out after
    minutes. They exit if another process reports an error meanwhile.
    """
    turn = f'turn {next(turns)}'
    if process_rank() > 0:
        until = time.monotonic() + PATIENCE
        while not common_store.check([turn]):
            if common_store.check(['told']):
                sys.exit(2)
            if time.monotonic() > until:
                raise BadInput(
                    f'the first process has not answered for {PATIENCE / 3600:.0f} hours'
                )
            time.sleep(0.1)
    yield
    if process_count() > 1 and process_rank() == 0:
        common_store.set(turn, 'done')


def sum_over_processes(tensor):
    """Sums a tensor in place over the processes that train together; returns it."""
    if process_count() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(items):
    """Joins the lists of all processes that train together into one list."""
    if process_count() == 1:
        return items
    lists = [None] * process_count()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def compare_processes(options, args):
    """Compares {option: value} and the commit of all processes that train together.

    If one of two machines had another seed or list, the training would silently be wrong. Raises
    BadInput that names the differences.
    """
    facts = {f'--{name}': value for name, value in options.items()}
    facts['commit'] = provenance(args.command)['commit']
    everyone = gather([facts])
    differences = []
    for name, value in facts.items():
        others = [other[name] for other in everyone if other[name] != value]
        if others:
            differences.append(f'{name}: {value} and {others[0]}')
    if differences:
        lines = ['the processes that run together differ:', *differences]
        lines.append(
            'Give all machines the same command, commit and lists, and a --save_path that they '
            'share.'
        )
        raise BadInput('\n'.join(lines))


def say(text):
    """Prints a line of the log, only in the first process."""
    if process_rank() == 0:
        print(text, flush=True)


def note(text):
    """Prints a note on standard error, only in the first process; results go to standard output.

    A note that cannot be printed, for example because the terminal is gone, does not end the work.
    """
    if process_rank() == 0:
        with contextlib.suppress(OSError):
            print(f'note: {text}', file=sys.stderr, flush=True)


class BadInput(Exception):
    """Input that cannot be used; the message says what is wrong, where, and what to do."""


@contextlib.contextmanager
def exit_on_bad_input(resume_hint=None):
    """Turns expected errors in the block into a message and exit status 2.

    The expected errors are those that message_for knows, and those that follow when another process
    has died. Other errors are bugs and keep their traceback. If nobody reads the output any more,
    the status is 141, without a message. Of several processes, only the first one that fails prints
    its message. resume_hint: see end_on_signals.
    """
    prepare_streams()
    with end_on_signals(resume_hint):
        try:
            yield
            sys.stdout.flush()
        except KeyboardInterrupt:  # in a notebook, or from another handler
            print('\nstopped by Ctrl-C', file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:
            sys.exit(141)  # the status of a program that SIGPIPE ends
        except Exception as error:
            message = message_for(error) or why_helpers_died(resume_hint)
            message = message or why_not_together(error)
            if message is None:
                raise
            if is_first_to_tell():
                print(f'error: {message}', file=sys.stderr)
            sys.exit(2)
        finally:
            drop_unwritten()


def prepare_streams():
    """Makes standard output and error accept any text, even if the shell closed them (`>&-`)."""
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, 'w', encoding='utf-8'))
        elif hasattr(stream, 'reconfigure'):  # a notebook's stream has no such method
            # A file name need not be UTF-8.
            stream.reconfigure(errors='backslashreplace')


def drop_unwritten():
    """Drops text that cannot be written; otherwise Python tries again at exit, and complains."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, stream.fileno())
            os.close(devnull)


@contextlib.contextmanager
def end_on_signals(resume_hint=None):
    """Makes Ctrl-C and SIGTERM end this process at once in the block, with status 130 or 143.

    If the handler raised an exception instead, a destructor or a callback could swallow it, and the
    run would go on. Files are written whole, so the process may end at any moment. resume_hint():
    returns text to add to the message.

    Notebooks and threads keep their handlers. Under torchrun SIGTERM keeps its default effect,
    because the processes may be waiting for each other outside of Python.
    """
    before = {}
    process = os.getpid()

    def end(number, frame):
        if os.getpid() != process:
            # This is a helper that was forked a moment ago; it ends silently.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if held_signals is not None:
            held_signals.append(number)
            return
        end_by_signal(number, resume_hint)

    if owns_the_process():
        for number in ENDING_SIGNALS:
            under_torchrun = number == signal.SIGTERM and 'TORCHELASTIC_RUN_ID' in os.environ
            # A shell script makes its background jobs ignore Ctrl-C; this stays so.
            if signal.getsignal(number) != signal.SIG_IGN and not under_torchrun:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def hold_signals():
    """Makes Ctrl-C and SIGTERM wait until the end of the block, which starts helpers.

    A helper is known only some time after it was forked. If a signal ended this process before
    that, the helper would not be killed, and could wait for work for ever.

    Blocking signals (pthread_sigmask) would not help: another thread would receive them.
    """
    global held_signals
    held_signals = []
    try:
        yield
    finally:
        numbers = held_signals
        held_signals = None
        for number in numbers:
            signal.raise_signal(number)


def owns_the_process():
    """Returns whether this is the main thread of a command, not of a notebook or a prompt."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    return is_main_thread and not hasattr(sys, 'ps1')


def end_by_signal(number, resume_hint):
    """Ends this process and its helpers at once, with a line on standard error."""
    try:
        # Neither a second signal nor the end of a helper may interrupt this.
        for name in ('SIGINT', 'SIGTERM', 'SIGCHLD'):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        # Kill helpers first: they would print errors, because nobody takes their data.
        for helper in multiprocessing.active_children():
            helper.kill()
        for path in unfinished_files:
            with contextlib.suppress(OSError):
                os.remove(path)
        # A child process shares the folder of its parent.
        if socket_folder and multiprocessing.parent_process() is None:
            shutil.rmtree(socket_folder, ignore_errors=True)
        if process_rank() == 0:
            name = 'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'
            hint = resume_hint() if resume_hint else ''
            # Do not use print: the signal may have interrupted it, and it cannot be entered twice.
            os.write(2, f'\nstopped by {name}{hint}\n'.encode(errors='backslashreplace'))
    finally:
        os._exit(128 + number)


# Words of PyTorch's errors for too little memory.
MEMORY = "out of memory|ALLOC_FAILED|can't allocate memory"

# Errors of the machine, not of this code.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def message_for(error):
    """Returns the message for people about an expected error; None for any other error."""
    if isinstance(error, BadInput):
        # An error of a loading process comes with that process's traceback.
        return str(error).rpartition('BadInput: ')[2].strip()
    if isinstance(error, ModuleNotFoundError):
        return f'the package {error.name} is needed for this: pip install {error.name}'
    if isinstance(error, OSError) and error.filename is not None:
        return f'{error.filename}: {error.strerror}'
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f'{error.strerror} (standard output, a file or a pipe of this process)'
    if isinstance(error, MemoryError):
        return f'{first_line(error)}\nIn training, use a smaller --batch_size, or shorter crops.'
    if isinstance(error, RuntimeError) and re.search(MEMORY, str(error)):
        return f'{first_line(error)}\nIn training, use a smaller --batch_size, or --accumulate.'
    return None


def first_line(error):
    """Returns the first line of a library's error, or its type if it has none."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]


def why_helpers_died(resume_hint):
    """Returns how a process that loads data died, and what to do; None if none died.

    The message of PyTorch's error changes between releases, so this asks the processes. If somebody
    stopped a helper, this ends the command: SIGTERM to a whole job may reach helpers first.
    """
    # A helper that has just closed its pipes may need a moment to end.
    multiprocessing.connection.wait([helper.sentinel for helper in helpers], timeout=1)
    codes = {helper.exitcode for helper in helpers} - {None, 0}
    if not codes:
        return None
    for number in ENDING_SIGNALS:
        if -number in codes and owns_the_process():
            end_by_signal(number, resume_hint)

    code = min(codes)
    if code > 0:
        return f'a loading process ended with status {code}; the lines above say why'
    name = signal.Signals(-code).name
    return f'a loading process was ended by {name}: {REMEDIES.get(name, OTHER_REMEDY)}'


MORE_SHARED_MEMORY = 'use a smaller --n_cpu, or give more (docker run --shm-size 4g)'
REMEDIES = {
    'SIGKILL': 'memory is probably short; use a smaller --n_cpu',
    'SIGBUS': f'shared memory is probably full; {MORE_SHARED_MEMORY}',
}
OTHER_REMEDY = 'a library failed; python -X faulthandler and --n_cpu 0 show where'


def why_not_together(error):
    """Returns the message for an exchange between processes that failed; None for other errors."""
    if process_count() == 1 or not isinstance(error, RuntimeError):
        return None
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    # The traceback of an exchange in the backward pass of batch norm ends in PyTorch's graph.py.
    exchanging = ('distributed', '_functional_collectives.py', 'graph.py')
    parts = {part for file in files for part in file.split(os.sep)}
    if not parts.intersection(exchanging):
        return None
    return (
        f'another of the processes that run together has ended, or has not answered for '
        f'{TIMEOUT / 60:.0f} minutes ({first_line(error)}); torchrun names it'
    )


def is_first_to_tell():
    """Returns whether this process is the first one that reports an error, and notes that."""
    if common_store is None:
        return True
    try:
        return common_store.add('told', 1) == 1
    except RuntimeError:
        return True  # the process that holds the store has ended
