import math

import pytest

from evaluation.ranks import spearman_within


def test_what_knows_the_masks_alone_foretells_no_choice():
    masks = ["easy", "hard"] * 4
    found = [1.0, 11.0, 2.0, 12.0, 3.0, 13.0, 4.0, 14.0]
    assert spearman_within([0.0, 1.0] * 4, found, masks) != spearman_within(found, found, masks)
    assert math.isnan(spearman_within([0.0, 1.0] * 4, found, masks))
    noisy = [0.1, 1.2, 0.2, 1.1, 0.4, 1.4, 0.3, 1.3]  # within a mask 0.8 and 0.6 by hand
    assert spearman_within(noisy, found, masks) == pytest.approx((0.8 + 0.6) / 2)


def test_masks_with_too_few_samples_do_not_count():
    assert spearman_within([1, 2, 3, 9, 8], [1, 3, 2, 1, 2], list("aaabb")) == pytest.approx(0.5)
    assert math.isnan(spearman_within([1, 2], [1, 2], "ab"))
