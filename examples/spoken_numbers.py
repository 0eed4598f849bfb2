"""Spoken numbers to train a small recogniser on: text, speech, noise, features and batches.

Everything is a NumPy array, so that an example in any framework can share this file. The speech comes from
eSpeak NG, which the wheel ``espeakng-loader`` brings along with its voices; nothing is downloaded. In a
fresh process the same seed gives the same corpus.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BLANK = 0
ALPHABET = "_ abcdefghijklmnopqrstuvwxyz"  # the blank first: a character's label is its position
MEL_BINS = 40
FRAME_PERIOD = 0.01  # seconds

ACCENTS = ("en", "en-us", "en-us-nyc", "en-gb-scotland", "en-gb-x-rp", "en-029")
TRAINING_SPEAKERS = (
    "f1", "f2", "f3", "f5", "m1", "m2", "m3", "m4", "m5", "m6", "m8", "Alicia", "Andy", "Annie", "Denis", "Diogo", "Gene",
    "Henrique", "Hugo", "Jacky", "Lee", "Marco", "Mario", "Mike", "Nguyen", "Reed", "Storm", "adam", "anika", "announcer",
    "antonio", "aunty", "belinda", "boris", "caleb", "david", "edward", "gustave", "ian", "iven", "john", "klatt3",
    "marcelo", "max", "michel", "miguel", "norbert", "pablo", "pedro", "quincy", "rob", "robert", "sandro", "shelby",
    "steph", "travis", "victor", "zac",
)  # fmt: skip
HELD_OUT_SPEAKERS = ("f4", "m7", "Alex", "Andrea", "Michael", "grandpa", "linda", "paul")
SIGNAL_TO_NOISE = (np.inf, 20.0, 15.0, 10.0)  # dB

_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def number_words(number: int) -> str:
    """Spell a number from 0 to 999,999 as it is spoken.

    Examples
    --------
    >>> number_words(342006)
    'three hundred forty two thousand and six'
    """
    if not 0 <= number < 1_000_000:
        raise ValueError(f"number: expected 0 to 999999, got {number}")
    thousands, rest = divmod(number, 1000)
    if thousands and rest:
        link = " thousand and " if rest < 100 else " thousand "
        return _below_thousand(thousands) + link + _below_thousand(rest)
    return _below_thousand(thousands) + " thousand" if thousands else _below_thousand(rest)


def _below_thousand(number: int) -> str:
    hundreds, rest = divmod(number, 100)
    words = [_ONES[hundreds], "hundred"] if hundreds else []
    if rest >= 20:
        words.append(_TENS[rest // 10])
        rest %= 10
    if rest or not words:
        words.append(_ONES[rest])
    return " ".join(words)


def to_labels(text: str) -> np.ndarray:
    """Labels (U,) int32 of a text."""
    return np.array([ALPHABET.index(character) for character in text], dtype=np.int32)


def to_text(labels: Sequence[int] | np.ndarray) -> str:
    """Text of labels: the inverse of `to_labels`. A class beyond the alphabet, as a larger vocabulary may have, is a "?"."""
    return "".join(ALPHABET[label] if label < len(ALPHABET) else "?" for label in labels)


def edit_distance(reference: Sequence, hypothesis: Sequence) -> int:
    """Least number of insertions, deletions and substitutions that turn one sequence into the other."""
    row = list(range(len(hypothesis) + 1))
    for i, wanted in enumerate(reference, 1):
        diagonal, row[0] = row[0], i
        for j, got in enumerate(hypothesis, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (wanted != got))
    return row[-1]


def error_rate(references: Sequence[Sequence], hypotheses: Sequence[Sequence]) -> float:
    """Edit distance over the length of the references, of a whole set at once."""
    edits = sum(edit_distance(r, h) for r, h in zip(references, hypotheses, strict=True))
    return edits / sum(len(r) for r in references)


class _Event(ctypes.Structure):  # espeak_EVENT of speak_lib.h
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class Synthesiser:
    """English speech from eSpeak NG.

    The library keeps its state in global variables: use one object per process, from one thread at a time. A
    little of that state outlives an utterance, and even the object: samples depend on what was said before.
    """

    def __init__(self) -> None:
        import espeakng_loader

        # load_library() of the wheel prints and returns None when it fails; CDLL says what is wrong.
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = Path(espeakng_loader.get_data_path())
        self._variants = data / "voices" / "!v"
        # eSpeak falls back to a path of its build machine when the one given is longer than some 160 bytes, as in a
        # deep virtual environment. The link must live as long as the library, which reads voices when first used.
        self._link = tempfile.TemporaryDirectory()
        short = Path(self._link.name) / "espeak-ng-data"
        short.symlink_to(data, target_is_directory=True)
        retrieval, return_on_error = 2, 0x8000  # without the latter a failure ends the process
        self.sample_rate = self._library.espeak_Initialize(retrieval, 0, str(short).encode(), return_on_error)
        if self.sample_rate <= 0:
            raise RuntimeError(f"eSpeak NG found no voices in {data}")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # it starts from the time of day otherwise
        self._samples: list[np.ndarray] = []
        self._word_starts: list[float] = []
        self._callback = _Callback(self._collect)  # kept: ctypes would free it and the library call into nothing
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples, count: int, events) -> int:
        if samples and count > 0:
            self._samples.append(np.ctypeslib.as_array(samples, (count,)).copy())  # the buffer is used again
        end_of_list, word = 0, 1
        position = 0
        while events[position].type != end_of_list:
            if events[position].type == word:
                self._word_starts.append(events[position].audio_position / 1000)
            position += 1
        return 0

    def say(self, text: str, accent: str, speaker: str, rate: int, pitch: int) -> tuple[np.ndarray, np.ndarray]:
        """Speak a text.

        Parameters
        ----------
        text : str
        accent : str
            A voice of eSpeak, as ``en-us``.
        speaker : str
            A voice variant of eSpeak, as ``f1``.
        rate : int
            Words per minute, from 80 to 450.
        pitch : int
            From 0 to 100; 50 is the speaker's own.

        Returns
        -------
        samples : ndarray of float32
            Between -1 and 1, at `sample_rate`.
        word_starts : ndarray
            Seconds.
        """
        # An unknown variant is no error to eSpeak, which speaks with the plain voice instead.
        if not (self._variants / speaker).is_file():
            raise ValueError(f"speaker: eSpeak NG has no voice variant {speaker!r}")
        if self._library.espeak_SetVoiceByName(f"{accent}+{speaker}".encode()):
            raise ValueError(f"accent: eSpeak NG has no voice {accent!r}")
        rate_parameter, pitch_parameter = 1, 3
        self._library.espeak_SetParameter(rate_parameter, rate, 0)
        self._library.espeak_SetParameter(pitch_parameter, pitch, 0)
        self._samples.clear()
        self._word_starts.clear()
        encoded, by_character, utf8 = text.encode(), 1, 1
        self._library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, by_character, 0, utf8, None, None)
        return np.concatenate(self._samples) / np.float32(32768), np.array(self._word_starts)


def add_noise(samples: np.ndarray, signal_to_noise: float, rng: np.random.Generator) -> np.ndarray:
    """Add background noise of a random colour, between white and brown, at a ratio in dB (inf: none)."""
    if np.isinf(signal_to_noise):
        return samples
    length = 1 << (len(samples) - 1).bit_length()  # a power of two: the fast Fourier transform of others is slower
    spectrum = np.fft.rfft(rng.standard_normal(length, dtype=np.float32))
    spectrum[1:] *= np.arange(1, len(spectrum)) ** -rng.uniform(0, 1)
    spectrum[0] = 0
    noise = np.fft.irfft(spectrum)[: len(samples)]
    gain = np.sqrt(np.mean(samples**2) / np.mean(noise**2)) * 10 ** (-signal_to_noise / 20)
    return (samples + gain * noise).astype(np.float32)


def log_mel(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """Log-mel features (frames, MEL_BINS) float32, a frame every FRAME_PERIOD."""
    import kaldi_native_fbank

    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = sample_rate
    options.frame_opts.frame_shift_ms = 1000 * FRAME_PERIOD
    options.frame_opts.frame_length_ms = 23  # 507 samples at 22,050 Hz: 25 ms would double the Fourier transform
    options.frame_opts.dither = 0  # Kaldi's default is a random one
    options.frame_opts.snip_edges = False
    options.mel_opts.num_bins = MEL_BINS
    options.mel_opts.high_freq = 8000
    bank = kaldi_native_fbank.OnlineFbank(options)
    bank.accept_waveform(sample_rate, samples.tolist())
    bank.input_finished()
    return np.stack([bank.get_frame(frame) for frame in range(bank.num_frames_ready)])


@dataclass(frozen=True)
class Utterance:
    """A sentence, who spoke it in how much noise (dB), its features (T, MEL_BINS) and the start of its words (s)."""

    text: str
    speaker: str
    signal_to_noise: float
    features: np.ndarray
    word_starts: np.ndarray


def corpus(
    training: int, held_out: int, seed: int = 0, advance: Callable[[], object] = lambda: None, tuning: bool = False
) -> tuple[list[Utterance], list[Utterance]]:
    """Synthesise a training and a held-out set; the held-out one has other speakers and other numbers.

    Parameters
    ----------
    training, held_out : int
        Number of utterances.
    seed : int
    advance : callable
        Called after every utterance.
    tuning : bool
        Hold out some of the training speakers in place of those by whom results are reported.
    """
    speakers = (TRAINING_SPEAKERS[8:], TRAINING_SPEAKERS[:8]) if tuning else (TRAINING_SPEAKERS, HELD_OUT_SPEAKERS)
    rng = np.random.default_rng(seed)
    # As many numbers of three digits as of six, or nearly all would have six.
    numbers = dict.fromkeys(int(10 ** rng.uniform(2, 6)) for _ in range(2 * (training + held_out)))
    texts = [number_words(number) for number in numbers][: training + held_out]
    synthesiser = Synthesiser()

    def utterance(index: int, speakers: Sequence[str]) -> Utterance:
        speaker = speakers[index % len(speakers)]
        signal_to_noise = SIGNAL_TO_NOISE[rng.integers(len(SIGNAL_TO_NOISE))]
        samples, word_starts = synthesiser.say(
            texts[index], str(rng.choice(ACCENTS)), speaker, int(rng.integers(150, 250)), int(rng.integers(30, 71))
        )
        features = log_mel(add_noise(samples, signal_to_noise, rng), synthesiser.sample_rate)
        advance()
        return Utterance(texts[index], speaker, signal_to_noise, features, word_starts)

    return (
        [utterance(index, speakers[0]) for index in range(training)],
        [utterance(index, speakers[1]) for index in range(training, training + held_out)],
    )


@dataclass(frozen=True)
class Batch:
    """Padded arrays of B utterances: features (B, T, MEL_BINS), targets (B, U) and their lengths (B,)."""

    features: np.ndarray
    feature_lengths: np.ndarray
    targets: np.ndarray
    target_lengths: np.ndarray


def batch(utterances: Sequence[Utterance], multiples: tuple[int, int] = (1, 1)) -> Batch:
    """Pad utterances with zeros to the longest of them, and on to multiples of so many frames and labels.

    Large multiples make few shapes, for a framework that compiles a model for each of them.
    """
    features, feature_lengths = _pad([utterance.features for utterance in utterances], multiples[0])
    targets, target_lengths = _pad([to_labels(utterance.text) for utterance in utterances], multiples[1])
    return Batch(features, feature_lengths, targets, target_lengths)


def _pad(arrays: Sequence[np.ndarray], multiple: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(array) for array in arrays], dtype=np.int32)
    longest = -(-lengths.max() // multiple) * multiple
    padded = np.zeros((len(arrays), longest, *arrays[0].shape[1:]), arrays[0].dtype)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array
    return padded, lengths


def epoch(
    utterances: Sequence[Utterance], batch_size: int, rng: np.random.Generator, multiples: tuple[int, int] = (1, 1)
) -> Iterator[Batch]:
    """Every utterance once, in batches of like length and random order; `multiples` as of `batch`."""
    # Lengths are jittered by a tenth, so that an utterance keeps no fixed company.
    lengths = np.array([len(utterance.features) for utterance in utterances])
    order = np.argsort(lengths * rng.uniform(0.9, 1.1, len(lengths)))
    groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for group in rng.permutation(len(groups)):
        yield batch([utterances[index] for index in groups[group]], multiples)


def batches(
    utterances: Sequence[Utterance], batch_size: int, rng: np.random.Generator, multiples: tuple[int, int] = (1, 1)
) -> Iterator[Batch]:
    """Epoch after epoch, without end."""
    while True:
        yield from epoch(utterances, batch_size, rng, multiples)
