"""Which lists and files does exps.conditions make of a list, and what does it refuse?"""

import numpy as np
import pytest
import soundfile
from cli import command_line, refusal
from conftest import trial_lines, wave, write_wav

from dataLoader import Codec
from exps import conditions

pytestmark = pytest.mark.usefixtures('quick')


def run(corpus, trials='trials.txt', **options):
    """Makes the conditions of a list of the corpus, in its folder out/."""
    chosen = {'audio': corpus / 'audio', 'n_cpu': 0, 'out': corpus / 'out', **options}
    conditions.main([str(corpus / trials), *command_line(**chosen)])


def test_conditions_of_a_list(corpus, tree, capsys):
    wanted = ['gsm', 'mp3', 'noise', 'room', 'short']
    options = {'conditions': wanted}
    options |= {'musan_path': tree['musan_path'], 'rir_path': tree['rir_path']}
    for out in ('one', 'two'):
        run(corpus, out=corpus / out, **options)
    assert '120 files' in capsys.readouterr().out
    lists = sorted(path.name for path in (corpus / 'one').glob('*.txt'))
    assert lists == sorted(f'{name}.txt' for name in ['clean', *wanted, 'gsm_cross'])
    original = [line.split() for line in (corpus / 'trials.txt').read_text().splitlines()]
    cross = [line.split() for line in (corpus / 'one/gsm_cross.txt').read_text().splitlines()]
    assert cross[0][1:] == [original[0][1][:-3] + 'clean.wav', original[0][2][:-3] + 'gsm.wav']
    assert [line[0] for line in cross] == [line[0] for line in original]

    files = sorted((corpus / 'one/audio').rglob('*.wav'))
    assert len(files) == 20 * 6
    for path in files:
        same = corpus / 'two/audio' / path.relative_to(corpus / 'one/audio')
        assert path.read_bytes() == same.read_bytes(), 'drawn only by the name of the file'
    clean, _ = soundfile.read(corpus / 'one/audio/id0/a/0.clean.wav')
    noisy, _ = soundfile.read(corpus / 'one/audio/id0/a/0.noise.wav')
    noise = noisy - clean
    assert 10 * np.log10(np.sum(clean**2) / np.sum(noise**2)) == pytest.approx(10, abs=0.5)
    assert soundfile.info(corpus / 'one/audio/id0/a/0.short.wav').frames == 32000

    # What is there is kept.
    kept = corpus / 'one/audio/id0/a/0.gsm.wav'
    before = kept.stat().st_mtime_ns
    (corpus / 'one/audio/id0/a/1.gsm.wav').unlink()
    run(corpus, out=corpus / 'one', **options)
    assert '1 files' in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == before
    message = refusal(capsys, run, corpus, out=corpus / 'x', conditions='fax')
    assert '--conditions fax' in message
    assert not (corpus / 'x').exists()


def test_noise_is_of_the_speaker_and_recording_and_as_loud_as_asked_for(corpus):
    for category in ('noise', 'speech', 'music'):
        # Ten seconds, of which each recording takes 2.5 at another place.
        samples = 0.1 * np.random.default_rng(0).standard_normal(160000)
        write_wav(corpus / 'musan' / category / '1.wav', samples, subtype='PCM_16')
    names = [f'id{speaker}/{session}/1.wav' for speaker in range(2) for session in 'xy']
    for number, name in enumerate(names):
        loudness = (1.0, 0.01)[number % 2]
        audio = loudness * wave(number, 40000)
        write_wav(corpus / 'audio' / name, audio, subtype='PCM_16')
    (corpus / 'few.txt').write_text(trial_lines(names))
    run(corpus, 'few.txt', musan_path=corpus / 'musan', conditions='noise')
    noises = []
    for name in names:
        stem = corpus / 'out/audio' / name[:-4]
        clean, _ = soundfile.read(f'{stem}.clean.wav')
        noisy, _ = soundfile.read(f'{stem}.noise.wav')
        original, _ = soundfile.read(corpus / 'audio' / name)
        np.testing.assert_array_equal(clean, original)
        noise = noisy * np.dot(clean, clean) / np.dot(noisy, clean) - clean
        # 0.5 dB for what of the noise is in phase with the speech, and for 16 bits.
        assert 10 * np.log10(np.sum(clean**2) / np.sum(noise**2)) == pytest.approx(10, abs=0.5)
        noises.append(noise)
    correlations = np.abs(np.corrcoef(noises) - np.eye(4))
    assert correlations.max() < 0.9, 'one noise under several recordings'


