"""The head under `torch.compile`: whole graphs, and how many of them there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_head import SIZE, make_features, make_head, make_targets
from test_predict import OLD_TORCH, OPTIONS, SIZES
from torch._dynamo.testing import CompileCounter

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")


@pytest.fixture
def fresh_compiler():
    """Limits of recompilation count what other tests compiled of the same code."""
    torch.compiler.reset()


@pytest.mark.slow
def test_training_compiles_whole():
    """Labels are not read there either."""
    head, features, targets = make_head(), make_features(2), make_targets([3, 0])

    def loss(features, targets):
        return head.loss(features, targets, [SIZE, SIZE])

    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(features, targets)
    torch.testing.assert_close(got, loss(features, targets))


@pytest.mark.slow
def test_prediction_compiles_whole():
    head, features = make_head(**OPTIONS), make_features(3)

    def predict(features):
        return head.predict(features, SIZES, padded=True)

    got, wanted = torch.compile(predict, fullgraph=True, backend="aot_eager")(features), predict(features)
    # torch 2.9 says that it exports, so candidates are sorted although all take part, and summed in another order.
    torch.testing.assert_close(got.pop("boxes"), wanted["boxes"], rtol=0, atol=1e-5 if OLD_TORCH else 0)
    assert all(torch.equal(rows, wanted[name]) for name, rows in got.items())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3,), (3, 2)], ids=str)
def test_factors_in_a_tensor_make_one_graph(shape):
    """Python's floats are constants of a graph, so each makes another."""
    head, features, counter = make_head(**OPTIONS, score_voting=False), make_features(3), CompileCounter()
    predict = torch.compile(head.predict, fullgraph=True, backend=counter)
    for i in range(12):
        factors = torch.full(shape, 1 + i / 10)
        assert torch.equal(
            predict(features, SIZES, factors, padded=True)["count"], head.predict(features, SIZES, factors, padded=True)["count"]
        )
    assert counter.frame_count == 1


@pytest.mark.slow
def test_a_compiled_forward_makes_one_graph_whatever_the_boxes():
    """`loss` and `predict` call it. A graph of the loss would be another for each image with 0, 1 or several boxes."""
    head, features, counter = make_head(), make_features(2), CompileCounter()
    batches = [make_targets(list(numbers)) for numbers in itertools.product(range(4), repeat=2)]
    wanted = [head.loss(features, targets) for targets in batches]
    head.compile(fullgraph=True, backend=counter)
    for targets, losses in zip(batches, wanted, strict=True):
        torch.testing.assert_close(head.loss(features, targets), losses)
    assert counter.frame_count == 1
    with torch.no_grad():
        head.predict(features, [SIZE, SIZE])
    assert counter.frame_count == 2  # without gradients


@pytest.mark.slow
def test_a_graph_of_the_loss_for_no_box_for_one_and_for_several():
    """For each image: so they soon reach torch's limit."""
    head, features, counter = make_head(), make_features(1), CompileCounter()
    loss = torch.compile(head.loss, fullgraph=True, backend=counter)
    for number in range(5):
        loss(features, make_targets([number]))
    assert counter.frame_count == 3
