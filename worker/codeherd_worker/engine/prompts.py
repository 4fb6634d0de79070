r"""Turn a request into the token ids that the model was trained to read.

Owns: the formats of Meta's reference code (llama/generation.py of github.com/meta-llama/codellama), the stop
ids that go with each, line ends, and what is left out when a prompt does not fit. Pure functions: the same
request, vocabulary and model give the same prompt in any process. Does not know how text is encoded
(`codeherd_worker.engine.vocabulary`) or what happens to the ids.

    completion            <s> prompt
    infilling             <s> ▁<PRE> prefix ▁<SUF> suffix ▁<MID>
    with suffix_first     <s> ▁<PRE> ▁<SUF> suffix ▁<MID> prefix
    chat, 7B 13B 34B      <s> [INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST] {answer} </s> <s> ...
    chat, 70B             <s>  Source: system\n\n {system} <step>  Source: user\n\n {user} <step> ...
                           Source: assistant\nDestination: user\n\n

Every text is encoded with the dummy prefix, but for the suffix, which continues other text. Control ids are
placed here and never come from user text: `</s>` or `▁<PRE>` in a file are plain characters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from codeherd_schema.errors import PromptTooLong, ReservedText, UnsupportedByModel
from codeherd_schema.models import ChatFormat, ServedModel, check_fit, most_prompt_tokens, texts
from codeherd_schema.requests import (
    ChatRequest,
    GenerateRequest,
    InfillRequest,
    Message,
    Overflow,
    Request,
)
from codeherd_schema.results import Cut
from codeherd_worker.engine.pieces import SPACE_MARK
from codeherd_worker.engine.vocabulary import Vocabulary

#: Text that Meta's chat code refuses in any message, in both formats (SPECIAL_TAGS in generation.py).
_CHAT_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<step>")

#: Part of the room that a prefix gets when prefix and suffix both have too much. What stands before the hole
#: says more about it than what follows. Peers give a prefix 3:2 (Continue: prefixPercentage 0.3,
#: maxSuffixPercentage 0.2) to 4:1 (llama.vim: n_prefix 256 lines, n_suffix 64).
_PREFIX_SHARE = 3 / 4

#: A cut moves to the next line border if that costs at most this part of the text that is kept.
_LINE_SEARCH_SHARE = 1 / 8


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the engine needs to run a request, and what the detokenizer needs to tell its text."""

    token_ids: tuple[int, ...]
    #: Ids that end the text.
    stop_ids: frozenset[int]
    #: The request's stop strings as the detokenizer will spell them.
    stop_strings: tuple[str, ...]
    #: Whether a space that the model says first belongs to the encoding and not to the text.
    strip_first_space: bool
    #: The request's line ends, which the model never sees: it reads and writes LF.
    newline: str
    #: What was left out to make the prompt fit.
    cut: tuple[Cut, ...] = ()


@dataclass(frozen=True, slots=True)
class _Body:
    token_ids: list[int]
    stop_ids: frozenset[int]
    strip_first_space: bool
    cut: tuple[Cut, ...] = ()


def build_prompt(request: Request, vocabulary: Vocabulary, model: ServedModel) -> Prompt:
    """Return the prompt of `request` for a model that uses this vocabulary.

    Raises:
        UnsupportedByModel: the model or its vocabulary cannot serve this kind of job.
        ReservedText: a chat message holds the format's own tags; change the message.
        PromptTooLong: never retry; shorten the text, ask for fewer new tokens, or allow truncation.
    """
    if not model.can(request.kind):
        raise UnsupportedByModel(f"model `{model.name}` cannot serve `{request.kind}` jobs")
    match request:
        case GenerateRequest():
            body = _completion(request, vocabulary, model)
        case InfillRequest():
            body = _infilling(request, vocabulary, model)
        case ChatRequest():
            body = _chat(request, vocabulary, model)
    check_fit(model, request, len(body.token_ids))
    newline = _newline(texts(request))
    return Prompt(
        token_ids=tuple(body.token_ids),
        stop_ids=body.stop_ids,
        stop_strings=tuple(_lf(stop).replace("\n", newline) for stop in request.sampling.stop),
        strip_first_space=body.strip_first_space,
        newline=newline,
        cut=body.cut,
    )


# Completion


def _completion(request: GenerateRequest, vocabulary: Vocabulary, model: ServedModel) -> _Body:
    room = _room(request, model) - 1
    kept = _keep_end("prompt", _lf(request.prompt), room, vocabulary)
    return _Body(
        token_ids=[vocabulary.specials.bos, *kept.token_ids],
        stop_ids=frozenset({vocabulary.specials.eos}),
        # Meta drops a first space here too, which joins two words. It only belongs to the encoding where no
        # text stands before it.
        strip_first_space=not kept.token_ids,
        cut=_cuts(request, model, kept),
    )