def test_every_file_gets_noise_if_some_of_it_is_silent(corpus):
    for number in range(6):
        sound = 0.1 * np.random.default_rng(number).standard_normal(80000) * (number == 0)
        write_wav(corpus / f'musan/noise/{number}.wav', sound, subtype='PCM_16')
    for category in ('speech', 'music'):
        write_wav(corpus / 'musan' / category / '0.wav', sound + 0.1, subtype='PCM_16')
    run(corpus, musan_path=corpus / 'musan', conditions='noise')
    for path in (corpus / 'out/audio').rglob('*.noise.wav'):
        clean, _ = soundfile.read(str(path).replace('noise.wav', 'clean.wav'))
        noisy, _ = soundfile.read(path)
        assert np.abs(noisy - clean).max() > 0.01


def test_noise_that_is_silent_as_a_whole_is_refused(corpus, capsys):
    for category in ('noise', 'speech', 'music'):
        write_wav(corpus / 'musan' / category / '0.wav', np.zeros(80000), subtype='PCM_16')
    options = {'musan_path': corpus / 'musan', 'conditions': 'noise'}
    assert '--musan_path' in refusal(capsys, run, corpus, **options)


def test_a_bad_file_is_named_once(corpus, capsys):
    (corpus / 'audio/id1/a/2.wav').write_bytes(b'not audio')
    message = refusal(capsys, run, corpus, conditions=['gsm', 'short'])
    assert message.count('id1/a/2.wav') == 1


def test_a_loud_file_is_turned_down_and_not_clipped_in_clean_too(corpus):
    path = corpus / 'audio/id0/a/0.wav'
    loud = 3 * wave(0, 40000) / np.abs(wave(0, 40000)).max()
    write_wav(path, loud, subtype='FLOAT')
    run(corpus, conditions='short')
    clean, _ = soundfile.read(corpus / 'out/audio/id0/a/0.clean.wav')
    np.testing.assert_allclose(clean, loud / 3, atol=1e-4)


def test_conditions_that_would_mix_files_are_refused(corpus, tree, capsys):
    cases = {
        'would be written to the same file': 'id0/a/0.flac',
        'give paths below --audio': str(corpus / 'audio/id0/a/0.wav'),
        'without ..': '../audio/id0/a/0.wav',
    }
    for words, name in cases.items():
        (corpus / 'odd.txt').write_text(f'1 id0/a/0.wav {name}\n0 id0/a/0.wav id1/a/0.wav\n')
        options = {'out': corpus / 'odd', 'conditions': 'short'}
        assert words in refusal(capsys, run, corpus, 'odd.txt', **options)
        assert not (corpus / 'odd').exists()

    run(corpus, conditions='short')
    noise = {'musan_path': tree['musan_path'], 'conditions': 'noise'}
    run(corpus, **noise)
    assert 'snr' in refusal(capsys, run, corpus, snr=5, **noise)
    text = (corpus / 'trials.txt').read_text()
    (corpus / 'trials.txt').write_text(''.join(text.splitlines(keepends=True)[1:]))
    assert str(corpus / 'out') in refusal(capsys, run, corpus, conditions='short')


def test_conditions_leave_out_codecs_that_libsndfile_lacks(corpus, monkeypatch, capsys):
    lacking = {**conditions.CODECS, 'opus': Codec(16000, 'OGG', 'NO_SUCH_CODING')}
    monkeypatch.setattr(conditions, 'CODECS', lacking)
    with pytest.raises(SystemExit) as stop:
        run(corpus, conditions='opus')
    assert stop.value.code == 2
    streams = capsys.readouterr()
    assert 'opus' in streams.out and '--conditions opus' in streams.err
