"""Tensors for layers that are trained: recall, regression, groups and flip-flops, against brute force."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from foveate.errors import BadArgument
from foveate.tasks import association, groups, regression
from foveate.tasks.association import TESTING, TRAINING, Mqar, recalled
from foveate.tasks.groups import IGNORE, READ, WRITE, flip_flop, group, tracked, word_problem
from foveate.tasks.regression import Regression, averaging, error_by_examples, least_squares, nearest

GROUPS = {"parity": 2, "Z60": 60, "S3": 6, "S5": 120, "A5": 60, "A4xZ5": 60}

# -- recall ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (64, 16), (130, 7), (8, 1), (256, 64)])
def test_a_dictionary_recalls_everything(length, pairs, fill, seed):
    task = Mqar(length, pairs, vocabulary=512, fill=fill)
    made = task.generate(50, seed)
    inputs, labels, evidence = (each.tolist() for each in (made.inputs, made.labels, made.evidence))
    answers = torch.zeros_like(made.inputs)
    for row in range(50):
        keys, values = inputs[row][: 2 * pairs : 2], inputs[row][1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= key < 256 for key in keys) and all(256 <= value < 512 for value in values)
        known = dict(zip(keys, values, strict=True))
        asked = [place for place, label in enumerate(labels[row]) if label != -100]
        assert sorted(inputs[row][place] for place in asked) == sorted(keys), "each key once"
        for place in range(length):
            token = inputs[row][place]
            answers[row, place] = known.get(token, 0)
            if place in asked:
                assert place >= 2 * pairs and place % 2 == 0
                assert labels[row][place] == known[token]
                source = evidence[row][place]
                assert inputs[row][source : source + 2] == [token, known[token]]
            else:
                assert evidence[row][place] == -1
                if place >= 2 * pairs:
                    assert token not in known, "a key comes nowhere else"
                    assert fill or token == 0
    assert recalled(answers, made.labels).tolist() == [1.0] * 50


def test_guesses_of_values_recall_nothing(seed):
    made = Mqar(64, 16).generate(60, seed)
    guesses = torch.randint(4096, 8192, made.inputs.shape)
    assert recalled(guesses, made.labels).mean() < 0.01
    logits = torch.nn.functional.one_hot(made.labels.clamp_min(0), 8192).float()
    assert recalled(logits, made.labels).tolist() == [1.0] * 60


def test_early_slots_are_asked_first_as_the_power_says(seed):
    for power, first in ((0.01, None), (1.0, 1 / 30)):
        made = Mqar(64, 1, 512, power).generate(4000, seed)
        share = float((made.labels[:, 2] != -100).double().mean())
        weights = [power * (g + 1) ** (power - 1) for g in range(31)]
        expected = weights[0] / sum(weights)
        assert abs(share - expected) < 5 * (expected * (1 - expected) / 4000) ** 0.5
        assert first is None or abs(expected - first) < 0.01


def test_equal_seeds_equal_sequences_and_the_settings_are_zoologys(seed):
    one, two, other = (Mqar(64, 4).generate(8, s).inputs for s in (seed, seed, seed + 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert [(m.length, m.pairs, n) for m, n in TRAINING] == [
        *((64, 4, 100_000), (128, 8, 20_000)),
        *((256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000)),
    ]
    assert [(m.length, m.pairs) for m, _ in TESTING][-2:] == [(512, 128), (1024, 256)]
    assert {n for _, n in TESTING} == {1000}
    assert Mqar(64, 4).vocabulary == 8192


@pytest.mark.parametrize("wrong", [{"length": 65}, {"length": 14}, {"pairs": 0}, {"vocabulary": 64}, {"power": 0.0}])
def test_impossible_sequences_are_refused(wrong):
    with pytest.raises(BadArgument, match=r"length=|vocabulary=|power="):
        Mqar(**{"length": 64, "pairs": 4, **wrong})
    assert association.UNLABELLED == -100


# -- regression --------------------------------------------------------------------------------------------------------


def test_least_squares_knows_the_function_after_as_many_points_as_dimensions(seed):
    made = Regression(width=6, points=14).generate(60, seed)
    error = error_by_examples(least_squares(made), made)
    assert error[0] == pytest.approx(float(made.y[:, 0].square().mean()) / 6)
    assert (error[6:] < 1e-12).all()
    assert (error[1:5] > 1e-3).all()
    row = random.Random(seed).randrange(60)
    w = torch.linalg.lstsq(made.x[row, :9], made.y[row, :9].unsqueeze(1)).solution
    torch.testing.assert_close(least_squares(made)[row, 9], (made.x[row, 9] @ w).squeeze())


def test_predicting_nothing_is_chance_and_baselines_are_between(seed):
    made = Regression().generate(400, seed)
    blind = error_by_examples(torch.zeros_like(made.y), made)
    assert made.x.shape == (400, 40, 20)
    assert abs(float(blind.mean()) - 1) < 0.2
    last = {
        f.__name__: float(error_by_examples(f(made), made)[-8:].mean()) for f in (averaging, nearest, least_squares)
    }
    assert last["least_squares"] < 1e-10 < last["averaging"] < float(blind.mean())
    assert last["nearest"] < 1.2
    ridged = error_by_examples(least_squares(made, ridge=1e-9), made)
    torch.testing.assert_close(ridged[-1], error_by_examples(least_squares(made), made)[-1], atol=1e-8, rtol=0)


def test_slow_baselines_agree(seed):
    made = Regression(width=3, points=6).generate(4, seed)
    for row, seen in itertools.product(range(4), range(1, 6)):
        x, y, now = made.x[row, :seen], made.y[row, :seen], made.x[row, seen]
        w = (x * y.unsqueeze(1)).mean(0)
        torch.testing.assert_close(averaging(made)[row, seen], w @ now)
        closest = sorted(range(seen), key=lambda i: float((x[i] - now).square().sum()))[:3]
        torch.testing.assert_close(nearest(made)[row, seen], y[closest].mean())


@pytest.mark.parametrize("kind", ["linear", "sparse", "quadratic"])
def test_points_lie_on_the_function_of_the_kind(kind, seed):
    made = Regression(width=8, points=30, kind=kind).generate(5, seed)
    features = made.x.square() if kind == "quadratic" else made.x
    w = torch.linalg.lstsq(features, made.y.unsqueeze(-1)).solution.squeeze(-1)
    torch.testing.assert_close((features @ w.unsqueeze(-1)).squeeze(-1), made.y)
    assert [int((row.abs() > 1e-9).sum()) for row in w] == [3 if kind == "sparse" else 8] * 5
    sequence = made.sequence()
    assert torch.equal(sequence[:, 0::2], made.x)
    assert torch.equal(sequence[:, 1::2, 0], made.y)
    assert not sequence[:, 1::2, 1:].any()


def test_noise_has_its_size_and_wrong_sizes_are_refused(seed):
    clean = Regression(4, 50).generate(100, seed)
    noisy = Regression(4, 50, noise=0.5).generate(100, seed)
    assert torch.equal(clean.x, noisy.x)
    assert float((noisy.y - clean.y).std()) == pytest.approx(0.5, rel=0.1)
    for wrong in ({"points": 0}, {"width": 0}, {"width": 2, "kind": "sparse"}):
        with pytest.raises(BadArgument, match="give at least"):
            regression.Regression(**wrong)


# -- states ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GROUPS)
def test_tables_are_groups(name, seed):
    table = group(name).table
    size = GROUPS[name]
    assert table.shape == (size, size) and group(name).size == size
    everything = torch.arange(size)
    assert torch.equal(table[0], everything) and torch.equal(table[:, 0], everything), "0 is neutral"
    assert all(torch.equal(row.sort().values, everything) for row in (*table, *table.T)), "a Latin square"
    left = table[table][:, :, :]  # (a b) c
    right = table[:, table]  # a (b c)
    assert torch.equal(left, right), "associative"
    commutes = torch.equal(table, table.T)
    assert commutes == (name in ("parity", "Z60"))


@pytest.mark.parametrize("name", GROUPS)
def test_targets_are_the_products_so_far_and_only_a_full_state_tracks_them(name, seed):
    words = word_problem(name, 24, 60, seed)
    table = group(name).table.tolist()
    answers = []
    for row in words.inputs.tolist():
        state, said = 0, []
        for token in row:
            state = table[state][token]
            said.append(state)
        answers.append(said)
    found = tracked(torch.tensor(answers), words)
    assert found.sequence == 1.0 and bool((found.position == 1.0).all())
    guesses = torch.randint(GROUPS[name], words.inputs.shape)
    blind = tracked(guesses, words)
    chance = 1 / GROUPS[name]
    assert abs(float(blind.position.mean()) - chance) < 5 * (chance * (1 - chance) / words.inputs.numel()) ** 0.5
    assert blind.sequence < 0.1
    assert chance <= blind.majority < 3 * chance
    assert torch.equal(words.inputs, word_problem(name, 24, 60, seed).inputs)
    assert not words.reads.any()


def test_parity_is_the_number_of_ones(seed):
    words = word_problem("parity", 40, 50, seed)
    assert torch.equal(words.targets, words.inputs.cumsum(1) % 2)


def test_permutations_are_put_one_behind_the_other():
    s3 = list(itertools.permutations(range(3)))
    swap, turn = s3.index((1, 0, 2)), s3.index((1, 2, 0))
    first_swap_then_turn = s3[int(group("S3").table[swap, turn])]
    assert first_swap_then_turn == tuple((1, 2, 0)[(1, 0, 2)[point]] for point in range(3))


def test_flip_flops_read_what_was_written_last(seed):
    for ignore in (0.0, 0.8, 1.0):
        words = flip_flop(40, 240, seed, ignore)
        answers = torch.zeros_like(words.inputs)
        for row, tokens in enumerate(words.inputs.tolist()):
            assert tokens[0] == WRITE and tokens[-2] == READ
            bit, written = 0, 0
            for place in range(0, 40, 2):
                order, after = tokens[place : place + 2]
                assert order in (WRITE, IGNORE, READ) and after in (3, 4)
                if order == WRITE:
                    bit, written = after, place
                if order == READ:
                    assert after == bit
                    assert words.reads[row, place] == written
                    answers[row, place] = bit
                assert (words.targets[row, place] != -100) == (order == READ)
        assert tracked(answers, words).sequence == 1.0
        assert 0.3 < tracked(torch.full_like(answers, 3), words).position[-2] < 0.7
    assert bool((flip_flop(40, 9, seed, 1.0).inputs[:, 2:-2:2] == IGNORE).all())


def test_wrong_states_are_refused():
    with pytest.raises(BadArgument, match="group='S4': use one of parity, Z60"):
        groups.group("S4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(BadArgument, match="length=0"):
        word_problem("S3", 0, 1, 0)
    with pytest.raises(BadArgument, match="length=5"):
        flip_flop(5, 1, 0)
    with pytest.raises(BadArgument, match="ignore=2"):
        flip_flop(6, 1, 0, ignore=2)
