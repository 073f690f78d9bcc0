import gc

import pytest
import torch

from halfbyte.engine.offload import Away, Offload, Passage

CPU = torch.device("cpu")
PIECE = 1024
ROWS = PIECE // (4 * 8)


@pytest.mark.parametrize("rows", [3, ROWS, 2 * ROWS + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_leaves_comes_back_as_it_was(rows, dtype):
    offload = Offload(CPU, PIECE)
    x = torch.randn(rows, 8).to(dtype).requires_grad_()
    away = Away(offload, x)
    assert away.tensor() is x
    away.leave()
    back = away.tensor()
    assert back is not x
    assert torch.equal(back, x)
    assert back.requires_grad
    assert back.is_leaf


def test_host_memory_is_made_once_for_all_sizes_and_used_again():
    offload, bytes_of_steps = Offload(CPU, PIECE), []
    for rows in (2 * ROWS, 7, 2 * ROWS, ROWS + 1):
        passage = Passage(offload)
        ways = [passage.send(torch.randn(rows, 8)) for _ in range(3)]
        for away in ways:
            away.leave()
        for away in reversed(ways):
            away.tensor()
        bytes_of_steps.append(offload.host_bytes)
    assert bytes_of_steps == [6 * PIECE] * 4


def test_the_layer_below_comes_back_while_this_one_runs_and_no_other():
    passage = Passage(Offload(CPU, PIECE))
    ways = [passage.send(torch.full((2, 4), float(i))) for i in range(4)]
    for away in ways:
        away.leave()
    there = [[away._x is not None for away in ways] for _ in (ways[3].tensor(),)]
    assert there == [[False, False, True, False]]
    assert float(ways[2].tensor()[0, 0]) == 2.0
    assert [away._x is not None for away in ways] == [False, True, False, False]


def test_two_forwards_may_come_before_their_backwards():
    offload = Offload(CPU, PIECE)
    first, second = (Passage(offload).send(torch.full((2, 4), float(i))) for i in range(2))
    first.leave()
    second.leave()
    assert float(first.tensor().sum()) == 0.0
    assert float(second.tensor().sum()) == 8.0


def test_a_pass_that_was_given_up_gives_its_memory_back():
    offload = Offload(CPU, PIECE)
    passage = Passage(offload)
    ways = [passage.send(torch.randn(2, 4)) for _ in range(3)]
    for away in ways:
        away.leave()
    ways[2].tensor()
    del passage, ways, away
    gc.collect()
    offload.settle()
    again = Passage(offload)
    kept = [again.send(torch.randn(2, 4)) for _ in range(3)]
    assert len(kept) * PIECE == offload.host_bytes


def test_a_second_backward_is_told_what_it_asks_for():
    away = Away(Offload(CPU, PIECE), torch.randn(2, 4))
    away.leave()
    away.tensor()
    with pytest.raises(RuntimeError, match="one backward"):
        away.tensor()


@pytest.mark.gpu
def test_copies_run_beside_the_computation_and_spoil_nothing():
    device = torch.device("cuda")
    passage = Passage(Offload(device))
    xs = [torch.randn(4096, 4096, device=device) for _ in range(6)]
    expected = [float(x.double().sum()) for x in xs]
    ways = []
    while xs:
        x = xs.pop(0)
        ways.append(passage.send(x))
        torch.mm(x, x)
        ways[-1].leave()
        del x
        torch.randn(4096, 4096, device=device)  # may take its memory
    for away, total in zip(reversed(ways), reversed(expected), strict=True):
        assert float(away.tensor().double().sum()) == total
