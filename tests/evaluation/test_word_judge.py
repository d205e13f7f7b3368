"""The judge: right on real joins it has never heard, disturbed ones too, and wrong where words are wrong."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqtok.audio.phrases import SpokenNumbers, join_words, phrase_split
from vqtok.audio.resampling import resample
from vqtok.audio.words import recordings_of
from vqtok.evaluation.word_judge import WordJudge, align_words, judge_speech, scores_by_word, word_edits, word_scores

pytest.importorskip("soundfile")
RATE = 16_000


@pytest.fixture(scope="module")
def judge():
    return WordJudge()


@pytest.fixture(scope="module")
def phrases():
    items = [SpokenNumbers("test", 8, seed=21)[i] for i in range(8)]
    return [item["audio"][0] for item in items], [item["text"] for item in items]


def _noise(sound, decibels):
    noise = np.random.default_rng(0).standard_normal(len(sound))
    return (sound + noise * np.sqrt((sound**2).mean() / 10 ** (decibels / 10))).astype(np.float32)


def _coarse(sound):
    """Magnitudes off by 4 dB at random and phases by about a radian, as of a coarse codec."""
    generator, window = torch.Generator().manual_seed(0), torch.hann_window(512)
    spectrum = torch.stft(torch.from_numpy(sound), 512, 128, window=window, return_complex=True)
    jitter, turn = (torch.randn(spectrum.shape, generator=generator) for _ in range(2))
    spectrum = spectrum * 10 ** (4 * jitter / 20) * torch.exp(1j * turn)
    return torch.istft(spectrum, 512, 128, window=window, length=len(sound)).numpy()


DISTURBED = {
    "as it is": lambda sound: sound,
    "20 dB softer": lambda sound: sound * 0.1,
    "noise at 15 dB": lambda sound: _noise(sound, 15),
    "coarse codec": _coarse,
    "4 % faster": lambda sound: resample(sound[None], 104, 100)[0],
    "a quarter of a second of silence around": lambda sound: np.pad(sound, RATE // 4),
}


@pytest.mark.parametrize("kind", DISTURBED)
def test_real_joins_are_heard(judge, phrases, kind):
    sounds, texts = phrases
    scores = judge.judge([DISTURBED[kind](sound) for sound in sounds], texts, RATE)
    assert scores["num_words"] == sum(len(text.split()) for text in texts) and scores["num_phrases"] == 8
    assert scores["word_accuracy"] > 0.97, scores


def test_a_soft_word_beside_loud_ones_is_heard(judge):
    for words, key in ((["monday", "july", "third"], 0), (["kilo", "mike"], 2)):
        sound, spoken = join_words(words, key)
        _, start, stop = spoken[1]
        sound[start:stop] *= 0.5  # 6 dB
        assert judge.read([sound], RATE) == [words]


@pytest.mark.slow
@pytest.mark.parametrize("kind", DISTURBED)
def test_many_real_joins_are_heard(judge, kind):
    items = [SpokenNumbers("test", 100, seed=7)[i] for i in range(100)]
    sounds = [DISTURBED[kind](item["audio"][0]) for item in items]
    scores = judge.judge(sounds, [item["text"] for item in items], RATE)
    assert scores["word_accuracy"] > 0.97, scores


def test_every_word_alone(judge):
    words = list(recordings_of())[::7]
    heard = judge.read([join_words([word], key)[0] for key, word in enumerate(words)], RATE)
    assert heard == [[word] for word in words]


def test_wrong_missing_and_additional_words_are_counted(judge):
    sound = join_words(["two", "four", "six"])[0]
    texts = ["two four six", "two five six", "two four six eight", "four six"]
    scores = judge.judge([sound] * 4, texts, RATE)
    assert (scores["num_substitutions"], scores["num_deletions"], scores["num_insertions"]) == (1, 1, 1)
    assert scores["word_accuracy"] == pytest.approx(1 - 3 / 12)
    assert scores["words_recognised"] == pytest.approx(10 / 12) and scores["phrase_accuracy"] == 0.25


def test_silence_and_noise_say_nothing_that_was_asked_for(judge):
    assert judge.read([np.zeros(RATE, np.float32), np.zeros(1, np.float32)], RATE) == [[], []]
    noise = (0.1 * np.random.default_rng(0).standard_normal(2 * RATE)).astype(np.float32)
    assert judge.judge([noise], ["seven nine"], RATE)["words_recognised"] == 0


def test_reversed_speech_is_not_heard_as_speech(judge, phrases):
    sounds, texts = phrases
    scores = judge.judge([sound[::-1].copy() for sound in sounds[:4]], texts[:4], RATE)
    assert scores["words_recognised"] < 0.4


def test_another_rate_and_channels_make_no_difference(judge, phrases):
    sounds, texts = phrases
    stereo = np.stack([sounds[0], sounds[0]])
    other = resample(sounds[0][None], RATE, 24_000)
    assert judge.read([stereo], RATE) == judge.read([other], 24_000) == [texts[0].split()]


def test_a_sound_does_not_depend_on_its_neighbours(judge, phrases):
    sounds, _ = phrases
    assert judge.read(sounds[:3], RATE) == [judge.read([sound], RATE)[0] for sound in sounds[:3]]


@pytest.mark.parametrize(
    ("audio", "texts", "complaint"),
    [
        ([np.zeros(9)], [], "1 sounds and 0 texts"),
        ([], [], "nothing to judge"),
        ([np.zeros((9, 2))], ["one"], r"shape \(9, 2\)"),
        ([np.zeros(0)], ["one"], r"shape \(0,\)"),
        ([np.full(900, np.nan)], ["one"], "NaN"),
    ],
)
def test_errors_say_what_is_wrong(judge, audio, texts, complaint):
    with pytest.raises(ValueError, match=complaint):
        judge.judge(audio, texts, RATE)


@pytest.mark.parametrize(
    ("wanted", "heard", "edits"),
    [("", "", (0, 0, 0)), ("a b", "", (0, 2, 0)), ("", "a", (0, 0, 1)), ("a b c", "a c", (0, 1, 0))]
    + [("a b c", "a x c d", (1, 0, 1)), ("a b", "b a", (0, 1, 1))],
)
def test_edits_by_hand(wanted, heard, edits):
    assert sum(word_edits(wanted.split(), heard.split())) == sum(edits)
    if wanted != "a b" or heard != "b a":  # of which two cheapest ways there are more
        assert word_edits(wanted.split(), heard.split()) == edits


@given(st.lists(st.sampled_from("abc"), max_size=5), st.lists(st.sampled_from("abc"), max_size=5))
def test_words_beside_each_other_are_both_texts_in_their_order(one, other):
    pairs = align_words(one, other)
    assert [word for word, _ in pairs if word] == one and [word for _, word in pairs if word] == other
    assert ("", "") not in pairs and sum(a != b for a, b in pairs) == sum(word_edits(one, other))


def test_scores_of_words_by_hand():
    texts, heard = ["Two four", "two six two"], [["two", "fourth"], ["two", "two", "one"]]
    assert scores_by_word(texts, heard) == {"four": (0, 1), "six": (0, 1), "two": (3, 3)}
    scores = word_scores(texts, heard)
    assert (scores["num_substitutions"], scores["num_deletions"], scores["num_insertions"]) == (1, 1, 1)
    assert scores["word_accuracy"] == pytest.approx(0.4) and scores["words_recognised"] == pytest.approx(0.6)


class Copier:
    """A tokenizer that keeps everything, and a pipeline that says all words but those of the third phrase."""

    processor = SimpleNamespace(sampling_rate=RATE)

    def reconstruct(self, sounds, sampling_rate):
        assert sampling_rate == RATE
        return [sound.copy() for sound in sounds]

    def __call__(self, texts, seed):
        self.texts, self.seed = texts, seed
        sounds = [join_words(text.split(), key=9)[0] for text in texts]
        return [np.zeros(RATE, np.float32) if index == 2 else sound for index, sound in enumerate(sounds)]


def test_what_is_spoken_is_judged_beside_the_originals():
    copier = Copier()
    judged = judge_speech(copier, copier, 5, seed=4)
    texts = judged["texts"]
    assert copier.texts == texts and copier.seed == 4 and len(set(texts)) == 5
    assert all(phrase_split(text) == "test" for text in texts)
    assert [[word for word, _, _ in words] for words in judged["words"]] == [text.split() for text in texts]
    for kind in ("real", "reconstructed"):
        assert judged[kind]["scores"]["word_accuracy"] == 1 and judged[kind]["heard"] == [t.split() for t in texts]
    spoken = judged["spoken"]
    missed = len(texts[2].split())
    assert spoken["heard"][2] == [] and spoken["scores"]["num_deletions"] == missed
    assert sum(asked - right for right, asked in spoken["by_word"].values()) == missed
    assert judged["seconds_per_second"] > 1 and len(spoken["sounds"]) == 5


@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
def test_edits_are_a_distance(one, other):
    substitutions, deletions, insertions = word_edits(one, other)
    assert len(one) - deletions + insertions == len(other)
    back = word_edits(other, one)
    assert sum(back) == substitutions + deletions + insertions
    assert (sum(back) == 0) == (one == other) and sum(back) <= max(len(one), len(other))
