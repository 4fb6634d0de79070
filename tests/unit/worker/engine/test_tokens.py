from __future__ import annotations

import torch

from codeherd_worker.engine.logprobs import TokenLogprobs
from codeherd_worker.engine.sampling import Sampled
from codeherd_worker.engine.tokens import NOT_FINITE, Pending, Token


def test_each_slot_gets_its_token_and_idle_rows_say_nothing() -> None:
    pending = Pending([4, -1, 0], Sampled(torch.tensor([7, 8, 9])), {})

    assert pending.read() == {4: [Token(7)], 0: [Token(9)]}


def test_drafts_count_up_to_the_first_wrong_one() -> None:
    sampled = Sampled(torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]]))
    drafts = {0: (1, 2), 1: (1, 9), 2: (9, 2), 3: (1,)}

    tokens = Pending([0, 1, 2, 3, 4], sampled, {}, drafts).read()

    # The token after the last right guess is the model's own: it counts too.
    assert {slot: [token.id for token in new] for slot, new in tokens.items()} == {
        0: [1, 2, 3],
        1: [1, 2],
        2: [1],
        3: [1, 2],
        4: [1],
    }


def test_a_bad_row_has_no_token_and_ends_its_drafts() -> None:
    sampled = Sampled(torch.tensor([[NOT_FINITE, 5], [5, NOT_FINITE]]))

    tokens = Pending([0, 1], sampled, {}, {0: (5,), 1: (5,)}).read()

    assert tokens == {0: [Token(None)], 1: [Token(5), Token(None)]}


def test_logprobs_belong_to_their_place_and_are_as_many_as_asked() -> None:
    sampled = Sampled(
        torch.tensor([[1, 2], [3, 4]]),
        chosen_logprob=torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]),
        top_ids=torch.tensor([[[10, 11], [12, 13]], [[14, 15], [16, 17]]]),
        top_logprobs=torch.tensor([[[-0.5, -1.5], [-2.5, -3.5]], [[-4.5, -5.5], [-6.5, -7.5]]]),
    )

    tokens = Pending([6, 3], sampled, {6: 2, 3: 1}, {6: (1,)}).read()

    assert tokens[6] == [
        Token(1, TokenLogprobs(1, -1.0, ((10, -0.5), (11, -1.5)))),
        Token(2, TokenLogprobs(2, -2.0, ((12, -2.5), (13, -3.5)))),
    ]
    assert tokens[3] == [Token(3, TokenLogprobs(3, -3.0, ((14, -4.5),)))]


def test_logprobs_go_to_those_who_asked_when_the_step_was_launched() -> None:
    asked = {1: 1}
    sampled = Sampled(
        torch.tensor([5, 6]),
        chosen_logprob=torch.tensor([-1.0, -2.0]),
        top_ids=torch.tensor([[7], [8]]),
        top_logprobs=torch.tensor([[-0.5], [-1.5]]),
    )
    pending = Pending([0, 1], sampled, asked)

    asked.clear()

    assert pending.read() == {0: [Token(5)], 1: [Token(6, TokenLogprobs(6, -2.0, ((8, -1.5),)))]}
