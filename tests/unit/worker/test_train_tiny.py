"""The recipe of the tiny model: held-out split, training formats, tokenizer twins, and a resumable order."""

import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("sentencepiece")
pytest.importorskip("transformers")
# The recipe is not part of the wheel; it is run from its folder.
sys.path.insert(0, str(Path(__file__).parents[3] / "worker"))

import sentencepiece

from train_tiny.corpus import Unit, cut_file, is_held_out, read, summarize, write
from train_tiny.examples import MIDDLE_WEIGHT, PROMPT_WEIGHT, Formatter, Stream, docstring_hole, make_example
from train_tiny.tokenizer import INFILLING_PIECES, sample_lines, to_fast, train
from train_tiny.train import Run, length_limit, lr_share, read_arguments

#: The split must never move: these were held out when the shipped model was trained.
FIRST_HELD_OUT = [f"package/module{number}.py" for number in (16, 20, 28)]

SOURCE = '''
class Basket:
    """A basket."""

    @property
    def total_price(self) -> float:
        """Return the price of all items together.

        Discounts are included.
        """
        return sum(item.price for item in self.items) - self.discount

    def add_item(self, item, count=1):
        """Add an item to the basket `count` times."""
        self.items.extend([item] * count)


def find_basket(name, baskets):
    for basket in baskets:
        if basket.name == name:
            return basket
    raise KeyError(name)
'''


@pytest.fixture(scope="module")
def units() -> list[Unit]:
    # Many files, so that both sides of the split and every kind of unit are there.
    return [unit for number in range(120) for unit in cut_file(f"shop/basket{number}.py", SOURCE)]


@pytest.fixture(scope="module")
def model(units: list[Unit]) -> bytes:
    return train([*sample_lines(units, seed=1), "0123456789 _@()*"], vocab_size=400)


@pytest.fixture(scope="module")
def formatter(model: bytes) -> Formatter:
    return Formatter(sentencepiece.SentencePieceProcessor(model_proto=model))


def test_held_out_split_is_by_file_and_stays_the_same() -> None:
    paths = [f"package/module{number}.py" for number in range(4000)]

    held_out = [path for path in paths if is_held_out(path)]

    assert 60 < len(held_out) < 140
    assert held_out[:3] == FIRST_HELD_OUT


def test_functions_are_cut_with_header_summary_and_body() -> None:
    functions = {unit.name: unit for unit in cut_file("shop.py", SOURCE) if unit.is_function}

    price = functions["total_price"]
    assert price.head == "    @property\n    def total_price(self) -> float:\n"
    assert price.summary == "Return the price of all items together."
    assert price.body == "        return sum(item.price for item in self.items) - self.discount\n"
    assert price.class_line == "class Basket:"
    assert not functions["find_basket"].summary


@pytest.mark.parametrize(
    "docstring", ["", "TODO", "x", "See https://example.org/a for more.", "Parameters\n----"]
)
def test_what_is_no_sentence_is_no_summary(docstring: str) -> None:
    assert summarize(docstring) == ""


def test_units_survive_writing_and_reading(units: list[Unit], tmp_path: Path) -> None:
    write(units[:9], tmp_path / "corpus.jsonl")

    assert read(tmp_path / "corpus.jsonl") == units[:9]


def test_psm_example_decodes_back_to_its_parts(units: list[Unit], formatter: Formatter) -> None:
    unit = next(unit for unit in units if unit.name == "total_price")
    prefix, middle, suffix = docstring_hole(unit, 500)

    ids = formatter.infilling(prefix, middle, suffix, is_spm=False).ids

    suf, mid = ids.index(formatter.suf), ids.index(formatter.mid)
    assert ids[:2] == [formatter.bos, formatter.pre]
    assert ids[-1] == formatter.eot
    assert formatter.sp.decode(ids[2:suf]) == prefix
    assert formatter.sp.decode(ids[suf + 1 : mid]) == suffix
    assert formatter.sp.decode(ids[mid + 1 : -1]) == middle
    assert prefix.endswith('-> float:\n    """')
    assert suffix.startswith('"""\n    return')


