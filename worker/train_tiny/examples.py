"""Turn a unit of the corpus into token ids in the formats that Code Llama was trained on.

    completion  <s> text [</s>]
    PSM         <s> ▁<PRE> prefix ▁<SUF> suffix ▁<MID> middle ▁<EOT>
    SPM         <s> ▁<PRE> ▁<SUF> suffix ▁<MID> prefix middle ▁<EOT>

Suffix and middle are encoded without SentencePiece's dummy prefix (Meta, codellama/llama/tokenizer.py,
`encode_infilling`, and the paper's section 2.3). Everything here is a pure function of its arguments, the
random generator among them.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import sentencepiece

from train_tiny.corpus import Unit
from train_tiny.tokenizer import INFILLING_GUARD, INFILLING_PIECES

#: Loss weight of the tokens to fill in, of plain text, and of the text around a hole. Around a hole only one
#: token in `PROMPT_STRIDE` counts: without a weight a token costs no row of logits, a fifth of a step's time.
MIDDLE_WEIGHT, TEXT_WEIGHT, PROMPT_WEIGHT, PROMPT_STRIDE = 1.0, 0.35, 0.3, 3
#: Share of infilling examples in suffix-prefix-middle order.
SPM_SHARE = 0.35
#: Body shown after a docstring hole, characters, one of these: short ones buy more docstrings per second.
BODY_CHARS = (100, 160, 240, 240, 480, 1500)
#: Characters per token, about, to cut text before it is encoded.
CHARS_PER_TOKEN = 3


@dataclass(frozen=True)
class Example:
    """Token ids and the loss weight of each as a target."""

    ids: list[int]
    weights: list[float]


class Formatter:
    """Encodes text and assembles examples with one SentencePiece model."""

    def __init__(self, sp: sentencepiece.SentencePieceProcessor) -> None:
        self.sp = sp
        self.bos: int = sp.bos_id()
        self.eos: int = sp.eos_id()
        self.pre, self.suf, self.mid, self.eot = (sp.piece_to_id(piece) for piece in INFILLING_PIECES)

    def encode(self, text: str) -> list[int]:
        """Encode with the dummy prefix."""
        ids: list[int] = self.sp.encode(text)
        return ids

    def encode_infilling(self, text: str) -> list[int]:
        """Encode without the dummy prefix."""
        ids: list[int] = self.sp.encode(INFILLING_GUARD + text)
        return ids[2:]

    def psm_prompt(self, prefix: str, suffix: str) -> list[int]:
        """Return the prompt whose continuation is the middle."""
        before, after = self.encode(prefix), self.encode_infilling(suffix)
        return [self.bos, self.pre, *before, self.suf, *after, self.mid]

    def spm_prompt(self, prefix: str, suffix: str) -> list[int]:
        """Return the suffix-first prompt whose continuation is the middle."""
        after, before = self.encode_infilling(suffix), self.encode(prefix)
        return [self.bos, self.pre, self.suf, *after, self.mid, *before]

    def infilling(self, prefix: str, middle: str, suffix: str, is_spm: bool) -> Example:
        """Return a whole infilling example."""
        prompt = self.spm_prompt(prefix, suffix) if is_spm else self.psm_prompt(prefix, suffix)
        answer = [*self.encode_infilling(middle), self.eot]
        around = [PROMPT_WEIGHT if index % PROMPT_STRIDE == 0 else 0.0 for index in range(len(prompt))]
        return Example(prompt + answer, around + [MIDDLE_WEIGHT] * len(answer))

    def completion(self, text: str, is_whole: bool) -> Example:
        """Return plain text; `is_whole` says that it ends here, and not because it was cut."""
        ids = [self.bos, *self.encode(text), *([self.eos] if is_whole else [])]
        return Example(ids, [TEXT_WEIGHT] * len(ids))


def make_example(unit: Unit, formatter: Formatter, rng: random.Random, max_tokens: int) -> Example | None:
    """Make one random example of at most `max_tokens` tokens, or None if the unit does not fit."""
    draw = rng.random()
    if not unit.is_function:
        text = unit.context[: max_tokens * CHARS_PER_TOKEN]
        example = formatter.completion(text, False) if draw < 0.5 else _random_hole(text, formatter, rng)
    elif unit.summary and draw < 0.80:
        example = _docstring_hole(unit, formatter, rng, max_tokens)
    elif unit.summary and draw < 0.90:
        example = _commented_function(unit, formatter, rng)
    elif draw < 0.95 or (not unit.summary and draw < 0.6):
        example = formatter.completion(dedent(unit.head + _documented_body(unit), unit.head), True)
    else:
        text = dedent(unit.head + _documented_body(unit), unit.head)
        example = _random_hole(text[: max_tokens * CHARS_PER_TOKEN], formatter, rng)
    if len(example.ids) <= max_tokens:
        return example
    # A cut completion is still a completion; a cut infilling example has lost its answer.
    is_completion = example.weights[0] == TEXT_WEIGHT
    return Example(example.ids[:max_tokens], example.weights[:max_tokens]) if is_completion else None


def dedent(text: str, head: str) -> str:
    """Move a function to the left margin."""
    margin = len(head) - len(head.lstrip(" "))
    return re.sub(rf"(?m)^ {{1,{margin}}}", "", text) if margin else text


def docstring_hole(unit: Unit, max_body_chars: int) -> tuple[str, str, str]:
    """Return prefix, middle and suffix of the hole at the summary of a function, at the left margin."""
    prefix = dedent(unit.head + unit.indent, unit.head) + '"""'
    suffix = dedent('"""\n' + cut_lines(unit.body, max_body_chars), unit.head)
    return prefix, unit.summary, suffix