# Infilling


def _infilling(request: InfillRequest, vocabulary: Vocabulary, model: ServedModel) -> _Body:
    bos, eos = vocabulary.specials.bos, vocabulary.specials.eos
    prefix_id, suffix_id = vocabulary.specials.prefix, vocabulary.specials.suffix
    middle_id, eot = vocabulary.specials.middle, vocabulary.specials.eot
    if prefix_id is None or suffix_id is None or middle_id is None or eot is None:
        raise UnsupportedByModel(f"the tokenizer of `{model.name}` has no infilling tokens")
    room = _room(request, model) - 4
    kept_prefix, kept_suffix = _keep_around_hole(_lf(request.prefix), _lf(request.suffix), room, vocabulary)
    prefix, suffix = kept_prefix.token_ids, kept_suffix.token_ids
    if request.suffix_first:
        ids = [bos, prefix_id, suffix_id, *suffix, middle_id, *prefix]
    else:
        ids = [bos, prefix_id, *prefix, suffix_id, *suffix, middle_id]
    return _Body(
        token_ids=ids,
        stop_ids=frozenset({eot, eos}),
        # A middle is encoded without the dummy prefix, so all its spaces are its own. With the suffix first,
        # prefix and middle were encoded as one text (paper, section 2.3): where there is no prefix, the
        # middle carries the dummy prefix of both.
        strip_first_space=request.suffix_first and not prefix,
        cut=_cuts(request, model, kept_prefix, kept_suffix),
    )


# Chat


def _chat(request: ChatRequest, vocabulary: Vocabulary, model: ServedModel) -> _Body:
    found = next((tag for tag in _CHAT_TAGS for m in request.messages if tag in m.content), None)
    if found is not None:
        raise ReservedText(
            f"a message holds `{found}`, which the chat format uses itself",
            hint="write the tag another way, for example with a space inside",
        )
    messages = [m.model_copy(update={"content": _lf(m.content)}) for m in request.messages]
    # Dropping turns encodes the same texts again.
    encode = functools.cache(vocabulary.encode)
    dialog_ids: Callable[[Sequence[Message]], list[int]]
    if model.chat is ChatFormat.STEP:
        step = vocabulary.specials.step
        if step is None:
            raise UnsupportedByModel(f"the tokenizer of `{model.name}` has no `<step>` token")
        dialog_ids = functools.partial(_step_dialog, encode=encode, bos=vocabulary.specials.bos, step=step)
        stop_ids = frozenset({step, vocabulary.specials.eos})
    else:
        bos, eos = vocabulary.specials.bos, vocabulary.specials.eos
        dialog_ids = functools.partial(_inst_dialog, encode=encode, bos=bos, eos=eos)
        stop_ids = frozenset({eos})
    ids, cut = _keep_last_turns(messages, dialog_ids, request, model)
    return _Body(token_ids=ids, stop_ids=stop_ids, strip_first_space=True, cut=cut)


