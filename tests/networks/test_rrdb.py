import torch

from networks.rrdb import RRDBNet
from original import draw, fixture, normal


def test_it_answers_as_the_authors_code():
    told = fixture("rrdb")
    network = RRDBNet(3, 6, width=8, blocks=2)
    network.load_state_dict({name: draw(name, shape) for name, shape in told["shapes"].items()})
    with torch.no_grad():
        output = network(normal("picture", (2, 3, 8, 6)))
    assert torch.allclose(output.flatten(), torch.tensor(told["output"]), atol=1e-5)
