import torch

from networks.hed import HED
from original import draw, fixture, normal


def test_it_answers_as_the_annotator_of_diffboost():
    """A 17th of its values; weights of the mixture are small, so that it is not all black and white."""
    network = HED()
    weights = {name: draw(name, list(value.shape)) for name, value in network.state_dict().items()}
    weights["moduleCombine.0.weight"] *= 0.003
    network.load_state_dict(weights)
    with torch.no_grad():
        edges = network(normal("image", (2, 3, 20, 36)).clamp(-1, 1))
    assert edges.shape == (2, 1, 20, 36)
    assert torch.allclose(edges.flatten()[::17], torch.tensor(fixture("hed")["output"]), atol=1e-5)
    with torch.no_grad():
        grey = torch.rand(1, 1, 16, 16)
        assert torch.equal(network(grey), network(grey.expand(-1, 3, -1, -1)))