def _inst_dialog(
    messages: Sequence[Message], *, encode: Callable[[str], list[int]], bos: int, eos: int
) -> list[int]:
    system, turns = _split_system(messages)
    contents = [turn.content for turn in turns]
    if system is not None:
        contents[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{contents[0]}"
    ids: list[int] = []
    for user, answer in zip(contents[:-1:2], contents[1::2], strict=True):
        ids += [bos, *encode(f"[INST] {user.strip()} [/INST] {answer.strip()} "), eos]
    return [*ids, bos, *encode(f"[INST] {contents[-1].strip()} [/INST]")]


def _step_dialog(
    messages: Sequence[Message], *, encode: Callable[[str], list[int]], bos: int, step: int
) -> list[int]:
    system, turns = _split_system(messages)
    ids = [bos]
    # This format always has a system turn, if only an empty one.
    for role, content in [("system", system or ""), *((turn.role, turn.content) for turn in turns)]:
        ids += encode(f" Source: {role}")
        if content:
            ids += encode(f"\n\n {content.strip()}")
        ids.append(step)
    return [*ids, *encode(" Source: assistant\nDestination: user"), *encode("\n\n ")]


def _split_system(messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
    if messages[0].role == "system":
        return messages[0].content, messages[1:]
    return None, messages


def _keep_last_turns(
    messages: Sequence[Message],
    dialog_ids: Callable[[Sequence[Message]], list[int]],
    request: ChatRequest,
    model: ServedModel,
) -> tuple[list[int], tuple[Cut, ...]]:
    """Drop the oldest question and answer until the dialog fits; system and last turn always stay."""
    _, turns = _split_system(messages)
    head = messages[: len(messages) - len(turns)]
    removed = 0
    ids = dialog_ids(messages)
    if request.overflow is Overflow.TRUNCATE:
        while len(ids) > _room(request, model) and removed + 2 < len(turns):
            removed += 2
            ids = dialog_ids([*head, *turns[removed:]])
    return ids, (Cut(part="messages", removed=removed, total=len(messages)),) if removed else ()


# What is kept when not all fits


@dataclass(frozen=True, slots=True)
class _Kept:
    """The encoding of the part of a text that is kept; `total` is the number of ids of all of it."""

    part: str
    token_ids: list[int]
    total: int


def _room(request: Request, model: ServedModel) -> int:
    """Return how many ids the prompt may have before something is cut."""
    if request.overflow is Overflow.REFUSE:
        return most_prompt_tokens(request)
    return model.context_window - request.sampling.max_new_tokens


def _cuts(request: Request, model: ServedModel, *parts: _Kept) -> tuple[Cut, ...]:
    cuts = tuple(
        Cut(part=kept.part, removed=kept.total - len(kept.token_ids), total=kept.total)
        for kept in parts
        if kept.total > len(kept.token_ids)
    )
    if cuts and not any(kept.token_ids for kept in parts):
        raise PromptTooLong(
            f"`{model.name}` has room for {model.context_window} tokens, and beside "
            f"{request.sampling.max_new_tokens} new ones nothing of the prompt fits",
            hint="ask for fewer new tokens",
        )
    return cuts


def _keep_around_hole(prefix: str, suffix: str, room: int, vocabulary: Vocabulary) -> tuple[_Kept, _Kept]:
    """Share the room between both sides of the hole; what one side does not need goes to the other."""
    suffix_needs = len(vocabulary.encode_raw(suffix))
    prefix_room = max(int(room * _PREFIX_SHARE), room - suffix_needs)
    kept_prefix = _keep_end("prefix", prefix, prefix_room, vocabulary)
    suffix_room = room - len(kept_prefix.token_ids)
    return kept_prefix, _keep_start("suffix", suffix, suffix_room, vocabulary)


def _keep_end(part: str, text: str, room: int, vocabulary: Vocabulary) -> _Kept:
    """Cut from the left until the encoding of what is kept has at most `room` ids."""
    ids = vocabulary.encode(text)
    total = len(ids)
    # A space mark encodes as a space does: with real spaces, the ids' bytes are the text's bytes.
    data = text.replace(SPACE_MARK, " ").encode()
    while ids and len(ids) > room:
        # The kept text is encoded anew, so that its ids are Meta's for just that text. It gets a dummy prefix
        # of its own, which often costs one id: hence one less. Should that not do, the next round cuts again.
        kept_ids = ids[len(ids) - max(room - 1, 0) :]
        start = len(data) - sum(len(vocabulary.token_bytes(i)) for i in kept_ids)
        data = _from_line_start(data, start)
        ids = vocabulary.encode(data.decode())
    return _Kept(part, ids, total)


def _keep_start(part: str, text: str, room: int, vocabulary: Vocabulary) -> _Kept:
    """Cut from the right until the encoding of what is kept has at most `room` ids."""
    ids = vocabulary.encode_raw(text)
    total = len(ids)
    data = text.replace(SPACE_MARK, " ").encode()
    while ids and len(ids) > room:
        end = sum(len(vocabulary.token_bytes(i)) for i in ids[: max(room, 0)])
        data = _to_line_end(data, end)
        ids = vocabulary.encode_raw(data.decode())
    return _Kept(part, ids, total)


def _from_line_start(data: bytes, start: int) -> bytes:
    """Return what follows `start`, from a line start if one is near, else from a whole character."""
    near = start + int((len(data) - start) * _LINE_SEARCH_SHARE)
    # From one byte earlier: `start` may be a line start itself.
    line_start = data.find(b"\n", max(start - 1, 0), near) + 1
    return data[line_start:] if line_start else data[start:].decode(errors="ignore").encode()


def _to_line_end(data: bytes, end: int) -> bytes:
    """Return what precedes `end`, up to a line end if one is near, else up to a whole character."""
    near = end - int(end * _LINE_SEARCH_SHARE)
    line_end = data.rfind(b"\n", near, end) + 1
    return data[:line_end] if line_end else data[:end].decode(errors="ignore").encode()


# Line ends


def _lf(text: str) -> str:
    # Code Llama overlooks `▁<SUF>` before CRLF (github.com/ex3ndr/llama-coder/pull/34), and CRLF is rare in
    # what it was trained on. A lone CR is no line end and stays.
    return text.replace("\r\n", "\n")


def _newline(parts: Sequence[str]) -> str:
    """Return the line end that most lines have."""
    crlf = sum(part.count("\r\n") for part in parts)
    return "\r\n" if crlf > sum(part.count("\n") for part in parts) - crlf else "\n"
