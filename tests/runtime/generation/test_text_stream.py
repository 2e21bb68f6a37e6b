"""Streamed text is what decoding at once gives, for every kind of decoder and any token ids."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models

from runtime.generation.text import TextCodec

WORDS = [
    *("<s>", "</s>", "##ing", "##", "▁a", "▁", "b", "a", "x", "é", "w</w>", "</w>", ".", "'", "n't", "|", "<pad>"),
    *("<0x0A>", "<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>", "<0xE2>", "<0x82>", "<0xAC>", "<0x", "<0x+A>"),
    *("Ġ", "Ġhi", "Ċ", "ĠðŁ", "Ļ", "Ĥ", "â", "Ĥ¬", "\ufffd", "ï", "¿", "½", "ab", "aab", "ba", "", "  "),
]
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
DECODERS = {
    "none": None,
    "byte level": decoders.ByteLevel(),
    "byte fallback": decoders.Sequence(LLAMA),
    "Metaspace": decoders.Metaspace(),
    "Metaspace after byte fallback": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "WordPiece": decoders.WordPiece(),
    "WordPiece without cleaning": decoders.WordPiece(cleanup=False),
    "BPE with suffixes": decoders.BPEDecoder(),
    "CTC": decoders.CTC(),
    "replacing in the whole text": decoders.Sequence([decoders.Fuse(), decoders.Replace("aab", "Q")]),
    "a regular expression over it": decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("a+b"), "Q")]),
    "a regular expression over tokens": decoders.Replace(Regex("a+b"), "Q"),
    "stripping": decoders.Sequence([decoders.Strip("a", 1, 0), decoders.ByteFallback(), decoders.Strip("x", 2, 0)]),
    "several": decoders.Sequence([decoders.WordPiece(), decoders.BPEDecoder(), decoders.ByteLevel()]),
}


def codec_with(decoder: decoders.Decoder | None, folder: Path) -> TextCodec:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "<s>"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<added é>", normalized=False)])
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.save(str(folder / "tokenizer.json"))
    return TextCodec(folder, {})


def ids_of(codec: TextCodec, *words: str) -> list[int]:
    vocabulary = codec.tokenizer.get_vocab()
    return [vocabulary[word] for word in words]


def streamed(codec: TextCodec, ids: list[int]) -> str:
    stream = codec.stream()
    return "".join([*map(stream.push, ids), stream.finish()])


def compare(codec: TextCodec, count: int, above: int = 5) -> None:
    """Random ids, some of them outside the tokenizer."""
    rng = random.Random(7)
    largest = codec.tokenizer.get_vocab_size() + above
    for _ in range(count):
        ids = [rng.randrange(largest) for _ in range(rng.choice([0, 1, 2, 3, 5, 10, 40]))]
        assert streamed(codec, ids) == codec.decode(ids), ids


@pytest.mark.parametrize("name", DECODERS)
def test_any_decoder_streams_what_it_decodes(name: str, tmp_path: Path) -> None:
    compare(codec_with(DECODERS[name], tmp_path), 1500)


@pytest.mark.parametrize("model", ["stories_folder", "smollm2_folder", "gemma3_folder"])
def test_real_tokenizers_stream_what_they_decode(model: str, request: pytest.FixtureRequest) -> None:
    codec = TextCodec(request.getfixturevalue(model), {})
    compare(codec, 1500)
    if (first := codec.tokenizer.token_to_id("<0x00>")) is not None:  # bytes that are no text, among letters
        rng = random.Random(3)
        letters = ids_of(codec, *"aey")
        for _ in range(1500):
            ids = [rng.choice([first + rng.randrange(256), rng.choice(letters)]) for _ in range(rng.randrange(12))]
            assert streamed(codec, ids) == codec.decode(ids), ids


def test_broken_bytes_become_replacement_characters_and_the_text_goes_on(tmp_path: Path) -> None:
    codec = codec_with(decoders.Sequence(LLAMA), tmp_path)
    stream = codec.stream()
    ids = ids_of(codec, "<0x0A>", "<0xF0>", "b", "<0x0A>", "b")
    assert [stream.push(token) for token in ids] == ["", "", "\ufffd\ufffdb", "", "\nb"]
    assert stream.finish() == ""


def test_a_byte_that_can_become_nothing_is_sent_at_once(tmp_path: Path) -> None:
    codec = codec_with(decoders.ByteLevel(), tmp_path)
    stream = codec.stream()
    lead, rest = ids_of(codec, "â", "Ĥ¬")
    assert [stream.push(token) for token in (lead, lead, rest, rest)] == ["", "\ufffd", "€", "\ufffd\ufffd"]


def test_a_decoder_that_fails_fails_at_the_end(tmp_path: Path) -> None:
    codec = codec_with(decoders.Sequence([decoders.Fuse(), decoders.Strip("a", 0, 2)]), tmp_path)
    stream = codec.stream()
    assert stream.push(*ids_of(codec, "")) == ""
    with pytest.raises(Exception, match=r"tokenizer\.json cannot decode these tokens") as caught:
        stream.finish()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["byte level", "byte fallback", "BPE with suffixes", "WordPiece"])
def test_streaming_takes_time_in_proportion_to_the_text(name: str, tmp_path: Path) -> None:
    codec = codec_with(DECODERS[name], tmp_path)
    broken = ids_of(codec, "Ĥ", "a", "<0xF0>", "<0x0A>")

    def seconds(count: int) -> float:
        start = time.perf_counter()
        streamed(codec, broken * count)
        return time.perf_counter() - start

    short = min(seconds(2_000) for _ in range(3))
    assert seconds(32_000) < 16 * 6 * short  # 256 times as long if every token cost the whole text