def cut_lines(text: str, max_chars: int) -> str:
    """Cut text after a whole line."""
    return text if len(text) <= max_chars else text[: text.rfind("\n", 0, max_chars) + 1]


def _docstring_hole(unit: Unit, formatter: Formatter, rng: random.Random, max_tokens: int) -> Example:
    room = max_tokens * CHARS_PER_TOKEN
    body_chars = rng.choice(BODY_CHARS)
    prefix, middle, suffix = docstring_hole(unit, body_chars)
    lines = unit.docstring.strip().count("\n") + 1
    if 1 < lines < 9 and rng.random() < 0.3:
        middle = dedent(unit.docstring, unit.head)
    if rng.random() < 0.4:
        # As in a real file: indented, after the class line or the lines before.
        suffix = '"""\n' + cut_lines(unit.body, body_chars)
        middle = middle if middle == unit.summary else unit.docstring
        context = unit.context[-rng.randrange(1, max(2, room // 4)) :].partition("\n")[2]
        if unit.class_line and rng.random() < 0.5:
            context = unit.class_line + "\n" + ("" if rng.random() < 0.5 else "\n")
        prefix = context + unit.head + unit.indent + '"""'
    return formatter.infilling(prefix, middle, suffix, rng.random() < SPM_SHARE)


def _documented_body(unit: Unit) -> str:
    return f'{unit.indent}"""{unit.summary}"""\n{unit.body}' if unit.summary else unit.body


def _commented_function(unit: Unit, formatter: Formatter, rng: random.Random) -> Example:
    words = unit.summary if rng.random() < 0.6 else " ".join(split_name(unit.name)) or unit.summary
    return formatter.completion(f"# {words}\n" + dedent(unit.head + unit.body, unit.head), True)


def split_name(name: str) -> Iterator[str]:
    """Yield the lower-case words of an identifier."""
    yield from (word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name))


def _random_hole(text: str, formatter: Formatter, rng: random.Random) -> Example:
    if rng.random() < 0.5:
        # Whole lines.
        starts = [0] + [match.end() for match in re.finditer("\n", text)]
        first = rng.randrange(len(starts))
        start = starts[first]
        stop = [*starts, len(text)][min(first + rng.choice((1, 1, 2, 3)), len(starts))]
    else:
        start = rng.randrange(len(text))
        stop = min(len(text), start + rng.choice((5, 15, 40, 100)))
    return formatter.infilling(text[:start], text[start:stop], text[stop:], rng.random() < SPM_SHARE)


class Stream:
    """An endless, repeatable order of examples, grouped into batches of similar length.

    Examples come in rounds. A round depends on the seed, its number and the length limit only, so that
    training resumes where it stopped. Within a round, examples are sorted by length, cut into batches, and
    the batches shuffled.
    """

    #: Examples in one round.
    ROUND_EXAMPLES = 3072
    #: Share of documented functions, of other functions; the rest are windows of files.
    DOCUMENTED_SHARE, OTHER_SHARE = 0.80, 0.10
    #: Batch lengths are multiples of this many tokens.
    LENGTH_STEP = 16

    def __init__(self, units: list[Unit], formatter: Formatter, seed: int, batch_tokens: int) -> None:
        documented = [unit for unit in units if unit.summary]
        other = [unit for unit in units if unit.is_function and not unit.summary]
        self._pools = [documented, other, [unit for unit in units if not unit.is_function]]
        #: The current epoch and order of each pool.
        self._orders: list[tuple[int, list[int]]] = [(-1, []) for _ in self._pools]
        self._formatter = formatter
        self._seed = seed
        self._batch_tokens = batch_tokens

    def round(self, number: int, max_tokens: int) -> list[list[Example]]:
        """Return the batches of one round, with no example longer than `max_tokens`."""
        rng = random.Random(f"{self._seed} {number}")
        counts = [int(share * self.ROUND_EXAMPLES) for share in (self.DOCUMENTED_SHARE, self.OTHER_SHARE)]
        counts.append(self.ROUND_EXAMPLES - sum(counts))
        examples = []
        for kind, (pool, count) in enumerate(zip(self._pools, counts, strict=True)):
            for position in range(number * count, (number + 1) * count) if pool else ():
                unit = pool[self._shuffled(kind, position)]
                example = make_example(unit, self._formatter, rng, max_tokens)
                if example is not None and len(example.ids) > 8:
                    examples.append(example)
        examples.sort(key=lambda example: len(example.ids))
        batches = list(self._cut(examples))
        rng.shuffle(batches)
        return batches

    def _shuffled(self, kind: int, position: int) -> int:
        """Return the unit at a position of an endless sequence that takes each unit once per epoch."""
        epoch, offset = divmod(position, len(self._pools[kind]))
        if self._orders[kind][0] != epoch:
            order = list(range(len(self._pools[kind])))
            random.Random(f"{self._seed} {kind} {epoch}").shuffle(order)
            self._orders[kind] = (epoch, order)
        return self._orders[kind][1][offset]

    def _cut(self, examples: list[Example]) -> Iterator[list[Example]]:
        """Cut sorted examples into batches of at most `batch_tokens`, padding included."""
        batch: list[Example] = []
        for example in examples:
            if batch and (len(batch) + 1) * self.padded_length(example) > self._batch_tokens:
                yield batch
                batch = []
            batch.append(example)
        if batch:
            yield batch

    def padded_length(self, example: Example) -> int:
        """Return the length of a batch whose longest example this is, tokens."""
        return -(-len(example.ids) // self.LENGTH_STEP) * self.LENGTH_STEP