def test_spm_example_puts_the_prefix_before_the_middle(formatter: Formatter) -> None:
    ids = formatter.infilling("def a():", " return", " 1\n", is_spm=True).ids

    expected = [
        formatter.bos,
        formatter.pre,
        formatter.suf,
        *formatter.encode_infilling(" 1\n"),
        formatter.mid,
    ]
    expected += [*formatter.encode("def a():"), *formatter.encode_infilling(" return"), formatter.eot]
    assert ids == expected


def test_only_the_middle_has_full_weight(formatter: Formatter) -> None:
    example = formatter.infilling("def a():", " return", " 1\n", is_spm=False)

    answer = len(formatter.encode_infilling(" return")) + 1
    assert example.weights[-answer:] == [MIDDLE_WEIGHT] * answer
    assert set(example.weights[:-answer]) == {0.0, PROMPT_WEIGHT}


@pytest.mark.parametrize("text", ['"""\n    x', "  a", "", "\n", "naïve ☺"])
def test_infilling_encoding_has_no_dummy_prefix(text: str, formatter: Formatter) -> None:
    assert formatter.sp.decode([*formatter.encode("."), *formatter.encode_infilling(text)]) == "." + text


def test_infilling_pieces_are_last_and_no_text_makes_them(formatter: Formatter) -> None:
    size = formatter.sp.get_piece_size()
    special = [formatter.sp.piece_to_id(piece) for piece in INFILLING_PIECES]

    assert special == list(range(size - len(special), size))
    assert not set(special) & set(formatter.encode(" ".join(INFILLING_PIECES) + "</s>"))


def test_both_tokenizer_files_give_the_same_ids(model: bytes, formatter: Formatter) -> None:
    fast = to_fast(model)

    for text in (SOURCE, "  \t\r\n", "naïve ☺ 🎉", "1234", "x"):
        assert fast.encode(text, add_special_tokens=False).ids == formatter.encode(text)


def test_every_example_fits_the_limit(units: list[Unit], formatter: Formatter) -> None:
    rng = random.Random(5)

    examples = [make_example(unit, formatter, rng, 96) for unit in units for _ in range(3)]

    lengths = [len(example.ids) for example in examples if example is not None]
    assert len(lengths) > 100
    assert max(lengths) <= 96


def test_a_resumed_stream_gives_the_same_batches(units: list[Unit], formatter: Formatter) -> None:
    stream = Stream(units, formatter, seed=3, batch_tokens=2048)
    first = [stream.round(number, 128) for number in range(3)]

    resumed = Stream(units, formatter, seed=3, batch_tokens=2048).round(2, 128)

    assert resumed == first[2]
    assert first[0] != first[1]


def test_batches_stay_within_their_tokens(units: list[Unit], formatter: Formatter) -> None:
    stream = Stream(units, formatter, seed=3, batch_tokens=2048)

    for batch in stream.round(0, 128):
        assert len(batch) * max(stream.padded_length(example) for example in batch) <= 2048


def test_learning_rate_rises_stays_and_falls() -> None:
    shares = [lr_share(used / 100) for used in range(101)]

    assert shares[0] < 0.05
    assert max(shares) == shares[20] == 1.0
    assert shares[50:] == sorted(shares[50:], reverse=True)
    assert shares[100] == pytest.approx(0.02)


def test_long_examples_come_late() -> None:
    assert length_limit(0.0) < length_limit(0.5) < length_limit(1.0) == 2048


def test_a_resumed_run_takes_the_step_that_was_next(units: list[Unit], model: bytes, tmp_path: Path) -> None:
    write(units, tmp_path / "corpus.jsonl")
    (tmp_path / "tokenizer.model").write_bytes(model)
    folders = [
        "--corpus",
        str(tmp_path / "corpus.jsonl"),
        "--tokenizer",
        str(tmp_path),
        "--out",
        str(tmp_path),
    ]
    shape = ["--width", "64", "--heads", "1", "--inner", "64", "--layers", "1", "--device", "cpu"]
    run = Run(read_arguments([*folders, *shape, "--batch-tokens", "512"]))
    batches = run.batches()
    for _ in range(3):
        run.step(next(batches))
    run.save()

    resumed = Run(read_arguments([*folders, *shape, "--batch-tokens", "512", "--resume"]))

    batch, resumed_batch = next(batches), next(resumed.batches())
    assert resumed_batch == batch
    assert resumed.step(resumed_batch) == pytest.approx(run.step(batch), rel=1e-4)
