import numpy as np
import torch
from scipy.signal import convolve2d

from diffusion.hints import Sobel, coloured, contour, grey_levels


def test_every_class_has_its_colour():
    mask = torch.tensor([[[0, 1], [2, 1]]])
    picture = coloured(mask, [[0, 0, 0], [1, 0.5, 0], [0, 0, 1]])
    assert picture.shape == (1, 3, 2, 2)
    assert picture[0, :, 0, 1].tolist() == [1, 0.5, 0]
    assert picture[0, :, 1, 0].tolist() == [0, 0, 1]
    assert grey_levels(2) == [[0, 0, 0], [1, 1, 1]]
    assert grey_levels(3)[1] == [0.5, 0.5, 0.5]


def test_contours_are_those_of_diffboost():
    """Their arithmetic: a complex Scharr kernel, symmetric borders, cut off at 1."""
    rng = np.random.default_rng(0)
    mask = np.kron(rng.integers(0, 3, (5, 6)), np.ones((4, 4), dtype=int))
    kernel = np.array([[-3 - 3j, 0 - 10j, 3 - 3j], [-10 + 0j, 0, 10 + 0j], [-3 + 3j, 0 + 10j, 3 + 3j]])
    expected = np.clip(np.abs(convolve2d(mask, kernel, boundary="symm", mode="same")), 0, 1)
    assert torch.equal(contour(torch.from_numpy(mask)[None])[0, 0], torch.from_numpy(expected).float())


def test_edges_lie_where_an_image_changes():
    image = torch.zeros(2, 3, 8, 8)
    image[0, :, :, 4:] = 0.3
    edges = Sobel()(image)
    assert edges.shape == (2, 1, 8, 8)
    assert torch.allclose(edges[0, 0], torch.tensor([0, 0, 0, 1.0, 1.0, 0, 0, 0]).expand(8, 8))
    assert not edges[1].any()
