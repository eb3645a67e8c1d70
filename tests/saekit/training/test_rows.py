"""Whole token rows: every one once an epoch, shared by ranks, resumable, and which of their positions are whose."""

import numpy as np
import pytest
import torch

from saekit.activations import ActivationStore, StoreView
from saekit.errors import StoreError
from saekit.training.rows import TokenRowBatches


def test_positions_are_those_of_normal_training_tokens(padded: ActivationStore) -> None:
    train, test = padded.split(0.3)
    source = TokenRowBatches(train, batch_size=24 * 3, seed=0)
    table = {row.tobytes(): number for number, row in enumerate(padded.tokens().astype(np.int64))}
    saw_padding = False
    for _ in range(4):
        rows = source.next_rows()
        for r, tokens in enumerate(rows.tokens.numpy()):
            # Equal documents have equal rows, on one side of the split all of them.
            number = table[tokens.tobytes()]
            kinds, documents = padded.kinds()[number], padded.documents()[number]
            np.testing.assert_array_equal(rows.is_replaced[r].numpy(), train.mask[number])
            np.testing.assert_array_equal(rows.is_padding[r].numpy(), kinds == 1)
            assert not (rows.is_replaced[r].numpy() & test.mask[number]).any()
            for t in range(24):
                counts = t + 1 < 24 and train.mask[number, t : t + 2].all() and documents[t] == documents[t + 1]
                assert bool(rows.is_counted[r, t]) == bool(counts)
            expected = padded.read_rows([number])[0].float()
            torch.testing.assert_close(rows.hidden[r][rows.is_replaced[r]], expected[rows.is_replaced[r]])
            saw_padding |= bool((kinds == 1).any())
    assert saw_padding


def test_every_row_comes_once_an_epoch_and_ranks_share_batches(padded: ActivationStore) -> None:
    train, _ = padded.split(0.3)
    whole = TokenRowBatches(train, batch_size=24 * 4, seed=5)
    parts = [TokenRowBatches(train, batch_size=24 * 4, seed=5, rank=rank, world_size=2) for rank in (0, 1)]
    seen = []
    for _ in range(len(train.rows()) // 4):
        rows = whole.next_rows()
        seen.append(rows.hidden)
        assert torch.equal(torch.cat([part.next_rows().hidden for part in parts]), rows.hidden)
    assert torch.cat(seen).shape[0] == len(train.rows()) // 4 * 4
    state = whole.state_dict()
    assert state["epoch"] == 1
    again = TokenRowBatches(train, batch_size=24 * 4, seed=5)
    again.load_state_dict(state)
    assert torch.equal(again.next_batch(), whole.next_batch())
    with pytest.raises(StoreError, match="saved with seed 5, needs 6 to go on"):
        TokenRowBatches(train, batch_size=24 * 4, seed=6).load_state_dict(state)


def test_fewer_rows_than_a_batch_are_refused(padded: ActivationStore) -> None:
    train, _ = padded.split(0.3)
    few = np.zeros_like(train.mask)
    few[:2] = train.mask[:2]
    with pytest.raises(StoreError, match="token rows to train on, one batch over all ranks needs 4"):
        TokenRowBatches(StoreView(padded, few), batch_size=96, seed=0)
